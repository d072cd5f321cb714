#!/usr/bin/env python3
"""Write text sampled from a local causal language model, one {"text": ...} a line.

Calibration wants text the model finds likely. When none is at hand, the model's own samples are such text.
Every sample starts from the beginning-of-text token, and by default each next token is drawn from the model's
own distribution (ancestral sampling). End-of-text is never drawn, so all samples have one length.

    python examples/sample_text.py MODEL OUT.jsonl --samples 160 --seed 1

Needs torch and transformers only. The same seed, batch size and torch version give the same text.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a local checkpoint in float32, with its tokenizer set up to pad on the left."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer


def continue_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: list[str],
    tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    may_stop: bool = True,
) -> list[str]:
    """Draw one continuation of at most `tokens` tokens for each prompt, all in one batch.

    `top_k` 0 draws from the whole vocabulary. With `may_stop` False the end-of-text token is never drawn.
    Uses torch's global generator. Returns the continuations without their prompts and without special tokens.
    """
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.inference_mode():
        out = model.generate(
            **batch,
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            top_p=1.0,
            max_new_tokens=tokens,
            min_new_tokens=None if may_stop else tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Count the tokens of `text`; can be below the number drawn, since a text may have a shorter spelling."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("out", type=Path, help="jsonl file to write")
    parser.add_argument("--samples", type=int, default=160, help="how many samples to keep")
    parser.add_argument("--tokens", type=int, default=560, help="tokens drawn for each sample")
    parser.add_argument(
        "--at-least", type=int, default=512, help="drop samples shorter than this when tokenized again"
    )
    parser.add_argument("--batch", type=int, default=32, help="samples drawn at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="0 draws from the whole vocabulary")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    model, tokenizer = load(args.model)
    start = tokenizer.bos_token or tokenizer.eos_token
    kept: list[str] = []
    dropped = 0
    while len(kept) < args.samples:
        drawn = continue_texts(
            model,
            tokenizer,
            prompts=[start] * args.batch,
            tokens=args.tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            may_stop=False,
        )
        long_enough = [text for text in drawn if length(tokenizer, text) >= args.at_least]
        dropped += len(drawn) - len(long_enough)
        kept += long_enough
        if dropped > 4 * args.samples:
            raise SystemExit(
                f"{dropped} samples were shorter than {args.at_least} tokens; raise --tokens ({args.tokens})"
            )
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept[: args.samples]]
    args.out.write_text("".join(lines), encoding="utf-8")
    print(
        f"{args.out}: {len(lines)} samples, {args.out.stat().st_size} bytes; {dropped} dropped as too short"
    )


if __name__ == "__main__":
    main()
