"""tokenizer.json and its companions from the header of a GGUF file: the inverse of `gguf_tokenizer`.

transformers reads such headers too, but cuts words in the manner of GPT-2 wherever it does not know the file's manner.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from auto_round.core.errors import ModelError
from auto_round.models.gguf_tokenizer import BYTE, CONTROL, KNOWN, SPECIAL, UNKNOWN, UNUSED, USER_DEFINED

logger = logging.getLogger("auto_round")
SPACE = "\u2581"  # how SentencePiece writes a space inside a token
SAME_CUTS = {
    "default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "llama-v3.2": "llama-bpe",
    "falcon3": "llama-bpe",
    "pixtral": "llama-bpe", "smaug-bpe": "llama-bpe", "deepseek-r1-qwen": "qwen2", "megrez": "qwen2",
    "starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "codeshell": "smollm", "exaone": "smollm",
    "olmo": "gpt-2", "phi-2": "gpt-2", "jina-es": "gpt-2", "jina-de": "gpt-2", "mpt": "gpt-2", "roberta-bpe": "gpt-2",
    "llama4": "gpt-4o", "gpt3-finnish": "bloom",
}  # fmt: skip
"""Other names of llama.cpp -> the name in `KNOWN` of the same expressions."""

Values = Mapping[str, Any]


def write_tokenizer(values: Values, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json in `folder`, from a header; nothing, and a warning, if it has none.

    Raises ModelError for a header that contradicts itself.
    """
    kind = values.get("tokenizer.ggml.model")
    whole = values.get("tokenizer.huggingface.json")
    if whole is None and kind not in MODELS:
        logger.warning(
            "the file's tokenizer (%s) cannot be made into one of transformers (%s can): going on without, so that "
            "calibration data must be token ids",
            kind or "none",
            ", ".join(MODELS),
        )
        return
    described = json.loads(whole) if isinstance(whole, str) else _described(values)
    (folder / "tokenizer.json").write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
    about = _about(values)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8"
    )


def _about(values: Values) -> dict[str, Any]:
    texts = values.get("tokenizer.ggml.tokens") or []
    found: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in SPECIAL.items():
        number = _number(values, name)
        if number is not None:
            found[key] = texts[number]
    if isinstance(values.get("tokenizer.chat_template"), str):
        found["chat_template"] = values["tokenizer.chat_template"]
    return found


def _number(values: Values, name: str) -> int | None:
    """Number of the special token `name`. Raises ModelError for one that is no token."""
    number = values.get(f"tokenizer.ggml.{name}_token_id")
    if number is None or number == 0xFFFFFFFF:  # llama.cpp's "there is none"
        return None
    count = len(values.get("tokenizer.ggml.tokens") or [])
    if not 0 <= number < count:
        raise ModelError(f"the header says {name} is token {number}, of {count} tokens; the file is damaged")
    return int(number)


def _described(values: Values) -> dict[str, Any]:
    texts = values.get("tokenizer.ggml.tokens") or []
    types = values.get("tokenizer.ggml.token_type") or [1] * len(texts)
    if not texts or len(types) != len(texts):
        raise ModelError(f"the header has {len(texts)} tokens and kinds of {len(types)}; the file is damaged")
    # Rows of the embedding that no token belongs to have texts of their own in a file.
    used = [i for i, kind in enumerate(types) if kind != UNUSED or texts[i] != f"[PAD{i}]"]
    special = {i for i in used if types[i] in (CONTROL, UNKNOWN)}
    added = [
        {"id": i, "content": texts[i], "special": i in special, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
        for i in used if types[i] in (CONTROL, UNKNOWN, USER_DEFINED)
    ]  # fmt: skip
    words = {texts[i]: i for i in used}
    parts = MODELS[str(values["tokenizer.ggml.model"])](values, words, {texts[i]: types[i] for i in used})
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts,
            "post_processor": _post_processor(values, texts)}  # fmt: skip


def _post_processor(values: Values, texts: list[str]) -> dict[str, Any] | None:
    """What puts tokens for beginning and end around a text."""
    # llama.cpp adds the beginning in models of SentencePiece unless the header says otherwise.
    default = {"bos": values.get("tokenizer.ggml.model") == "llama", "eos": False}
    around = {}
    for name in ("bos", "eos"):
        number = _number(values, name)
        if number is not None and values.get(f"tokenizer.ggml.add_{name}_token", default[name]):
            around[name] = {"id": texts[number], "ids": [number], "tokens": [texts[number]]}
    if not around:
        return None
    single: list[Any] = []
    pair: list[Any] = []
    for which, pieces in (("A", [single, pair]), ("B", [pair])):
        kind = int(which == "B")
        sequence: dict[str, Any] = {"Sequence": {"id": which, "type_id": kind}}
        tokens = {n: {"SpecialToken": {"id": one["id"], "type_id": kind}} for n, one in around.items()}
        for piece in pieces:
            piece += [part for part in (tokens.get("bos"), sequence, tokens.get("eos")) if part is not None]
    special = {one["id"]: one for one in around.values()}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _byte_level(values: Values, words: dict[str, int], types: Mapping[str, int]) -> dict[str, Any]:
    """BPE over bytes, cut by the expressions that llama.cpp keeps under the header's name of them."""
    name = str(values.get("tokenizer.ggml.pre") or "default")
    known = SAME_CUTS.get(name, name)
    if known not in KNOWN:
        logger.warning(
            "the file's way of cutting words (%s) is not known here: taking that of gpt-2, so that unusual text may be "
            "tokenized differently. Put the model's own tokenizer.json into the output folder",
            name,
        )
    cuts = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in KNOWN.get(known, KNOWN["gpt-2"])
    ]
    # The spelling of bytes as letters, which takes no part in cutting.
    spelling = {"type": "ByteLevel", "trim_offsets": True, "use_regex": False}
    prefix = bool(values.get("tokenizer.ggml.add_space_prefix", False))
    bytes_ = {**spelling, "add_prefix_space": prefix}
    first = [{"type": "ByteLevel", "trim_offsets": True, "use_regex": True, "add_prefix_space": True}]
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": first if prefix and known == "gpt-2" else [*cuts, bytes_],
        },
        "decoder": {**spelling, "add_prefix_space": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": known == "llama-bpe", "vocab": words,
            "merges": [merge.split(" ") for merge in values.get("tokenizer.ggml.merges") or []],
        },
    }  # fmt: skip


def _sentence_piece(values: Values, words: dict[str, int], types: Mapping[str, int]) -> dict[str, Any]:
    """BPE over characters, unknown ones as bytes; the order of merges is that of the scores of what they make."""
    prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
    scores = values.get("tokenizer.ggml.scores") or [0.0] * (max(words.values()) + 1)
    merges = sorted(
        (-float(scores[index]), index, len(left), left, word[len(left) :])
        for word, index in words.items()
        if len(word) > 1 and types[word] not in (CONTROL, UNKNOWN, BYTE)
        for left in (word[:at] for at in range(1, len(word)))
        if left in words and word[len(left) :] in words
    )
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = _number(values, "unknown")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "unk_token": None if unknown is None else next(w for w, i in words.items() if i == unknown),
            "fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": words,
            "merges": [[left, right] for *_, left, right in merges],
        },
    }  # fmt: skip


def _unigram(values: Values, words: dict[str, int], types: Mapping[str, int]) -> dict[str, Any]:
    """The pieces of most probability."""
    scores = values.get("tokenizer.ggml.scores") or []
    if len(scores) < len(words):
        raise ModelError(
            f"the header has {len(words)} tokens and scores of {len(scores)}; the file is damaged"
        )
    prefix = bool(values.get("tokenizer.ggml.add_space_prefix", True))
    charsmap = values.get("tokenizer.ggml.precompiled_charsmap")
    normalizers: list[dict[str, Any]] = []
    if charsmap:
        encoded = base64.b64encode(bytes(byte & 0xFF for byte in charsmap)).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if values.get("tokenizer.ggml.remove_extra_whitespaces"):
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    marks = {"type": "Metaspace", "replacement": SPACE, "split": True}
    marks["prepend_scheme"] = "always" if prefix else "never"
    by_number = {index: word for word, index in words.items()}
    vocabulary = [[by_number.get(i, f"[PAD{i}]"), float(scores[i])] for i in range(max(by_number) + 1)]
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": marks,
        "decoder": marks,
        "model": {"type": "Unigram", "unk_id": _number(values, "unknown"), "vocab": vocabulary,
                  "byte_fallback": BYTE in types.values()},
    }  # fmt: skip


MODELS = {"gpt2": _byte_level, "llama": _sentence_piece, "t5": _unigram}
"""llama.cpp's name of a kind of tokenizer -> what makes the parts of tokenizer.json that depend on it."""
