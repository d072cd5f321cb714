"""A block of a live model: its inputs on two chains, its targets, and running it with other weights.

The float chain gives every block's target; the quantized chain is what really arrives at a block once those before it
are quantized, and what it is tuned on. Blocks run in float32 (matrix products in bfloat16 where the processor has it).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.core.quantized import Knobs
from auto_round.core.scheme import TensorSpec
from auto_round.models.anatomy import Layer, parameters_for
from auto_round.models.capture import Call, Calls
from auto_round.models.device import elsewhere
from auto_round.models.experts import Experts
from auto_round.models.window import CallsInTurn, Chained, window_name, window_prefix
from auto_round.sources.activations import InputGrid, Limits, quantized_inputs
from auto_round.sources.base import Block
from auto_round.sources.channels import Channels, Scaler, norms_of
from auto_round.sources.expert_inputs import BlockExperts, quantized_expert_inputs
from auto_round.sources.moments import Moments, sharing
from auto_round.sources.rows import FileRows, MemoryRows, Notices, Rows

logger = logging.getLogger("auto_round")
GRAM_MOST = 8192  # a Gram matrix of that many channels takes 256 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How blocks are run. amp: dtype of matrix products, or None for float32 throughout. compiled: by torch.compile.

    nblocks: consecutive blocks that are handed out as one. language: whether the last is judged by predictions.
    percentile: share of a layer's inputs, in per cent, that calibrated ranges hold. tune_outside: whether layers after
    the blocks can be run too; if not, only their inputs' statistics are known.
    activations, layers: as in `core.placement`. scratch: folder for hidden states in files.
    """

    device: torch.device
    batch_size: int = 8
    quantized_inputs: bool = True
    amp: torch.dtype | None = None
    percentile: float = 100.0
    tune_outside: bool = True
    activations: str = "memory"
    scratch: Path | None = None
    layers: Mapping[str, str] = field(default_factory=dict)
    nblocks: int = 1
    compiled: bool = False
    language: bool = False

    def rows(self, shape: tuple[int, ...]) -> Rows:
        """Room for hidden states of `shape`, where they are to be kept."""
        if self.activations == "file":
            return FileRows(shape, self.scratch)
        on_device = self.activations == "device"
        return MemoryRows(shape, self.device if on_device else "cpu", pinned=self.activations == "pinned")

    def autocast(self) -> torch.autocast:
        """The context in which blocks compute."""
        return torch.autocast(
            self.device.type, dtype=self.amp or torch.bfloat16, enabled=self.amp is not None
        )


@dataclass(slots=True)
class Chain:
    """Hidden states on their way through the blocks; `quantized` may be `plain` itself.

    notices, quantized_notices: what blocks of either chain left for later ones.
    """

    plain: Rows
    quantized: Rows
    notices: Notices = field(default_factory=Notices)
    quantized_notices: Notices = field(default_factory=Notices)


class LiveBlock(Block):
    """A block that is a module of a live model, or several in a row.

    members: their modules by name. after: from sample numbers and hidden states (B, T, H) to logits, of the last.
    """

    def __init__(
        self,
        members: Mapping[str, nn.Module],
        layers: Mapping[str, Layer],
        execution: Execution,
        experts: Iterable[Experts] = (),
        after: Callable[[Sequence[int], Tensor], Tensor] | None = None,
    ) -> None:
        self.members, names = tuple(members.values()), tuple(members)
        self.name, self._prefix = window_name(names), f"{window_prefix(names)}."
        module = self.members[0] if len(names) == 1 else Chained(members)
        self.module, self._layers, self._execution, self._after = module, layers, execution, after
        self._experts = tuple(experts)
        self._dtypes = {key: tensor.dtype for key, tensor in module.state_dict().items()}
        self._home = next(module.parameters()).device  # where `settle` puts the block back
        module.to(execution.device)
        self._moves = [
            hook
            for n in layers
            if n in execution.layers and layers[n].piece is None
            for hook in elsewhere(
                module.get_submodule(self._inside(n)), torch.device(execution.layers[n]), execution.device
            )
        ]
        self.weights: dict[str, Tensor] = {name: self._matrix(name) for name in layers}
        self._moments: dict[str, Moments] = {}
        self._limits: dict[str, Limits] = {}
        self._grids: dict[str, InputGrid] = {}
        self._free: list[nn.Parameter] = []
        self._scaler: Scaler | None = None

    def attach(self, chain: Chain, calls: Calls | CallsInTurn, valid: Tensor | None) -> None:
        """Give the block its inputs, after which it can be run."""
        self._chain, self._calls, self._valid = chain, calls, valid
        self.samples = chain.plain.shape[0]
        # After `weights` was made, which keeps the tensors as stored: codes are made from those, losses in float32.
        self.module.float()
        # Only what is tuned needs a gradient. Norms with one would ask for that of their outputs too: a product more
        # for each layer that reads them.
        self._free = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.module.requires_grad_(False)
        if self._execution.compiled:
            for member in self.members:
                member.compile(dynamic=False)

    def settle_precision(self) -> str | None:
        """Run one sample; a block whose own code cannot mix dtypes, as `index_add_` cannot, goes on in float32.

        Returns what it said if it does, None if all is as asked for.
        """
        if self._execution.amp is None:
            return None
        try:
            self._forward(self._chain.plain, [0], None)
        except RuntimeError as error:
            self._execution = replace(self._execution, amp=None)
            # An error of float32 too has nothing to do with dtypes.
            self._forward(self._chain.plain, [0], None)
            return _first_line(error)
        return None

    def observe(self, *, statistics: bool) -> None:
        """Run the original block over all samples: its targets, and the second moments of its layers' inputs."""
        plain = [name for name, layer in self._layers.items() if layer.piece is None]
        seen: list[tuple[Tensor, str]] = []
        hooks = [self._gather(name, seen) for name in plain] if statistics else []
        fused, apart = (self._experts, plain) if statistics else ((), [])
        experts = BlockExperts(self._submodule, fused, apart, lambda: self.valid(self._rows))
        # In place of the inputs, batch by batch, as soon as nobody looks at those again: neither as the quantized chain
        # nor to feed starved experts.
        again = self._chain.quantized is self._chain.plain or (statistics and self._experts)
        self._targets = self._chain.plain.like() if again else self._chain.plain
        with experts.watching():
            for rows in self.batches():
                self._rows = rows
                seen.clear()
                self._targets[rows] = self._forward(self._chain.plain, rows, None, leave=True)
        for hook in hooks:
            hook.remove()
        self.tokens, self.starved = experts.tokens, experts.fed | experts.blind
        if experts.fed:
            with experts.watching(starved_only=True):
                for rows in self.batches():
                    self._rows = rows
                    self._forward(self._chain.plain, rows, None)
        self._moments.update(experts.moments())
        self._limits.update(experts.limits())
        for name in experts.blind:  # few tokens, and no way to send it more: weights alone
            self._moments.pop(name, None)

    def _submodule(self, layer: str) -> nn.Module:
        return self.module.get_submodule(self._inside(layer))

    def _gather(self, layer: str, seen: list[tuple[Tensor, str]]) -> torch.utils.hooks.RemovableHandle:
        """Add up X'X of the inputs of `layer`; layers that get the very same tensor, `seen` in this pass, share it."""

        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for x, other in seen:
                if x is args[0]:
                    self._moments[layer], self._limits[layer] = self._moments[other], self._limits[other]
                    return
            seen.append((args[0], layer))
            x = args[0].detach().float()
            valid = self.valid(self._rows)
            # Padding must not count; a layer whose input has lost the (B, T) shape gets all of it.
            x = x[valid] if valid is not None and x.shape[:2] == valid.shape else x.flatten(0, -2)
            self._limits.setdefault(layer, Limits(sampled=self._execution.percentile < 100)).add(x)
            if layer not in self._moments:
                width = x.shape[1]
                self._moments[layer] = Moments(width, whole=width <= GRAM_MOST, like=x)
            self._moments[layer].add(x)

        return self._submodule(layer).register_forward_pre_hook(add)

    def importance(self, layer: str) -> Tensor | None:
        """Second moments over all samples; layers with the same inputs get the same tensor."""
        moments = self._moments.get(layer)
        return None if moments is None else moments.shrunk()

    def input_limits(self, layer: str, percentile: float = 100.0) -> tuple[Tensor, Tensor] | None:
        """Of the original block."""
        return self._limits.get(layer, Limits()).within(percentile)

    def quantize_inputs(self, acts: Mapping[str, tuple[TensorSpec, Knobs]]) -> None:
        """By hooks on the layers' modules, and in place of fused experts' forward, while the block runs."""
        super().quantize_inputs(acts)
        self._grids = {name: InputGrid(*act) for name, act in acts.items()}

    def channels(self) -> Iterator[Channels]:
        """Of layers whose inputs were gathered, by running the first sample."""
        paths = {name: self._inside(name) for name, layer in self._layers.items() if layer.piece is None}
        groups = sharing({name: self._moments[name] for name in paths if name in self._moments})
        matrices = {name: self._matrix(name) for name in paths}
        scaler = self._scaler = Scaler(self.module, paths, matrices, self._run_exactly, self._dtypes)
        yield from scaler.find(groups)

    def scale_channels(self, channels: Channels, factors: Tensor) -> None:
        """In the module, so that it computes the same, with and without given weights."""
        assert self._scaler is not None, "channels are found before they are scaled"
        # Shared by all of them.
        self._moments[channels.readers[0]].divide(self._scaler.scale(channels, factors))
        for name in channels.readers:
            self._limits.pop(name, None)  # those of inputs as they were
        for name in channels.layers():
            # From now on the module has what is quantized; the tensor as stored does not any more.
            self.weights[name] = self._matrix(name)
        vectors = self._scaler.stored_vectors(channels)
        self.folded = {**self.folded, **{self._prefix + path: vector for path, vector in vectors.items()}}

    def _run_exactly(self) -> Tensor:
        """The first sample through the block as it is, in float32."""
        before, self._execution = self._execution, replace(self._execution, amp=None)
        try:
            return self._forward(self._chain.quantized, [0], None)
        finally:
            self._execution = before

    def _matrix(self, layer: str) -> Tensor:
        """The weight (O, I) that the module has, float32 once the block is attached."""
        found = self._layers[layer]
        return found.matrix(self._parameter(found.parameter).detach())

    def batches(self) -> Iterator[list[int]]:
        """All samples, in order, in groups of the batch size."""
        for start in range(0, self.samples, self._execution.batch_size):
            yield list(range(start, min(start + self._execution.batch_size, self.samples)))

    def target(self, rows: Sequence[int]) -> Tensor:
        """Stored by `observe`."""
        return self._targets[list(rows)].to(self._execution.device)

    def run(self, rows: Sequence[int], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """From the quantized chain's hidden states."""
        return self._forward(self._chain.quantized, rows, weights)

    def valid(self, rows: Sequence[int]) -> Tensor | None:
        """Tokens that are no padding."""
        return None if self._valid is None else self._valid[list(rows)].to(self._execution.device)

    def _forward(
        self, hidden: Rows, rows: Sequence[int], weights: Mapping[str, Tensor] | None, *, leave: bool = False
    ) -> Tensor:
        """leave: whether what the block leaves for later ones is kept."""
        # The few tokens of a starved expert would speak for all that it may ever get: no gradient comes from them.
        still = self.starved if len(self.starved) < len(weights or {}) else ()
        weights = {name: w.detach() if name in still else w for name, w in (weights or {}).items()}
        parameters = self._parameters(weights)
        notices = self._chain.notices if hidden is self._chain.plain else self._chain.quantized_notices
        call = self._call(rows, notices)
        with (
            # A run with its own weights is never differentiated; a graph would only hold its activations.
            torch.set_grad_enabled(bool(parameters) and torch.is_grad_enabled()),
            self._quantized_inputs(self._grids if parameters else {}),
        ):
            out = self._computed(call, hidden[list(rows)].to(self._execution.device), parameters)
        if leave and call.board is not None:
            notices.post(rows, call.board)
        return out

    def differentiable(self, row: int, states: Tensor) -> Tensor:
        """Output (1, T, H) of the block as it is for `states`, the original hidden states of sample `row`."""
        return self._computed(self._call([row], self._chain.notices), states, {})

    def _call(self, rows: Sequence[int], notices: Notices) -> Call:
        call = self._calls.batch(rows, self._execution.device)
        if call.board is not None:
            call.board.update(notices.show(rows, self._execution.device))
        return call

    def _computed(self, call: Call, states: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
        inside = {self._inside(name): value for name, value in parameters.items()}

        def module(*args: object, **kwargs: object) -> object:
            return (
                functional_call(self.module, inside, args, kwargs) if inside else self.module(*args, **kwargs)
            )

        with self._execution.autocast():
            try:
                return call.run(module, states).float()
            except torch._dynamo.exc.TorchDynamoException as error:  # raised by compiled blocks only
                why = _first_line(error)
                logger.warning("%s: torch.compile failed, going on without: %s", self.name, why)
                self._run_eagerly()
                return call.run(module, states).float()

    def _run_eagerly(self) -> None:
        for member in self.members:
            member._compiled_call_impl = None

    def predict(self, rows: Sequence[int], hidden: Tensor) -> Tensor | None:
        """By what comes after the blocks."""
        return None if self._after is None else self._after(rows, hidden)

    @contextmanager
    def _quantized_inputs(self, grids: Mapping[str, InputGrid]) -> Iterator[None]:
        plain = {name: grid for name, grid in grids.items() if self._layers[name].piece is None}
        modules = {name: self.module.get_submodule(self._inside(name)) for name in plain}
        with ExitStack() as stack:
            stack.enter_context(quantized_inputs(modules, plain))
            for experts in self._experts:
                module = self.module.get_submodule(self._inside(experts.path))
                stack.enter_context(quantized_expert_inputs(module, experts, grids))
            yield

    @torch.no_grad()
    def advance(self, replaced: Mapping[str, Tensor], *, quantized: bool) -> None:
        """Move both chains past this block, whose weights become `replaced`."""
        if quantized:
            for rows in self.batches():
                self._chain.quantized[rows] = self._forward(self._chain.quantized, rows, replaced, leave=True)
        self._chain.plain = self._targets  # the float output is there already
        if not self._execution.quantized_inputs:
            self._chain.quantized = self._chain.plain

    def release(self) -> None:
        """Leave the module without what was put on it: all layers run where their weights are, and can be trained."""
        self._scaler = None  # it runs this block: the two would keep each other, and all weights, in memory
        for hook in self._moves:
            hook.remove()
        self._run_eagerly()
        for parameter in self._free:
            parameter.requires_grad_(True)

    @torch.no_grad()
    def settle(self, replaced: Mapping[str, Tensor]) -> None:
        """Leave the module as found, in its own dtypes and place, with the weights `replaced`."""
        for name, value in self._parameters(replaced).items():
            self._parameter(name).data = value
        for key, tensor in self.module.state_dict(keep_vars=True).items():
            # By .data: whoever else holds these parameters, the user for one, keeps seeing them.
            tensor.data = tensor.data.to(self._home, self._dtypes[key]).contiguous()

    def _parameters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter of the model -> its value with `weights` of layers and vectors."""
        layers = {name: weight for name, weight in weights.items() if name in self._layers}
        plain = {name: value.float() for name, value in weights.items() if name not in layers}
        return {**parameters_for(self._layers, layers, self._parameter), **plain}

    @property
    def vectors(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """Weights and biases of norms, biases of layers."""
        plain = [self._inside(name) for name, layer in self._layers.items() if layer.piece is None]
        found = norms_and_biases(self.module, plain)
        return {self._prefix + path: v.detach().to(self._dtypes[path]) for path, v in found.items()}

    def _inside(self, name: str) -> str:
        """Name of a parameter of the model as seen from this block."""
        return name.removeprefix(self._prefix)

    def _parameter(self, name: str) -> nn.Parameter:
        return self.module.get_parameter(self._inside(name))


def norms_and_biases(module: nn.Module, layers: Iterable[str]) -> dict[str, nn.Parameter]:
    """Path -> the parameters of the norms in `module`, and the biases of `layers`, paths in it."""
    found = {
        f"{path}.{name}": parameter
        for path, each in norms_of(module).items()
        for name, parameter in each.named_parameters(recurse=False)
    }
    biases = {f"{path}.bias": module.get_submodule(path).bias for path in layers}
    return found | {path: bias for path, bias in biases.items() if isinstance(bias, nn.Parameter)}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
