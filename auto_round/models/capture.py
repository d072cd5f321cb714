"""Learning what the blocks of a live model are called with, without computing them.

While the model runs, every block of one list is replaced by the identity, which notes its arguments. So one cheap pass
gives the first block's hidden states and each block's own keyword arguments: rotary embeddings, masks, positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from auto_round.core.errors import ModelError

Forward = Callable[..., Any]
Board = MutableMapping[Any, tuple[Tensor, ...]]
WEIGHTS_ALONE = "Quantize from weights alone: iters=0, disable_opt_rtn=True (auto-round-rtn)"


class _Reached(Exception):
    """The forward got as far as needed."""


@dataclass(frozen=True, slots=True)
class Axes:
    """Where samples and tokens lie in the hidden states of a block: (T, B, H) in XLNet, (P, B, T, H) in Gemma 3n."""

    sample: int = 0
    token: int = 1

    def first(self, hidden: Tensor) -> Tensor:
        """`hidden` as the block has it, with samples and tokens first: (B, T, ...)."""
        return hidden.movedim((self.sample, self.token), (0, 1))

    def back(self, hidden: Tensor) -> Tensor:
        """The reverse of `first`."""
        return hidden.movedim((0, 1), (self.sample, self.token))


@dataclass(frozen=True, slots=True)
class Call:
    """Arguments of one block apart from the hidden states; `by_keyword` tells how those were passed.

    board: the one among the arguments that blocks write on for later blocks, as Gemma 3n's do with keys and values.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool
    axes: Axes = Axes()
    board: Board | None = None

    def run(self, module: Forward, hidden: Tensor) -> Tensor:
        """Call `module` with `hidden` (B, T, ...) and these arguments; the hidden states it returns."""
        states = self.axes.back(hidden)
        out = (
            module(**{**self.kwargs, "hidden_states": states})
            if self.by_keyword
            else module(states, *self.args, **self.kwargs)
        )
        # Some blocks return their cache or attention too.
        return self.axes.first(out[0] if isinstance(out, (tuple, list)) else out)


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Forward]) -> Iterator[None]:
    """Each of `modules` runs the given forward instead of its own, until the context is left."""
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own forward shows again


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any], axes: Axes) -> tuple[Tensor, Call]:
    """(hidden states as the block gets them, the rest of its arguments)."""
    if args:
        return args[0], Call(_without_caches(args[1:]), _without_caches(kwargs), False, axes)
    if "hidden_states" not in kwargs:
        raise ModelError(f"a block is called without hidden_states; its keywords are {', '.join(kwargs)}")
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], Call((), _without_caches(rest), True, axes)


def _without_caches(values: Any) -> Any:
    """`values`, a tuple or a dict, with None for every cache of keys and values.

    XLM makes one although it is told not to; it would grow with every run of the block.
    """
    from transformers import Cache

    if isinstance(values, dict):
        return {key: None if isinstance(value, Cache) else value for key, value in values.items()}
    return tuple(None if isinstance(value, Cache) else value for value in values)


@dataclass(frozen=True, slots=True)
class Pass:
    """What one forward of the model told: hidden states (B, T, ...) into the first block, and each block's call."""

    hidden: Tensor
    calls: tuple[Call, ...]


class Recorder:
    """Runs a model up to the last block of a list, noting how its blocks are called."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model, self.blocks = model, blocks
        self._returned: Any = None
        self._axes = Axes()

    @torch.no_grad()
    def __call__(self, tokens: Tensor, attention_mask: Tensor | None) -> Pass:
        """One forward over `tokens` (B, T)."""
        if self._returned is None:  # the same for all samples: found out once
            self._learn_axes(tokens[:1])
            self._learn_return(tokens[:1], None if attention_mask is None else attention_mask[:1])
        seen: list[tuple[Tensor, Call]] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            seen.append(_split_call(args, kwargs, self._axes))
            if len(seen) > 1:
                self._check_link(len(seen) - 1, seen[-2][0], seen[-1][0])
            if len(seen) == len(self.blocks):
                raise _Reached  # what follows, above all the head, would cost the most
            return self._returning(seen[-1][0])

        with replaced_forwards(self.blocks, [note] * len(self.blocks)):
            run_until(self.model, tokens, attention_mask)
        if len(seen) != len(self.blocks):
            raise ModelError(
                f"the model ran {len(seen)} of its {len(self.blocks)} blocks; cannot tell how to call the rest"
            )
        return Pass(self._axes.first(seen[0][0]), tuple(call for _, call in seen))

    def _check_link(self, number: int, returned: Tensor, got: Tensor) -> None:
        """Raise ModelError when block `number` does not get what the one before returned."""
        # A model may cast in between, which changes the last bits of values.
        if got is returned or (got.shape == returned.shape and torch.equal(got, returned.to(got.dtype))):
            return
        raise ModelError(
            f"{type(self.model).__name__}: block {number} ({type(self.blocks[number]).__name__}) does not get what the "
            f"block before it returns, so blocks cannot be tuned one after the other. {WEIGHTS_ALONE}"
        )

    def _learn_axes(self, tokens: Tensor) -> None:
        """Find samples and tokens by which sizes change with their numbers."""
        if tokens.shape[1] < 2:
            return
        one, two, short = (self._shape(ids) for ids in (tokens, tokens.repeat(2, 1), tokens[:, :-1]))
        sample = next((i for i, size in enumerate(one) if two[i] == 2 * size), 0)
        token = next((i for i, size in enumerate(one) if short[i] == size - 1 and i != sample), None)
        if token is not None:
            self._axes = Axes(sample, token)

    def _shape(self, tokens: Tensor) -> torch.Size:
        """Shape of the hidden states into the first block."""
        found: list[torch.Size] = []

        def watch(*args: Any, **kwargs: Any) -> Any:
            found.append(_split_call(args, kwargs, self._axes)[0].shape)
            raise _Reached

        with replaced_forwards([self.blocks[0]], [watch]):
            run_until(self.model, tokens, None)
        return found[0]

    def like_output(self, hidden: Tensor) -> Any:
        """`hidden` (B, T, ...) in the form in which a block returns it."""
        return self._returning(self._axes.back(hidden))

    def pass_on(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a block that returns what it gets."""
        return self._returning(_split_call(args, kwargs, self._axes)[0])

    def _returning(self, hidden: Tensor) -> Any:
        if self._returned is Tensor:
            return hidden
        kind, count = self._returned
        return kind([hidden, *[None] * (count - 1)])

    def _learn_return(self, tokens: Tensor, attention_mask: Tensor | None) -> None:
        first = self.blocks[0]

        def watch(*args: Any, **kwargs: Any) -> Any:
            # The class's own: the instance's `forward` is this very function as long as it is replaced.
            out = type(first).forward(first, *args, **kwargs)
            self._returned = Tensor if isinstance(out, Tensor) else _form(out, first)
            raise _Reached

        with replaced_forwards([first], [watch]):
            run_until(self.model, tokens, attention_mask)


def _form(out: Any, block: nn.Module) -> tuple[type, int]:
    """(type, length) of the sequence that `block` returned. Raises ModelError for anything else."""
    if type(out) in (tuple, list) and isinstance(out[0], Tensor):
        return type(out), len(out)
    raise ModelError(
        f"{type(block).__name__} returns a {type(out).__name__}, not hidden states or a tuple that begins with them, "
        f"so blocks cannot be tuned one after the other. {WEIGHTS_ALONE}"
    )


def run_until(model: nn.Module, tokens: Tensor, attention_mask: Tensor | None) -> None:
    """Run the model until something raises `_Reached`."""
    extra = {} if attention_mask is None else {"attention_mask": attention_mask}
    try:
        model(input_ids=tokens, use_cache=False, **extra)  # a cache would only fill memory
    except _Reached:
        return


@torch.no_grad()
def input_after_blocks(
    recorder: Recorder, layer: nn.Module, tokens: Tensor, mask: Tensor | None, hidden: Tensor
) -> Tensor:
    """What `layer`, which runs after the blocks, gets when the last block returns `hidden` (B, T, H)."""
    got: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
        got.append(args[0])  # before the layer computes: its input is all that is wanted
        raise _Reached

    def finish(*_args: Any, **_kwargs: Any) -> Any:
        return recorder.like_output(hidden)

    handle = layer.register_forward_pre_hook(note)
    try:
        with replaced_forwards(recorder.blocks, [recorder.pass_on] * (len(recorder.blocks) - 1) + [finish]):
            run_until(recorder.model, tokens, mask)
    finally:
        handle.remove()
    if not got:
        raise ModelError("the model never reached the layer after its blocks")
    return got[0]


def output_after_blocks(
    recorder: Recorder, parameters: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None, hidden: Tensor
) -> Tensor:
    """Logits (B, T, V) of the model when its last block returns `hidden` (B, T, H); differentiable in `hidden`.

    parameters: what is used outside the blocks in the place of the model's own.
    """

    def finish(*_args: Any, **_kwargs: Any) -> Any:
        return recorder.like_output(hidden)

    call = {"input_ids": tokens, "use_cache": False, **({} if mask is None else {"attention_mask": mask})}
    with replaced_forwards(recorder.blocks, [recorder.pass_on] * (len(recorder.blocks) - 1) + [finish]):
        logits: Tensor = functional_call(recorder.model, dict(parameters), (), call).logits
    return logits


def leaves(value: Any) -> list[Tensor]:
    """All tensors inside nested tuples, lists and dicts, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, dict):
        return [leaf for key in value for leaf in leaves(value[key])]
    return []


def rebuilt(value: Any, replace: Iterator[Tensor]) -> Any:
    """`value` with its tensors, in the order of `leaves`, taken from `replace`."""
    if isinstance(value, Tensor):
        return next(replace)
    if isinstance(value, (tuple, list)):
        return type(value)(rebuilt(item, replace) for item in value)
    if isinstance(value, dict):
        return {key: rebuilt(item, replace) for key, item in value.items()}
    return value


class Calls:
    """The calls of one block for all samples: what is the same for every sample is stored once."""

    def __init__(self, one: Call, other: Call, both: Call, samples: Sequence[Call] | None) -> None:
        """Learn from passes over sample 0, sample 1, and both at once; `samples` holds every sample's own call."""
        self._one = one
        self.boards = {k for k, v in one.kwargs.items() if isinstance(v, MutableMapping) and not len(v)}
        self._shared = leaves((one.args, one.kwargs))
        second, joint = leaves((other.args, other.kwargs)), leaves((both.args, both.kwargs))
        shapes = [(a.shape, c.shape) for a, c in zip(self._shared, joint, strict=True)]
        # What doubles when two samples run together is per sample (masks); what stays is shared (rotary tables).
        self._axes = [_doubled(a, c) for a, c in shapes]
        varying = [not torch.equal(a, b) for a, b in zip(self._shared, second, strict=True)]
        self._per_sample: list[list[Tensor]] | None = None
        if samples is not None:
            every = [leaves((call.args, call.kwargs)) for call in samples]
            self._per_sample = [
                [] if axis is None else [row[i].narrow(axis, 0, self._shared[i].shape[axis]) for row in every]
                for i, axis in enumerate(self._axes)
            ]
        elif any(varying):
            raise ModelError("the blocks' arguments depend on the sample; every sample's call is needed")

    def storages(self) -> dict[int, int]:
        """Address -> bytes of what is stored for single samples; blocks may share it."""
        own = [tensor.untyped_storage() for parts in self._per_sample or () for tensor in parts]
        return {storage.data_ptr(): storage.nbytes() for storage in own}

    def batch(self, rows: Sequence[int], device: torch.device | str, board: Board | None = None) -> Call:
        """The call for the samples `rows` together, with an empty board of its own unless there is a `board`."""

        def leaf(i: int) -> Tensor:
            axis = self._axes[i]
            if axis is None:
                return self._shared[i].to(device)
            own = self._per_sample[i] if self._per_sample else []
            parts = [own[row] for row in rows] if own else [self._shared[i]] * len(rows)
            return torch.cat(parts, axis).to(device)

        args, kwargs = rebuilt(
            (self._one.args, self._one.kwargs), (leaf(i) for i in range(len(self._shared)))
        )
        # Empty when it was captured, as no block had run: what was written on it since would be other samples'.
        for key, value in self._one.kwargs.items():
            if isinstance(value, MutableMapping) and key in self.boards:
                board = type(value)() if board is None else board
                kwargs[key] = board
        return Call(args, kwargs, self._one.by_keyword, self._one.axes, board)


def _doubled(one: torch.Size, both: torch.Size) -> int | None:
    """The axis along which `both` is twice as long as `one`, when all others are the same."""
    changed = [i for i, (a, c) in enumerate(zip(one, both)) if a != c]
    if len(one) != len(both) or len(changed) != 1:
        return None
    (axis,) = changed
    return axis if both[axis] == 2 * one[axis] else None


def varies(one: Pass, other: Pass) -> bool:
    """Whether any block's arguments differ between two samples."""
    for a, b in zip(one.calls, other.calls, strict=True):
        for x, y in zip(leaves((a.args, a.kwargs)), leaves((b.args, b.kwargs)), strict=True):
            if x.shape != y.shape or not torch.equal(x, y):
                return True
    return False
