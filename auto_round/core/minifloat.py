"""Small floating-point elements (E2M1, E2M3, E3M2, E4M3, E5M2, uniform steps): rounding, encoding, decoding.

A code is sign | exponent | mantissa, as in the OCP formats (OCP MX v1.0, section 5.3); subnormals included, no Inf or
NaN is ever made: what is too large becomes the largest finite value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

FLOAT32_MANTISSA = 23
EXPONENT_MASK = 0x7F800000  # of float32
GRAM_SWEEPS = 2


@dataclass(frozen=True, slots=True)
class MiniFloat:
    """An element format.

    mantissa: stored bits of it. least: exponent of the smallest normal value. top: largest finite value. bits: width of
    a code with its sign, or without when `signed` is False.
    """

    bits: int
    mantissa: int
    least: int
    top: float
    signed: bool = True

    @property
    def smallest(self) -> float:
        """The smallest positive value, a subnormal."""
        return 2.0 ** (self.least - self.mantissa)

    @property
    def exponent(self) -> int:
        """floor(log2(top)): "emax" of the MX specification."""
        return math.frexp(self.top)[1] - 1

    def step(self, x: Tensor) -> Tensor:
        """Distance between neighbouring values at `x`, float32: a power of two."""
        # 2^floor(log2|x|), 0 for subnormals
        power = (x.view(torch.int32) & EXPONENT_MASK).view(torch.float32)
        # Below `least` values lie as far apart as in the lowest binade, above `top` as in the highest.
        return power.clamp_(2.0**self.least, 2.0**self.exponent).mul_(2.0**-self.mantissa)

    def near(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """The value nearest to `x` float32, ties to even; `offset` is added first, in steps at `x`. Saturates."""
        return self.saturated(self.rounded(x, offset))

    def rounded(self, x: Tensor, offset: Tensor | None = None) -> Tensor:
        """`near` without the limits."""
        if offset is not None:
            x = x + offset * self.step(x)
        step = self.step(x)  # of the sum, which an offset may have moved into the next binade
        return (x / step).round_().mul_(step)  # exact but for the rounding: steps are powers of two

    def saturated(self, x: Tensor) -> Tensor:
        """`x` within the limits."""
        return x.clamp(-self.top if self.signed else 0.0, self.top)

    def encode(self, x: Tensor) -> Tensor:
        """Codes, uint8, of `x` float32 that are values of this format already."""
        size = x.abs()
        # Fields lie in the order of float32: a normal code is the float's upper bits less a difference of biases.
        base = (self.least - 1 + 127) << self.mantissa
        normal = (size.view(torch.int32) >> (FLOAT32_MANTISSA - self.mantissa)) - base
        code = torch.where(size < 2.0**self.least, (size / self.smallest).to(torch.int32), normal)
        # The sign bit and not x < 0: -0 keeps its sign, so decoding gives back the very same bits.
        if self.signed:
            code = code | (torch.signbit(x).to(torch.int32) << (self.bits - 1))
        return code.to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """Values, float32, of `codes`."""
        return _values(self, codes.device)[codes.int()]

    def values(self) -> list[float]:
        """The value of every code in turn. Codes that are Inf or NaN elsewhere are NaN here."""
        signs = (1.0, -1.0) if self.signed else (1.0,)
        return [
            sign * self._magnitude(code) for sign in signs for code in range((1 << self.bits) // len(signs))
        ]

    def _magnitude(self, code: int) -> float:
        exponent, fraction = code >> self.mantissa, code & ((1 << self.mantissa) - 1)
        if exponent:  # a normal number has a leading one
            fraction += 1 << self.mantissa
        value = math.ldexp(fraction, max(exponent, 1) - 1 + self.least - self.mantissa)
        return math.nan if value > self.top else value  # E4M3: 0x7F would be 480


@cache
def _values(element: MiniFloat, device: torch.device) -> Tensor:
    # float32, so that products with scales are too, whatever torch's default dtype is at the first call.
    return torch.tensor(element.values(), dtype=torch.float32, device=device)


E2M1 = MiniFloat(bits=4, mantissa=1, least=0, top=6.0)
E2M3 = MiniFloat(bits=6, mantissa=3, least=0, top=7.5)
E3M2 = MiniFloat(bits=6, mantissa=2, least=-2, top=28.0)
E4M3 = MiniFloat(bits=8, mantissa=3, least=-6, top=448.0)
E5M2 = MiniFloat(bits=8, mantissa=2, least=-14, top=57344.0)
# Exponent 31 holds numbers, as 15 does in E4M3; only the last mantissa of it is NaN.
UE5M3 = MiniFloat(bits=8, mantissa=3, least=-14, top=114688.0, signed=False)
INT4 = MiniFloat(bits=4, mantissa=2, least=0, top=1.75)  # sign and magnitude, steps of 1/4: MXINT4


E8M0_BIAS = 127  # OCP MX v1.0, section 5.4.1


def power_of_two_scale(largest: Tensor, element: MiniFloat, *, up: bool) -> Tensor:
    """The MX scale of groups with the largest magnitudes `largest` (G, 1), float32; 1 where that is zero.

    2^(floor(log2(largest)) - emax), or, rounded `up`, the smallest power of two under which nothing saturates.
    """
    if up:
        mantissa, exponent = torch.frexp(largest / element.top)
        # frexp gives mantissas in [0.5, 1): 0.5 is an exact power of two, which needs no rounding up.
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    else:
        # frexp and not log2, which rounds up to a whole number just below a power of two.
        exponent = torch.frexp(largest).exponent - 1 - element.exponent
    # 254 at most: 255 is NaN in E8M0.
    return e8m0_value(torch.where(largest == 0, E8M0_BIAS, exponent + E8M0_BIAS).clamp(0, 2 * E8M0_BIAS))


def e8m0_value(byte: Tensor) -> Tensor:
    """2^(byte - 127), float32."""
    # Made of bits: the exponent field is the byte, except for 2^-127, which is below the normal numbers.
    bits = torch.where(byte == 0, 1 << (FLOAT32_MANTISSA - 1), byte.int() << FLOAT32_MANTISSA)
    return bits.to(torch.int32).view(torch.float32)


def e8m0_byte(scale: Tensor) -> Tensor:
    """The byte, uint8, of powers of two `scale`."""
    return (torch.frexp(scale).exponent - 1 + E8M0_BIAS).to(torch.uint8)


class _Scaled(torch.autograd.Function):
    """scale * near(groups / scale, offset); the backward is that of the straight-through definition."""

    @staticmethod
    def forward(ctx: Any, groups: Tensor, scale: Tensor, offset: Tensor | None, element: MiniFloat) -> Tensor:
        x = groups / scale
        wanted = element.rounded(x, offset)
        value = element.saturated(wanted)
        inside = wanted == value
        step = element.step(x) * scale if offset is not None else None  # d out / d offset
        ctx.save_for_backward(inside, value - x * inside if scale.requires_grad else None, step)
        return value * scale

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        inside, slope, step = ctx.saved_tensors
        (grad,) = upstream
        # d out / d scale = value - inside * x: rounding passes the gradient on, saturation stops it.
        d_scale = None if slope is None else (grad * slope).sum(1, keepdim=True)
        return None, d_scale, None if step is None else grad * inside * step, None


def scaled(groups: Tensor, scale: Tensor, offset: Tensor | None, element: MiniFloat) -> Tensor:
    """What `groups` (G, K) become when stored as `element` times `scale` (G, 1). Differentiable in scale and offset."""
    out: Tensor = _Scaled.apply(groups, scale, offset, element)  # type: ignore[no-untyped-call]
    return out


class Best:
    """The scale of least weighted squared error of each group, among those offered."""

    def __init__(self, groups: Tensor, weight: Tensor | None, element: MiniFloat, start: Tensor) -> None:
        self.groups, self.weight, self.element = groups, weight, element
        self.scale = start
        self.error = torch.full_like(start, torch.inf)  # so that `start` is kept whatever its error
        self.offer(start)

    def offer(self, scale: Tensor) -> None:
        """Keep `scale` (G, 1), which storage can hold, where it has less error than the best so far."""
        difference = self.element.near(self.groups / scale).mul_(scale).sub_(self.groups).square_()
        if self.weight is not None:
            difference.mul_(self.weight)
        error = difference.sum(1, keepdim=True)
        self.scale = torch.where(error < self.error, scale, self.scale)
        self.error = torch.minimum(error, self.error)

    def on_gram(
        self, shape: tuple[int, int], gram: Tensor, candidates: Callable[[Tensor], list[Tensor]]
    ) -> None:
        """Coordinate descent of the scales on tr(D gram D'), D = fake - w: one column of groups after the other.

        shape: (O, I) of the matrix, cut into groups along its rows. candidates: scales to try in place of (O, 1) ones.
        All rows move at once; each takes what lowers its output error given the errors of its other groups.
        """
        size, columns = self.groups.shape[1], self.groups.shape[0] // shape[0]
        missing = columns * size - shape[1]
        # Padding has no input: zero rows and columns leave its errors out of the sum.
        gram = torch.nn.functional.pad(gram, (0, missing, 0, missing))
        weights = self.groups.reshape(shape[0], columns, size)
        scales = self.scale.reshape(shape[0], columns, 1).clone()  # the caller's stay as they are
        error = (self.element.near(weights / scales) * scales - weights).flatten(1)
        for j in [*range(columns)] * GRAM_SWEEPS:
            here = slice(j * size, (j + 1) * size)
            own, kept, w = gram[here, here], error[:, here], weights[:, j]
            # A quadratic form: this group's own part, and twice its products with the other groups, which stay.
            outside = error @ gram[:, here] - kept @ own
            lowest = ((kept @ own + 2 * outside) * kept).sum(1, keepdim=True)
            for scale in candidates(scales[:, j]):
                difference = self.element.near(w / scale) * scale - w
                cost = ((difference @ own + 2 * outside) * difference).sum(1, keepdim=True)
                better = cost < lowest
                lowest = torch.where(better, cost, lowest)
                scales[:, j] = torch.where(better, scale, scales[:, j])
                kept = torch.where(better, difference, kept)
            error[:, here] = kept
        self.scale = scales.reshape(-1, 1)
