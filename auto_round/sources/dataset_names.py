"""Data sets known by name: where they are, which splits they have, and which columns make a text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """One data set. columns: what makes a text, joined by newlines; () for the usual columns and chat messages.

    hub, modelscope: ids; None where it is not to be had. configs: variants that are all read. splits: the default ones.
    large: streamed, never downloaded as a whole.
    """

    names: tuple[str, ...]
    language: str
    hub: str | None
    modelscope: str | None = None
    configs: tuple[str | None, ...] = (None,)
    splits: tuple[str, ...] = ("train",)
    columns: tuple[str, ...] = ()
    large: bool = False


DEFAULT_DATASET = "NeelNanda/pile-10k"  # upstream's default, too


def name_of(dataset: object) -> str:
    """What a file says about its data: their name, or what kind of object they were given as."""
    if dataset is None:
        return DEFAULT_DATASET
    return dataset if isinstance(dataset, str) else type(dataset).__name__


KNOWN = (
    Known(
        names=("NeelNanda/pile-10k", "pile-10k"),
        language="English, code",
        hub="NeelNanda/pile-10k",
        columns=("text",),
    ),
    Known(
        names=("swift/pile-val-backup", "pile-val-backup"),
        language="English, code",
        hub=None,
        modelscope="swift/pile-val-backup",
        splits=("validation",),
        columns=("text",),
    ),
    Known(
        names=("mit-han-lab/pile-val-backup",),
        language="English, code",
        hub="mit-han-lab/pile-val-backup",
        modelscope="swift/pile-val-backup",
        splits=("validation",),
        columns=("text",),
    ),
    Known(
        names=("BAAI/CCI3-HQ", "CCI3-HQ"),
        language="Chinese",
        hub="BAAI/CCI3-HQ",
        modelscope="BAAI/CCI3-HQ",
        columns=("text",),
        large=True,
    ),
    Known(
        names=("codeparrot/github-code-clean", "github-code-clean"),
        language="code",
        hub="codeparrot/github-code-clean",
        configs=("all-mit", "all-apache-2.0"),
        columns=("code",),
        large=True,
    ),
    Known(
        names=("nvidia/OpenCodeInstruct", "OpenCodeInstruct", "opencode-instruct"),
        language="code, instructions",
        hub="nvidia/OpenCodeInstruct",
        columns=("input", "output"),
        large=True,
    ),
    Known(
        names=("HuggingFaceH4/ultrachat_200k", "ultrachat_200k"),
        language="English, chat",
        hub="HuggingFaceH4/ultrachat_200k",
        modelscope="HuggingFaceH4/ultrachat_200k",
        splits=("train_sft",),
        columns=("messages",),
    ),
    Known(
        names=("openbmb/Ultra-FineWeb", "Ultra-FineWeb"),
        language="English (split en), Chinese (split zh)",
        hub="openbmb/Ultra-FineWeb",
        modelscope="OpenBMB/Ultra-FineWeb",
        splits=("en",),
        columns=("content",),
        large=True,
    ),
    Known(
        names=("HuggingFaceFW/fineweb-edu", "fineweb-edu"),
        language="English",
        hub="HuggingFaceFW/fineweb-edu",
        modelscope="AI-ModelScope/fineweb-edu",
        configs=("sample-10BT",),
        columns=("text",),
        large=True,
    ),
    Known(
        names=("madao33/new-title-chinese", "new-title-chinese"),
        language="Chinese",
        hub="madao33/new-title-chinese",
        columns=("content",),
    ),
    Known(
        names=("google-research-datasets/mbpp", "mbpp"),
        language="code, instructions",
        hub="google-research-datasets/mbpp",
        columns=("text", "code"),
    ),
)


def known(name: str) -> Known | None:
    """The data set called `name`, in any case, or None."""
    return next((one for one in KNOWN if name.casefold() in {n.casefold() for n in one.names}), None)
