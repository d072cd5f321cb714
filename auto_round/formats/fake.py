"""A plain model whose weights are what is left after quantization: for research, loaded by anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from auto_round.codecs.base import codec_of
from auto_round.core.errors import FormatError
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.formats.base import Format, Provenance


class Fake(Format):
    """One `weight` per layer, in the dtype of the model."""

    name = "fake"
    holds_codes = False
    holds_embedding = True
    merged = False

    def reject(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Holds everything."""
        return None

    def write(self, q: Quantized) -> dict[str, Tensor]:
        """The dequantized weight (O, I), float32; the writer casts it to the dtype of the tensor it replaces."""
        return {"weight": codec_of(q.spec).dequantize(q)}

    def read(self, tensors: Mapping[str, Tensor], spec: TensorSpec, shape: tuple[int, int]) -> Quantized:
        """Not possible: the codes are gone. Raises FormatError."""
        raise FormatError(
            f"a fake checkpoint stores plain weights, no codes of {spec}; load it as an ordinary model"
        )

    def remarks(self, plan: Plan) -> Iterator[str]:
        """What a plain model cannot say."""
        if any(scheme.act is not None for scheme in plan.values()):
            yield "fake stores weights only: the loaded model does not quantize inputs. Format auto_round does"

    def config(self, plan: Plan, provenance: Provenance) -> None:
        """None: readers see an ordinary model."""
        return None


ENTRIES = (Fake(),)
