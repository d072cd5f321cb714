"""q2_k, q3_k, q4_k, q5_k and q6_k of ggml: super-blocks of 256 values, whose groups have integer scales of a float16.

With offsets (q2, q4, q5): fake = (d * s) * code - dmin * m. Without (q3, q6): fake = (d * s) * (code - zero).
Layouts: https://github.com/ggml-org/ggml, ggml-common.h. The search is in `core/fitting.py`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from auto_round.codecs.blocks import BlockCodec
from auto_round.core.fitting import Blocks, Ladder, fit_line, fit_scale, half, quantize_scales, refine
from auto_round.core.quantized import Knobs, Quantized
from auto_round.core.rounding import straight_through
from auto_round.core.scheme import TensorSpec

SUPER = 256
HALF, BYTE = torch.float16, torch.uint8


class KQuant(BlockCodec):
    """What the five types share.

    Parameters: "scale" (B, 1) and "sub_scale" (B, S) for B super-blocks of S groups; with offsets "min" and "sub_min".
    """

    block = SUPER
    sub_scales: ClassVar[tuple[int, int]]  # bounds of s; those of m are the same
    deltas: ClassVar[tuple[float, ...]]
    refits: ClassVar[int] = 2
    rounds: ClassVar[int] = 2

    @classmethod
    def ladder(cls) -> Ladder:
        """The bounds of this type's two-level grid."""
        top = (1 << cls.bits) - 1
        return Ladder(
            blocks=SUPER // cls.group,
            levels=(-cls.zero, top - cls.zero),
            scales=cls.sub_scales,
            offsets=cls.sub_scales if cls.has_low else None,
        )

    def start(self, x: Tensor) -> dict[str, Tensor]:
        """Groups from extreme to extreme, then their scales and offsets rounded against the largest of them."""
        low, high = x.amin(1).clamp(max=0), x.amax(1)  # offsets are stored without a sign: at most 0
        shape = (-1, SUPER // self.group)
        if self.has_low:
            steps = (high - low).clamp(min=0) / self.levels[1]
            found = dict(zip(("min", "sub_min"), _rounded(-low.view(shape), self.sub_scales)))
        else:
            steps = torch.where(high > -low, high, low) / self.levels[0]
            found = {}
        found |= dict(zip(("scale", "sub_scale"), _rounded(steps.view(shape), self.sub_scales)))
        return {name: found[name] for name in self.stored}

    def fit(self, x: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """Each group by itself, then the super-scales, then everything in storage precision."""
        blocks, ladder = Blocks(x, weight), self.ladder()
        low: Tensor | float = 0.0
        if self.has_low:
            scale, low = fit_line(blocks, ladder.levels, deltas=self.deltas, highest=0.0, refits=self.refits)
        else:
            scale = fit_scale(blocks, ladder.levels, deltas=self.deltas, refits=self.refits)
        moments = blocks.moments(blocks.levels(scale, low, ladder.levels))
        # Rounding the scales changes which levels are nearest, so integers are chosen anew on the stored grid.
        grid = refine(blocks, quantize_scales(moments, scale, low, ladder), rounds=self.rounds)
        shape = (-1, ladder.blocks)
        every = {"scale": grid.d.unsqueeze(1), "sub_scale": grid.s.view(shape)}
        if self.has_low:
            every |= {"min": grid.dmin.unsqueeze(1), "sub_min": grid.m.view(shape)}
        return {name: every[name] for name in self.stored}

    def moved(self, params: Mapping[str, Tensor], knobs: Knobs) -> Mapping[str, Tensor]:
        """Factors on the sub-scales and sub-offsets, rounded to integers in their bounds."""
        found = dict(params)
        for knob, name in {"high": "sub_scale", "low": "sub_min"}.items():
            if knob in knobs and name in params:
                wanted = params[name] * knobs[knob].view_as(params[name])
                found[name] = straight_through(torch.round, wanted).clamp(*self.sub_scales)
        return found

    def grid(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Products of super-scales and integers, as ggml multiplies them."""
        step = (params["scale"] * params["sub_scale"]).reshape(-1, 1)
        if not self.has_low:
            return step, None
        return step, -(params["min"] * params["sub_min"]).reshape(-1, 1)

    def results(self, groups: int) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Super-scales, super-offsets, sub-scales and sub-offsets."""
        blocks = groups * self.group // SUPER
        shapes = {"scale": 1, "min": 1, "sub_scale": SUPER // self.group, "sub_min": SUPER // self.group}
        every = {name: torch.empty(blocks, count, dtype=torch.float32) for name, count in shapes.items()}
        return list(every.values()), {name: every[name] for name in self.stored}

    def pack(self, q: Quantized) -> Tensor:
        """Super-blocks in the order of ggml's structures."""
        params = {name: t.view(BYTE) if t.dtype == HALF else t for name, t in q.params.items()}
        parts = self.packed(q.codes.view(-1, SUPER), params)
        return torch.cat(parts, 1).reshape(q.shape[0], -1)

    def unpack(self, packed: Tensor, spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `pack`."""
        codes, params = self.unpacked(packed.reshape(-1, self.nbytes))
        stored = {
            name: params[name].contiguous().view(HALF) if dtype == HALF else params[name].to(dtype)
            for name, dtype in self.stored.items()
        }
        return Quantized(spec=spec, shape=shape, codes=codes.reshape(-1, self.group), params=stored)

    @abstractmethod
    def packed(self, codes: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
        """The bytes of super-blocks (B, ...) by field, from codes (B, 256) and parameters."""

    @abstractmethod
    def unpacked(self, blocks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The inverse of `packed`, from whole blocks (B, nbytes)."""


def _rounded(x: Tensor, bounds: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(super-scale (B, 1) in float16, integers (B, S) within `bounds`) for `x` (B, S)."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    if bounds[0] < 0:
        # The extreme goes to the lower bound, which is one further from zero (-32 against 31).
        scale = half(torch.where(high > -low, high, low) / bounds[0])
    else:
        scale = half(high / bounds[1])
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    return scale, (x * inverse).round().clamp(*bounds)


def _crumbs(codes: Tensor) -> Tensor:
    """The low two bits of codes (B, 256), four to a byte: value l of each 32 of a half shares byte l. (B, 64)."""
    quarters = (codes & 3).view(-1, 2, 4, 32)
    # The bits lie apart, so that the sum is their union.
    return (quarters << _shifts(4, 2).view(1, 1, 4, 1)).sum(2, dtype=BYTE).view(-1, 64)


def _uncrumbs(crumbs: Tensor) -> Tensor:
    """The inverse of `_crumbs`: (B, 64) to (B, 256)."""
    return ((crumbs.reshape(-1, 2, 1, 32) >> _shifts(4, 2).view(1, 1, 4, 1)) & 3).reshape(-1, SUPER)


def _bit_planes(bits: Tensor) -> Tensor:
    """One bit per value (B, 256) as (B, 32): bit j of byte l belongs to value 32 j + l."""
    return (bits.view(-1, 8, 32) << _shifts(8, 1).view(1, 8, 1)).sum(1, dtype=BYTE)


def _from_bit_planes(planes: Tensor) -> Tensor:
    """The inverse of `_bit_planes`: (B, 32) to (B, 256)."""
    return ((planes.reshape(-1, 1, 32) >> _shifts(8, 1).view(1, 8, 1)) & 1).reshape(-1, SUPER)


def _nibbles(codes: Tensor) -> Tensor:
    """The low four bits of codes (B, 256): of each 64, value l and value l + 32 share a byte. (B, 128)."""
    pairs = (codes & 0xF).view(-1, 4, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)


def _unnibbles(nibbles: Tensor) -> Tensor:
    """The inverse of `_nibbles`: (B, 128) to (B, 256)."""
    rows = nibbles.reshape(-1, 4, 32)
    return torch.stack([rows & 0xF, rows >> 4], 2).reshape(-1, SUPER)


def _shifts(count: int, step: int) -> Tensor:
    return (torch.arange(count) * step).to(BYTE)


def _six_bits(s: Tensor, m: Tensor) -> Tensor:
    """Eight pairs of 6-bit numbers in 12 bytes: the first four of each whole, the others in the gaps."""
    # Byte j: s[j] in six bits, above them the top two of s[j + 4]; bytes 4 to 7 alike for m; then the nibbles.
    first, last = s[:, :4] | ((s[:, 4:] >> 4) << 6), m[:, :4] | ((m[:, 4:] >> 4) << 6)
    return torch.cat([first, last, (s[:, 4:] & 0xF) | ((m[:, 4:] & 0xF) << 4)], 1)


def _un_six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_six_bits`: (B, 12) to two (B, 8)."""
    first, last, rest = packed.split(4, 1)
    s = torch.cat([first & 63, (rest & 0xF) | ((first >> 6) << 4)], 1)
    m = torch.cat([last & 63, (rest >> 4) | ((last >> 6) << 4)], 1)
    return s, m


WITH_OFFSETS: Mapping[str, torch.dtype] = {"scale": HALF, "min": HALF, "sub_scale": BYTE, "sub_min": BYTE}
WITHOUT: Mapping[str, torch.dtype] = {"scale": HALF, "sub_scale": torch.int8}


class Q2_K(KQuant):
    """2 bits, 4-bit scales and offsets of 16 values: 2.625 bits per weight."""

    name, bits, group, nbytes, has_low = "q2_k", 2, 16, 84, True
    stored, sub_scales = WITH_OFFSETS, (0, 15)
    deltas = (0.0, -0.3, -0.6, 0.3, 0.6)
    mixtures = ("Q2_K", "Q2_K_S", "Q2_K_MIXED")

    def packed(self, codes: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
        """scales, codes, d, dmin."""
        scales = params["sub_scale"] | (params["sub_min"] << 4)
        return [scales, _crumbs(codes), params["scale"], params["min"]]

    def unpacked(self, blocks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The inverse of `packed`."""
        scales, codes, d, dmin = blocks.split([16, 64, 2, 2], 1)
        params = {"scale": d, "min": dmin, "sub_scale": scales & 0xF, "sub_min": scales >> 4}
        return _uncrumbs(codes), params


class Q3_K(KQuant):
    """3 bits, 6-bit scales of 16 values: 3.4375 bits per weight."""

    name, bits, group, nbytes, zero = "q3_k", 3, 16, 110, 4
    stored, sub_scales = WITHOUT, (-32, 31)
    deltas = (0.0, 0.2, 0.5, 0.8, -0.3)
    mixtures = ("Q3_K_S", "Q3_K_M", "Q3_K_L")

    def packed(self, codes: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
        """third bits, low bits, scales, d."""
        s = (params["sub_scale"] + 32).to(BYTE)  # stored without a sign
        # Byte j: the top two bits of scales j, j + 4, j + 8 and j + 12; before them nibbles of j and j + 8.
        high = ((s >> 4).view(-1, 4, 4) << _shifts(4, 2).view(1, 4, 1)).sum(1, dtype=BYTE)
        scales = torch.cat([(s[:, :8] & 0xF) | ((s[:, 8:] & 0xF) << 4), high], 1)
        return [_bit_planes(codes >> 2), _crumbs(codes), scales, params["scale"]]

    def unpacked(self, blocks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The inverse of `packed`."""
        third, low, nibbles, high, d = blocks.split([32, 64, 8, 4, 2], 1)
        top = ((high.view(-1, 1, 4) >> _shifts(4, 2).view(1, 4, 1)) & 3).reshape(-1, 16)
        s = torch.cat([nibbles & 0xF, nibbles >> 4], 1) | (top << 4)
        return _uncrumbs(low) | (_from_bit_planes(third) << 2), {
            "scale": d,
            "sub_scale": s.to(torch.int8) - 32,
        }


class Q4_K(KQuant):
    """4 bits, 6-bit scales and offsets of 32 values: 4.5 bits per weight."""

    name, bits, group, nbytes, has_low = "q4_k", 4, 32, 144, True
    stored, sub_scales = WITH_OFFSETS, (0, 63)
    deltas = (0.0, -0.6, -1.2, 0.6, 1.2)
    mixtures = ("Q4_K_S", "Q4_K_M")

    def packed(self, codes: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
        """d, dmin, scales, codes."""
        scales = _six_bits(params["sub_scale"], params["sub_min"])
        return [params["scale"], params["min"], scales, _nibbles(codes)]

    def unpacked(self, blocks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The inverse of `packed`."""
        d, dmin, scales, codes = blocks.split([2, 2, 12, 128], 1)
        s, m = _un_six_bits(scales)
        return _unnibbles(codes), {"scale": d, "min": dmin, "sub_scale": s, "sub_min": m}


class Q5_K(KQuant):
    """5 bits, 6-bit scales and offsets of 32 values: 5.5 bits per weight."""

    name, bits, group, nbytes, has_low = "q5_k", 5, 32, 176, True
    stored, sub_scales = WITH_OFFSETS, (0, 63)
    deltas = (0.0, -0.6, -1.2, 0.6, 1.2)
    mixtures = ("Q5_K_S", "Q5_K_M")

    def packed(self, codes: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
        """d, dmin, scales, fifth bits, low bits."""
        scales = _six_bits(params["sub_scale"], params["sub_min"])
        return [params["scale"], params["min"], scales, _bit_planes(codes >> 4), _nibbles(codes)]

    def unpacked(self, blocks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The inverse of `packed`."""
        d, dmin, scales, fifth, low = blocks.split([2, 2, 12, 32, 128], 1)
        s, m = _un_six_bits(scales)
        params = {"scale": d, "min": dmin, "sub_scale": s, "sub_min": m}
        return _unnibbles(low) | (_from_bit_planes(fifth) << 4), params


class Q6_K(KQuant):
    """6 bits, 8-bit scales of 16 values: 6.5625 bits per weight."""

    name, bits, group, nbytes, zero = "q6_k", 6, 16, 210, 32
    stored, sub_scales = WITHOUT, (-128, 127)
    deltas = (0.0, 0.7, 1.5, 2.5, -0.7)

    def packed(self, codes: Tensor, params: Mapping[str, Tensor]) -> list[Tensor]:
        """low bits (of each 128, value l and value l + 64 share a byte), high bits, scales, d."""
        pairs = (codes & 0xF).view(-1, 2, 2, 64)  # other strides than q4 and q5, which go by 32
        low = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
        return [low, _crumbs(codes >> 4), params["sub_scale"].view(BYTE), params["scale"]]

    def unpacked(self, blocks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The inverse of `packed`."""
        low, high, s, d = blocks.split([128, 64, 16, 2], 1)
        pairs = low.reshape(-1, 2, 64)
        codes = torch.stack([pairs & 0xF, pairs >> 4], 2).reshape(-1, SUPER)
        return codes | (_uncrumbs(high) << 4), {"scale": d, "sub_scale": s.contiguous().view(torch.int8)}


ENTRIES = (Q2_K(), Q3_K(), Q4_K(), Q5_K(), Q6_K())
