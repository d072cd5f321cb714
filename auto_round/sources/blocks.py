"""A live model, block by block: captured inputs, then one block after the other, then what is outside them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from auto_round.core.errors import PlanError
from auto_round.models.anatomy import Anatomy, Layer
from auto_round.models.capture import (
    Call,
    Calls,
    Pass,
    Recorder,
    input_after_blocks,
    output_after_blocks,
    varies,
)
from auto_round.models.shards import raw_bytes
from auto_round.models.skeleton import Resident, Skeleton
from auto_round.models.window import CallsInTurn, window_name, windows
from auto_round.sources.base import Block, Needs, Source
from auto_round.sources.dataset import Calibration
from auto_round.sources.expert_inputs import tell_starved
from auto_round.sources.gradients import (
    GradientBlock,
    Predictor,
    Products,
    Visit,
    gradients,
    surprise,
    watched,
)  # fmt: skip
from auto_round.sources.live_block import Chain, Execution, LiveBlock
from auto_round.sources.outside_block import OutsideBlock
from auto_round.sources.rows import Notices, Rows

logger = logging.getLogger("auto_round")


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
        self._filled: tuple[str, ...] = ()
        self._tokens: dict[str, int] = {}
        self._told_of_float32 = False
        self.call_bytes = 0  # of the arguments that single samples have for themselves, together

    @property
    def keeps(self) -> bool:
        """Whether the model is in memory as a whole."""
        return self._home.keeps

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
            together = list(windows(blocks, self.execution.nblocks))
            # What leaves the last block is needed only by layers outside; else its quantized run can be saved.
            self._last_block = "" if outside else window_name(together[-1])
            for members in together:
                own = calls[blocks.index(members[0]) :][: len(members)] if calls else []
                after = self._after(recorder) if members[-1] == self.anatomy.in_order()[-1] else None
                yield self._block(members, chain, own, window_name(members) not in finished, after)
        tell_starved(self._tokens)
        for layer in outside:
            yield self._outside(layer, recorder, chain)

    def backwards(self, wanted: Iterable[str], seed: int) -> Iterator[Visit]:
        """(Block, products of every sample) for the head, if it is among `wanted`, and every block from the last to the
        first: layers' inputs with gradients of their outputs.

        Gradients are of the `surprise` of the model's predictions. Statistics of inputs are there as in `blocks`.
        Raises PlanError for a model with several lists of blocks, whose gradients meet in places not known here.
        """
        if len(self.anatomy.block_lists) > 1:
            raise PlanError(
                "gradients of this model are not known: it has blocks in several places "
                f"({', '.join(blocks[0] for blocks in self.anatomy.block_lists)}). Give bits per layer in layer_config"
            )
        self._needs, blocks = Needs.STATISTICS, self.anatomy.block_lists[0]
        recorder = Recorder(self.model, [self.model.get_submodule(name) for name in blocks])
        chain, calls = self._capture(recorder, blocks)
        arrived: list[Rows] = []
        for name, call in zip(blocks, calls, strict=True):
            block = self._block((name,), chain, [call], False)
            arrived.append(chain.plain)
            self.done(block, {})
        above, head = chain.plain.like(), self.anatomy.head
        samples = self._products_after(recorder, chain.plain, above, seed)
        if head is not None and head in set(wanted):
            yield self._outside(self.anatomy.layers[head], recorder, chain), samples
        _finish(samples)
        self._home.drop()
        for name, call, states in reversed(list(zip(blocks, calls, arrived, strict=True))):
            there = Chain(states, states, chain.notices)
            visited = self._block((name,), there, [call], True, kind=GradientBlock)
            samples = self._products_in(visited, above)
            yield visited, samples
            _finish(samples)
            self._leave(visited, {})

    def _products_after(self, recorder: Recorder, hidden: Rows, above: Rows, seed: int) -> Iterator[Products]:
        """Of the head; `above` gets the gradients of the hidden states after the blocks."""
        predictor, head = self._predictor(recorder, self._outside_parameters()), self.anatomy.head
        modules = {} if head is None else {head: self.model.get_submodule(head)}
        generator = torch.Generator().manual_seed(seed)
        for row in range(len(hidden)):
            states = hidden[[row]].to(self.execution.device).requires_grad_()
            valid = None if self.data is None or self.data.valid is None else self.data.valid[[row]]
            with torch.enable_grad(), watched(modules) as seen:
                lost = surprise(predictor([row], states), valid, generator)
            found, above[[row]] = gradients(lost, states, seen)
            yield found

    def _products_in(self, block: LiveBlock, above: Rows) -> Iterator[Products]:
        """Of the layers of `block`; `above` gets the gradients of the hidden states that arrive there."""
        assert isinstance(block, GradientBlock), "made as one"
        for row in range(len(above)):
            found, above[[row]] = block.products(row, above[[row]])
            yield found

    def sample(self, name: str, needs: Needs) -> Callable[[], Block]:
        """What makes the block or outside layer `name`, on the embedded samples. A block comes with its window."""
        self._needs = needs if self.data is not None else Needs.NOTHING
        layer = self.anatomy.layers.get(name)
        lists = self.anatomy.block_lists
        blocks = next((blocks for blocks in lists if name in blocks), lists[-1])
        recorder = Recorder(self.model, [self.model.get_submodule(block) for block in blocks])
        chain, calls = (None, None) if self._needs is Needs.NOTHING else self._capture(recorder, blocks)
        if layer is not None:
            return lambda: self._outside(layer, recorder, chain)
        members = next(each for each in windows(blocks, self.execution.nblocks) if name in each)
        at = blocks.index(members[0])
        if chain is not None and calls and any(call.boards for call in calls):
            self._run_once(blocks, chain, calls)
        own = calls[at:][: len(members)] if calls else []
        return lambda: self._block(members, chain, own, True)

    def _run_once(self, blocks: Sequence[str], chain: Chain, calls: Sequence[Calls]) -> None:
        """Run `blocks` as they are, for what they leave for one another; its size counts as that of arguments."""
        for name, call in zip(blocks, calls, strict=True):
            block = self._block((name,), chain, [call], False)
            block.advance({}, quantized=chain.quantized is not chain.plain)
            block.release()
            if self._home.keeps:
                block.settle({})
            self._home.drop(name)
        self.call_bytes += chain.notices.nbytes + chain.quantized_notices.nbytes

    def _outside(self, layer: Layer, recorder: Recorder | None, chain: Chain | None) -> OutsideBlock:
        reader, inputs = self._reader(layer), None
        if chain is not None and recorder is not None and reader is not None:
            inputs = self._inputs_of(reader, recorder, chain)
        self._home.fill(layer.name)
        valid = None if self.data is None or inputs is None else self.data.valid
        module = self.model.get_submodule(layer.name)
        shared = layer.name == self.anatomy.embedding
        return OutsideBlock(layer, module, self.execution, inputs, valid, shared=shared)

    def _after(self, recorder: Recorder) -> Predictor | None:
        wanted = self.execution.language and self.data is not None
        return self._predictor(recorder, self._outside_parameters()) if wanted else None

    def _outside_parameters(self) -> dict[str, Tensor]:
        """What the model has outside its blocks, in float32."""
        self._home.fill_outside(None)
        inside = tuple(f"{block}." for block in self.anatomy.in_order())
        # float32: small differences between predictions are what is looked at.
        tensors = {n: p for n, p in self.model.named_parameters() if not n.startswith(inside)}
        return {n: p.detach().to(self.execution.device, torch.float32) for n, p in tensors.items()}

    def _predictor(self, recorder: Recorder, parameters: Mapping[str, Tensor]) -> Predictor:
        """From hidden states after the last block to logits, by the model's own norm and head."""
        assert self.data is not None, "predictions need data"
        data, device = self.data, self.execution.device

        def logits(rows: Sequence[int], hidden: Tensor) -> Tensor:
            mask = None if data.attention_mask is None else data.attention_mask[list(rows)].to(device)
            return output_after_blocks(recorder, parameters, data.tokens[list(rows)].to(device), mask, hidden)

        return logits

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
        self._leave(block, replaced)

    def _leave(self, block: Block, replaced: Mapping[str, Tensor]) -> None:
        if isinstance(block, LiveBlock):
            block.release()
        if isinstance(block, (LiveBlock, OutsideBlock)) and self._home.keeps:
            block.settle(replaced)
        # A block's weights are gone before the next ones are read: one is in memory at a time.
        for name in self._filled:
            self._home.drop(name)
        self._home.drop(block.name)

    def _block(
        self,
        members: tuple[str, ...],
        chain: Chain | None,
        calls: Sequence[Calls],
        gather: bool,
        after: Predictor | None = None,
        kind: type[LiveBlock] = LiveBlock,
    ) -> LiveBlock:
        layers = {n: layer for n, layer in self.anatomy.layers.items() if layer.block in members}
        self._filled = members
        for name in members:
            self._home.fill(name)
        experts = [
            e for e in self.anatomy.experts if e.path.startswith(tuple(f"{name}." for name in members))
        ]
        modules = {name: self.model.get_submodule(name) for name in members}
        block = kind(modules, layers, self.execution, experts, after)
        if chain is not None and calls:
            own = calls[0] if len(calls) == 1 else CallsInTurn(calls)
            block.attach(chain, own, None if self.data is None else self.data.valid)
            with torch.no_grad():
                if (why := block.settle_precision()) and not self._told_of_float32:
                    self._told_of_float32 = True
                    logger.warning(
                        "%s cannot compute in %s (%s): float32, there and in blocks like it",
                        block.name,
                        self.execution.amp,
                        why,
                    )
                block.observe(statistics=gather)
            self._tokens.update(block.tokens)
        return block

    def _capture(self, recorder: Recorder, blocks: Sequence[str]) -> tuple[Chain, list[Calls]]:
        assert self.data is not None, "capture needs data"
        self._fill_around(blocks)
        self._home.fill(blocks[0])  # one sample goes through it, to see what blocks return
        tokens, mask = self.data.tokens, self.data.attention_mask
        # transformers passes no mask for a sample without padding. Next to a padded one, every sample gets one.
        padded = [] if mask is None else [int((mask == 0).any(1).nonzero()[0])]
        pair = padded * 2 or [0, min(1, len(tokens) - 1)]
        one, other = (self._record(recorder, [row]) for row in pair)
        both = self._record(recorder, pair)
        # Calls of all samples are kept only if they differ: as a rule masks and rotary tables do not.
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
        self.call_bytes = sum({key: n for call in calls for key, n in call.storages().items()}.values())
        self._home.drop()
        same = self._needs is not Needs.FORWARD or not self.execution.quantized_inputs
        # Where nothing is tuned on quantized inputs both chains are the same, and memory holds one.
        dtype = self.execution.amp or torch.float32
        return Chain(plain, plain if same else plain.copy(), Notices(dtype), Notices(dtype)), calls

    def _fill_around(self, blocks: Sequence[str]) -> None:
        """Read what runs apart from `blocks` and the head: also the blocks of other lists, as BLT has them."""
        self._home.fill_outside(self.anatomy.head)
        for name in self.anatomy.in_order():
            if name not in blocks:
                self._home.fill(name)

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

        self._fill_around(self.anatomy.block_lists[-1])
        plain = through(chain.plain)
        found = Chain(plain, plain if chain.quantized is chain.plain else through(chain.quantized))
        self._home.drop()
        return found


def _finish(samples: Iterator[object]) -> None:
    """Go through what nobody asked for: what comes before a block needs the gradients of all samples."""
    for _ in samples:
        continue
