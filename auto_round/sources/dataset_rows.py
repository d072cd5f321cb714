"""From stored samples to token ids: which columns hold the text, chat messages through the template, concatenation."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from auto_round.core.errors import DataError
from auto_round.sources.dataset_spec import Part

logger = logging.getLogger("auto_round")

Row = tuple[Tensor, Tensor | None]
"""Token ids (T,) and the attention mask (T,), None when nothing is padding."""

MESSAGES = ("messages", "conversations", "conversation", "chat")
TEXT_COLUMNS = (
    "text",
    "content",
    "code",
    "prompt",
    "question",
    "instruction",
    "input",
    "sentence",
    "article",
)
ANSWERS = {
    "text": ("code",),
    "prompt": ("response", "completion", "chosen"),
    "question": ("answer", "response"),
    "instruction": ("output", "response"),
    "input": ("output",),
}
"""Columns that go on where a text column ends."""
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


def rows_of(items: Iterable[Any], tokenizer: Any, part: Part, seqlen: int) -> Iterator[Row]:
    """The token ids of each item, read as they are asked for; with `part.concat`, of all of them together, cut."""
    rows = (row for item in items for one in _apart(item) for row in _rows(one, tokenizer, part))
    return _concatenated(rows, tokenizer, seqlen) if part.concat else rows


def _apart(item: Any) -> Iterable[Any]:
    """The samples of a batch of texts, or of a dict of them, as a DataLoader makes it; else the item itself."""
    if _is_texts(item):
        return item
    if isinstance(item, Mapping) and any(_is_texts(item.get(name)) for name in TEXT_COLUMNS):
        batches = {key: value for key, value in item.items() if _is_texts(value)}
        return [dict(zip(batches, values, strict=True)) for values in zip(*batches.values(), strict=True)]
    return [item]


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(text, str) for text in value)


def _rows(item: Any, tokenizer: Any, part: Part) -> Iterator[Row]:
    if isinstance(item, Mapping) and isinstance(item.get("input_ids"), str):
        item = item["input_ids"]
    elif isinstance(item, Mapping) and "input_ids" not in item:
        item = _content(item, part)
    if isinstance(item, str) or _is_chat(item):
        yield _tokenized(item, tokenizer, part), None
    else:
        yield from _ids(item)


def _content(item: Mapping[str, Any], part: Part) -> Any:
    """The text of an item, or its chat messages."""
    chat = next((item[key] for key in MESSAGES if _is_chat(item.get(key))), None)
    if chat is not None:
        return chat
    column = next((name for name in TEXT_COLUMNS if isinstance(item.get(name), str)), None)
    if column is None and len(item) == 1:
        return str(next(iter(item.values())))
    if column is None:
        raise DataError(
            f"dataset {part.name}: an item has none of the columns {', '.join((*TEXT_COLUMNS, *MESSAGES))}; "
            f"it has {', '.join(item)}"
        )
    question, answer = item[column], next((item.get(name) for name in ANSWERS.get(column, ())), None)
    # Alpaca's three columns: the input belongs to the question.
    if column == "instruction" and item.get("input"):
        question = f"{question}\n{item['input']}"
    if not isinstance(answer, str):
        return question
    if part.chat:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return f"{question}\n{answer}"


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple)) and bool(value) and all(isinstance(turn, Mapping) for turn in value)
    )


def _messages(turns: Iterable[Mapping[str, Any]], part: Part) -> list[dict[str, str]]:
    """Turns as {"role", "content"}, whichever of the two usual spellings they have."""
    found = []
    for turn in turns:
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, str):
            raise DataError(
                f"dataset {part.name}: a chat turn needs role and content (or from and value), it has {', '.join(turn)}"
            )
        found.append({"role": ROLES.get(role, role), "content": content})
    if part.system_prompt is not None:
        found = [
            {"role": "system", "content": part.system_prompt},
            *(m for m in found if m["role"] != "system"),
        ]
    return found


def _tokenized(item: Any, tokenizer: Any, part: Part) -> Tensor:
    if tokenizer is None:
        raise DataError(
            f"dataset {part.name!r} is text, and the model has no tokenizer; pass one, or token ids"
        )
    if not isinstance(item, str) or part.chat:
        turns = _messages([{"role": "user", "content": item}] if isinstance(item, str) else item, part)
        # Turns that are no string cannot be tokenized as they are, so a template is used even unasked.
        if tokenizer.chat_template:
            item = tokenizer.apply_chat_template(turns, tokenize=False)
        elif part.chat:
            raise DataError(
                f"dataset {part.name!r}: apply_chat_template, but the tokenizer has no chat template; leave it out"
            )
        else:
            item = "\n\n".join(turn["content"] for turn in turns)
    # Not verbose: tokenizers warn of texts longer than the model takes, and these are cut anyway.
    return torch.tensor(tokenizer(item, verbose=False)["input_ids"], dtype=torch.int64)


def _concatenated(rows: Iterable[Row], tokenizer: Any, seqlen: int) -> Iterator[Row]:
    """All samples one after the other, without their BOS and EOS, cut to the wanted length."""
    # Inside a sample that is cut anywhere, marks of a text's ends would say something untrue.
    special = set() if tokenizer is None else {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    held: list[int] = []
    for tokens, mask in rows:
        ids = (tokens if mask is None else tokens[mask.bool()]).tolist()
        held += ids[ids[0] in special if ids else 0 : len(ids) - (ids[-1] in special if ids else 0)]
        while len(held) >= seqlen:
            yield torch.tensor(held[:seqlen]), None
            held = held[seqlen:]
    if held:
        # Too short, and dropped with its length, so that a message can say what would do.
        yield torch.tensor(held), None


def _ids(item: Any) -> Iterator[Row]:
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
