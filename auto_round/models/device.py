"""Which device blocks run on, and in which dtype their matrix products are computed."""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from auto_round.core.errors import PlanError

logger = logging.getLogger("auto_round")
KINDS = ("cpu", "cuda", "xpu", "hpu", "mps", "meta")
"""Words before the colon of a device; any other is part of a layer's name."""


@dataclass(frozen=True, slots=True)
class Devices:
    """The first of `devices` runs blocks, the others take layers of them. layers: name or pattern -> device."""

    devices: tuple[torch.device, ...]
    layers: Mapping[str, torch.device] = field(default_factory=dict)

    @property
    def main(self) -> torch.device:
        """Where blocks run and hidden states arrive."""
        return self.devices[0]

    def of(self, layer: str) -> torch.device | None:
        """The device that the user gave to `layer`, by its name in the model or in its block; None when none is."""
        for pattern, device in self.layers.items():
            if layer == pattern or layer.endswith(f".{pattern}") or re.search(pattern, layer):
                return device
        return None


def parse_devices(device_map: Any = None) -> Devices:
    """The devices that `device_map` means.

    None or a number: that accelerator, or the CPU on a machine without one. "auto": all accelerators. "0,1" or
    "cuda:0,cuda:1": those. A mapping, or "pattern:device,pattern:device": single layers, the rest on the first device
    named. Raises PlanError for a device that is not there.
    """
    if isinstance(device_map, str) and ":" in device_map:
        pairs = [part.strip().partition(":") for part in device_map.split(",") if part.strip()]
        # "cuda:0" is a device, "q_proj:0" is not.
        if any(colon and name not in KINDS for name, colon, _ in pairs):
            device_map = {name: device for name, _, device in pairs}
    if isinstance(device_map, Mapping):
        layers = {str(name).strip(): _device(device) for name, device in device_map.items()}
        if not layers:
            raise PlanError(f"device_map {device_map!r} names no device; give one, or leave device_map out")
        # An accelerator runs the blocks if any is named: the CPU comes last.
        named = sorted({*layers.values()}, key=lambda d: (d.type == "cpu", d.index or 0))
        return Devices((named[0],), layers)
    if device_map is None:
        return Devices((_device(0),))
    if str(device_map) == "auto":
        return Devices(tuple(_device(i) for i in range(torch.cuda.device_count())) or (_device(0),))
    parts = [part.strip() for part in str(device_map).split(",") if part.strip()]
    return Devices(tuple(dict.fromkeys(_device(part) for part in parts)))


def _device(said: Any) -> torch.device:
    """One device. A number means that accelerator; on a machine without any, the CPU."""
    if str(said).isdigit():
        if not torch.cuda.is_available():
            logger.info("no accelerator found: on the CPU with %d threads", torch.get_num_threads())
            return torch.device("cpu")
        said = f"cuda:{said}"
    try:
        device = torch.device(said)
        torch.empty(0, device=device)  # fails here for a device that is not there, not after an hour
    except (RuntimeError, AssertionError, ImportError) as error:
        raise PlanError(f"device {said!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def execution_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies it faster than float32, else None for the latter."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    if device.type == "cpu":
        # Without it bfloat16 products are emulated. On x86, AVX-512's own are slower than float32's too (1.4 times in
        # tuning, a Xeon without AMX); what is fast there is the matrix unit.
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if platform.machine().lower() in ("x86_64", "amd64"):
            fast = fast and torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if fast else None
    return torch.bfloat16


def elsewhere(module: nn.Module, device: torch.device, home: torch.device) -> list[RemovableHandle]:
    """Let `module` run on `device` inside a block on `home`: its inputs go there, and its output comes back."""

    def moved(value: Any, to: torch.device) -> Any:
        return tree_map(lambda x: x.to(to) if isinstance(x, torch.Tensor) else x, value)

    def there(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return moved(args, device), moved(kwargs, device)

    def back(_module: nn.Module, _args: Any, output: Any) -> Any:
        return moved(output, home)

    if any(tensor.device != device for tensor in module.parameters()):  # moved once, and stays there
        module.to(device)
    return [
        module.register_forward_pre_hook(there, with_kwargs=True),
        module.register_forward_hook(back),
    ]
