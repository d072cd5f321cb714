"""What a checkpoint in the making consists of: every tensor by name, dtype and shape, before anything is written."""

from __future__ import annotations

from collections.abc import Container, Mapping

from torch import Tensor

from auto_round.core.plan import Plan
from auto_round.formats.base import Format, planned_tensors
from auto_round.jobs.accounts import Account
from auto_round.models.checkpoint import Checkpoint, TensorInfo
from auto_round.models.experts import ExpertStore, FusedTensors
from auto_round.models.subject import Subject


class Layout:
    """The tensors of one checkpoint in one format.

    infos: of the files, in the order of the source, then the quantized layers', then further ones. account: what
    becomes of each tensor of the source. fused: the tensors that hold several experts, or None.
    """

    def __init__(self, fmt: Format, subject: Subject, plan: Plan, more: Mapping[str, Tensor]) -> None:
        """more: tensors that neither a layer nor the source has, written as they are."""
        self.format, self.subject, self.plan = fmt, subject, plan
        self.account = Account()
        self.fused: FusedTensors | None = None
        self._of_layer: dict[str, list[str]] = {}  # layer -> its tensors, also those that lie in fused ones
        scales = {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in more.items()}
        self.infos = {**self._infos(), **scales}

    def _infos(self) -> dict[str, TensorInfo]:
        """Those of the source, with quantized layers replaced."""
        store = self.subject.files.store
        infos, made = dict(store.infos), set()
        for layer in self.plan.quantized():
            prefix, source = self.subject.stored_name(layer), f"{self.subject.stored_name(layer)}.weight"
            spec = self.plan[layer].weight
            assert spec is not None, "quantized() names layers with a spec"
            dtype = infos[source].dtype if source in infos else None
            if infos.pop(source, None) is not None:  # a tied head has no tensor of its own to replace
                self.account.replaced.append(source)
            for suffix, tensor in planned_tensors(
                self.format, spec, self.plan.shapes[layer], self.plan[layer].act
            ).items():
                name = f"{prefix}.{suffix}"
                made.add(name)
                self._of_layer.setdefault(layer, []).append(name)
                tensor = self.as_stored(layer, suffix, tensor)
                infos[name] = TensorInfo(
                    dtype if self._plain(suffix) and dtype else tensor.dtype, tuple(tensor.shape)
                )
                if name not in store.infos:
                    self.account.added.append(name)
        if isinstance(store, ExpertStore):
            infos = store.joined(infos)
            self.fused = FusedTensors(store, made - infos.keys())
        filled: Container[str] = self.fused or ()
        self.account.copied = [name for name in infos if name not in made and name not in filled]
        return infos

    def as_stored(self, layer: str, suffix: str, tensor: Tensor) -> Tensor:
        """A plain weight of a layer that its model stores transposed goes to the file in that form."""
        return tensor.t() if self._plain(suffix) and self.subject.anatomy.layers[layer].transposed else tensor

    def _plain(self, suffix: str) -> bool:
        """Whether that tensor is an ordinary weight, as the model itself stores it."""
        return suffix == "weight" and not self.format.holds_codes

    def planned(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor of the files, or of one that lies in a fused tensor."""
        return self.infos.get(name) or self.subject.files.store.infos[name]

    def stored_in(self, name: str) -> str:
        """The tensor of the files that has `name`: itself, or the fused one that it lies in."""
        store = self.subject.files.store
        if name in self.infos or not isinstance(store, ExpertStore):
            return name
        return store.pieces[name].tensor

    def holders_of(self, name: str) -> set[str]:
        """The tensors of the files that hold the layer `name`, or the copied tensor of that name."""
        return {self.stored_in(tensor) for tensor in self._of_layer.get(name, [name])}

    def read_back(self, stored: Checkpoint, name: str) -> Tensor:
        """The tensor called `name` of the written files."""
        store = self.subject.files.store
        if name in stored.infos or not isinstance(store, ExpertStore):
            return stored.look(name)
        piece = store.pieces[name]
        return piece.of_expert(stored.look(piece.tensor, piece.expert))

    def float_matrices(self) -> tuple[str, ...]:
        """Modules, by the model's names, whose weight is a matrix that is copied as it is."""
        names = {stored: name for name, stored in self.subject.names.items()}
        copied = (name for name in self.account.copied if name.endswith(".weight"))
        return tuple(
            names.get(name, name).removesuffix(".weight")
            for name in copied
            if len(self.infos[name].shape) == 2 and self.infos[name].dtype.is_floating_point
        )
