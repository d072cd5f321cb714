"""Where blocks of weights come from, and what steps may ask of a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from types import MappingProxyType

from torch import Tensor

from auto_round.core.errors import AutoRoundError
from auto_round.core.quantized import Knobs
from auto_round.core.scheme import TensorSpec
from auto_round.sources.channels import Channels


class Needs(IntEnum):
    """What a recipe needs besides weights: nothing, statistics of layer inputs, or running the block."""

    NOTHING = 0
    STATISTICS = 1
    FORWARD = 2


class Block(ABC):
    """Some matrices that are quantized together."""

    name: str
    weights: Mapping[str, Tensor]
    """Layer name -> (O, I), as in the checkpoint."""
    samples: int = 0
    """Calibration samples that it can be run on; 0 when there are none."""
    tied: Mapping[str, Knobs] = MappingProxyType({})
    """Layer -> knobs that its fused set has in common, set by the loop: part of every candidate, plain rounding too."""
    inputs: Mapping[str, Knobs] = MappingProxyType({})
    """Layer -> calibrated range of its inputs, as it is stored with the layer."""

    vectors: Mapping[str, Tensor] = MappingProxyType({})
    """Tensor name -> norms and biases that may be tuned along, (N,) in storage dtype."""
    rewritten: Mapping[str, Tensor] = MappingProxyType({})
    """Those of them that a step has changed."""

    folded: Mapping[str, Tensor] = MappingProxyType({})
    """Norms and biases that `scale_channels` has changed, under their names, in storage dtype."""

    tokens: Mapping[str, int] = MappingProxyType({})
    """Expert ("model.layers.0.mlp.experts.3") -> calibration tokens that its router sent to it."""
    starved: Collection[str] = ()
    """Layers of experts with too few of them: known by the inputs of all tokens, and not tuned on their own."""

    def importance(self, layer: str) -> Tensor | None:
        """Second moment of each input channel of `layer`, (I,) float32, or None when nothing was gathered."""
        return None

    def input_limits(self, layer: str, percentile: float = 100.0) -> tuple[Tensor, Tensor] | None:
        """Limits of `percentile` per cent of the inputs of `layer`, 0-dim float32; None when it saw no token."""
        return None

    def quantize_inputs(self, acts: Mapping[str, tuple[TensorSpec, Knobs]]) -> None:
        """From now on the inputs of these layers are quantized whenever the block runs with given weights.

        acts: layer -> (spec, what was calibrated of its range), which `inputs` then tells.
        """
        self.inputs = {name: fixed for name, (_, fixed) in acts.items()}

    def channels(self) -> Iterator[Channels]:
        """Channels that `scale_channels` may scale; found one after the other, so they can be scaled in between."""
        return iter(())

    def scale_channels(self, channels: Channels, factors: Tensor) -> None:
        """Divide what makes `channels` by `factors` (I,), and multiply the weights that read them.

        The block computes the same; `weights`, importance and `folded` follow.
        """
        raise AutoRoundError(f"{self.name}: this source cannot scale channels")

    def target(self, rows: Sequence[int]) -> Tensor:
        """Output of the original block for the samples `rows`: (B, T, H) float32."""
        raise AutoRoundError(f"{self.name}: this source cannot run blocks")

    def run(self, rows: Sequence[int], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Output for the samples `rows` as they arrive here through the quantized layers before, (B, T, H) float32.

        weights: layer -> (O, I), and names of `vectors` -> (N,), used instead of the original ones.
        """
        raise AutoRoundError(f"{self.name}: this source cannot run blocks")

    def predict(self, rows: Sequence[int], hidden: Tensor) -> Tensor | None:
        """Logits of the next tokens (B, T, V) when this block puts out `hidden`; None unless it is the last one and was
        asked for."""
        return None

    def valid(self, rows: Sequence[int]) -> Tensor | None:
        """(B, T) bool: tokens that count; None when all do."""
        return None


class Source(ABC):
    """Hands out the blocks of a model in order."""

    can_run: bool

    @abstractmethod
    def blocks(self, needs: Needs, wanted: Iterable[str], finished: Collection[str] = ()) -> Iterator[Block]:
        """Every block with a layer in `wanted`, or that later blocks depend on.

        finished: names of blocks that an earlier run quantized. They are handed out only to be passed to `done`:
        nothing is gathered for them, and their weights may be missing.
        """

    def describe(self) -> dict[str, object]:
        """What the outcome depends on besides weights and plan: the data, and how blocks are run."""
        return {}

    def done(self, block: Block, replaced: Mapping[str, Tensor]) -> None:
        """`block` is finished; `replaced` is layer -> the weight (O, I) that its quantized form stands for."""
        return None
