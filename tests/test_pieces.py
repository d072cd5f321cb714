"""Small parts that others stand on: plans, shards, threads, journals' comparisons, folders, calls of blocks."""

import itertools
import json
import threading
import time
from dataclasses import FrozenInstanceError

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from auto_round.core.errors import ModelError, PlanError
from auto_round.core.plan import Plan
from auto_round.core.registry import discover
from auto_round.core.scheme import FLOAT, Scheme, TensorSpec
from auto_round.jobs import folders
from auto_round.jobs.manifest import differences
from auto_round.jobs.workers import in_threads
from auto_round.models.capture import leaves, rebuilt
from auto_round.models.checkpoint import INDEX, TensorInfo, names_match, natural
from auto_round.models.shards import COLUMNS, ShardWriter, checksum, plan_shards, raw_bytes
from auto_round.sources.activations import Limits
from auto_round.sources.dataset_items import alternating

FOUR, EIGHT = Scheme(weight=TensorSpec(bits=4)), Scheme(weight=TensorSpec(bits=8))
NAMES = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("q_proj", "k_proj", "o_proj")]
FUSED = [frozenset(NAMES[:2]), frozenset(NAMES[3:5])]


@pytest.fixture
def plan():
    """Six layers of four bits, two pairs of them fused."""
    return Plan(dict.fromkeys(NAMES, FOUR), shapes=dict.fromkeys(NAMES, (8, 8)), base=FOUR, fused=FUSED)


def test_an_override_is_a_new_plan_with_the_reason(plan):
    changed = plan.override({NAMES[0]: EIGHT, NAMES[5]: None}, "because")
    assert list(changed) == NAMES
    assert changed[NAMES[0]] == EIGHT and changed[NAMES[5]] == FLOAT
    assert changed.why == {NAMES[0]: "because", NAMES[5]: "because"} and not plan.why
    assert changed.quantized() == NAMES[:5] and plan.quantized() == NAMES


def test_the_last_reason_of_a_layer_counts(plan):
    twice = plan.override({NAMES[0]: EIGHT}, "first").override({NAMES[0]: None}, "second")
    assert twice.why[NAMES[0]] == "second"


def test_a_layer_outside_the_plan_cannot_be_changed(plan):
    with pytest.raises(PlanError, match="'lm_head' is not in the plan"):
        plan.override({"lm_head": EIGHT}, "because")


def test_whoever_made_a_plan_cannot_change_it_afterwards():
    schemes = {"a": FOUR}
    plan = Plan(schemes, shapes={"a": (8, 8), "b": (8, 8)}, base=FOUR)
    schemes["a"] = schemes["b"] = EIGHT
    assert dict(plan) == {"a": FOUR} and dict(plan.shapes) == {"a": (8, 8)}
    with pytest.raises(TypeError):
        plan.why["a"] = "because"
    with pytest.raises(FrozenInstanceError):
        plan["a"].weight.bits = 3


def test_fused_sets_are_mixed_when_one_member_differs(plan):
    assert plan.mixed_fused_sets() == []
    assert plan.override({NAMES[2]: EIGHT}, "x").mixed_fused_sets() == []  # in no set
    assert plan.override({NAMES[1]: None}, "x").mixed_fused_sets() == [(NAMES[0], NAMES[1])]
    assert plan.override(dict.fromkeys(NAMES[:2], EIGHT), "x").mixed_fused_sets() == []


def test_a_part_of_a_plan_has_its_layers_and_no_others(plan):
    part = plan.noted("a remark").only([NAMES[4], NAMES[3]], FUSED[1:])
    assert list(part) == [NAMES[4], NAMES[3]] and part.fused == (FUSED[1],) and part.base == FOUR


def test_remarks_add_up(plan):
    assert plan.noted("one").noted("two", "three").notes == ("one", "two", "three")


def test_two_entries_of_one_name_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "twins").mkdir()
    (tmp_path / "twins" / "__init__.py").write_text("")
    entry = "class E:\n    name = 'same'\n\nENTRIES = (E(),)\n"
    for module in ("a", "b"):
        (tmp_path / "twins" / f"{module}.py").write_text(entry)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="twins: two entries are named 'same'"):
        discover("twins")


# Shards


def infos():
    """Tensors of several dtypes, layers and sizes."""
    made = {f"layers.{i}.{part}": (8, 16 + i) for i in (0, 1, 2, 10) for part in ("weight", "bias")}
    dtypes = (torch.float32, torch.float16, torch.uint8, torch.bfloat16)
    return {name: TensorInfo(dtypes[i % 4], shape) for i, (name, shape) in enumerate(made.items())}


def filled(every):
    """Random bytes of the shapes and dtypes of `every`."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(0, 200, (info.nbytes,), dtype=torch.uint8, generator=generator)
        .view(info.dtype)
        .reshape(info.shape)
        for name, info in every.items()
    }


@pytest.mark.parametrize("limit", [1, 700, 1500, 10**9])
def test_every_tensor_is_in_one_shard_and_layers_stay_together(limit):
    every = infos()
    shards = plan_shards(every, limit)
    placed = [name for shard in shards for name in shard.offsets]
    assert sorted(placed) == sorted(every)
    home = {name: shard.file for shard in shards for name in shard.offsets}
    assert all(home[name] == home[f"{name.rpartition('.')[0]}.weight"] for name in every)
    assert len(shards) == 1 or shards[0].file == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        layers = {name.rpartition(".")[0] for name in shard.offsets}
        assert len(layers) == 1 or sum(every[name].nbytes for name in shard.offsets) <= limit


@pytest.mark.parametrize("limit", [700, 10**9])
def test_every_tensor_is_aligned_to_its_elements(limit):
    every = infos()
    for shard in plan_shards(every, limit):
        assert len(shard.header) % 8 == 0
        ends = {shard.offsets[name] + every[name].nbytes for name in shard.offsets}
        assert all(shard.offsets[name] % every[name].dtype.itemsize == 0 for name in shard.offsets)
        assert {*shard.offsets.values(), shard.size} - ends == {len(shard.header)}  # no gap anywhere


def test_planned_sizes_are_those_of_the_files_that_the_library_reads(tmp_path):
    every = infos()
    tensors = filled(every)
    with ShardWriter(tmp_path, every, 1500) as writer:
        for name in reversed(list(tensors)):
            writer.put(name, tensors[name])
    files = sorted(tmp_path.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) == writer.nbytes
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert all(raw_bytes(found[name]) == raw_bytes(tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in every.values())
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    with safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_that_was_not_planned_so_is_refused(tmp_path):
    every = {"a.weight": TensorInfo(torch.float16, (2, 2))}
    words = r"a.weight: planned torch.float16 \(2, 2\), got torch.float32"
    with pytest.raises(ValueError, match=words), ShardWriter(tmp_path, every, 10**6) as writer:
        writer.put("a.weight", torch.zeros(2, 2))


def test_a_checkpoint_with_a_hole_is_not_finished(tmp_path):
    every = {name: TensorInfo(torch.uint8, (4,)) for name in ("a", "b")}
    words = "1 planned tensors were never written, first b"
    with pytest.raises(ValueError, match=words), ShardWriter(tmp_path, every, 10**6) as writer:
        writer.put("a", torch.zeros(4, dtype=torch.uint8))


def test_what_an_earlier_run_wrote_stays_and_counts(tmp_path):
    every = {name: TensorInfo(torch.uint8, (4,)) for name in ("a", "b")}
    with pytest.raises(KeyError), ShardWriter(tmp_path, every, 10**6) as writer:
        writer.put("a", torch.full((4,), 7, dtype=torch.uint8))
        raise KeyError("killed")
    with ShardWriter(tmp_path, every, 10**6) as writer:
        writer.written(["a"])
        writer.put("b", torch.full((4,), 9, dtype=torch.uint8))
    found = load_file(tmp_path / "model.safetensors")
    assert found["a"].tolist() == [7] * 4 and found["b"].tolist() == [9] * 4


@pytest.mark.parametrize("count", [1, 7, 8, 8 * COLUMNS - 1, 8 * COLUMNS, 8 * COLUMNS + 3])
def test_any_damaged_byte_changes_the_checksum(count):
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = checksum(data)
    assert checksum(data.clone()) == whole
    for at in {0, count // 2, count - 1}:
        damaged = data.clone()
        damaged[at] ^= 1
        assert checksum(damaged) != whole


def test_a_checksum_does_not_depend_on_where_the_bytes_lie():
    data = torch.arange(1009, dtype=torch.int64).to(torch.uint8)
    assert checksum(data[4:]) == checksum(data[4:].clone())


def test_rows_that_change_places_change_the_checksum():
    rows = torch.arange(3 * COLUMNS).reshape(3, COLUMNS)
    assert len({checksum(rows[list(order)]) for order in itertools.permutations(range(3))}) == 6


def test_raw_bytes_are_those_of_the_rows():
    w = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    assert bytes(raw_bytes(w)) == b"".join(i.to_bytes(2, "little") for i in range(6))
    assert bytes(raw_bytes(w.t())) == bytes(raw_bytes(w.t().contiguous()))
    assert len(raw_bytes(torch.empty(0, 5))) == 0


def test_natural_order_counts_and_compares_words_with_numbers():
    names = ["layers.10.w", "layers.2.w", "head", "layers.2.b", "2", "layers.x"]
    expected = ["2", "head", "layers.2.b", "layers.2.w", "layers.10.w", "layers.x"]
    assert sorted(names, key=natural) == expected


def test_a_checkpoint_may_have_or_lack_the_prefix_of_the_base_model():
    info = TensorInfo(torch.float32, (1,))
    for stored in ("model.a.weight", "a.weight"):
        for wanted in ("model.a.weight", "a.weight"):
            assert names_match([wanted], {stored: info}, "model") == {wanted: stored}
    assert names_match(["a.weight", "b.weight"], {"a.weight": info}, "model") is None
    assert names_match(["a"], {"A": info}, "model", str.upper) == {"a": "A"}


# Threads


def test_threads_take_every_item_once_and_no_more_than_the_workers_run():
    running, most, lock = 0, 0, threading.Lock()

    def work(item):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1
        return item

    assert sorted(in_threads(work, range(20), workers=3)) == list(range(20))
    assert 1 < most <= 3


@pytest.mark.parametrize(("sizes", "room"), [([5, 5, 1, 1, 9, 0, 1, 3], 6), ([7, 7, 7], 2), ([1] * 9, 3)])
def test_what_is_under_way_is_no_larger_than_the_room_or_alone(sizes, room):
    lock, running = threading.Lock(), []

    def work(item):
        with lock:
            running.append(sizes[item])
            large = [size for size in running if size]
            assert sum(large) <= room or len(large) == 1
        time.sleep(0.002)
        with lock:
            running.remove(sizes[item])
        return item

    found = in_threads(work, range(len(sizes)), workers=3, size=sizes.__getitem__, room=room)
    assert sorted(found) == list(range(len(sizes)))


def test_the_first_error_stops_the_taking_of_items():
    taken = []

    def items():
        for item in range(1000):
            taken.append(item)
            yield item

    def work(item):
        if item == 2:
            raise ModelError("broken")
        return item

    with pytest.raises(ModelError, match="broken"):
        list(in_threads(work, items(), workers=2))
    assert len(taken) < 50


def test_workers_compute_with_one_thread_each_and_give_the_number_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert set(in_threads(lambda _: torch.get_num_threads(), range(6), workers=2)) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Manifests, folders, values within values


def test_changes_are_told_by_their_path_and_counted():
    before = {"recipe": {"iters": 5, "lr": 1}, "plan": {"q": {"bits": 4}}, "old": 1}
    now = {"recipe": {"iters": 6, "lr": 1}, "plan": {"q": {"bits": 4}}, "new": 2}
    assert differences(before, before) == []
    assert differences(before, now) == [
        "recipe iters was 5, is 6",
        "old was 1, is absent",
        "new was absent, is 2",
    ]
    many = differences({str(i): i for i in range(9)}, {})
    assert len(many) == 4 and many[-1] == "and 6 more settings differ"


def test_only_folders_that_were_made_are_removed_and_only_while_empty(tmp_path):
    made = folders.missing(tmp_path / "a" / "b" / "c")
    assert made == [tmp_path / "a" / "b" / "c", tmp_path / "a" / "b", tmp_path / "a"]
    made[0].mkdir(parents=True)
    (tmp_path / "a" / "kept").write_text("")
    folders.remove_empty(made)
    assert not (tmp_path / "a" / "b").exists() and (tmp_path / "a" / "kept").exists()


def test_nested_values_are_taken_apart_and_put_together():
    value = ([torch.ones(1), {"x": torch.zeros(2)}], None, "word", (torch.arange(3),))
    parts = leaves(value)
    assert [len(part) for part in parts] == [1, 2, 3]
    again = rebuilt(value, iter([part + 1 for part in parts]))
    assert again[1:3] == (None, "word") and torch.equal(again[3][0], torch.arange(3) + 1)
    assert isinstance(again[0], list) and torch.equal(again[0][1]["x"], torch.ones(2))


def test_sources_take_turns_until_all_are_used_up():
    assert list(alternating([[1, 2, 3], [], [None, 5]])) == [1, None, 2, 5, 3]


def test_limits_hold_as_much_as_they_say_on_either_side():
    limits = Limits()
    assert limits.within(100) is None
    limits.add(torch.empty(0))  # an expert without a token
    assert limits.within(99) is None
    for part in torch.linspace(-10, 30, 4000).chunk(4):
        limits.add(part)
    assert [float(x) for x in limits.within(100)] == [-10, 30]
    low, high = (float(x) for x in limits.within(90))
    assert low == pytest.approx(-8, abs=0.1) and high == pytest.approx(28, abs=0.1)
