"""Hadamard matrices, and rotations by them: orthogonal, of plus and minus ones, spreading outliers over a whole block.

Sylvester's construction for powers of two, Paley's for others (R. Paley, J. Math. Phys. 12, 1933), both computed: there
is no table of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from zlib import crc32

import torch
from torch import Tensor

from auto_round.core.errors import PlanError

DENSE = 64
"""Up to this size one product with the whole matrix is as fast as two with its factors."""


@cache
def hadamard(order: int) -> Tensor:
    """(order, order) int8 of +1 and -1 whose rows are orthogonal; for powers of two Sylvester's, which is symmetric.

    Raises PlanError for an order that neither construction, doubled as often as need be, has.
    """
    if order < 1:
        raise PlanError(f"no Hadamard matrix has order {order}")
    with torch.device("cpu"):  # transformers makes models under another default device
        return _made(order)


def _made(order: int) -> Tensor:
    found = torch.ones(1, 1, dtype=torch.int8) if order == 1 else _paley(order)
    if found is None:
        if order % 2 or (order > 2 and order % 4):
            raise PlanError(
                f"no Hadamard matrix of order {order}: orders are 1, 2 and multiples of four. Give a power of two"
            )
        half = hadamard(order // 2)
        found = torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])
    return found


def _paley(order: int) -> Tensor | None:
    """Of order p + 1 for primes p = 3 (mod 4), and 2 (p + 1) for p = 1 (mod 4); None for others and powers of two."""
    if not order & (order - 1):
        return None
    if _is_prime(order - 1) and order % 4 == 0:
        skew = _bordered(order - 1, -1)
        return skew + torch.eye(order, dtype=torch.int8)
    if order % 2 == 0 and _is_prime(order // 2 - 1) and order // 2 % 4 == 2:
        symmetric = _bordered(order // 2 - 1, 1)
        plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
        zero = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
        return torch.kron(symmetric, plus) + torch.kron(torch.eye(order // 2, dtype=torch.int8), zero)
    return None


def _bordered(prime: int, sign: int) -> Tensor:
    """Jacobsthal's matrix, quadratic characters of differences, with a first row of ones and a column of `sign`."""
    character = torch.full((prime,), -1, dtype=torch.int8)
    character[(torch.arange(1, prime) ** 2) % prime] = 1
    character[0] = 0
    steps = torch.arange(prime)
    whole = torch.zeros(prime + 1, prime + 1, dtype=torch.int8)
    whole[1:, 1:] = character[(steps[:, None] - steps) % prime]
    whole[0, 1:], whole[1:, 0] = 1, sign
    return whole


def _is_prime(number: int) -> bool:
    return number > 2 and all(number % factor for factor in range(2, int(number**0.5) + 1))


def power_of_two(channels: int) -> int:
    """The largest power of two that divides `channels`."""
    return channels & -channels


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """x -> x R on each `size` channels in turn, with R = signs / sqrt(size).

    signs: (size, size) of +1 and -1, orthogonal rows. None: Sylvester's matrix, by two products with small ones.
    """

    size: int
    signs: Tensor | None = None

    @classmethod
    def random(cls, size: int, generator: torch.Generator) -> Rotation:
        """A Hadamard matrix whose columns have random signs: H diag(s)."""
        flips = torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
        return cls(size, hadamard(size) * flips)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., n) -> x R block by block; n is a multiple of the size."""
        return self._times(x, transposed=False)

    def back(self, x: Tensor) -> Tensor:
        """(..., n) -> x R', which undoes it."""
        return self._times(x, transposed=True)

    def down(self, x: Tensor) -> Tensor:
        """(n, ...) -> R' x: the same of columns, for what writes the channels that are turned."""
        return self(x.t()).t()

    def told(self) -> str:
        """What tells it from other rotations, for fingerprints."""
        return f"{self.size} {'' if self.signs is None else crc32(self.signs.contiguous().numpy().tobytes())}"

    def matrix(self) -> Tensor:
        """R, (size, size) float32."""
        signs = hadamard(self.size) if self.signs is None else self.signs
        normal: Tensor = signs.float() / self.size**0.5
        return normal

    def _times(self, x: Tensor, *, transposed: bool) -> Tensor:
        apart: Tensor = x.unflatten(-1, (-1, self.size))
        if self.signs is not None:
            matrix = self.signs.to(x.device, x.dtype) / self.size**0.5
            turned: Tensor = apart @ (matrix.t() if transposed else matrix)
            return turned.flatten(-2)
        if self.size <= DENSE:
            turned = apart @ _normal(self.size, x.dtype, x.device)
            return turned.flatten(-2)
        # The matrix of order a b is the Kronecker product of those of a and b, and symmetric.
        outer = 1 << (self.size.bit_length() - 1) // 2
        inner = self.size // outer
        first, second = (_normal(order, x.dtype, x.device) for order in (outer, inner))
        turned = first @ (apart.unflatten(-1, (outer, inner)) @ second)
        return turned.flatten(-3)


@dataclass(frozen=True, slots=True, eq=False)
class Learned(Rotation):
    """A rotation by any orthogonal matrix. values: (size, size); where they need gradients, results carry them."""

    values: Tensor = field(kw_only=True)

    def told(self) -> str:
        """What tells it from other rotations, for fingerprints."""
        return f"{self.size} {crc32(self.values.contiguous().numpy().tobytes())}"

    def matrix(self) -> Tensor:
        """R, (size, size)."""
        return self.values

    def _times(self, x: Tensor, *, transposed: bool) -> Tensor:
        matrix = self.values.to(x.device, x.dtype)
        turned: Tensor = x.unflatten(-1, (-1, self.size)) @ (matrix.t() if transposed else matrix)
        return turned.flatten(-2)


@cache
def _normal(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    normal: Tensor = hadamard(order).double() / order**0.5
    return normal.to(device, dtype)
