"""One stream on several machines: whoever fills the places, the bytes are the same; with Ray itself in slow tests."""

import json
import os
import pickle
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from models import tiny

from auto_round import AutoRound, spread
from auto_round.core.errors import OutputError, PlanError
from auto_round.jobs import cluster
from auto_round.jobs.stream import Unit
from auto_round.spread import by_file, fill

SMALL = {"group_size": 32, "model_free": True, "max_shard_size": "60KB"}


@pytest.fixture(scope="module", params=["llama", "qwen3-moe"])
def model(request, tmp_path_factory):
    """The folder of a tiny model."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny(request.param, folder, dtype=torch.bfloat16)
    return folder


def run(model, out, **options):
    """Quantize `model` into `out`; name -> bytes of every file."""
    AutoRound(model, **{**SMALL, **options}).quantize_and_save(out)
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def elsewhere(function, order, items, *, address):
    """What a cluster does, in this process: everything goes there and comes back as bytes, last item first."""
    spread._prepared.cache_clear()
    for item in reversed(list(items)):
        yield pickle.loads(pickle.dumps(function(order, pickle.loads(pickle.dumps(item)))))


@pytest.mark.parametrize("options", [{}, {"sym": False}, {"format": "fake", "enable_opt_rtn": True}], ids=str)
def test_other_processes_write_the_same_bytes(options, model, tmp_path, monkeypatch):
    expected = run(model, tmp_path / "one", **options)
    monkeypatch.setattr(spread, "in_cluster", elsewhere)
    assert run(model, tmp_path / "many", distributed="auto", **options) == expected


def test_a_killed_driver_goes_on_with_the_files_that_were_done(model, tmp_path, monkeypatch):
    expected = run(model, tmp_path / "one")
    done = []

    def dies(function, order, items, *, address):
        for result in elsewhere(function, order, items, address=address):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(result[0].sums.keys())
            yield result

    monkeypatch.setattr(spread, "in_cluster", dies)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", distributed="auto")
    assert not (tmp_path / "out" / "config.json").exists()
    again = []

    def counts(function, order, items, *, address):
        for written, results in elsewhere(function, order, items, address=address):
            again.extend(written.sums)
            yield written, results

    monkeypatch.setattr(spread, "in_cluster", counts)
    assert run(model, tmp_path / "out", distributed="auto", resume=True) == expected
    assert again and not set(again) & {layer for layers in done for layer in layers}


class Files:
    """A writer that only knows its files."""

    def __init__(self, files, copied):
        every = {**files, **{name: {file} for name, file in copied.items()}}
        self.files_of, self.to_copy = every.get, lambda: list(copied)


def test_no_file_is_in_two_shares_and_nothing_is_left_out():
    files = {"a": {"1"}, "b": {"2"}, "c": {"3"}, "d": {"2", "3"}, "e": {"1"}, "f": {"4"}}
    work = [Unit("block", (name,)) for name in files]
    copied = {"norm": "3", "embedding": "5"}
    shares = by_file(work, Files(files, copied))
    seen = [
        {file for unit in share.units for file in files[unit.layers[0]]}
        | {copied[name] for name in share.copied}
        for share in shares
    ]
    assert sorted(map(sorted, seen)) == [["1"], ["2", "3"], ["4"], ["5"]]
    assert sorted(unit.layers[0] for share in shares for unit in share.units) == sorted(files)
    assert sorted(name for share in shares for name in share.copied) == sorted(copied)


def test_what_cannot_be_spread_is_refused_with_what_to_do(model, tmp_path):
    with pytest.raises(PlanError, match=r"only streams.*model_free"):
        run(model, tmp_path / "a", distributed="auto", model_free=False, iters=0, nsamples=0, dataset=None,
            disable_model_free=True, disable_opt_rtn=True)  # fmt: skip
    with pytest.raises(PlanError, match=r"one --format"):
        run(model, tmp_path / "b", distributed="auto", format="auto_round,fake")
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_another_version_elsewhere_is_named(model, tmp_path, monkeypatch):
    def newer(function, order, items, *, address):
        spread._prepared.cache_clear()
        monkeypatch.setattr(spread, "__version__", "99.9")
        yield function(order, next(iter(items)))

    monkeypatch.setattr(spread, "in_cluster", newer)
    with pytest.raises(PlanError, match=r"this machine has auto-round 99\.9"):
        run(model, tmp_path / "out", distributed="auto")


def test_an_output_folder_that_a_machine_does_not_see_is_named(model, tmp_path, monkeypatch):
    def blind(function, order, items, *, address):
        (tmp_path / "out").rename(tmp_path / "moved")
        try:
            yield from elsewhere(function, order, items, address=address)
        finally:
            (tmp_path / "moved").rename(tmp_path / "out")

    monkeypatch.setattr(spread, "in_cluster", blind)
    with pytest.raises(OutputError, match=r"is not there on .*all of them see"):
        run(model, tmp_path / "out", distributed="auto")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(PlanError, match=r"auto-round\[ray\]"):
        list(cluster.in_cluster(fill, b"", [], address="auto"))


@pytest.fixture(scope="module")
def nodes():
    """A Ray cluster to which nodes of one core are added."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    # Ray's processes give way to all others by default, and may wait for minutes on a machine that is busy.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield SimpleNamespace(address=found.address, add=lambda: found.add_node(num_cpus=1))
    found.shutdown()


def dies_once(order, share):
    """`fill`, in a process that is killed halfway through the first share."""
    mark = pickle.loads(order).folder / "died"
    if not mark.exists():
        mark.touch()
        spread.run_unit = lambda *_: os._exit(1)
    return fill(order, share)


@pytest.mark.slow
def test_a_ray_cluster_of_one_two_or_three_nodes_writes_the_same_bytes(nodes, model, tmp_path, monkeypatch):
    expected = run(model, tmp_path / "one")
    for count in (1, 2, 3):
        out, begin = tmp_path / str(count), time.perf_counter()
        assert run(model, out, distributed=nodes.address) == expected
        print(json.dumps({"nodes": count, "seconds": time.perf_counter() - begin}))
        if count < 3:
            nodes.add()


@pytest.mark.slow
def test_a_killed_process_of_the_cluster_changes_no_byte(nodes, model, tmp_path, monkeypatch):
    # The processes of the cluster cannot import a file of tests.
    __import__("ray").cloudpickle.register_pickle_by_value(sys.modules[__name__])
    expected = run(model, tmp_path / "one")
    monkeypatch.setattr(spread, "fill", dies_once)
    written = run(model, tmp_path / "out", distributed=nodes.address)
    assert written.pop("died") == b"" and written == expected
