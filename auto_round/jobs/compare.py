"""How far a model is from its original: KL divergence, agreement on the next token, perplexity, size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from auto_round.core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """kl: mean KL(original || quantized), nats per token. top1: share of tokens with the same most likely successor.

    Sizes are those of the weight files in bytes, None for a model that is not a folder.
    """

    kl: float
    top1: float
    perplexity_original: float
    perplexity_quantized: float
    tokens: int
    bytes_original: int | None
    bytes_quantized: int | None


def weight_bytes(folder: Path) -> int:
    """Bytes of all weight files in `folder`."""
    return sum(path.stat().st_size for end in ("safetensors", "gguf") for path in folder.glob(f"*.{end}"))


def windows(texts: Sequence[str], tokenizer: Any, seqlen: int, count: int) -> Tensor:
    """(N, seqlen) token ids: the texts one after the other, cut. Raises DataError when there is no whole window."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= seqlen * count:  # no more text is tokenized than is used
            break
    whole = min(count, len(ids) // seqlen)
    if whole == 0:
        raise DataError(
            f"the text has {len(ids)} tokens, fewer than one window of {seqlen}; use a smaller seqlen"
        )
    return torch.tensor(ids[: whole * seqlen]).reshape(whole, seqlen)


@torch.inference_mode()
def compare(
    original: str | Path | nn.Module,
    quantized: str | Path | nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    seqlen: int = 256,
    max_windows: int = 32,
) -> Comparison:
    """Compare two models on `texts`, both in float32. Raises DataError when the text is too short."""
    tokens = windows(texts, tokenizer, seqlen, max_windows)
    first, second = _loaded(original), _loaded(quantized)
    # float64: a million small float32 terms would round one another away.
    sums = torch.zeros(4, dtype=torch.float64)
    for window in tokens.split(4):
        a = first(input_ids=window).logits[:, :-1].float().log_softmax(-1)  # the last token has no successor
        b = second(input_ids=window).logits[:, :-1].float().log_softmax(-1)
        following = window[:, 1:].unsqueeze(-1)
        sums += torch.stack([
            (a.exp() * (a - b)).sum(-1).double().sum(),
            (a.argmax(-1) == b.argmax(-1)).double().sum(),
            -a.gather(-1, following).double().sum(),
            -b.gather(-1, following).double().sum(),
        ])  # fmt: skip
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    kl, top1, loss_a, loss_b = (sums / count).tolist()
    return Comparison(
        kl=kl,
        top1=top1,
        perplexity_original=math.exp(loss_a),
        perplexity_quantized=math.exp(loss_b),
        tokens=count,
        bytes_original=_bytes(original),
        bytes_quantized=_bytes(quantized),
    )


def _loaded(model: str | Path | nn.Module) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32).eval()


def _bytes(model: str | Path | nn.Module) -> int | None:
    return None if isinstance(model, nn.Module) else weight_bytes(Path(model))
