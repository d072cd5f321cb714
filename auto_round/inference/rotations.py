"""Rotations of a loaded checkpoint: layers whose inputs are turned at run time, and queries and keys that are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from auto_round.backends.base import Kernel
from auto_round.core.errors import FormatError
from auto_round.core.hadamard import power_of_two
from auto_round.core.rotation import (
    EXPERTS,
    Rotations,
    SpinQuantConfig,
    head_dim,
    is_earlier,
    read_rotations,
    restored,
    stored,
    turned_layers,
)
from auto_round.models.turning import InputTurn, turn_keys

FACTOR = "spinquant_R4_had_K"
"""Where auto-round before 1.0 keeps the matrix that R4 is made of when its width is no power of two."""


def make_room(model: nn.Module, config: Mapping[str, Any], prefixes: Iterable[str]) -> None:
    """Give the quantized layers of `model` the buffers that tell their rotations, for transformers to fill.

    config: the quantization configuration. prefixes: names of the lists of blocks.
    """
    wish = read_rotations(config)
    if wish is None:
        return
    # What is outside the blocks, such as a quantized head, has its inputs as they are.
    inside = tuple(f"{prefix}." for prefix in prefixes)
    kernels = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Kernel) and name.startswith(inside)
    }
    experts = [name for name in kernels if EXPERTS in name]
    if experts and is_earlier(config):
        raise FormatError(
            f"{experts[0]}: auto-round before 1.0 turns the inputs of experts too, which is not read here. Quantize "
            "the original again"
        )
    orders = set()
    for name, place, rotation in _planned(model, wish, kernels):
        if rotation.signs is None and power_of_two(rotation.size) != rotation.size:
            # Four times the odd factor: 12 for 768 channels.
            orders.add(4 * rotation.size // power_of_two(rotation.size))
        suffixes = stored(place, rotation)
        kernels[name].planned_turn = place, rotation
        kernels[name].told = tuple(suffixes)
        for suffix, tensor in suffixes.items():
            kernels[name].register_buffer(suffix, torch.empty_like(tensor, device="meta"))
    for order in orders:  # one: R4 has one width
        model.register_buffer(FACTOR, torch.empty(order, order, device="meta"))
    if isinstance(wish, SpinQuantConfig) and wish.r3:
        text = model.config.get_text_config()  # type: ignore[union-attr, operator]
        turn_keys(model, wish, head_dim(text.to_dict()), seed=0)


def _planned(
    model: nn.Module, wish: Rotations, kernels: Mapping[str, Kernel]
) -> Iterable[tuple[str, str, Any]]:
    hidden = getattr(model.config.get_text_config(), "hidden_size", 0)  # type: ignore[union-attr, operator]
    return turned_layers(wish, ((n, kernel.in_features) for n, kernel in kernels.items()), hidden)


def start_turning(model: nn.Module, kernels: Sequence[Kernel]) -> None:
    """After loading: hook what the buffers say. Raises FormatError for a rotation that cannot be carried out."""
    factor = model._buffers.get(FACTOR)
    shared: dict[tuple[str, str], InputTurn] = {}
    only = next((k.get_buffer("hadamard_matrix") for k in kernels if _has_matrix(k)), None)
    for kernel in kernels:
        if kernel.planned_turn is None:
            continue
        name, (place, planned) = kernel.site.name, kernel.planned_turn
        tensors = {suffix: kernel.get_buffer(suffix) for suffix in kernel.told}
        if "hadamard_matrix" in tensors and not _has_matrix(kernel) and only is not None:
            # auto-round 0.16 stores what all layers share with the first of them.
            tensors["hadamard_matrix"] = only
            kernel._buffers["hadamard_matrix"] = only
        if any(tensor.is_meta for tensor in tensors.values()):
            raise FormatError(
                f"{name}: its rotation is missing from the checkpoint; copy or download it again"
            )
        kernel.rotation = restored(place, tensors, planned, factor)
        if kernel.in_features % kernel.rotation.size:
            raise FormatError(
                f"{name}: a rotation of {kernel.rotation.size} channels does not divide its {kernel.in_features} inputs"
            )
        key = (name.rpartition(".")[0], place)
        kernel.register_forward_pre_hook(shared.setdefault(key, InputTurn(kernel.rotation)))


def _has_matrix(kernel: Kernel) -> bool:
    matrix = kernel._buffers.get("hadamard_matrix")
    return matrix is not None and not matrix.is_meta and bool(getattr(matrix, "_is_hf_initialized", False))
