#!/usr/bin/env python3
"""Quantize the embedded model several ways, load every result with stock transformers, and compare.

This is what `make demo` runs. The model and its texts are in examples/novelist-8m, so nothing is downloaded.
Results go to ./demo_output/novelist-8m, which is made anew each time.
"""

import json
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoRoundConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from auto_round import AutoRound, AutoScheme
from auto_round.cli.progress import Show
from auto_round.jobs.compare import Comparison, compare, weight_bytes

MODEL = Path(__file__).parent / "novelist-8m"
OUT = Path("demo_output/novelist-8m")
PROMPT = "The old lady put down her letter, looked out of the window at the rain, and said"
# Small numbers for a quick look. The defaults, 200 x 8 x 2048 tokens from 128 samples, are more accurate.
TUNING = {"iters": 60, "batch_size": 4, "nsamples": 64, "seqlen": 256}
JOBS = {
    "rtn W4": {"scheme": "W4A16", "iters": 0, "disable_opt_rtn": True},
    "opt_rtn W4": {**TUNING, "scheme": "W4A16", "iters": 0},
    "signround W4": {**TUNING, "scheme": "W4A16", "format": "auto_round,auto_gptq"},
    "rtn W2G64": {"scheme": "W2A16G64", "iters": 0, "disable_opt_rtn": True},
    "signround W2G64": {**TUNING, "scheme": "W2A16G64"},
    "signround 3 bits": {**TUNING, "scheme": AutoScheme(avg_bits=3.0, options=("W2A16G64", "W4A16"))},
}

console = Console()


@dataclass(frozen=True, slots=True)
class Result:
    """One checkpoint folder: how it did and what it writes. seconds: to quantize, into all formats."""

    name: str
    folder: Path
    seconds: float
    comparison: Comparison
    text: str


@contextmanager
def announced(title: str) -> Iterator[None]:
    """Print a title, then how long the work under it took."""
    console.rule(f"[bold]{title}", align="left")
    started = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - started:.1f} s")


def quantize(name: str, options: dict[str, object]) -> list[Path]:
    """Run one job; return its checkpoint folders, one for each format."""
    out = OUT / name.replace(" ", "-")
    job = AutoRound(str(MODEL), dataset=str(MODEL / "calibration.jsonl"), seed=42, **options)
    with Show(console) as show:
        job.observers.append(show)
        _, folders = job.quantize_and_save(str(out))
    return [Path(folder) for folder in (folders if isinstance(folders, list) else [folders])]


def load(folder: Path) -> PreTrainedModel:
    """Load a checkpoint with transformers alone, in float32: then only quantization makes a difference."""
    # Given a configuration, transformers loads GPTQ checkpoints with this package; it warns that it keeps theirs.
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")
    config = {"quantization_config": AutoRoundConfig()} if folder.name == "auto-gptq" else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **config).eval()


def continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt's most likely continuation, 40 tokens."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])


def measure(original: PreTrainedModel, name: str, folder: Path, seconds: float) -> Result:
    """Load one checkpoint, compare it with the original on held-out text, and let it write."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (MODEL / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    model = load(folder)
    comparison = compare(original, model, tokenizer, texts, seqlen=256, max_windows=32)
    return Result(name, folder, seconds, comparison, continued(model, tokenizer))


def table(results: list[Result]) -> Table:
    """All results, one a row."""
    found = Table(title="Distance from the original on held-out text of its own making", title_justify="left")
    found.caption = "KL in nats per token; top-1: same next token"
    found.add_column("model", no_wrap=True)
    for column in ("seconds", "MB", "KL", "top-1", "perplexity"):
        found.add_column(column, justify="right")
    for result in results:
        measured = result.comparison
        found.add_row(
            result.name,
            f"{result.seconds:.1f}" if result.seconds else "",
            f"{weight_bytes(result.folder) / 1e6:.2f}",
            f"{measured.kl:.4f}",
            f"{measured.top1:.1%}",
            f"{measured.perplexity_quantized:.2f}",
        )
    return found


def main() -> None:
    disable_progress_bar()
    shutil.rmtree(OUT, ignore_errors=True)
    folders = [("original", MODEL, 0.0)]
    for name, options in JOBS.items():
        with announced(f"quantize: {name}"):
            started = time.perf_counter()
            made = quantize(name, options)
            seconds = time.perf_counter() - started
        for folder in made:
            folders.append((f"{name}, {folder.name}" if len(made) > 1 else name, folder, seconds))
    with announced("load with transformers and compare"):
        original = load(MODEL)
        results = [measure(original, *row) for row in folders]
    console.print(table(results))
    console.rule("[bold]what they write", align="left")
    console.print(f"[dim]{PROMPT} ...")
    for result in results:
        console.print(f"[bold]{result.name}:[/] ", end="")
        console.print(result.text.strip(), markup=False)
    console.print(f"[dim]the checkpoints are in {OUT.resolve()}")


if __name__ == "__main__":
    main()
