"""Channels inside a block whose size can be moved from what makes them into the weights that read them.

A norm and the layers that read it, or two matrices with nothing but a product, a mask or a ReLU in between, compute the
same when the first is divided by what the second is multiplied by (arXiv:2306.00978, 3.2). No list of architectures
says where: factors are moved, and where the block's output stays what it was they may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAME = 1e-4  # relative difference of outputs: of float32 with room for sums in another order


@dataclass(frozen=True, slots=True)
class Channels:
    """Outputs of `maker` that nobody but the layers `readers` reads, of `width` channels.

    norm: whether the maker is a norm (a path in the block) and not a layer. plus: what it adds to its weight before it
    multiplies by it, 1 in Gemma.
    """

    maker: str
    readers: tuple[str, ...]
    width: int
    norm: bool = False
    plus: float = 0.0


class Scaler:
    """Finds and scales channels of the block `module`.

    matrices: layer -> its weight (O, I), a float32 view of the module's parameter. biases: layer -> its bias, if any.
    run: the block's output on a sample. stored: dtype of the "weight" or "bias" of a maker in the checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        matrices: Mapping[str, Tensor],
        biases: Mapping[str, Tensor],
        run: Callable[[], Tensor],
        stored: Callable[[Channels, str], torch.dtype],
    ) -> None:
        self._matrices, self._biases, self._run, self._stored = matrices, biases, run, stored
        self._norms = {
            path: norm
            for path, norm in module.named_modules()
            if "norm" in type(norm).__name__.lower() and isinstance(getattr(norm, "weight", None), Tensor)
        }

    @torch.no_grad()
    def find(self, groups: Sequence[tuple[str, ...]]) -> Iterator[Channels]:
        """The channels that each of `groups`, layers with the same inputs, reads, as far as something makes them alone.

        Whoever asks may scale those found before going on.
        """
        for readers in groups:
            before = self._run()
            found = next((each for each in self._makers(readers) if self._may_be_scaled(each, before)), None)
            if found is not None:
                yield found

    def _makers(self, readers: tuple[str, ...]) -> Iterator[Channels]:
        """What may have made the inputs of `readers`, by its size."""
        width = self._matrices[readers[0]].shape[1]
        for path, norm in self._norms.items():
            if norm.weight.shape == (width,):
                for plus in (0.0, 1.0):
                    yield Channels(path, readers, width, norm=True, plus=plus)
        for name, matrix in self._matrices.items():
            if len(matrix) == width and name not in readers:
                yield Channels(name, readers, width)

    def _may_be_scaled(self, channels: Channels, before: Tensor) -> bool:
        """Whether the block still puts out `before` with other sizes of `channels`; they are left as they were."""
        tensors = [*self.of_maker(channels).values(), *(self._matrices[name] for name in channels.readers)]
        kept = [tensor.clone() for tensor in tensors]
        # Powers of two: what is left of them in the output is a difference, not rounding.
        power = torch.arange(channels.width, device=tensors[0].device) % 3 - 1
        self.scale(channels, torch.exp2(power.float()), exact=True)
        after = self._run()
        for tensor, values in zip(tensors, kept, strict=True):
            tensor.copy_(values)
        return bool((after - before).norm() <= SAME * before.norm())

    def of_maker(self, channels: Channels) -> dict[str, Tensor]:
        """Weight and, if there is one, bias of the maker, under these words."""
        if channels.norm:
            norm = self._norms[channels.maker]
            both = {"weight": norm.weight, "bias": getattr(norm, "bias", None)}
        else:
            both = {"weight": self._matrices[channels.maker], "bias": self._biases.get(channels.maker)}
        return {key: tensor.detach() for key, tensor in both.items() if isinstance(tensor, Tensor)}

    @torch.no_grad()
    def scale(self, channels: Channels, factors: Tensor, *, exact: bool = False) -> Tensor:
        """Divide the maker by `factors` (width,) and multiply the readers; the factors that were really applied.

        exact: what stays in floating point is not rounded to the dtype in which it is stored.
        """

        def held(values: Tensor, key: str) -> Tensor:
            return values if exact else values.to(self._stored(channels, key)).float()

        vectors = self.of_maker(channels)
        weight = vectors["weight"]
        factors = factors.to(weight.device)
        if channels.norm:
            size = weight + channels.plus
            wanted = held(size / factors - channels.plus, "weight")
            # What rounding the norm has changed, the readers take back.
            applied = size / (wanted + channels.plus)
            fine = torch.isfinite(applied) & (applied > 0)
            weight.copy_(torch.where(fine, wanted, weight))
            factors = torch.where(fine, applied, torch.ones_like(applied))
        else:
            weight.div_(factors.unsqueeze(1))
        if "bias" in vectors:
            vectors["bias"].copy_(held(vectors["bias"] / factors, "bias"))
        for name in channels.readers:
            self._matrices[name].mul_(factors.to(self._matrices[name].device))
        return factors
