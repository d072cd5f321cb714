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

    def layers(self) -> tuple[str, ...]:
        """All layers whose weights change with the sizes."""
        return self.readers if self.norm else (*self.readers, self.maker)


class Scaler:
    """Finds and scales channels of the block `module`.

    paths: layer -> where it is in the module. matrices: layer -> its weight (O, I), a float32 view of the parameter.
    run: the block's output on a sample. stored: path of a parameter -> its dtype in the checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        paths: Mapping[str, str],
        matrices: Mapping[str, Tensor],
        run: Callable[[], Tensor],
        stored: Mapping[str, torch.dtype],
    ) -> None:
        self._paths, self._matrices, self._run, self._stored = paths, matrices, run, stored
        self._parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
        self._norms = [path for path in norms_of(module) if f"{path}.weight" in self._parameters]

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
        for path in self._norms:
            if self._parameters[f"{path}.weight"].shape == (width,):
                for plus in (0.0, 1.0):
                    yield Channels(path, readers, width, norm=True, plus=plus)
        for name, matrix in self._matrices.items():
            if len(matrix) == width and name not in readers:
                yield Channels(name, readers, width)

    def _may_be_scaled(self, channels: Channels, before: Tensor) -> bool:
        """Whether the block still puts out `before` with other sizes of `channels`, which stay as they were.

        Only if it does not with those of the readers alone: a path that the sample did not take proves nothing.
        """
        tensors = [*self._of_maker(channels).values(), *(self._matrices[name] for name in channels.readers)]
        kept = [tensor.clone() for tensor in tensors]
        # Powers of two: what is left of them in the output is a difference, not rounding.
        power = torch.arange(channels.width, device=tensors[0].device) % 3 - 1
        factors = torch.exp2(power.float())
        self.scale(channels, factors, exact=True)
        found = self._puts_out(before)
        for tensor, values in zip(tensors, kept, strict=True):
            tensor.copy_(values)
        if not found:
            return False
        self._multiply(channels, factors)
        alone = self._puts_out(before)
        self._multiply(channels, 1 / factors)  # exact, as these are powers of two
        return not alone

    def _puts_out(self, wanted: Tensor) -> bool:
        return bool((self._run() - wanted).norm() <= SAME * wanted.norm())

    def _multiply(self, channels: Channels, factors: Tensor) -> None:
        """Multiply what reads `channels`."""
        for name in channels.readers:
            self._matrices[name].mul_(factors.to(self._matrices[name].device))

    def _path(self, channels: Channels) -> str:
        return channels.maker if channels.norm else self._paths[channels.maker]

    def _of_maker(self, channels: Channels) -> dict[str, Tensor]:
        """Weight and, if there is one, bias of the maker, under these words."""
        path = self._path(channels)
        weight = self._parameters[f"{path}.weight"] if channels.norm else self._matrices[channels.maker]
        bias = self._parameters.get(f"{path}.bias")
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}

    def stored_vectors(self, channels: Channels) -> dict[str, Tensor]:
        """Path -> value, in storage dtype, of what the maker has besides a matrix."""
        path, found = self._path(channels), self._of_maker(channels)
        kept = [key for key in found if channels.norm or key == "bias"]
        return {f"{path}.{key}": found[key].to(self._stored[f"{path}.{key}"]) for key in kept}

    @torch.no_grad()
    def scale(self, channels: Channels, factors: Tensor, *, exact: bool = False) -> Tensor:
        """Divide the maker by `factors` (width,) and multiply the readers; the factors that were really applied.

        exact: what stays in floating point is not rounded to the dtype in which it is stored.
        """

        def held(values: Tensor, key: str) -> Tensor:
            return values if exact else values.to(self._stored[f"{self._path(channels)}.{key}"]).float()

        vectors = self._of_maker(channels)
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
        self._multiply(channels, factors)
        return factors


def norms_of(module: nn.Module) -> dict[str, nn.Module]:
    """Path -> norm, of those in `module`: classes that say so."""
    return {path: each for path, each in module.named_modules() if "norm" in type(each).__name__.lower()}
