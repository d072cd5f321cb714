#!/usr/bin/env python3
"""Quantize a real chat model, SmolLM2-135M-Instruct, to 4 bits in two ways and compare.

This is what `make demo-smollm2` runs. The model comes out of a registry package (see fetch_smollm2.py). The
calibration and the held-out text are chats the model writes itself, so nothing else is downloaded. Model and
texts are kept in ./demo_output/smollm2, and a second run starts from there.
"""

import itertools
import json
import shutil
import time
from pathlib import Path

import torch
from fetch_smollm2 import fetch
from rich.console import Console
from rich.table import Table
from sample_text import continue_texts, length, load
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from auto_round import AutoRound
from auto_round.cli.progress import Show
from auto_round.jobs.compare import Comparison, compare, weight_bytes

OUT = Path("demo_output/smollm2")
QUESTION = "What is the capital of France?"
SEQLEN, SAMPLES, HELD_OUT = 256, 32, 8
ANSWER_TOKENS, CHATS_AT_ONCE = 192, 32
JOBS = {
    "opt_rtn": {"iters": 0},
    "signround": {"iters": 20, "batch_size": 4},
}
REQUESTS = (
    "What is {}?",
    "Tell me three facts about {}.",
    "Write a short story about {}.",
    "Explain {} to a child of eight.",
    "What are the good and bad sides of {}?",
    "Write a letter to a friend about {}.",
    "Give me a list of tips on {}.",
    "How has {} changed in the last hundred years?",
)
SUBJECTS = (
    "the sea", "baking bread", "electric motors", "learning a language", "the Roman army", "a lost dog",
    "photosynthesis", "chess", "public transport", "keeping bees", "the moon", "saving money", "volcanoes",
    "playing the violin", "libraries", "writing programs",
)  # fmt: skip

console = Console()


def as_chat(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """A question in the model's chat template, up to where its answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def own_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """Let the model answer questions until its chats fill `count` texts of at least SEQLEN tokens each.

    Milder than its own distribution (temperature 0.8, the 50 likeliest tokens): at 1.0 so small a model soon
    loses the thread.
    """
    questions = [request.format(subject) for subject, request in itertools.product(SUBJECTS, REQUESTS)]
    order = itertools.cycle(torch.randperm(len(questions)).tolist())
    texts, current = [], ""
    while len(texts) < count:
        prompts = [as_chat(tokenizer, questions[next(order)]) for _ in range(CHATS_AT_ONCE)]
        answers = continue_texts(
            model, tokenizer, prompts=prompts, tokens=ANSWER_TOKENS, temperature=0.8, top_k=50
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            current += f"{prompt}{answer}<|im_end|>\n"
            if length(tokenizer, current) >= SEQLEN:
                texts.append(current)
                current = ""
        console.print(f"{min(len(texts), count)} of {count} texts written")
    return texts[:count]


def cached_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Path, list[str]]:
    """The calibration file and the held-out texts, written at the first run."""
    calibration, held_out = OUT / "calibration.jsonl", OUT / "heldout.jsonl"
    if not held_out.exists():
        torch.manual_seed(1)
        texts = own_texts(model, tokenizer, SAMPLES + HELD_OUT)
        for path, part in ((calibration, texts[:SAMPLES]), (held_out, texts[SAMPLES:])):
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in part), encoding="utf-8")
    return calibration, [
        json.loads(line)["text"] for line in held_out.read_text(encoding="utf-8").splitlines()
    ]


def quantize(name: str, original: Path, calibration: Path) -> tuple[Path, float]:
    """Run one job; return its checkpoint folder and the seconds it took."""
    started = time.perf_counter()
    folder = OUT / name
    shutil.rmtree(folder, ignore_errors=True)
    data = {"dataset": str(calibration), "nsamples": SAMPLES, "seqlen": SEQLEN, "seed": 42}
    job = AutoRound(str(original), scheme="W4A16", **data, **JOBS[name])
    with Show(console) as show:
        job.observers.append(show)
        job.quantize_and_save(str(folder), format="auto_round")
    return folder, time.perf_counter() - started


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The most likely answer to QUESTION."""
    inputs = tokenizer(as_chat(tokenizer, QUESTION), return_tensors="pt", add_special_tokens=False)
    made = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(made, skip_special_tokens=True).strip()


def table(rows: list[tuple[str, Path, float, Comparison]]) -> Table:
    """All results, one a row."""
    found = Table(title="Distance from the original on held-out chats of its own", title_justify="left")
    found.caption = "KL in nats per token; top-1: same next token"
    found.add_column("model", no_wrap=True)
    for column in ("seconds", "MB", "KL", "top-1", "perplexity"):
        found.add_column(column, justify="right")
    for name, folder, seconds, measured in rows:
        figures = f"{measured.kl:.4f}", f"{measured.top1:.1%}", f"{measured.perplexity_quantized:.2f}"
        found.add_row(
            name, f"{seconds:.0f}" if seconds else "", f"{weight_bytes(folder) / 1e6:.1f}", *figures
        )
    return found


def main() -> None:
    disable_progress_bar()
    started = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    console.rule("[bold]fetch the model and let it write", align="left")
    folder = fetch(OUT / "original")
    original, tokenizer = load(folder)
    calibration, texts = cached_texts(original, tokenizer)
    rows = [("original", folder, 0.0)]
    for name in JOBS:
        console.rule(f"[bold]quantize: {name} W4", align="left")
        rows.append((f"{name} W4", *quantize(name, folder, calibration)))
    console.rule("[bold]load with transformers and compare", align="left")
    results, answers = [], []
    for name, folder, seconds in rows:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        measured = compare(original, model, tokenizer, texts, seqlen=SEQLEN, max_windows=HELD_OUT)
        results.append((name, folder, seconds, measured))
        answers.append((name, answer(model, tokenizer)))
    console.print(table(results))
    console.print(f"[bold]{QUESTION}")
    for name, text in answers:
        console.print(f"{name}: {text}", markup=False)
    console.print(f"[dim]{time.perf_counter() - started:.0f} s; the checkpoints are in {OUT.resolve()}")


if __name__ == "__main__":
    main()
