"""A small trained model of another architecture for the benchmarks: a Qwen3-MoE student of the embedded model.

    python benchmarks/student.py OUT --text TEXT [--steps 600]

Random weights say nothing about accuracy, and trained ones of many architectures need a hub. The student
learns the teacher's predictions (KL) on the text: some minutes on one core. The same seed gives the same weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers
from torch.nn.functional import kl_div, log_softmax


def mixture(teacher: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """Four blocks of eight experts, two of which see a token; as wide as the teacher, with its vocabulary."""
    return transformers.Qwen3MoeConfig(
        vocab_size=teacher.vocab_size, hidden_size=teacher.hidden_size, intermediate_size=2 * teacher.hidden_size,
        moe_intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=8, num_experts_per_tok=2, norm_topk_prob=True, tie_word_embeddings=False,
        max_position_embeddings=teacher.max_position_embeddings,
        bos_token_id=teacher.bos_token_id, eos_token_id=teacher.eos_token_id, pad_token_id=teacher.pad_token_id,
    )  # fmt: skip


def batches(tokens: torch.Tensor, size: int, length: int, steps: int):
    """`steps` batches (size, length) of passages that begin at random."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - length, (size,), generator=generator)
        yield torch.stack([tokens[start : start + length] for start in starts])


def train(student: torch.nn.Module, teacher: torch.nn.Module, tokens: torch.Tensor, steps: int) -> float:
    """Let the student predict as the teacher does; the mean KL of the last tenth of the steps, in nats per token."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    losses = []
    for step, rows in enumerate(batches(tokens, 8, 128, steps)):
        with torch.no_grad():
            target = log_softmax(teacher(rows).logits.flatten(0, 1).float(), -1)
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(rows).logits
        loss = kl_div(
            log_softmax(logits.flatten(0, 1).float(), -1), target, reduction="batchmean", log_target=True
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: KL to the teacher {loss.item():.3f}", flush=True)
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def texts(path: Path) -> str:
    """The text of a .txt file, or of all lines of a .jsonl file."""
    if path.suffix == ".jsonl":
        return "\n".join(json.loads(line)["text"] for line in path.read_text().splitlines())
    return path.read_text()


def main() -> None:
    """Make the student and save it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--teacher", type=Path, default=Path("examples/novelist-8m"))
    parser.add_argument("--text", type=Path, default=Path("examples/novelist-8m/calibration.jsonl"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.teacher)
    teacher = transformers.AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16).eval()
    student = transformers.AutoModelForCausalLM.from_config(mixture(teacher.config)).train()
    tokens = tokenizer(texts(args.text), return_tensors="pt").input_ids[0]
    print(f"{len(tokens):,} tokens; {sum(p.numel() for p in student.parameters()):,} parameters")
    found = train(student, teacher, tokens, args.steps)
    student.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: KL to the teacher {found:.3f}")


if __name__ == "__main__":
    main()
