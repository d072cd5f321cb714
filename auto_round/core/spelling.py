"""How configurations and users spell data types: "mx_fp", "mx_fp4", "mx_fp_rceil", "nv_fp4_with_static_gs", "fp8_e5m2".

A word says the codec, maybe the bits, its dialect, and the dtype of its scales. A word of no known family is the name
of a codec, so that a new data type needs nothing here.
"""

import re
from typing import NamedTuple


class Word(NamedTuple):
    """What one spelling means; bits 0 when it does not say."""

    dtype: str
    bits: int = 0
    variant: str = ""
    scale_dtype: str = "float16"


# The keys are codecs; no scale_dtype is stored in a configuration where it is the one that stands here.
FAMILIES = {"int": "float16", "mx_fp": "e8m0", "mx_int": "e8m0", "nv_fp": "e4m3", "fp": "bfloat16"}
"""Codec -> dtype of its scales when nothing else is said. FP8 readers keep scales in bfloat16: made in it already."""
E5M3 = "nvfp4_v2"  # upstream's word for FP4 with scales in E5M3
STATIC_GLOBAL = "nv_fp4_with_static_gs"
IRREGULAR = {
    E5M3: Word("nv_fp", 4, "", "e5m3"),
    "nv_fp4_e5m3": Word("nv_fp", 4, "", "e5m3"),
    STATIC_GLOBAL: Word("nv_fp", 4, "static_gs", "e4m3"),
}
USUAL_ELEMENTS = {"e2m1": 4, "e2m3": 6, "e4m3": 8}  # those that so many bits mean when no element is named
REGULAR = re.compile(r"(mx_?fp|mx_?int|nv_?fp|fp|int)_?(\d?)_?(e\dm\d)?_?(rceil)?")


def spelled(text: str) -> Word:
    """What the data type `text` means."""
    word = text.strip().casefold()
    if word in IRREGULAR:
        return IRREGULAR[word]
    found = REGULAR.fullmatch(word)
    if found is None:
        return Word(word, scale_dtype=_usual_scales(word))
    family, bits, element, rounding = found.groups()
    # "mxfp4" and "mx_fp4" are the same word.
    dtype = family if "_" in family else family.replace("mx", "mx_").replace("nv", "nv_")
    width = int(bits or USUAL_ELEMENTS.get(element, 0))
    # Named beside other bits (mx_fp6_e4m3) it stays, so that the codec can refuse it.
    tokens = ["" if USUAL_ELEMENTS.get(element) == width else element, rounding]
    return Word(dtype, width, "_".join(token for token in tokens if token), FAMILIES[dtype])


def spell(dtype: str, bits: int, variant: str, scale_dtype: str) -> str:
    """The word that configurations use, the inverse of `spelled`."""
    if scale_dtype == "e5m3":
        return E5M3
    if variant == "static_gs":
        return STATIC_GLOBAL
    if not variant:
        return dtype
    return f"{dtype}{bits}{variant}" if re.match(r"e\dm\d", variant) else f"{dtype}_{variant}"


def _usual_scales(dtype: str) -> str:
    """Dtype of the scales of codec `dtype`; of no known family, by whether it begins with "mx_" or "nv_"."""
    start = {"mx": "e8m0", "nv": "e4m3"}.get(dtype.partition("_")[0], "float16")
    return FAMILIES.get(dtype, start)


def scale_dtype_of(dtype: str, given: str | None = None, *, run_time: bool = False) -> str:
    """Dtype of the scales of codec `dtype`. Float scales that are made at run time are not stored: float32."""
    usual = given or _usual_scales(dtype)
    # E8M0 and E4M3 scales are part of the number format, so inputs have them at run time as well.
    stored_as_float = _usual_scales(dtype) in ("float16", "bfloat16")
    if run_time:
        return "float32" if stored_as_float else usual
    return _usual_scales(dtype) if stored_as_float else usual
