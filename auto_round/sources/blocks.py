"""A live model, block by block: captured inputs, the float chain and the quantized chain.

The float chain gives every block's target; the quantized chain is what really arrives at a block once those before it
are quantized, and what it is tuned on. Blocks run in float32 (matrix products in bfloat16 where the processor has it).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.codecs.base import fake_inputs
from auto_round.core.errors import ModelError
from auto_round.core.quantized import Knobs
from auto_round.core.scheme import TensorSpec
from auto_round.models.anatomy import Anatomy, Layer, parameters_for
from auto_round.models.capture import Call, Calls, Pass, Recorder, input_after_blocks, varies
from auto_round.models.device import elsewhere
from auto_round.models.experts import Experts
from auto_round.models.shards import raw_bytes
from auto_round.models.skeleton import Resident, Skeleton
from auto_round.sources.activations import InputGrid, Limits, quantized_inputs
from auto_round.sources.base import Block, Needs, Source
from auto_round.sources.dataset import Calibration
from auto_round.sources.expert_inputs import BlockExperts, quantized_expert_inputs, tell_starved
from auto_round.sources.rows import FileRows, MemoryRows, Rows

GRAM_MOST = 8192  # a Gram matrix of that many channels takes 256 MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How blocks are run. amp: dtype of matrix products, or None for float32 throughout.

    tune_outside: whether layers after the blocks can be run too; if not, only their inputs' statistics are known.
    activations, layers: as in `core.placement`. scratch: folder for hidden states in files.
    """

    device: torch.device
    batch_size: int = 8
    quantized_inputs: bool = True
    amp: torch.dtype | None = None
    tune_outside: bool = True
    activations: str = "memory"
    scratch: Path | None = None
    layers: Mapping[str, str] = field(default_factory=dict)

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
    """Hidden states on their way through the blocks; `quantized` may be `plain` itself."""

    plain: Rows
    quantized: Rows


class LiveBlock(Block):
    """A block that is a module of a live model."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layers: Mapping[str, Layer],
        execution: Execution,
        experts: Iterable[Experts] = (),
    ) -> None:
        self.name, self.module, self._layers, self._execution = name, module, layers, execution
        self._experts = tuple(experts)
        self._dtypes = {key: tensor.dtype for key, tensor in module.state_dict().items()}
        self._home = next(module.parameters()).device
        module.to(execution.device)
        self._moves = [
            hook
            for n in layers
            if n in execution.layers and layers[n].piece is None
            for hook in elsewhere(
                module.get_submodule(self._inside(n)), torch.device(execution.layers[n]), execution.device
            )
        ]
        self.weights = {
            n: layer.matrix(self._parameter(layer.parameter).detach()) for n, layer in layers.items()
        }
        self._importance: dict[str, Tensor] = {}
        self._limits: dict[str, Limits] = {}
        self._grids: dict[str, InputGrid] = {}

    def attach(self, chain: Chain, calls: Calls, valid: Tensor | None) -> None:
        """Give the block its inputs, after which it can be run."""
        self._chain, self._calls, self._valid = chain, calls, valid
        self.samples = chain.plain.shape[0]
        self.module.float()

    def observe(self, *, statistics: bool) -> None:
        """Run the original block over all samples: its targets, and the second moments of its layers' inputs."""
        plain = [name for name, layer in self._layers.items() if layer.piece is None]
        seen: list[tuple[Tensor, str]] = []
        hooks = [self._gather(name, seen) for name in plain] if statistics else []
        experts = BlockExperts(
            self._submodule,
            self._experts if statistics else (),
            plain if statistics else (),
            lambda: self.valid(self._rows),
        )
        self._targets = self._chain.plain.like()
        with experts.watching():
            for rows in self.batches():
                self._rows = rows
                seen.clear()
                self._targets[rows] = self._forward(self._chain.plain, rows, None)
        for hook in hooks:
            hook.remove()
        self.tokens, self.starved = experts.tokens, experts.fed | experts.blind
        if experts.fed:
            with experts.watching(starved_only=True):
                for rows in self.batches():
                    self._rows = rows
                    self._forward(self._chain.plain, rows, None)
        self._importance.update(experts.importance())
        self._limits.update(experts.limits())
        for name in experts.blind:
            self._importance.pop(name, None)

    def _submodule(self, layer: str) -> nn.Module:
        return self.module.get_submodule(self._inside(layer))

    def _gather(self, layer: str, seen: list[tuple[Tensor, str]]) -> torch.utils.hooks.RemovableHandle:
        """Add up X'X of the inputs of `layer`; layers that get the very same tensor, `seen` in this pass, share it."""

        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for x, other in seen:
                if x is args[0]:
                    self._importance[layer], self._limits[layer] = (
                        self._importance[other],
                        self._limits[other],
                    )
                    return
            seen.append((args[0], layer))
            x = args[0].detach().float()
            valid = self.valid(self._rows)
            # Padding must not count; a layer whose input has lost the (B, T) shape gets all of it.
            x = x[valid] if valid is not None and x.shape[:2] == valid.shape else x.flatten(0, -2)
            self._limits.setdefault(layer, Limits()).add(x)
            with torch.autocast(x.device.type, enabled=False):
                if layer not in self._importance:
                    width = x.shape[1]
                    self._importance[layer] = x.new_zeros((width, width) if width <= GRAM_MOST else (width,))
                total = self._importance[layer]
                total.addmm_(x.t(), x) if total.ndim == 2 else total.add_(x.square().sum(0))

        return self._submodule(layer).register_forward_pre_hook(add)

    def importance(self, layer: str) -> Tensor | None:
        """Sum of squares of each input channel over all samples."""
        return self._importance.get(layer)

    def input_limits(self, layer: str, percentile: float = 100.0) -> tuple[Tensor, Tensor] | None:
        """Of the original block."""
        return self._limits.get(layer, Limits()).within(percentile)

    def quantize_inputs(self, acts: Mapping[str, tuple[TensorSpec, Knobs]]) -> None:
        """By hooks on the layers' modules, and in place of fused experts' forward, while the block runs."""
        super().quantize_inputs(acts)
        self._grids = {name: InputGrid(*act) for name, act in acts.items()}

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

    def _forward(self, hidden: Rows, rows: Sequence[int], weights: Mapping[str, Tensor] | None) -> Tensor:
        device = self._execution.device
        call = self._calls.batch(rows, device)
        # The few tokens of a starved expert would speak for all that it may ever get: no gradient comes from them.
        still = self.starved if len(self.starved) < len(weights or {}) else ()
        weights = {name: w.detach() if name in still else w for name, w in (weights or {}).items()}
        replaced = parameters_for(self._layers, weights, self._parameter)
        parameters = {self._inside(name): value for name, value in replaced.items()}

        def module(*args: object, **kwargs: object) -> object:
            return (
                functional_call(self.module, parameters, args, kwargs)
                if parameters
                else self.module(*args, **kwargs)
            )

        with (
            torch.set_grad_enabled(bool(parameters) and torch.is_grad_enabled()),
            self._execution.autocast(),
            self._quantized_inputs(self._grids if parameters else {}),
        ):
            return call.run(module, hidden[list(rows)].to(device)).float()

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
                self._chain.quantized[rows] = self._forward(self._chain.quantized, rows, replaced)
        self._chain.plain = self._targets
        if not self._execution.quantized_inputs:
            self._chain.quantized = self._chain.plain

    def release(self) -> None:
        """Let all layers run where their weights are."""
        for hook in self._moves:
            hook.remove()

    @torch.no_grad()
    def settle(self, replaced: Mapping[str, Tensor]) -> None:
        """Leave the module as found, in its own dtypes and place, with the weights `replaced`."""
        for name, value in parameters_for(self._layers, replaced, self._parameter).items():
            self._parameter(name).data = value
        for key, tensor in self.module.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(self._home, self._dtypes[key]).contiguous()

    def _inside(self, name: str) -> str:
        """Name of a parameter of the model as seen from this block."""
        return name.removeprefix(f"{self.name}.")

    def _parameter(self, name: str) -> nn.Parameter:
        return self.module.get_parameter(self._inside(name))


class OutsideBlock(Block):
    """One layer after the blocks, lm_head for instance. Its target is computed when asked for: it is large."""

    def __init__(
        self,
        layer: Layer,
        module: nn.Module,
        execution: Execution,
        inputs: Chain | None,
        valid: Tensor | None = None,
        *,
        shared: bool = False,
    ) -> None:
        self._shared = shared  # an embedding, whose weight may be the head's too
        self.name, self._layer, self._module, self._execution = layer.name, layer, module, execution
        self._inputs, self._valid = inputs, valid
        self._grid: InputGrid | None = None
        weight = module.get_parameter("weight").detach().to(execution.device)
        self.weights = {layer.name: weight.t() if layer.transposed else weight}
        self.samples = 0 if inputs is None or not execution.tune_outside else inputs.plain.shape[0]

    def importance(self, layer: str) -> Tensor | None:
        """Sum of squares of each input channel over all samples."""
        if self._inputs is None:
            return None
        squares = [x.square().sum(0) for x in self._inputs.plain.tokens(self._valid)]
        return torch.stack(squares).sum(0).to(self._execution.device)

    def valid(self, rows: Sequence[int]) -> Tensor | None:
        """Tokens that are no padding."""
        return None if self._valid is None else self._valid[list(rows)].to(self._execution.device)

    def target(self, rows: Sequence[int]) -> Tensor:
        """Output of the original layer."""
        return self._apply(self._chain.plain[list(rows)], self.weights[self.name])

    def run(self, rows: Sequence[int], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """From the quantized chain's hidden states."""
        x = self._chain.quantized[list(rows)].to(self._execution.device)
        if weights and self._grid is not None:
            x = fake_inputs(x, self._grid.spec, self._grid.fixed)
        return self._apply(x, (weights or self.weights)[self.name])

    def input_limits(self, layer: str, percentile: float = 100.0) -> tuple[Tensor, Tensor] | None:
        """Of the float chain."""
        if self._inputs is None:
            return None
        limits = Limits()
        for x in self._inputs.plain.tokens(self._valid):
            limits.add(x)
        return limits.within(percentile)

    def quantize_inputs(self, acts: Mapping[str, tuple[TensorSpec, Knobs]]) -> None:
        """While the layer runs."""
        super().quantize_inputs(acts)
        self._grid = next((InputGrid(*act) for act in acts.values()), None)

    @property
    def _chain(self) -> Chain:
        if self._inputs is None:
            raise ModelError(f"{self.name}: no inputs were captured, so it cannot be run")
        return self._inputs

    def _apply(self, hidden: Tensor, weight: Tensor) -> Tensor:
        x = hidden.to(self._execution.device)
        with self._execution.autocast():
            return nn.functional.linear(x, weight.float()).float()

    @torch.no_grad()
    def settle(self, replaced: Mapping[str, Tensor]) -> None:
        """Give the module the weight `replaced`; a head's tie to the embedding is cut, not followed."""
        for weight in replaced.values():
            old = self._module.get_parameter("weight")
            new = (weight.t() if self._layer.transposed else weight).to(old.device, old.dtype)
            if self._shared:
                old.data = new.contiguous()
            else:
                self._module.weight = nn.Parameter(new.contiguous(), requires_grad=False)


class LiveSource(Source):
    """Blocks of a live model, then the wanted layers outside blocks."""

    can_run = True

    def __init__(
        self,
        model: nn.Module | Skeleton,
        anatomy: Anatomy,
        execution: Execution,
        data: Calibration | None,
    ) -> None:
        self._home = Resident(model) if isinstance(model, nn.Module) else model
        self.model, self.anatomy, self.execution, self.data = self._home.model, anatomy, execution, data
        self._needs = Needs.NOTHING
        self._last_block = ""
        self._tokens: dict[str, int] = {}

    def blocks(self, needs: Needs, wanted: Iterable[str], finished: Collection[str] = ()) -> Iterator[Block]:
        """In model order; inputs of a block list are captured when it is reached."""
        names = set(wanted)
        outside = [
            layer for layer in self.anatomy.layers.values() if layer.block is None and layer.name in names
        ]
        self._needs = needs if self.data is not None else Needs.NOTHING
        chain: Chain | None = None
        recorder: Recorder | None = None
        for blocks in self.anatomy.block_lists:
            modules = [self.model.get_submodule(name) for name in blocks]
            recorder = Recorder(self.model, modules)
            chain, calls = (None, None) if self._needs is Needs.NOTHING else self._capture(recorder, blocks)
            self._last_block = "" if outside else blocks[-1]
            for index, (name, module) in enumerate(zip(blocks, modules, strict=True)):
                gather = name not in finished
                yield self._block(name, module, chain, calls[index] if calls else None, gather)
        tell_starved(self._tokens)
        for layer in outside:
            reader = self._reader(layer)
            inputs = (
                None if None in (chain, recorder, reader) else self._inputs_of(reader, recorder, chain)  # type: ignore[arg-type]
            )
            self._home.fill(layer.name)
            valid = None if self.data is None or inputs is None else self.data.valid
            module = self.model.get_submodule(layer.name)
            shared = layer.name == self.anatomy.embedding
            yield OutsideBlock(layer, module, self.execution, inputs, valid, shared=shared)

    def sample(self, name: str, needs: Needs) -> Callable[[], LiveBlock]:
        """What makes the block `name` with the embedded samples as its inputs, whichever block it is."""
        self._needs = needs if self.data is not None else Needs.NOTHING
        blocks = next(blocks for blocks in self.anatomy.block_lists if name in blocks)
        module, chain, calls = self.model.get_submodule(name), None, None
        if self._needs is not Needs.NOTHING:
            recorder = Recorder(self.model, [self.model.get_submodule(block) for block in blocks])
            chain, calls = self._capture(recorder, blocks)
        own = calls[blocks.index(name)] if calls else None
        return lambda: self._block(name, module, chain, own, True)

    def _reader(self, layer: Layer) -> Layer | None:
        """The layer that multiplies by this weight: itself, or the head that is tied to the embedding, if any is."""
        if layer.name != self.anatomy.embedding:
            return layer
        return self.anatomy.layers[self.anatomy.head] if self.anatomy.tied and self.anatomy.head else None

    def describe(self) -> dict[str, object]:
        """The execution, the threads (sums depend on their number) and a hash of the data."""
        about = {f.name: getattr(self.execution, f.name) for f in fields(self.execution)}
        for place in ("activations", "scratch", "layers"):  # where things lie changes no bytes
            del about[place]
        about["threads"] = torch.get_num_threads()
        if self.data is not None:
            state = hashlib.blake2b(raw_bytes(self.data.tokens), digest_size=16)
            if self.data.attention_mask is not None:
                state.update(raw_bytes(self.data.attention_mask))
            about["data"] = state.hexdigest()
        return about

    def done(self, block: Block, replaced: Mapping[str, Tensor]) -> None:
        """Propagate both chains and put the weights into the model."""
        replaced = dict(replaced)  # made once, looked at many times
        if isinstance(block, LiveBlock) and self._needs is not Needs.NOTHING:
            wanted = self._needs is Needs.FORWARD and self.execution.quantized_inputs
            block.advance(replaced, quantized=wanted and block.name != self._last_block)
        if isinstance(block, LiveBlock):
            block.release()
        if isinstance(block, (LiveBlock, OutsideBlock)) and self._home.keeps:
            block.settle(replaced)
        self._home.drop(block.name)

    def _block(
        self, name: str, module: nn.Module, chain: Chain | None, calls: Calls | None, gather: bool
    ) -> LiveBlock:
        layers = {n: layer for n, layer in self.anatomy.layers.items() if layer.block == name}
        self._home.fill(name)
        experts = [found for found in self.anatomy.experts if found.path.startswith(f"{name}.")]
        block = LiveBlock(name, module, layers, self.execution, experts)
        if chain is not None and calls is not None:
            block.attach(chain, calls, None if self.data is None else self.data.valid)
            with torch.no_grad():
                block.observe(statistics=gather)
            self._tokens.update(block.tokens)
        return block

    def _capture(self, recorder: Recorder, blocks: Sequence[str]) -> tuple[Chain, list[Calls]]:
        assert self.data is not None, "capture needs data"
        self._home.fill_outside(self.anatomy.head)
        self._home.fill(blocks[0])  # one sample goes through it, to see what blocks return
        tokens, mask = self.data.tokens, self.data.attention_mask
        # transformers passes no mask for a sample without padding. Next to a padded one, every sample gets one.
        padded = [] if mask is None else [int((mask == 0).any(1).nonzero()[0])]
        pair = padded * 2 or [0, min(1, len(tokens) - 1)]
        one, other = (self._record(recorder, [row]) for row in pair)
        both = self._record(recorder, pair)
        every = mask is not None or varies(one, other)
        plain = self.execution.rows((len(tokens), *one.hidden.shape[1:]))
        own: list[tuple[Call, ...]] = []
        for row in range(len(tokens)):
            seen = self._record(recorder, [row, *padded])
            plain[[row]] = seen.hidden[:1].float()
            if every:
                own.append(seen.calls)
        calls = [
            Calls(
                one.calls[i], other.calls[i], both.calls[i], [sample[i] for sample in own] if every else None
            )
            for i in range(len(recorder.blocks))
        ]
        self._home.drop()
        same = self._needs is not Needs.FORWARD or not self.execution.quantized_inputs
        return Chain(plain, plain if same else plain.copy()), calls

    def _record(self, recorder: Recorder, rows: list[int]) -> Pass:
        assert self.data is not None, "recording needs data"
        mask = self.data.attention_mask
        return recorder(self.data.tokens[rows], None if mask is None else mask[rows])

    def _inputs_of(self, layer: Layer, recorder: Recorder, chain: Chain) -> Chain:
        assert self.data is not None, "inputs need data"
        module, data = self.model.get_submodule(layer.name), self.data
        dtype = next(self.model.parameters()).dtype

        def through(hidden: Rows) -> Rows:
            found = hidden.like()
            for row in range(len(hidden)):
                mask = None if data.attention_mask is None else data.attention_mask[[row]]
                states = hidden[[row]].to("cpu", dtype)
                found[[row]] = input_after_blocks(recorder, module, data.tokens[[row]], mask, states).float()
            return found

        self._home.fill_outside(self.anatomy.head)
        plain = through(chain.plain)
        found = Chain(plain, plain if chain.quantized is chain.plain else through(chain.quantized))
        self._home.drop()
        return found
