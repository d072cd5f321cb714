"""Calibration data: from what the user names to token ids of one length.

Accepted: a hub data set or local .json, .jsonl, .txt file with options (``a.jsonl:num=64,NeelNanda/pile-10k:num=64``),
a list of strings, of token ids, of tensors or of dicts with input_ids, or an iterable (DataLoader) of these.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_round.core.errors import DataError, NotYetError, nearest

logger = logging.getLogger("auto_round")

DEFAULT_DATASET = "NeelNanda/pile-10k"
TEXT_COLUMNS = ("text", "content", "code", "prompt", "question")
OPTIONS = ("num", "split", "concat", "apply_chat_template", "system_prompt", "seed")
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


@dataclass(frozen=True, slots=True)
class Part:
    """One data set of a specification, with its options."""

    name: str
    num: int | None = None
    split: tuple[str, ...] = ()
    concat: bool = False
    chat: bool = False
    system_prompt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is wanted of the data: how many samples of how many tokens, and the seed of their order."""

    nsamples: int
    seqlen: int
    seed: int


def split_outside_quotes(text: str, mark: str) -> list[str]:
    """`text` cut at each `mark` that is not inside single or double quotes."""
    pattern = rf"""((?:"[^"]*"|'[^']*'|[^{re.escape(mark)}"'])+)"""
    return [piece.strip() for piece in re.findall(pattern, text) if piece.strip()]


def parse_spec(text: str) -> list[Part]:
    """The parts of ``name:option=value:...,name``. Raises DataError for an unknown option or value."""
    parts = []
    for item in split_outside_quotes(text, ","):
        name, *options = split_outside_quotes(item, ":")
        part = Part(name)
        for option in options:
            part = _with_option(part, option, text)
        parts.append(part)
    if not parts:
        raise DataError(f"dataset {text!r} names nothing")
    return parts


def _with_option(part: Part, option: str, text: str) -> Part:
    key, has_value, value = (piece.strip() for piece in option.partition("="))
    on = not has_value or value.casefold() not in ("false", "0", "no")
    if key == "num":
        if not value.isdigit() or int(value) == 0:
            raise DataError(f"dataset {text!r}: num={value!r} must be a positive number")
        return replace(part, num=int(value))
    if key == "split":
        return replace(part, split=tuple(value.split("+")))
    if key == "concat":
        return replace(part, concat=on)
    if key == "apply_chat_template":
        return replace(part, chat=on)
    if key == "system_prompt":
        return replace(part, system_prompt=value.strip("\"'"), chat=True)
    if not has_value and key in ("train", "validation", "test"):
        return replace(part, split=(key,))
    raise DataError(
        f"dataset {text!r}: option {key!r} is unknown.{nearest(key, OPTIONS)} Known: {', '.join(OPTIONS)}"
    )


def load_calibration(dataset: Any, tokenizer: Any, request: Request) -> Calibration:
    """The calibration samples for `dataset`. What was used and dropped is logged.

    Raises DataError when the data cannot be found or gives no sample of the wanted length.
    """
    if isinstance(dataset, (str, Path)):
        gathered = [_from_part(part, tokenizer, request) for part in parse_spec(str(dataset))]
        samples = _interleave(gathered, request)
    else:
        samples = _Samples.of(_from_objects(dataset, tokenizer), request, limit=request.nsamples)
    if not samples.kept:
        would_do = samples.longest // 32 * 32 or samples.longest
        raise DataError(
            f"no usable calibration sample: none of {samples.seen} has {request.seqlen} tokens, the longest has "
            f"{samples.longest}. Use --seqlen {would_do} or less, or the option concat=True"
        )
    return _stack(samples, request)


@dataclass(slots=True)
class _Samples:
    """Token ids of one length, and what became of the rest."""

    kept: list[tuple[Tensor, Tensor | None]]
    seen: int = 0
    longest: int = 0

    @classmethod
    def of(
        cls, rows: Iterable[tuple[Tensor, Tensor | None]], request: Request, limit: int | None = None
    ) -> _Samples:
        """Rows cut to the wanted length; shorter ones are dropped. Stops at `limit` kept rows."""
        found = cls([])
        for tokens, mask in rows:
            found.seen += 1
            found.longest = max(found.longest, len(tokens))
            if len(tokens) >= request.seqlen:
                cut = slice(0, request.seqlen)
                found.kept.append((tokens[cut], None if mask is None else mask[cut]))
            if limit is not None and len(found.kept) >= limit:
                break
        return found


def _interleave(parts: Sequence[tuple[Part, _Samples]], request: Request) -> _Samples:
    """Each part's own number of samples, or an equal share of what is left; shuffled by the seed."""
    fixed = sum(part.num or 0 for part, _ in parts)
    open_parts = [part for part, _ in parts if part.num is None]
    share = -(-max(0, request.nsamples - fixed) // max(1, len(open_parts)))
    rows = [
        row for part, found in parts for row in found.kept[: part.num or (share if len(parts) > 1 else None)]
    ]
    random.Random(request.seed).shuffle(rows)
    return _Samples(rows, sum(f.seen for _, f in parts), max(f.longest for _, f in parts))


def _stack(samples: _Samples, request: Request) -> Calibration:
    rows = samples.kept[: request.nsamples]
    used = f"calibration: {len(rows)} samples of {request.seqlen} tokens"
    if len(rows) < request.nsamples:
        short = samples.seen - len(samples.kept)
        logger.warning(
            "%s, %d wanted; %d of %d shorter ones dropped. More data, a shorter seqlen or concat=True gives more",
            used, request.nsamples, short, samples.seen,
        )  # fmt: skip
    else:
        logger.info(used)
    if len(rows) * request.seqlen < FEW_TOKENS:
        logger.warning(
            "only %d calibration tokens; results improve up to some 100,000", len(rows) * request.seqlen
        )
    tokens = torch.stack([tokens for tokens, _ in rows]).long()
    if all(mask is None or bool(mask.all()) for _, mask in rows):
        return Calibration(tokens)
    masks = [torch.ones_like(tokens[0]) if mask is None else mask.long() for _, mask in rows]
    return Calibration(tokens, torch.stack(masks))


def _from_part(part: Part, tokenizer: Any, request: Request) -> tuple[Part, _Samples]:
    """The samples of one part; a hub data set is read no further than needed."""
    texts = _local_texts(Path(part.name), part) if Path(part.name).exists() else _hub_texts(part)
    if tokenizer is None:
        raise DataError(
            f"dataset {part.name!r} is text, and the model has no tokenizer; pass one, or token ids"
        )
    rows: Iterable[Tensor] = (_tokens(text, tokenizer, part) for text in texts)
    if part.concat:
        rows = _concatenated(rows, tokenizer, request)
    wanted = part.num or request.nsamples
    return part, _Samples.of(((row, None) for row in rows), request, limit=wanted)


def _tokens(text: Any, tokenizer: Any, part: Part) -> Tensor:
    if isinstance(text, list) or part.chat:
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        if part.system_prompt:
            messages = [{"role": "system", "content": part.system_prompt}, *messages]
        if not tokenizer.chat_template:
            raise DataError(
                f"dataset {part.name!r} needs a chat template, and the tokenizer has none; give plain text"
            )
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def _concatenated(rows: Iterable[Tensor], tokenizer: Any, request: Request) -> Iterable[Tensor]:
    """All samples one after the other, without their BOS and EOS, cut to the wanted length."""
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    held: list[int] = []
    for row in rows:
        ids = row.tolist()
        held += ids[ids[0] in special if ids else 0 : len(ids) - (ids[-1] in special if ids else 0)]
        while len(held) >= request.seqlen:
            yield torch.tensor(held[: request.seqlen])
            held = held[request.seqlen :]


def _local_texts(path: Path, part: Part) -> list[Any]:
    """The texts (or chat message lists) of a local file."""
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            return (
                [piece for piece in re.split(r"\n\s*\n", content) if piece.strip()]
                if not part.concat
                else [content]
            )
        if path.suffix == ".jsonl":
            items: Any = [json.loads(line) for line in content.splitlines() if line.strip()]
        elif path.suffix == ".json":
            items = json.loads(content)
        else:
            raise NotYetError(
                f"dataset {str(path)!r}: kind {path.suffix or 'folder'!r} is not there yet; use .json, .jsonl or .txt"
            )
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise DataError(f"dataset {str(path)!r} cannot be read: {error}") from error
    values = list(items.values()) if isinstance(items, dict) else items
    return [_text_of(item, str(path)) for item in values]


def _text_of(item: Any, where: str) -> Any:
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        if "messages" in item or "conversations" in item:
            return item.get("messages") or item.get("conversations")
        column = next((name for name in TEXT_COLUMNS if isinstance(item.get(name), str)), None)
        if column is None and len(item) == 1:
            return str(next(iter(item.values())))
        if column is not None:
            return item[column]
        raise DataError(
            f"dataset {where}: an item has none of the columns {', '.join(TEXT_COLUMNS)}; it has {', '.join(item)}"
        )
    raise DataError(f"dataset {where}: an item is neither text nor a dict but {type(item).__name__}")


def _hub_texts(part: Part) -> Iterable[Any]:
    looks_local = part.name.startswith((".", "/", "~")) or Path(part.name).suffix in (
        ".json",
        ".jsonl",
        ".txt",
    )
    if looks_local:
        raise DataError(f"dataset {part.name!r}: no such file")
    from datasets import load_dataset

    logger.info("fetching the data set %s", part.name)
    for split in part.split or ("train",):
        try:
            rows = load_dataset(part.name, split=split)
        except (OSError, ValueError) as error:
            raise DataError(
                f"dataset {part.name!r}: no local file, and not to be had from the hub ({str(error).splitlines()[0]}). "
                "Give a local .json, .jsonl or .txt file with --dataset"
            ) from error
        for item in rows:
            yield _text_of(item, part.name)


def _from_objects(dataset: Any, tokenizer: Any) -> Iterable[tuple[Tensor, Tensor | None]]:
    """(tokens, attention mask) of each sample of a list, a DataLoader or any iterable."""
    if not isinstance(dataset, Iterable):
        raise DataError(
            f"dataset must be a name, a file, or an iterable of samples, got {type(dataset).__name__}"
        )
    for item in dataset:
        if isinstance(item, str):
            if tokenizer is None:
                raise DataError(
                    "the data set is text, and the model has no tokenizer; pass one, or token ids"
                )
            yield _tokens(item, tokenizer, Part("list")), None
        elif isinstance(item, Mapping) and "input_ids" not in item:
            yield _tokens(_text_of(item, "list"), tokenizer, Part("list")), None
        else:
            yield from _rows_of(item)


def _rows_of(item: Any) -> Iterable[tuple[Tensor, Tensor | None]]:
    """The samples of one item: a dict with input_ids, a tuple that starts with them, a tensor, or a list of numbers."""
    mask = item.get("attention_mask") if isinstance(item, Mapping) else None
    if isinstance(item, Mapping):
        item = item["input_ids"]
    elif isinstance(item, (tuple, list)) and item and isinstance(item[0], Tensor):
        item = item[0]
    try:
        tokens = torch.as_tensor(item)
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"a calibration sample is no list of token ids: {_kind(item)} ({error})") from error
    if tokens.ndim == 0 or tokens.is_floating_point() or tokens.is_complex():
        raise DataError(f"a calibration sample must be text or whole token ids, got {_kind(item)}")
    masks = None if mask is None else torch.as_tensor(mask).reshape(-1, tokens.shape[-1])
    for index, row in enumerate(tokens.reshape(-1, tokens.shape[-1])):
        yield row, None if masks is None else masks[index]


def _kind(item: Any) -> str:
    """What `item` is, for an error message: "int", "list of float"."""
    if isinstance(item, (list, tuple)) and item:
        return f"{type(item).__name__} of {_kind(item[0])}"
    return f"tensor of {item.dtype}" if isinstance(item, Tensor) else type(item).__name__
