"""Kill a run at many random moments, resume each, and compare the files with those of a run that was left alone.

    python benchmarks/kills.py [--kills 50] [--seed 0] [--out benchmarks/results/kills.json]

Every second kill is SIGKILL after a random time, every other one an exit before a random file operation (between write
and rename, in the packing of the last shard, while the checkpoint is moved into place, ...). The model is random, Llama
shaped, four blocks; each run writes two formats in several shards.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers

from auto_round import AutoRound
from auto_round.jobs.journal import JOURNAL

EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.copyfile"}
BLOCKS = 4


def make_model(folder: Path) -> None:
    """A random Llama folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=BLOCKS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def run(model: Path, out: Path, *, resume: bool) -> None:
    """One tuning job, two formats."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 256, (32,), generator=generator) for _ in range(8)]
    job = AutoRound(
        model, dataset=tokens, nsamples=8, seqlen=32, iters=20, batch_size=4, group_size=32, max_shard_size="60KB",
        resume=resume,
    )  # fmt: skip
    job.quantize_and_save(out, format="auto_round,fake")


def in_child(call, kill_after: float | None = None) -> int:
    """Exit code of `call()` in a forked process, which is killed after `kill_after` seconds."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
        try:
            call()
        finally:
            os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted(call, nth: int, count_file: Path | None = None):
    """`call`, which ends the process before its `nth` file operation."""

    def hooked() -> None:
        seen = [0]

        def watch(event: str, _args: object) -> None:
            seen[0] += event in EVENTS
            if seen[0] == nth:
                os._exit(9)

        sys.addaudithook(watch)
        call()
        if count_file is not None:
            count_file.write_text(str(seen[0]))

    return hooked


def hashes(folder: Path) -> dict[str, str]:
    """Path -> hash of every file."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def main() -> None:
    """Run the experiment and print one line per kill, then the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_model(work / "model")
        out = work / "out"
        started = time.perf_counter()
        in_child(lambda: run(work / "model", work / "whole", resume=False))
        duration = time.perf_counter() - started
        in_child(counted(lambda: run(work / "model", work / "count", resume=False), -1, work / "events"))
        events = int((work / "events").read_text())
        expected = hashes(work / "whole")
        rows = []
        for number in range(options.kills):
            shutil.rmtree(out, ignore_errors=True)
            rows.append(one_kill(number, draw, work / "model", out, duration, events, expected))
            print(rows[-1], flush=True)
    same = sum(row["identical"] for row in rows)
    lost = max(row["blocks_lost"] for row in rows)
    summary = {
        "command": " ".join(["python", "benchmarks/kills.py", *sys.argv[1:]]),
        "torch": torch.__version__, "python": platform.python_version(), "kills": len(rows),
        "identical": same, "most_blocks_lost": lost, "rows": rows,
    }  # fmt: skip
    print(f"{same} of {len(rows)} runs resumed to identical bytes; at most {lost} block of work lost in each")
    if options.out:
        options.out.write_text(json.dumps(summary, indent=1) + "\n")
    sys.exit(0 if same == len(rows) else 1)


def one_kill(number, draw, model, out, duration, events, expected) -> dict:
    """Kill one run, see what is left, resume it and compare."""
    marks = out.parent / "marks"
    marks.write_text("")
    if number % 2:
        how, after = "SIGKILL", draw.uniform(0.05, duration * 1.1)
        in_child(lambda: marked(model, out, marks), kill_after=after)
        where = f"{after:.2f} s of {duration:.2f} s"
    else:
        how, nth = "exit", draw.randrange(1, events)
        in_child(counted(lambda: marked(model, out, marks), nth))
        where = f"file operation {nth} of {events}"
    begun = len(marks.read_text().split())
    kept = len(list((out / JOURNAL).glob("*/block.json")))
    published = (out / "fake" / "config.json").exists() or (out / "auto-round" / "config.json").exists()
    code = in_child(lambda: run(model, out, resume=True))
    return {
        "kill": number, "how": how, "where": where, "blocks_begun": begun, "blocks_kept": kept,
        "blocks_lost": 0 if published else begun - kept,
        "identical": code == 0 and hashes(out) == expected,
    }  # fmt: skip


def marked(model: Path, out: Path, marks: Path) -> None:
    """`run`, which notes in the file `marks` when the tuning of a block begins."""
    from auto_round.steps.sign_round import SignRound

    block = SignRound.block

    def noting(self, one, *rest):
        handle = os.open(marks, os.O_WRONLY | os.O_APPEND)
        os.write(handle, f"{one.name}\n".encode())
        os.close(handle)
        return block(self, one, *rest)

    SignRound.block = noting
    run(model, out, resume=False)


if __name__ == "__main__":
    main()
