"""The compiled search for integer grids and its twin in torch find the same, and nothing worse than plain rounding."""

import pytest
import torch

from auto_round.codecs.base import codec_of
from auto_round.core import integer_search
from auto_round.core.scheme import TensorSpec

SPECS = [
    TensorSpec(bits=4, group=128),
    TensorSpec(bits=2, group=32),
    TensorSpec(bits=3, group=16, sym=False),
    TensorSpec(bits=8, group=-1),
    TensorSpec(bits=5, group=40, sym=False, scale_dtype="bfloat16"),
    TensorSpec(bits=4, group=24, scale_dtype="float32"),
    TensorSpec(bits=4, group=13),
    TensorSpec(bits=6, group=0),
]
HERE = integer_search.library(integer_search.KERNELS) is not None


def layer(rows=24, columns=256):
    """Weights with rows of all magnitudes, zeros, one sign and an outlier, and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator) * torch.logspace(-6, 1, rows).unsqueeze(1)
    w[3], w[4], w[5], w[6, 7] = 0, w[4].abs(), -w[5].abs(), 1e3
    x = torch.randn(2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
    x = x + 0.5 * torch.randn(2 * columns, 1, generator=generator)
    x[:, 11] = 0
    return w, x.t() @ x


def error_of(w, spec, knobs, importance):
    """The output error of each row with what the codec makes of `knobs`."""
    codec = codec_of(spec)
    difference = codec.dequantize(codec.quantize(w, spec, knobs)) - w
    if importance is not None and importance.ndim == 2:
        return ((difference @ importance) * difference).sum(1)
    return (difference.square() * (1.0 if importance is None else importance)).sum(1)


def importance_of(kind, gram):
    return {"none": None, "diagonal": gram.diagonal().clamp(min=1e-3), "gram": gram}[kind]


@pytest.mark.skipif(not HERE, reason="no C compiler")
@pytest.mark.parametrize("kind", ["none", "diagonal", "gram"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_compiled_search_finds_what_torch_finds(spec, kind, monkeypatch):
    w, gram = layer()
    importance = importance_of(kind, gram)
    compiled = codec_of(spec).search(w, spec, importance)
    monkeypatch.setattr(integer_search, "library", lambda source: None)
    expected = codec_of(spec).search(w, spec, importance)
    assert compiled.keys() == expected.keys()
    assert all(compiled[key].shape == expected[key].shape for key in expected)
    assert all(compiled[key].dtype == torch.float32 for key in expected)
    found, wanted = (error_of(w, spec, knobs, importance) for knobs in (compiled, expected))
    # Sums in another order decide near-ties otherwise; what they are between is equally good.
    torch.testing.assert_close(found, wanted, rtol=1e-3 if kind != "gram" else 2e-2, atol=1e-12)
    nearly = 1e-5 if spec.scale_dtype == "float32" else 0  # only storage rounds the last digits away
    same = ((compiled["scale"] / expected["scale"] - 1).abs() <= nearly).float().mean().item()
    assert same > (0.9 if kind == "gram" else 0.97), same


@pytest.mark.parametrize(
    "native", [pytest.param(True, marks=pytest.mark.skipif(not HERE, reason="no C compiler")), False]
)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_search_is_never_worse_than_plain_rounding(spec, native, monkeypatch):
    if not native:
        monkeypatch.setattr(integer_search, "library", lambda source: None)
    w, gram = layer()
    for kind in ("none", "diagonal"):
        importance = importance_of(kind, gram)
        found = error_of(w, spec, codec_of(spec).search(w, spec, importance), importance)
        plain = error_of(w, spec, {}, importance)
        if spec.group == 0:  # one scale for all rows
            found, plain = found.sum(), plain.sum()
        assert (found <= plain * 1.001 + 1e-12).all()


@pytest.mark.skipif(not HERE, reason="no C compiler")
def test_the_number_of_threads_changes_no_byte():
    w, gram = layer(rows=25)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append([codec_of(s).search(w, s, gram.diagonal())["scale"] for s in SPECS])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*found))


@pytest.mark.skipif(not HERE, reason="no C compiler")
def test_weights_in_any_memory_order_are_searched_alike():
    w, gram = layer()
    spec = TensorSpec(bits=4, group=32)
    expected = codec_of(spec).search(w, spec, gram)["scale"]
    for other in (w.t().contiguous().t(), torch.cat([w, w], 1)[:, : w.shape[1]]):
        assert torch.equal(codec_of(spec).search(other, spec, gram)["scale"], expected)
