"""A run that is killed anywhere goes on from its finished blocks and writes the bytes of one that was not."""

import json
import logging
import os
import resource
import shutil
import signal
import sys

import pytest
import torch
from models import samples, tiny

from auto_round import AutoRound
from auto_round.core.errors import AutoRoundError, OutputError, PlanError
from auto_round.jobs.folders import claimed
from auto_round.jobs.journal import JOURNAL, Journal

TUNED = {"iters": 2, "nsamples": 4, "seqlen": 16, "batch_size": 2, "group_size": 32, "disable_opt_rtn": True}
RTN = {"iters": 0, "disable_opt_rtn": True, "group_size": 32}
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile"}
KILLED = 9


class Watch:
    """An observer that remembers the results, and raises `error` after the block `at`."""

    def __init__(self, error=None, at=-1):
        self.error, self.at, self.results = error, at, []

    def started(self, plan, blocks):
        pass

    def finished(self, result):
        self.results.append(result)
        if len(self.results) == self.at + 1:
            raise self.error


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama folder of three blocks."""
    folder = tmp_path_factory.mktemp("journal") / "model"
    tiny("llama", folder, dtype=torch.bfloat16, num_hidden_layers=3)
    return folder


def run(model, out, watch=None, fmt="auto_round", **options):
    """Quantize `model` into `out`."""
    options = {**TUNED, "dataset": samples(4, 16), **options}
    made = AutoRound(model, **options)
    made.observers += [watch] if watch else []
    made.quantize_and_save(out, format=fmt)
    return made


def bytes_of(folder):
    """Path below `folder` -> contents, for all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def in_child(call):
    """`call()` in a forked process; its exit code."""
    child = os.fork()
    if child == 0:
        try:
            call()
        except AutoRoundError as error:
            print(error, file=sys.stderr)
            os._exit(1)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(nth, out, call):
    """`call()` in a process that ends at once before its `nth` change or opening of a file below `out`."""

    def hooked():
        seen = [0]

        def watch(event, args):
            if event in EVENTS and (str(out) in str(args[0]) or event in ("os.remove", "os.rmdir")):
                seen[0] += 1
                if seen[0] == nth:
                    os._exit(KILLED)

        sys.addaudithook(watch)
        call()
        os._exit(100 + min(100, seen[0] // 2))  # how many there are, for `count_events`

    return in_child(hooked)


def count_events(out, call):
    """About how many openings and changes of files `call()` makes."""
    return 2 * (killed_at(-1, out, call) - 100)


def test_a_run_killed_at_any_file_operation_resumes_to_the_same_bytes(model, tmp_path):
    both = {"fmt": "auto_round,fake", "max_shard_size": "60KB"}
    run(model, tmp_path / "whole", **both)
    expected = bytes_of(tmp_path / "whole")
    out = tmp_path / "out"
    events = count_events(out, lambda: run(model, out, **both))
    assert bytes_of(out) == expected and events > 60
    for nth in range(3, events, max(1, events // 8)):
        shutil.rmtree(out)
        assert killed_at(nth, out, lambda: run(model, out, **both)) == KILLED, nth
        watch = Watch()
        run(model, out, watch, resume=True, **both)
        assert bytes_of(out) == expected, f"killed at file operation {nth}"
        assert len(watch.results) == 3


def exit_before_rename(to):
    """What makes this process end at once instead of renaming a file or folder to a name that holds `to`."""
    rename = os.replace

    def replaced(source, target):
        if to in str(target):
            os._exit(KILLED)
        rename(source, target)

    return lambda: setattr(os, "replace", replaced)


def exit_in_last_shard():
    """Makes this process end at once when half of a tensor of the last layer is written into its shard."""
    from auto_round.models import shards

    put, write = shards.ShardWriter.put, shards.write_at

    def half(file, data, offset):
        write(file, data[: len(data) // 2], offset)
        os._exit(KILLED)

    def stopped(self, name, tensor):
        if name == "model.layers.2.mlp.down_proj.qweight":
            shards.write_at = half
        put(self, name, tensor)

    shards.ShardWriter.put = stopped


MOMENTS = {
    "a-block-written-not-renamed": (exit_before_rename("model.layers.1"), 1),
    "the-manifest-written-not-renamed": (exit_before_rename("manifest"), 0),
    "a-shard-written-not-renamed": (exit_before_rename("model-00002"), 3),
    "the-configuration-written-not-renamed": (exit_before_rename(os.path.join("out", "config.json")), 3),
    "in-the-packing-of-the-last-shard": (exit_in_last_shard, 2),
}
"""What makes a run end, and the blocks that the journal has then."""


@pytest.mark.parametrize(("prepare", "finished"), MOMENTS.values(), ids=MOMENTS)
def test_a_run_killed_at_the_worst_moments_resumes_to_the_same_bytes(prepare, finished, model, tmp_path):
    several = {"max_shard_size": "60KB"}
    run(model, tmp_path / "whole", **several)
    out = tmp_path / "out"
    assert in_child(lambda: (prepare(), run(model, out, **several))) == KILLED
    kept = [path.parent.name for path in (out / JOURNAL).glob("*/block.json")]
    assert len([name for name in kept if name.startswith("model.layers")]) == finished
    run(model, out, resume=True, **several)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_at_most_the_block_at_hand_is_lost(model, tmp_path):
    with pytest.raises(RuntimeError):
        run(model, tmp_path / "out", Watch(RuntimeError("boom"), at=1))
    kept = [path.parent.name for path in (tmp_path / "out" / JOURNAL).glob("*/block.json")]
    assert sorted(kept) == ["model.layers.0", "model.layers.1"]


def test_finished_blocks_are_not_tuned_again(model, tmp_path, monkeypatch):
    from auto_round.steps.sign_round import SignRound

    with pytest.raises(RuntimeError):
        run(model, tmp_path / "out", Watch(RuntimeError("boom"), at=1))
    tuned, block = [], SignRound.block
    monkeypatch.setattr(SignRound, "block", lambda self, b, *a: tuned.append(b.name) or block(self, b, *a))
    run(model, tmp_path / "out", resume=True)
    assert tuned == ["model.layers.2"]


def test_a_resumed_run_reports_every_block_as_it_was(model, tmp_path):
    first, second = Watch(RuntimeError("boom"), at=1), Watch()
    with pytest.raises(RuntimeError):
        run(model, tmp_path / "out", first)
    run(model, tmp_path / "out", second, resume=True)
    assert second.results[:2] == first.results and len(second.results) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "sym": False},
        {"bits": 2, "enable_quanted_input": False},
        {"quant_lm_head": True},
        {**RTN, "dataset": None},
        {"iters": 0, "disable_opt_rtn": False},
    ],
    ids=["3-bit-asym", "float-inputs", "head", "streamed", "searched"],
)
def test_every_kind_of_job_resumes_to_the_same_bytes(model, tmp_path, options):
    run(model, tmp_path / "whole", **options)
    with pytest.raises(RuntimeError):
        run(model, tmp_path / "out", Watch(RuntimeError("boom"), at=1), **options)
    run(model, tmp_path / "out", resume=True, **options)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_live_model_resumes_too(model, tmp_path):
    run(tiny("llama"), tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(tiny("llama"), tmp_path / "out", Watch(RuntimeError("boom"), at=0))
    run(tiny("llama"), tmp_path / "out", resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_job_may_resume_into_other_formats(model, tmp_path):
    with pytest.raises(RuntimeError):
        run(model, tmp_path / "out", Watch(RuntimeError("boom"), at=1))
    run(model, tmp_path / "out", resume=True, fmt="auto_gptq")
    run(model, tmp_path / "whole", fmt="auto_gptq")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


class Second:
    """An observer that starts another job into the same folder once the first block is done."""

    def __init__(self, start):
        self.start, self.refusal = start, None

    def started(self, plan, blocks):
        pass

    def finished(self, result):
        if self.refusal is None:
            with pytest.raises(OutputError) as caught:
                self.start()
            self.refusal = str(caught.value)


@pytest.mark.parametrize("options", [{}, RTN], ids=["tuned", "streamed"])
def test_a_second_job_in_the_same_folder_is_refused_and_disturbs_nothing(model, tmp_path, options):
    run(model, tmp_path / "whole", **options)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    second = Second(lambda: run(model, tmp_path / "link", **options, seed=1))
    run(model, tmp_path / "out", second, **options)
    assert "another job is writing there" in second.refusal
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    run(model, tmp_path / "out", **options)  # the folder is free again


def test_a_killed_job_keeps_no_claim_to_its_folder(tmp_path):
    child = os.fork()
    if child == 0:
        with claimed(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with claimed(tmp_path), pytest.raises(OutputError), claimed(tmp_path):
        pass


def test_nothing_to_resume_is_a_fresh_run(model, tmp_path):
    run(model, tmp_path / "whole")
    run(model, tmp_path / "out", resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iters": 4}, ["recipe", "iters was 2, is 4"]),
        ({"bits": 3}, ["plan", "bits was 4, is 3", "more settings differ"]),
        ({"dataset": samples(4, 16, seed=5)}, ["data was"]),
        ({"batch_size": 4}, ["batch_size was 2, is 4"]),
        ({"seed": 7}, ["seed was 42, is 7"]),
        ({"lr_scheduler": "cosine"}, ["schedule was"]),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_another_run_left_is_refused_and_the_change_is_named(model, tmp_path, change, words):
    with pytest.raises(RuntimeError):
        run(model, tmp_path / "out", Watch(RuntimeError("boom"), at=0))
    before = bytes_of(tmp_path / "out")
    with pytest.raises(PlanError) as caught:
        run(model, tmp_path / "out", resume=True, **change)
    assert all(word in str(caught.value) for word in [*words, "leave out resume"]), caught.value
    assert bytes_of(tmp_path / "out") == before


def test_another_model_is_refused(model, tmp_path):
    with pytest.raises(RuntimeError):
        run(model, tmp_path / "out", Watch(RuntimeError("boom"), at=0))
    tiny("llama", tmp_path / "other", dtype=torch.bfloat16, num_hidden_layers=3, seed=1)
    with pytest.raises(PlanError, match="model weights was"):
        run(tmp_path / "other", tmp_path / "out", resume=True)


def test_without_resume_a_run_starts_again_and_says_what_it_drops(model, tmp_path, caplog):
    run(model, tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(model, tmp_path / "out", Watch(RuntimeError("boom"), at=1))
    with caplog.at_level(logging.WARNING, "auto_round"):
        run(model, tmp_path / "out")
    assert "2 blocks" in caplog.text and "--resume" in caplog.text
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_damaged_block_is_quantized_again(model, tmp_path, caplog):
    run(model, tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(model, tmp_path / "out", Watch(RuntimeError("boom"), at=1))
    stored = tmp_path / "out" / JOURNAL / "model.layers.0" / "tensors.bin"
    stored.write_bytes(stored.read_bytes()[:-1] + b"?")
    with caplog.at_level(logging.WARNING, "auto_round"):
        run(model, tmp_path / "out", resume=True)
    assert "model.layers.0 is quantized again" in caplog.text
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_an_interrupt_says_how_to_go_on(model, tmp_path, caplog):
    # A shell ignores it for what it runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupted(Watch):
        def finished(self, result):
            super().finished(result)
            if len(self.results) == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with caplog.at_level(logging.WARNING, "auto_round"), pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", Interrupted())
    assert "2 blocks are done" in caplog.text and "--resume" in caplog.text and str(tmp_path) in caplog.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == [JOURNAL]


def test_the_journal_holds_codes_exactly_and_small(tmp_path):
    made = AutoRound(tiny("llama"), layer_config={"k_proj": {"bits": 2}, "v_proj": {"bits": 3}}, **RTN)
    made.quantize()
    with pytest.raises(RuntimeError), Journal(tmp_path, made.plan) as journal:
        journal.begin({}, resume=False)
        layers = {n: q for n, q in made._kept.layers.items() if n.startswith("model.layers.0.")}
        for name, q in layers.items():
            journal.add(name, q)
        journal.finished(_result("model.layers.0", len(layers)))
        again, _, _ = journal.read("model.layers.0")
        assert again.keys() == layers.keys() and all(again[n].equals(q) for n, q in layers.items())
        size = (tmp_path / JOURNAL / "model.layers.0" / "tensors.bin").stat().st_size
        assert size <= 0.6 * sum(q.codes.numel() for q in layers.values())
        raise RuntimeError("keep it")


def _result(name, layers):
    from auto_round.jobs.quantize import BlockResult
    from auto_round.steps.base import BlockReport

    return BlockResult(name, layers, BlockReport(losses={"plain": 0.5}, kept="plain"), 0.1)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.95])
def test_a_full_disk_keeps_the_finished_blocks(model, tmp_path, share):
    """The limit on the size of files stands in for a full disk: the write itself fails, as the system has it."""
    run(model, tmp_path / "whole", fmt="fake")
    largest = max(p.stat().st_size for p in (tmp_path / "whole").rglob("*"))

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest * share), resource.RLIM_INFINITY))
        run(model, tmp_path / "out", fmt="fake")

    assert in_child(limited) == 1
    assert not (tmp_path / "out" / "config.json").exists()
    run(model, tmp_path / "out", resume=True, fmt="fake")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("nth", [1, 9, 15])
def test_a_journal_that_cannot_be_written_is_named(model, tmp_path, monkeypatch, nth):
    from auto_round.jobs import journal

    run(model, tmp_path / "whole")
    put, calls = journal._put, []

    def failing(file, key, tensor):
        calls.append(key)
        if len(calls) == nth:
            raise OSError(28, "No space left on device")
        return put(file, key, tensor)

    monkeypatch.setattr(journal, "_put", failing)
    with pytest.raises(OutputError, match=r"journal .*No space left"):
        run(model, tmp_path / "out")
    monkeypatch.setattr(journal, "_put", put)
    run(model, tmp_path / "out", resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_the_manifest_can_be_read(model, tmp_path):
    with pytest.raises(RuntimeError):
        run(model, tmp_path / "out", Watch(RuntimeError("boom"), at=0))
    text = (tmp_path / "out" / JOURNAL / "manifest.json").read_text()
    assert " at 0x" not in text, "another process has other addresses"
    manifest = json.loads(text)
    assert manifest.keys() == {"model", "plan", "recipe", "source", "versions"}
    assert manifest["versions"]["torch"] == torch.__version__
