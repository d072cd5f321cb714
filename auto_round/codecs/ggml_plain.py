"""q4_0, q4_1, q5_0, q5_1 and q8_0 of ggml: blocks of 32 values with a float16 scale, and an offset in the types "_1".

A block's bytes are its parameters, the fifth bits of its codes (q5), then its codes; value i and value i + 16 share a
byte, the first in its low half (layouts: https://github.com/ggml-org/ggml, ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from auto_round.codecs.blocks import BlockCodec
from auto_round.core.fitting import Blocks, fit_line, fit_scale, half, settled_line, settled_scale
from auto_round.core.quantized import Knobs, Quantized
from auto_round.core.rounding import cast_to_storage
from auto_round.core.scheme import TensorSpec

HALF = torch.float16


class Plain(BlockCodec):
    """What the five types share: parameters "scale" and, with offsets, "offset", both (G, 1) float16."""

    group = block = 32
    deltas: ClassVar[tuple[float, ...]]

    def start(self, x: Tensor) -> dict[str, Tensor]:
        """The extreme value at the end of the levels that reaches further; with offsets, both extremes."""
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        if self.has_low:
            return {"scale": half((high - low) / self.levels[1]), "offset": half(low)}
        # The lower end reaches one further (-8 against 7), so that is where the extreme goes, with the scale's sign.
        return {"scale": half(torch.where(high > -low, high, low) / self.levels[0])}

    def fit(self, x: Tensor, weight: Tensor | None) -> dict[str, Tensor]:
        """A sweep of ranges, least squares, then least squares again in float16."""
        blocks = Blocks(x, weight)
        if not self.has_low:
            scale = fit_scale(blocks, self.levels, deltas=self.deltas, refits=1)
            return {"scale": settled_scale(blocks, scale, self.levels).unsqueeze(1)}
        line = fit_line(blocks, self.levels, deltas=self.deltas, highest=None, refits=2)
        scale, low = settled_line(blocks, *line, self.levels)
        return {"scale": scale.unsqueeze(1), "offset": low.unsqueeze(1)}

    def moved(self, params: Mapping[str, Tensor], knobs: Knobs) -> Mapping[str, Tensor]:
        """Factors on the float16 parameters, rounded to float16."""
        names = {"high": "scale", "low": "offset"}
        found = dict(params)
        for knob, name in names.items():
            if knob in knobs and name in params:
                found[name] = cast_to_storage(params[name] * knobs[knob], HALF)
        return found

    def grid(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The parameters themselves."""
        return params["scale"], params.get("offset")

    def even_grid(self, step: Tensor, low: Tensor, spec: TensorSpec) -> Knobs:
        """{"scale"} and, with offsets, {"offset"}, in float16."""
        return {"scale": half(step), **({"offset": half(low)} if self.has_low else {})}

    def results(self, groups: int) -> tuple[list[Tensor | None], dict[str, Tensor]]:
        """Scale and, with offsets, offset of each group."""
        named = {name: torch.empty(groups, 1, dtype=torch.float32) for name in self.stored}
        return [named["scale"], named.get("offset")], named

    def pack(self, q: Quantized) -> Tensor:
        """Parameters, high bits, nibbles (or the signed bytes of q8_0)."""
        parts = [q.params[name].view(torch.uint8) for name in self.stored]
        if self.bits == 5:
            # Bit i of these four bytes, counted from the first, is the fifth bit of value i.
            weights = (2 ** torch.arange(8)).to(torch.uint8)
            parts.append((((q.codes >> 4) & 1).view(-1, 4, 8) * weights).sum(2, dtype=torch.uint8))
        if self.bits == 8:
            parts.append(q.codes - self.zero)  # wraps around: the two's complement of the level
        else:
            nibbles = q.codes & 0xF
            parts.append(nibbles[:, :16] | (nibbles[:, 16:] << 4))
        return torch.cat(parts, 1).reshape(q.shape[0], -1)

    def unpack(self, packed: Tensor, spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """The inverse of `pack`."""
        blocks = packed.reshape(-1, self.nbytes)
        params = {
            name: blocks[:, 2 * i : 2 * i + 2].contiguous().view(HALF) for i, name in enumerate(self.stored)
        }
        rest = blocks[:, 2 * len(params) :]  # after a float16 per parameter
        if self.bits == 8:
            return Quantized(spec=spec, shape=shape, codes=rest + self.zero, params=params)
        nibbles = rest[:, -16:]
        codes = torch.cat([nibbles & 0xF, nibbles >> 4], 1)
        if self.bits == 5:
            bits = (rest[:, :4].unsqueeze(2) >> torch.arange(8, dtype=torch.uint8)) & 1
            codes = codes | (bits.reshape(-1, 32) << 4)
        return Quantized(spec=spec, shape=shape, codes=codes, params=params)


class Q4_0(Plain):
    """4 bits, symmetric: 4.5 bits per weight."""

    name, bits, nbytes, zero = "q4_0", 4, 18, 8
    stored: ClassVar[Mapping[str, torch.dtype]] = {"scale": HALF}
    deltas = (0.0, 0.3, 0.6, 0.9, 1.2, 1.5)


class Q4_1(Plain):
    """4 bits with offsets: 5 bits per weight."""

    name, bits, nbytes, has_low = "q4_1", 4, 20, True
    stored: ClassVar[Mapping[str, torch.dtype]] = {"scale": HALF, "offset": HALF}
    deltas = (0.0, -0.5, -1.0, -1.5, 0.5, 1.0)


class Q5_0(Plain):
    """5 bits, symmetric: 5.5 bits per weight."""

    name, bits, nbytes, zero = "q5_0", 5, 22, 16
    stored: ClassVar[Mapping[str, torch.dtype]] = {"scale": HALF}
    deltas = (0.0, 0.4, 0.8, 1.2, 1.6)


class Q5_1(Plain):
    """5 bits with offsets: 6 bits per weight."""

    name, bits, nbytes, has_low = "q5_1", 5, 24, True
    stored: ClassVar[Mapping[str, torch.dtype]] = {"scale": HALF, "offset": HALF}
    deltas = (0.0, -0.5, -1.0, -1.5, 0.5, 1.0)


class Q8_0(Plain):
    """8 bits, symmetric: 8.5 bits per weight."""

    name, bits, nbytes, zero = "q8_0", 8, 34, 128
    stored: ClassVar[Mapping[str, torch.dtype]] = {"scale": HALF}
    deltas = (0.0, 0.5)

    @property
    def levels(self) -> tuple[int, int]:
        """-128 is left out: kernels that take absolute values of signed bytes have no 128."""
        return -127, 127


ENTRIES = (Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0())
