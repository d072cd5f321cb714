"""Calibration text written by the model itself: for a machine without data and without network.

Every sample starts from the token that begins a text, and each next one is drawn from the model's own distribution.
"""

from __future__ import annotations

import logging
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auto_round.core.errors import DataError

logger = logging.getLogger("auto_round")

TOGETHER = 32  # samples drawn at once
MEASURED = 8  # tokens after which the time is known


class Author(NamedTuple):
    """A live model that writes calibration text, and how many samples it has room for at once."""

    model: nn.Module
    together: int = TOGETHER


def bytes_of_one(model: nn.Module, length: int) -> int:
    """What one sample of `length` tokens takes while `model`, which may lack its weights, draws it: keys and values of
    all layers, one of them twice as it grows, and the scores of all words in three dtypes."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = next(model.parameters()).dtype.itemsize
    return 2 * (config.num_hidden_layers + 1) * heads * width * length * size + 12 * config.vocab_size


@torch.inference_mode()
def sample_tokens(
    model: nn.Module, tokenizer: Any, *, count: int, length: int, seed: int, together: int = TOGETHER
) -> list[Tensor]:
    """`count` samples of `length` tokens, (T,) int64 each; the same for the same seed, model and torch version.

    together: samples drawn at once, which changes what is drawn.
    Tokens that end a text are never drawn. Raises DataError when the model does not say how a text begins.
    """
    start = _start(model, tokenizer)
    barred = _barred(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    samples: list[Tensor] = []
    while len(samples) < count:
        size = min(together, count - len(samples))
        told = _Told(began, -(-count // together), count, length) if not samples else None
        samples += list(_drawn(model, torch.full((size, 1), start), length, barred, generator, told))
    seconds = time.perf_counter() - began
    logger.info("the model wrote %d samples of %d tokens in %.0f s", count, length, seconds)
    return samples


class _Told:
    """Says once how long the whole will take."""

    def __init__(self, began: float, rounds: int, count: int, length: int) -> None:
        self._began, self._rounds, self._count, self._length = began, rounds, count, length

    def __call__(self, tokens: int) -> None:
        if tokens == min(MEASURED, self._length - 1):
            seconds = (time.perf_counter() - self._began) / tokens * self._length * self._rounds
            logger.info(
                "the model writes its own calibration text, %d x %d tokens: some %.0f s",
                self._count, self._length, seconds,
            )  # fmt: skip


def _drawn(
    model: nn.Module,
    tokens: Tensor,
    length: int,
    barred: list[int],
    generator: torch.Generator,
    told: _Told | None,
) -> Tensor:
    """`tokens` (B, 1) continued to (B, length)."""
    device, past, newest = next(model.parameters()).device, None, tokens
    while tokens.shape[1] < length:
        out = model(input_ids=newest.to(device), past_key_values=past, use_cache=True)
        # Drawn on the CPU: generators of other devices give other numbers for the same seed.
        past, logits = out.past_key_values, out.logits[:, -1].float().cpu()
        logits[:, barred] = -torch.inf  # what follows the end of a text is noise
        newest = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, newest], 1)
        if told is not None:
            told(tokens.shape[1] - 1)
    return tokens


def _start(model: nn.Module, tokenizer: Any) -> int:
    for source in (tokenizer, model.config):
        for name in ("bos_token_id", "eos_token_id"):
            found = _numbers(source, name)
            if found:
                return found[0]
    raise DataError(
        "dataset 'self': neither tokenizer nor config.json names a beginning-of-text token; give other calibration data"
    )


def _barred(model: nn.Module, tokenizer: Any) -> list[int]:
    names = ("eos_token_id", "pad_token_id")
    return sorted(
        {n for source in (tokenizer, model.config) for name in names for n in _numbers(source, name)}
    )


def _numbers(source: Any, name: str) -> list[int]:
    found = getattr(source, name, None)
    return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [int(found)]
