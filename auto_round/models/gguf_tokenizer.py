"""A tokenizer as GGUF metadata, read off tokenizer.json; and which of llama.cpp's ways of cutting words it has.

llama.cpp keeps regular expressions under names. Which of them a tokenizer needs is found by cutting probe texts with
its own pre-tokenizer and with each of the known ones, so that no list of known tokenizers is needed.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from auto_round.core.errors import ModelError

logger = logging.getLogger("auto_round")

# ruff: noqa: RUF001 - regular expressions and probe texts of many scripts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama_token_type
MEMBERS = ("pretokenizers", "normalizers", "decoders", "processors")  # of a sequence of parts, by its kind
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s|"
SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
HAN = r"[一-龥ࠀ-一가-퟿]+"
DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "dbrx": (LLAMA3,),
    "qwen2": (QWEN2,),
    "smollm": (r"\p{N}", GPT2),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    "bloom": (r" ?[^(\s|.,!?…。，、।۔،)]+",),
    "deepseek-llm": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", HAN, r"\p{N}"),
    "deepseek-v3": (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK_V3),
    "gpt-4o": (CASED % (CONTRACTIONS + "?", CONTRACTIONS + "?") + r"\p{N}{1,3}|" + SLASHED,),
    "tekken": (CASED % ("", "") + r"\p{N}|" + SLASHED,),
}
"""llama.cpp's name -> the expressions that it cuts with, one after the other."""

PROBES = (
    "Hello world! It's 3.14159, isn't it? I'LL SAY 12345678 times.",
    "  two  spaces\tand\ttabs\n\n\nlines \r\n  indented\n    def f(x_1): return x*2 // 3  # ok",
    "Ünïcödé naïve CamelCase XMLHttpRequest straße Ωmega привет мир 你好，世界。 こんにちは 한국어 😀👍🏽",
    'a/b\\c <tag attr="v">$100 + 200 = 300; ~^|`{}[]()...!!!\n/path/to//file 1st 2nd १२३ ½ ²',
    "don't DON'T we've WE'VE   trailing   ",
)


def vocabulary_metadata(folder: Path, config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Key -> value of everything about the tokenizer in `folder`, for an embedding of `rows` rows.

    Raises ModelError when there is no tokenizer.json, when it has more tokens than the embedding, or is of a kind that
    llama.cpp does not have.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: no tokenizer.json, and a gguf file needs its tokenizer. "
            "Save the tokenizer into the model's folder, as save_pretrained of a fast tokenizer does"
        )
    described = _checked(path)
    model = described["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "none")
    if kind not in ("BPE", "Unigram"):
        raise ModelError(
            f"{path}: a tokenizer of kind {kind!r} has no counterpart in llama.cpp here: BPE or Unigram only"
        )
    working = _working(described, path)
    if kind == "Unigram":
        own = _unigram(described)
    else:
        bytes_ = _is_byte_level(described)
        own = _byte_level(working, described, path) if bytes_ else _sentence_piece(described)
    texts, types = _tokens(described, path, rows)
    scores = own.pop("scores", None)
    values = {**own, "tokens": texts, "token_type": types}
    if scores is not None:
        values["scores"] = [float(scores.get(text, -1000.0)) for text in texts]
    values |= _special_tokens(folder, config, described)
    values |= _added_at_the_ends(working, values)
    found = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    template = _chat_template(folder)
    return found if template is None else {**found, "tokenizer.chat_template": template}


def _checked(path: Path) -> dict[str, Any]:
    """The contents of tokenizer.json. Raises ModelError when they are not those of a tokenizer."""
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        model = described["model"]
        vocabulary = model.get("vocab") or {}
        own = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        numbers = [*own, *(token["id"] for token in described.get("added_tokens") or [])]
        if not numbers or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError(f"its vocabulary has {len(numbers)} entries, of which some are no token numbers")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{path} holds no tokenizer ({type(error).__name__}: {error}); download it again, or save it anew"
        ) from error
    return dict(described)


def _working(described: Mapping[str, Any], path: Path) -> Any:
    """The tokenizer itself. Raises ModelError for parts that the installed `tokenizers` does not have."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # the package raises nothing more precise
        parts = {
            "normalizer": tokenizers.normalizers,
            "pre_tokenizer": tokenizers.pre_tokenizers,
            "post_processor": tokenizers.processors,
            "decoder": tokenizers.decoders,
        }
        unknown = [
            f"{key} {part.get('type')!r}"
            for key, module in parts.items()
            for part in _parts(described.get(key))
            if part.get("type") not in dir(module)
        ]
        reason = f"has no {', '.join(unknown)}" if unknown else f"refuses it ({error})"
        raise ModelError(
            f"{path}: tokenizers {tokenizers.__version__} {reason}. Install the version that the tokenizer was made "
            "with, or save it anew"
        ) from error


def _tokens(described: Mapping[str, Any], path: Path, rows: int) -> tuple[list[str], list[int]]:
    """(text, kind) of every row of the embedding."""
    model = described["model"]
    vocabulary = model["vocab"]
    if not isinstance(vocabulary, dict):
        vocabulary = {text: index for index, (text, _) in enumerate(vocabulary)}
    added = {token["id"]: token for token in described.get("added_tokens", [])}
    most = max([*vocabulary.values(), *added], default=-1) + 1
    if most > rows:
        raise ModelError(
            f"{path}: {most} tokens, but the model's embedding has {rows} rows. "
            "Is the tokenizer the model's own? Resize the embedding, or leave the added tokens out"
        )
    # Embeddings are often padded to a round size; llama.cpp wants a token for each row.
    texts = [f"[PAD{index}]" for index in range(rows)]
    types = [UNUSED] * rows
    bytes_ = model.get("byte_fallback") or False
    for text, index in vocabulary.items():
        texts[index] = text
        types[index] = (
            BYTE if bytes_ and _is_byte(text) else UNKNOWN if text == model.get("unk_token") else NORMAL
        )
    for index, token in added.items():
        texts[index] = token["content"]
        if types[index] != UNKNOWN:  # which is special too, but has a kind of its own
            types[index] = CONTROL if token.get("special") else USER_DEFINED
    return texts, types


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _is_byte_level(described: Mapping[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(described.get("pre_tokenizer")))


def _parts(described: Any) -> Iterator[Mapping[str, Any]]:
    """The members of a pre-tokenizer, normalizer, decoder or post-processor, which may be a sequence of them."""
    if described is None:
        return
    inner = next((described[key] for key in MEMBERS if key in described), None)
    if inner is None:
        yield described
        return
    for part in inner:
        yield from _parts(part)


def _merges(model: Mapping[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _byte_level(working: Any, described: Mapping[str, Any], path: Path) -> dict[str, Any]:
    model = described["model"]
    prefix = any(part.get("add_prefix_space") for part in _parts(described.get("pre_tokenizer")))
    return {
        "model": "gpt2",
        "pre": pre_tokenizer(working.pre_tokenizer, described, str(path)),
        "merges": _merges(model),
        **({"add_space_prefix": True} if prefix else {}),
    }


def pre_tokenizer(own: Any, described: Mapping[str, Any], where: str) -> str:
    """llama.cpp's name of the way in which `own` cuts words; the nearest one, and a warning, if there is none."""
    from tokenizers import Regex, pre_tokenizers

    expected = [_pieces(own, probe) for probe in PROBES]
    agreeing: dict[str, int] = {}
    for name, expressions in KNOWN.items():
        cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
        ours = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        agreeing[name] = sum(_pieces(ours, probe) == want for probe, want in zip(PROBES, expected))
    if described["model"].get("ignore_merges"):
        agreeing["dbrx"] -= 1  # cuts like llama-bpe, and never takes whole words from the vocabulary first
    else:
        agreeing["llama-bpe"] -= 1
    best = max(agreeing, key=lambda name: agreeing[name])
    if agreeing[best] < len(PROBES):
        logger.warning(
            "%s: llama.cpp cannot cut words exactly like this tokenizer; taking %r, which agrees on %d of %d probe "
            "texts, so that unusual text may be tokenized differently",
            where,
            best,
            agreeing[best],
            len(PROBES),
        )
    return best


def _pieces(cutter: Any, text: str) -> list[str]:
    return [piece for piece, _ in cutter.pre_tokenize_str(text)]


def _sentence_piece(described: Mapping[str, Any]) -> dict[str, Any]:
    """BPE over characters with byte fallback: what SentencePiece calls BPE. A piece's score is its merge's rank."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(_merges(described["model"])):
        # Earlier merges first, which is what a higher score means to llama.cpp.
        scores.setdefault(merge.replace(" ", "", 1) if merge[0] != " " else merge, -float(rank + 1))
    single = {text: -float(len(scores) + 1) for text in described["model"]["vocab"] if text not in scores}
    return {
        "model": "llama",
        "pre": "default",
        "scores": {**single, **scores},
        "add_space_prefix": _adds_space(described),
    }


def _adds_space(described: Mapping[str, Any]) -> bool:
    """Whether a text gets a leading space."""
    if any(part["type"] == "Prepend" for part in _parts(described.get("normalizer"))):
        return True
    marks = [part for part in _parts(described.get("pre_tokenizer")) if part["type"] == "Metaspace"]
    return any(
        m.get("prepend_scheme", "always") != "never" and m.get("add_prefix_space", True) for m in marks
    )


def _unigram(described: Mapping[str, Any]) -> dict[str, Any]:
    maps = [
        p["precompiled_charsmap"] for p in _parts(described.get("normalizer")) if p["type"] == "Precompiled"
    ]
    values: dict[str, Any] = {
        "model": "t5",
        "pre": "default",
        "scores": dict(described["model"]["vocab"]),
        "add_space_prefix": _adds_space(described),
        "remove_extra_whitespaces": any(
            part["type"] == "Replace" and "{2,}" in str(part.get("pattern"))
            for part in _parts(described.get("normalizer"))
        ),
    }
    if maps and maps[0]:
        values["precompiled_charsmap"] = list(base64.b64decode(maps[0]))
    return values


def _special_tokens(folder: Path, config: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of the tokens for beginning, end, unknown and padding."""
    ids = {token["content"]: token["id"] for token in described.get("added_tokens", [])}
    vocabulary = described["model"]["vocab"]
    if isinstance(vocabulary, dict):
        ids = {**vocabulary, **ids}
    named = {**_read(folder / "special_tokens_map.json"), **_read(folder / "tokenizer_config.json")}
    found = {}
    for name, key in SPECIAL.items():
        token = named.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        number = ids.get(text) if text else None
        if number is None and name in ("bos", "eos"):
            # Tokenizers may leave it out where the model's configuration says it.
            number = config.get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) else number
        if number is not None:
            found[f"{name}_token_id"] = int(number)
    return found


def _added_at_the_ends(working: Any, values: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the tokenizer puts its token for the beginning, or the end, around a text."""
    # Found by trying: what adds the tokens is a template of one of several kinds.
    ids = working.encode("a").ids
    bos, eos = values.get("bos_token_id"), values.get("eos_token_id")
    return {
        "add_bos_token": bool(ids) and bos is not None and ids[0] == bos,
        "add_eos_token": len(ids) > 1 and eos is not None and ids[-1] == eos,
    }


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = _read(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
