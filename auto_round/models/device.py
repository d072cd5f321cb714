"""Which device blocks run on, and in which dtype their matrix products are computed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from auto_round.core.errors import NotYetError, PlanError

logger = logging.getLogger("auto_round")


def pick_device(device_map: Any = None) -> torch.device:
    """The device for tuning: the one asked for, else the first accelerator, else the CPU.

    A number means that accelerator, or the CPU on a machine without one. Raises PlanError for a device that is not
    there, NotYetError for several.
    """
    if isinstance(device_map, Mapping) or (isinstance(device_map, str) and "," in device_map):
        raise NotYetError(
            f"device_map {device_map!r}: several devices are not there yet; name one, such as 'cuda:0'"
        )
    if device_map is None or str(device_map) == "auto" or str(device_map).isdigit():
        index = int(device_map) if str(device_map).isdigit() else 0
        if torch.cuda.is_available():
            return torch.device("cuda", index)
        logger.info("no accelerator found: tuning on the CPU with %d threads", torch.get_num_threads())
        return torch.device("cpu")
    try:
        device = torch.device(device_map)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise PlanError(f"device {device_map!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def execution_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device multiplies it in hardware, else None for float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    if device.type == "cpu":
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else None
    return torch.bfloat16
