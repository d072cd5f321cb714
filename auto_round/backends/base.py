"""What a kernel library must offer, what it can hold, and the choice among them for one layer."""

from __future__ import annotations

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn

from auto_round.codecs.base import codec_of
from auto_round.core.errors import AutoRoundError, FormatError, nearest
from auto_round.core.hadamard import Rotation
from auto_round.core.quantized import Quantized
from auto_round.core.registry import discover
from auto_round.core.scheme import TensorSpec
from auto_round.formats.base import Format, planned_tensors

T = TypeVar("T")
GPTQ = ("auto_round:auto_gptq", "auto_gptq")  # zero points stored less one: the guide's gptq_zp+-1
GPTQ_PLAIN = ("auto_round:gptqmodel",)  # the guide's gptq
AWQ = ("auto_round:auto_awq", "auto_awq")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One layer of a quantized checkpoint that needs a module. shape: (O, I) as stored.

    act: spec of its inputs, or None. padding: columns at the end of a stored row that the model does not have.
    """

    name: str
    format: Format
    spec: TensorSpec
    shape: tuple[int, int]
    device: str
    dtype: torch.dtype
    bias: torch.dtype | None
    act: TensorSpec | None = None
    padding: int = 0

    @property
    def kind(self) -> str:
        """What layers that any backend treats alike have in common, in words."""
        inputs = "" if self.act is None else f", inputs {self.act}"
        return f"{self.spec}{inputs} ({self.format.name}, {str(self.dtype).removeprefix('torch.')}, {self.device})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a kernel library can hold: one row of the backend table.

    groups: allowed group sizes, None for any. symmetric: allowed values. multiple_of: what O and I must divide by.
    types: data types of the weights. Quantized inputs are outside all limits.
    """

    devices: tuple[str, ...]
    bits: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    packings: tuple[str, ...]
    groups: tuple[int, ...] | None = None
    symmetric: tuple[bool, ...] = (True, False)
    multiple_of: tuple[int, int] = (1, 1)
    types: tuple[str, ...] = ("int",)

    def reject(self, site: Site) -> str | None:
        """Why `site` is outside these limits, or None."""
        given = (
            ("device", site.device.split(":")[0], self.devices),
            ("packing", site.format.name, self.packings),
            ("data type", site.spec.dtype, self.types),
            ("bits", site.spec.bits, self.bits),
            ("group size", site.spec.group, self.groups),
            ("symmetric", site.spec.sym, self.symmetric),
            ("compute dtype", site.dtype, self.dtypes),
        )
        for what, value, allowed in given:
            if allowed is not None and value not in allowed:
                return f"{what} {value} is not among {', '.join(str(a) for a in allowed)}".replace(
                    "torch.", ""
                )
        if site.act is not None:
            return f"inputs are quantized ({site.act})"
        for side, size, unit in zip(("rows", "columns"), site.shape, self.multiple_of):
            if size % unit:
                return f"{size} {side} are no multiple of {unit}"
        return None


def _pad(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Inputs of a layer whose stored rows are longer than the model's: what lies beyond meets zeros."""
    assert isinstance(layer, Kernel), "the hook is put on kernels"
    return (nn.functional.pad(args[0], (0, layer.site.padding)), *args[1:])


class Kernel(nn.Module):
    """A layer of a loaded checkpoint, as some backend runs it.

    It starts with the checkpoint's tensors as empty buffers on the meta device. A backend that needs another layout
    swaps them in `finish` with `replace`, and overrides `quantized`; saving writes the checkpoint's tensors again.
    """

    def __init__(self, site: Site, backend: str) -> None:
        super().__init__()
        self.backend, self.site = backend, site
        self.in_features, self.out_features = site.shape[1] - site.padding, site.shape[0]
        if site.padding:
            self.register_forward_pre_hook(_pad)
        self.transposed = False  # whether the plain layer held its weight as (I, O)
        self.ready = False  # whether its tensors are loaded
        self.planned_turn: tuple[str, Rotation] | None = None  # what the configuration says of its inputs
        self.told: tuple[str, ...] = ()  # names of the buffers that tell it
        self.rotation: Rotation | None = None  # which the inputs go through before they come here
        # From the format's own `write` on meta tensors: no table of buffers that could differ from the file.
        planned = planned_tensors(site.format, site.spec, site.shape, site.act)
        self._planned = {suffix: tensor.dtype for suffix, tensor in planned.items()}
        for suffix, tensor in planned.items():
            self.register_buffer(suffix, torch.empty_like(tensor))
        self.packed = tuple(name for name, _ in self.named_buffers())
        bias = None if site.bias is None else torch.empty(site.shape[0], dtype=site.bias, device="meta")
        self.bias: Tensor | None
        self.register_buffer("bias", bias)
        self.complete = True  # all buffers are registered: none of that name can be missed

    def quantized(self) -> Quantized:
        """What the layer holds. Raises FormatError for tensors that do not fit."""
        tensors = {name: self.get_buffer(name) for name in self.packed}
        return self.site.format.read(tensors, self.site.spec, self.site.shape)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) in `dtype`."""
        return codec_of(self.site.spec).dequantize(self.quantized()).to(dtype)

    def checked(self) -> Quantized:
        """`quantized`, after loading. Raises FormatError naming the layer for missing or damaged tensors."""
        q: Quantized = self._checked(self.quantized)
        self._check_scales(q.params)
        return q

    def checked_grid(self) -> dict[str, Tensor] | None:
        """The params of `checked` where codes can be taken from GPTQ's `qweight` as they are, else None."""
        tensors = {name: self.get_buffer(name) for name in self.packed}
        params = self._checked(lambda: self.site.format.read_grid(tensors, self.site.spec, self.site.shape))
        if params is not None:
            self._check_scales(params)
        return params

    def _checked(self, read: Callable[[], T]) -> T:
        """What `read` gives, once every tensor is there and of its type."""
        for name in self.packed:
            tensor, wanted = self.get_buffer(name), self._planned[name]
            if tensor.device.type == "meta":
                raise FormatError(f"{self.site.name}.{name} is missing from the checkpoint")
            # transformers casts floats to the planned type; bit fields of another width would be read as other codes.
            if tensor.dtype != wanted and not (tensor.is_floating_point() and wanted.is_floating_point):
                raise FormatError(
                    f"{self.site.name}.{name} is {tensor.dtype}, {self.site.format.name} stores {wanted}: "
                    "the checkpoint is damaged or of another format"
                )
        try:
            return read()
        except AutoRoundError as error:
            raise FormatError(f"{self.site.name}: {error}") from error

    def _check_scales(self, params: Mapping[str, Tensor]) -> None:
        if not all(bool(torch.isfinite(t).all()) for t in params.values() if t.is_floating_point()):
            raise FormatError(
                f"{self.site.name}: scales that are NaN or Inf; copy or download the checkpoint again"
            )

    def replace(self, **tensors: Tensor) -> None:
        """Hold `tensors` in the place of the checkpoint's, which `quantized` must be able to give back."""
        for name in self.packed:
            del self._buffers[name]
        self.packed = ()
        for name, tensor in tensors.items():
            # Not the checkpoint's: see `_save_to_state_dict`.
            self.register_buffer(name, tensor, persistent=False)

    def __getattr__(self, name: str) -> Any:
        """Also `weight`, where no tensor of the checkpoint is called so: see `weight_for_readers`."""
        if name == "weight" and self.__dict__.get("complete") and name not in self._buffers:
            return self.weight_for_readers()
        return super().__getattr__(name)

    def weight_for_readers(self) -> Tensor:
        """The weight as the plain layer would hold it, made anew, for code of models that reads it past the layer.

        Until the layer is loaded it is a stand-in on the meta device: transformers 5 initializes some layers through
        their parents (GPT2Attention fills c_proj.weight), and skips what is marked as done.
        """
        if not self.ready:
            shape = (self.in_features, self.out_features) if self.transposed else self.site.shape
            stand_in = torch.empty(shape, dtype=self.site.dtype, device="meta")
            stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
            return stand_in
        return self.plain_weight()

    def plain_weight(self) -> Tensor:
        """The dequantized weight in the model's dtype, without padding: (O, I), or (I, O) where the model has it so."""
        weight = self.dequantized(self.site.dtype)[:, : self.in_features]
        if self.rotation is not None:  # a plain layer turns no inputs
            weight = self.rotation.back(weight.float()).to(weight.dtype)
        return weight.t().contiguous() if self.transposed else weight.contiguous()

    @property
    def W_q(self) -> Tensor:
        """Some tensor of the layer: peft (0.21) asks it for the device of adapters when there is no `qweight`."""
        return next(self.buffers())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.packed:
            for name, tensor in self.site.format.write(self.quantized()).items():
                destination[prefix + name] = tensor

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move as modules do; codes and scales keep their dtypes."""
        before = {name: tensor for name, tensor in self.named_buffers() if name != "bias"}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                # A model cast to bfloat16 must not round its scales: the codes were made for these.
                self._buffers[name] = tensor.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        size = f"{self.in_features}, {self.out_features}"
        return f"{size}, {self.site.spec}, format={self.site.format.name}, backend={self.backend}"


class LibraryLinear(Kernel):
    """A layer that another library's module multiplies. The checkpoint's tensors stay in main memory, for saving."""

    def adopt(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Give `module` its `tensors` in the layout it starts from, and the bias; let it repack them."""
        self._kept = {name: self.get_buffer(name).cpu() for name in self.packed}
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        module.register_buffer("bias", self.bias)
        if callable(settle := getattr(module, "post_init", None)):  # what these libraries call it
            settle()
        self.replace()
        # In a tuple it is no submodule: what the library made of the tensors is not part of the checkpoint.
        self._module = (module,)

    def quantized(self) -> Quantized:
        """What the layer holds."""
        if self.packed:
            return super().quantized()
        return self.site.format.read(self._kept, self.site.spec, self.site.shape)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) to (..., O)."""
        y: Tensor = self._module[0](x)
        return y


class Backend(ABC):
    """One kernel library: where it can run (`limits`, any one row), and what it needs (`requires`)."""

    name: str
    aliases: tuple[str, ...] = ()
    priority: float
    limits: tuple[Limits, ...]
    requires: tuple[str, ...] = ()  # distributions, as pip names them, with versions
    summary: str

    def reject(self, site: Site) -> str | None:
        """Why this backend cannot run `site`, whatever is installed, or None."""
        reasons = [row.reject(site) for row in self.limits]
        if None in reasons:
            return None
        # The most telling row is one that already agrees about the device.
        near = [r for row, r in zip(self.limits, reasons) if site.device.split(":")[0] in row.devices]
        return (near or reasons)[0]

    def missing(self) -> str | None:
        """What this machine lacks for the backend and how to get it, or None."""
        unmet = [text for text in self.requires if not is_met(text)]
        if not unmet:
            return None
        return f"needs {', '.join(_with_found(text) for text in unmet)}: pip install {_quoted(unmet)}"

    def prepare(self) -> str | None:
        """Make ready what takes time, such as compiling, at first use. Why that failed, or None."""
        return None

    @abstractmethod
    def build(self, site: Site) -> Kernel:
        """An empty module on the meta device whose buffers have the names, shapes and dtypes of the checkpoint."""

    @abstractmethod
    def finish(self, module: Kernel, *, cache: bool) -> None:
        """After loading: check, repack. `cache` allows keeping a dequantized copy of the weight."""

    def join(self, modules: Sequence[Kernel]) -> None:  # noqa: B027  most backends have no such call
        """Told after `finish` that these layers of one module read the same input; may multiply them in one call."""


def has_device(kind: str) -> bool:
    """Whether torch can put a tensor on a device of this kind here."""
    try:
        torch.empty(0, device=kind)
    # torch says it in four ways: not compiled in, no driver, unknown name, module of the vendor not imported.
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        return False
    return True


@cache
def found_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_met(requirement: str) -> bool:
    """Whether an installed distribution satisfies `requirement` ("torch>=2.8")."""
    wanted = Requirement(requirement)
    found = found_version(wanted.name)
    return found is not None and wanted.specifier.contains(found, prereleases=True)


def _with_found(requirement: str) -> str:
    found = found_version(Requirement(requirement).name)
    return requirement if found is None else f"{requirement} (here: {found})"


def _quoted(requirements: list[str]) -> str:
    return " ".join(f'"{r}"' if any(c in r for c in "<>") else r for r in requirements)


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend for one layer, and the better ones that this machine lacks: name -> what is missing."""

    backend: Backend
    better: Mapping[str, str]


def backends() -> dict[str, Backend]:
    """All backends by name, best first."""
    found = discover("auto_round.backends")
    return dict(sorted(found.items(), key=lambda item: (-item[1].priority, item[0])))


def named(wanted: str) -> dict[str, Backend]:
    """The backends that `wanted`, a name or an alias, stands for, best first. Raises FormatError."""
    known = backends()
    key = wanted.strip().casefold()
    if key in ("auto", "none", ""):
        return known
    # Several may share an alias: "gptq" means the best of AutoGPTQ's kernels, whichever runs here.
    meant = {b.name: b for b in known.values() if key == b.name or key in b.aliases}
    if not meant:
        every = sorted({name for b in known.values() for name in (b.name, *b.aliases)})
        raise FormatError(
            f"backend {wanted!r} is unknown.{nearest(key, every)} Available: auto, {', '.join(every)}"
        )
    return meant


def choose(site: Site, wanted: str = "auto") -> Choice:
    """The best backend for `site` among those that `wanted` stands for.

    Raises FormatError with the reason of every one of them when none can run it here.
    """
    reasons: dict[str, str] = {}
    lacking: dict[str, str] = {}
    for name, backend in named(wanted).items():
        reason = backend.reject(site)
        if reason is not None:
            reasons[name] = reason
            continue
        # Preparing may compile for half a minute, so it comes last and only for a backend that is wanted.
        missing = backend.missing() or backend.prepare()
        if missing is None:
            return Choice(backend, lacking)
        reasons[name] = lacking[name] = missing
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    asked = "no backend can run it" if wanted == "auto" else f"backend {wanted!r} cannot run it"
    raise FormatError(f"{site.name}: {asked}. {told}")
