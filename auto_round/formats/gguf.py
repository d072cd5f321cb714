"""GGUF, one file for llama.cpp: its types, and the mixtures in which some tensors get more bits than the others.

The mixtures are llama.cpp's (its quantizer's choice by tensor name; docs/gguf.md has them in words). The file itself is
written by `jobs/gguf_export.py`; names of tensors come from `models/gguf_names.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from auto_round.codecs.base import codec_of, codecs
from auto_round.codecs.blocks import BlockCodec
from auto_round.core.errors import FormatError
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import FLOAT, Scheme, TensorSpec
from auto_round.formats.base import Format, Provenance
from auto_round.models.gguf_metadata import block_count, language_config
from auto_round.models.gguf_names import Names, architecture_of, first, heads, kv_heads


@dataclass(frozen=True, slots=True)
class Site:
    """What the choice of a tensor's type depends on. index: its block; grouped: query heads per key head."""

    part: str
    index: int
    blocks: int
    grouped: int
    experts: int
    falcon: bool

    def early(self, share: int) -> bool:
        """Whether the block is in the first 1 / share of all."""
        return self.index < self.blocks // share

    def more_bits(self) -> bool:
        """The blocks that a mixture M favours: the first and last eighth, and every third between."""
        eighth = self.blocks // 8
        return self.early(8) or self.index >= 7 * self.blocks // 8 or (self.index - eighth) % 3 == 2


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors `parts` get the type `type` where `when` holds; `why` completes "... because"."""

    parts: tuple[str, ...]
    type: str
    why: str
    when: Callable[[Site], bool] = lambda site: True


VALUES = ("attn_v", "attn_kv_b", "attn_qkv")  # or what they are part of
DOWN = ("ffn_down", "ffn_down_exps", "ffn_down_shexp")
OUTPUT = ("attn_output",)
EIGHT_EXPERTS = (
    Rule((*VALUES, "attn_k"), "q8_0", "with 8 experts, keys and values are small", lambda s: s.experts == 8),
)
EIGHT_OUTPUT = Rule(
    OUTPUT, "q5_k", "with 8 experts, attention outputs are small", lambda s: s.experts == 8 and not s.falcon
)
FAVOURED = "favoured block: first and last eighth, and every third between"


def _early(parts: tuple[str, ...], type_: str, share: int) -> Rule:
    return Rule(parts, type_, f"block among the first 1/{share}", lambda s: s.early(share))


RULES: Mapping[str, tuple[Rule, ...]] = {
    "q2_k": (
        *EIGHT_EXPERTS,
        EIGHT_OUTPUT,
        Rule(VALUES, "q4_k", "values shared by 4 or more query heads", lambda s: s.grouped >= 4),
        Rule(VALUES, "q3_k", "values of attention"),
        Rule(DOWN, "q3_k", "down projection"),
        Rule(OUTPUT, "q3_k", "attention output", lambda s: not s.falcon),
    ),
    "q2_k_s": (
        *EIGHT_EXPERTS,
        Rule(VALUES, "q4_k", "values shared by 4 or more query heads", lambda s: s.grouped >= 4),
        _early(DOWN, "q4_k", 8),
    ),
    "q3_k_s": (*EIGHT_EXPERTS, EIGHT_OUTPUT),
    "q3_k_m": (
        *EIGHT_EXPERTS,
        EIGHT_OUTPUT,
        Rule(VALUES, "q5_k", "values of the first two blocks", lambda s: s.index < 2),
        Rule(VALUES, "q4_k", "values of attention"),
        _early(DOWN, "q5_k", 16),
        Rule(DOWN, "q4_k", "down projection", lambda s: not s.falcon or s.more_bits()),
        Rule(OUTPUT, "q4_k", "attention output", lambda s: not s.falcon),
    ),
    "q3_k_l": (
        *EIGHT_EXPERTS,
        Rule(VALUES, "q5_k", "values of attention"),
        Rule(DOWN, "q4_k", "down projection of Falcon", lambda s: s.falcon),
        Rule(DOWN, "q5_k", "down projection"),
        Rule(OUTPUT, "q4_k", "attention output of Falcon", lambda s: s.falcon),
        Rule(OUTPUT, "q3_k", "with 8 experts, as most", lambda s: s.experts == 8),
        Rule(OUTPUT, "q5_k", "attention output"),
    ),
    "q4_k_s": (
        *EIGHT_EXPERTS,
        EIGHT_OUTPUT,
        Rule(VALUES, "q5_k", "values of the first four blocks", lambda s: s.index < 4),
        Rule(DOWN, "q5_k", "block among the first 1/8", lambda s: s.early(8) and not s.falcon),
    ),
    "q4_k_m": (
        *EIGHT_EXPERTS,
        EIGHT_OUTPUT,
        Rule(VALUES, "q6_k", FAVOURED, Site.more_bits),
        Rule(DOWN, "q6_k", "block of Falcon among the first 1/16", lambda s: s.falcon and s.early(16)),
        Rule(DOWN, "q5_k", FAVOURED, lambda s: s.falcon and s.more_bits()),
        Rule(DOWN, "q6_k", FAVOURED, lambda s: not s.falcon and s.more_bits()),
    ),
    "q5_k_s": EIGHT_EXPERTS,
    "q5_k_m": (
        *EIGHT_EXPERTS,
        Rule(VALUES, "q6_k", FAVOURED, Site.more_bits),
        Rule(DOWN, "q6_k", FAVOURED, Site.more_bits),
    ),
    "q6_k": EIGHT_EXPERTS,
    "q4_0": (*EIGHT_EXPERTS, _early(DOWN, "q4_1", 8)),
    "q4_1": EIGHT_EXPERTS,
    "q5_0": (*EIGHT_EXPERTS, _early(DOWN, "q5_1", 8)),
    "q5_1": EIGHT_EXPERTS,
}
"""First rule that applies; a tensor without one gets the mixture's own type."""

DEFAULTS = {
    "q2_k": ("q2_k", 10), "q2_k_s": ("q2_k", 21), "q2_k_mixed": ("q2_k", 21),
    "q3_k_s": ("q3_k", 11), "q3_k_m": ("q3_k", 12), "q3_k_l": ("q3_k", 13),
    "q4_k_s": ("q4_k", 14), "q4_k_m": ("q4_k", 15), "q5_k_s": ("q5_k", 16), "q5_k_m": ("q5_k", 17),
    "q6_k": ("q6_k", 18), "q4_0": ("q4_0", 2), "q4_1": ("q4_1", 3), "q5_0": ("q5_0", 8), "q5_1": ("q5_1", 9),
    "q8_0": ("q8_0", 7), "f16": (None, 1), "bf16": (None, 32),
}  # fmt: skip
"""Mixture -> type of most tensors (None: floating point), and llama.cpp's number of it (llama_ftype)."""

NARROW = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""What rows that are no multiple of 256 get instead."""

BY_BITS = {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}
"""Type for a number of bits in `layer_config`."""


@dataclass(frozen=True)
class GGUF(Format):
    """One mixture."""

    name: str
    mixture: str
    file_type: int
    scheme: Scheme | None
    whole_model: bool = True
    merged: bool = False

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Block types only, in rows of whole blocks."""
        spec = scheme.weight
        if scheme.act is not None:
            return f"{self.name} quantizes no inputs, got {scheme.act}. Leave act_bits at 16"
        if spec is None:
            return None
        codec = codecs().get(spec.dtype)
        if not isinstance(codec, BlockCodec):
            return f"{self.name} stores {', '.join(block_types())} only, got {spec}. Use another format"
        return codec.rejects_row(shape[1])

    def adapt(self, plan: Plan, config: Mapping[str, Any]) -> Plan:
        """The mixture: every tensor its type, with the reason when it is not the usual one.

        Layers that `layer_config` names keep what it says, as far as there is such a type. Raises ModelError for an
        architecture that llama.cpp does not know, FormatError for a scheme that it cannot hold.
        """
        mixture, notes = self._mixture(plan, config)
        plan, changes = plan.noted(*notes), dict[str, dict[str, Scheme | None]]()
        for name, site in _sites(plan, language_config(config)).items():
            # A reason in the plan means that somebody chose: the mixture has no say there.
            chosen, why = _asked_for(name, plan) if name in plan.why else self._choose(site, mixture, plan)
            if plan[name].weight is None or chosen is None:
                continue
            chosen, narrow = _fitting(chosen, plan.shapes[name][1])
            scheme = FLOAT if chosen is None else _scheme(chosen)
            if scheme != plan[name]:
                reason = "; ".join(part for part in (why, narrow) if part)
                changes.setdefault(reason or f"{self.mixture} has {chosen} here", {})[name] = scheme
        for reason, layers in changes.items():
            plan = plan.override(layers, reason)
        return plan

    def _mixture(self, plan: Plan, config: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        if self.mixture != "q2_k_mixed" or _experts(config):
            return self.mixture, ()
        return "q2_k_s", (
            f"{self.name} is meant for models with experts; this one has none and gets gguf:q2_k_s",
        )

    def _choose(self, site: Site, mixture: str, plan: Plan) -> tuple[str | None, str]:
        usual = DEFAULTS[mixture][0]
        if usual is None:
            return None, ""
        if mixture == "q2_k_mixed":
            if site.part in ("output", "token_embd"):
                return "q8_0", "embedding or output head"
            if site.part.endswith("_exps"):
                return "q2_k", "expert"
            mixture, usual = "q4_k_s", "q4_k"
        if site.part == "output" and usual != "q8_0":
            return ("q8_0", "output head of Falcon") if site.falcon else ("q6_k", "output head")
        for rule in RULES.get(mixture, ()):
            if site.part in rule.parts and rule.when(site):
                return rule.type, f"{self.name}: {rule.why}"
        return usual, ""

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """The bytes of the layer's rows, (O, bytes of a row) uint8."""
        codec = codec_of(q.spec)
        assert isinstance(codec, BlockCodec), f"{q.spec} was refused"
        return {"weight": codec.pack(q)}

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `write`."""
        codec = codec_of(spec)
        assert isinstance(codec, BlockCodec), f"{spec} was refused"
        return codec.unpack(tensors["weight"], spec, shape)

    def config(self, plan: Plan, provenance: Provenance) -> None:
        """None: everything is in the file."""
        return None

    def remarks(self, plan: Plan) -> Iterator[str]:
        """How many layers had to take another type because of their width."""
        narrow = [name for name in plan if "no multiple of 256" in plan.why.get(name, "")]
        if narrow:
            yield (
                f"{self.name}: rows of {len(narrow)} layers, such as {narrow[0]}, are no multiple of 256 and take a "
                "larger type of 32 values instead"
            )


def block_types() -> list[str]:
    """Names of the types that a file may hold."""
    return [name for name, codec in codecs().items() if isinstance(codec, BlockCodec)]


def _scheme(type_: str) -> Scheme:
    codec = codecs()[type_]
    assert isinstance(codec, BlockCodec), f"{type_} is a block type"
    return Scheme(weight=codec.spec())


def _fitting(type_: str, columns: int) -> tuple[str | None, str]:
    """`type_`, or what rows of `columns` values get instead (None: floating point), and why."""
    if columns % 32:
        return None, f"rows of {columns} are no multiple of 32"
    if columns % 256 and type_ in NARROW:  # super-blocks of 256 values never run over the end of a row
        return NARROW[type_], f"rows of {columns} are no multiple of 256: {NARROW[type_]} instead of {type_}"
    return type_, ""


def _asked_for(name: str, plan: Plan) -> tuple[str | None, str]:
    """The type for a layer whose scheme the user chose."""
    spec = plan[name].weight
    if spec is None:
        return None, ""
    codec = codecs().get(spec.dtype)
    if isinstance(codec, BlockCodec) and codec.bits == spec.bits:
        return spec.dtype, plan.why[name]
    if spec.bits not in BY_BITS or not (isinstance(codec, BlockCodec) or spec.dtype == "int"):
        raise FormatError(
            f"{name}: gguf has no type for {spec} ({plan.why[name]}). "
            f"Give it one of {', '.join(block_types())} as data_type, or bits {', '.join(map(str, BY_BITS))} or 16"
        )
    return BY_BITS[spec.bits], f"{plan.why[name]}: {BY_BITS[spec.bits]} for {spec.bits} bits"


def _experts(config: Mapping[str, Any]) -> int:
    return int(first(config, "num_local_experts", "num_experts", "n_routed_experts", default=0))


def _sites(plan: Plan, config: Mapping[str, Any]) -> dict[str, Site]:
    """Layer -> what its type depends on. Raises ModelError for a layer that the architecture has no tensor for."""
    architecture, blocks = architecture_of(config), block_count(config)
    names = Names(architecture, blocks)
    tied = bool(config.get("tie_word_embeddings"))
    found = {}
    for layer in plan:
        place = names.place(f"{layer}.weight")
        assert place is not None, "a layer is no buffer"
        parts = place.name.split(".")
        part = parts[-2] if len(parts) > 1 else place.name
        found[layer] = Site(
            # llama.cpp multiplies by a tied embedding as the head, so its choice is the head's.
            part="output" if part == "token_embd" and tied else part,
            index=int(parts[1]) if parts[0] == "blk" else 0,
            blocks=blocks,
            # Values that many queries share are few, so that more bits for them cost little.
            grouped=heads(config) // kv_heads(config),
            experts=_experts(config),
            falcon=architecture.name == "falcon",
        )
    return found


ENTRIES = tuple(
    GGUF(
        name=f"gguf:{mixture}",
        mixture=mixture,
        file_type=number,
        scheme=FLOAT if usual is None else _scheme(usual),
    )
    for mixture, (usual, number) in DEFAULTS.items()
)
