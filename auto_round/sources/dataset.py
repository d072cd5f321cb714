"""Calibration data: from what the user names to token ids of one length.

Accepted: data sets by name or file with options (`dataset_spec.py`), the model itself (``self``), lists of strings, of
token ids, of tensors, of dicts with text, chat messages or input_ids, and any iterable of these: DataLoader, Dataset.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.core.errors import DataError
from auto_round.sources.dataset_items import columns_or_rows, items_of
from auto_round.sources.dataset_rows import Row, rows_of
from auto_round.sources.dataset_spec import Part, parse_spec
from auto_round.sources.self_text import Author, sample_tokens

logger = logging.getLogger("auto_round")

SELF = "self"
FEW_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Calibration:
    """Samples of one length. tokens: (N, T) int64. attention_mask: (N, T) int64 or None when nothing is padding."""

    tokens: Tensor
    attention_mask: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        """(N, T) bool: tokens that are no padding; None when all are."""
        return None if self.attention_mask is None else self.attention_mask.bool()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is wanted of the data: samples, tokens of each, the seed of their order, and where names are looked up."""

    nsamples: int
    seqlen: int
    seed: int
    platform: str = "hf"


def load_calibration(
    dataset: Any, tokenizer: Any, request: Request, author: Callable[[], Author] | None = None
) -> Calibration:
    """The calibration samples for `dataset`. What was used and dropped is logged.

    author: gives the live model, for the data set `self`. Everything is fetched before this returns.
    Raises DataError when the data cannot be found or gives no sample of the wanted length.
    """
    if isinstance(dataset, (str, Path)):
        parts = parse_spec(str(dataset))
        gathered = [(part, _named(part, tokenizer, request, author)) for part in parts]
        samples = _interleave(gathered, request)
        names = ", ".join(part.name for part in parts)
    else:
        if not isinstance(dataset, Iterable):
            raise DataError(
                f"dataset must be a name, a file, or an iterable of samples, got {type(dataset).__name__}"
            )
        names = f"the given {type(dataset).__name__}"
        rows = rows_of(columns_or_rows(dataset), tokenizer, Part(names), request.seqlen)
        samples = _Samples.of(rows, request, limit=request.nsamples)
    if not samples.kept:
        would_do = samples.longest // 32 * 32 or samples.longest  # a round number for the message
        raise DataError(
            f"dataset {names}: no usable calibration sample: none of {samples.seen} has {request.seqlen} tokens, the "
            f"longest has {samples.longest}. Use --seqlen {would_do} or less, or the option concat=True"
        )
    return _stack(samples, names, request)


@dataclass(slots=True)
class _Samples:
    """Token ids of one length, and what became of the rest: how many were empty, how many too short."""

    kept: list[Row] = field(default_factory=list)
    seen: int = 0
    empty: int = 0
    longest: int = 0

    @classmethod
    def of(cls, rows: Iterable[Row], request: Request, limit: int) -> _Samples:
        """Rows cut to the wanted length; shorter ones are dropped. Stops at `limit` kept rows."""
        found = cls()
        for tokens, mask in rows:
            found.seen += 1
            found.empty += not len(tokens)
            found.longest = max(found.longest, len(tokens))
            if len(tokens) >= request.seqlen:
                cut = slice(0, request.seqlen)
                found.kept.append((tokens[cut], None if mask is None else mask[cut]))
            if len(found.kept) >= limit:
                break
        return found

    def dropped(self, seqlen: int) -> str:
        """What was not used and why, or nothing."""
        short = self.seen - self.empty - len(self.kept)
        reasons = [f"{short} shorter than {seqlen} tokens"] if short else []
        reasons += [f"{self.empty} empty"] if self.empty else []
        return f"; dropped {' and '.join(reasons)} of {self.seen} read" if reasons else ""


def _named(part: Part, tokenizer: Any, request: Request, author: Callable[[], Author] | None) -> _Samples:
    """The samples of one named data set, which is read no further than needed."""
    wanted = part.num or request.nsamples
    if part.name == SELF and not Path(SELF).exists():
        if author is None:
            raise DataError("dataset 'self' needs a model to write the text; there is none here")
        model, together = author()
        drawn = sample_tokens(
            model, tokenizer, count=wanted, length=request.seqlen, seed=request.seed, together=together
        )
        return _Samples.of(((row, None) for row in drawn), request, limit=wanted)
    items = items_of(part, platform=request.platform, seed=request.seed)
    return _Samples.of(rows_of(items, tokenizer, part, request.seqlen), request, limit=wanted)


def _interleave(parts: Sequence[tuple[Part, _Samples]], request: Request) -> _Samples:
    """Each part's own number of samples, or an equal share of what is left; shuffled by the seed."""
    fixed = sum(part.num or 0 for part, _ in parts)
    open_parts = [part for part, _ in parts if part.num is None]
    share = -(-max(0, request.nsamples - fixed) // max(1, len(open_parts)))  # rounded up: the surplus is cut
    rows = [
        row for part, found in parts for row in found.kept[: part.num or (share if len(parts) > 1 else None)]
    ]
    # A generator of our own: the global one belongs to the program that calls us.
    random.Random(request.seed).shuffle(rows)
    unused = sum(len(found.kept) for _, found in parts) - len(rows)
    return _Samples(
        rows,
        sum(found.seen for _, found in parts) - unused,
        sum(found.empty for _, found in parts),
        max(found.longest for _, found in parts),
    )


def _stack(samples: _Samples, names: str, request: Request) -> Calibration:
    rows, dropped = samples.kept[: request.nsamples], samples.dropped(request.seqlen)
    count = len(rows) * request.seqlen
    used = f"calibration: {len(rows)} samples of {request.seqlen} tokens ({count:,} in all) from {names}"
    if len(rows) < request.nsamples:
        logger.warning(
            "%s, %d wanted%s. More data, a shorter seqlen or concat=True gives more", used, request.nsamples, dropped
        )  # fmt: skip
    else:
        logger.info("%s%s", used, dropped)
    if count < FEW_TOKENS:
        logger.warning(
            "only %d calibration tokens; results improve up to some 100,000: raise nsamples or seqlen", count
        )
    tokens = torch.stack([tokens for tokens, _ in rows]).long()
    if all(mask is None or bool(mask.all()) for _, mask in rows):
        return Calibration(tokens)
    masks = [torch.ones_like(tokens[0]) if mask is None else mask.long() for _, mask in rows]
    return Calibration(tokens, torch.stack(masks))
