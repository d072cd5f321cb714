"""Compiled rounding and packing: bit for bit what torch makes, for every width, grouping, dtype and odd value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_round.codecs.base import codec_of, encode
from auto_round.core import bits, rows
from auto_round.core.native import EXACT, library
from auto_round.core.scheme import TensorSpec

pytestmark = pytest.mark.skipif(library(rows.SOURCE, EXACT) is None, reason="no C compiler here")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD = (0.0, -0.0, 1e-45, -1e-40, 6e-8, -3e-5, 1.0, -1.0, 65504.0, -3e38, 0.5, 1.5, 2.5)
"""Zeros of both signs, denormal numbers of float32 and of float16, halves, and the largest of two dtypes."""


def in_torch(make):
    """What `make` gives where nothing can be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "library", lambda *_: None)
        return make()


def matrix(shape, dtype, seed, odd, size):
    """Normal values of the magnitude `size`, every third of them replaced by one of `odd`."""
    make = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=make) * size
    if odd:
        values = torch.tensor(odd)[torch.randint(len(odd), shape, generator=make)]
        w = torch.where(torch.rand(shape, generator=make) < 0.3, values, w)
    w = w.to(dtype)
    return torch.where(w.isfinite(), w, torch.zeros_like(w))


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 300))
matrices = st.builds(
    matrix,
    SHAPES,
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
    st.lists(st.sampled_from(ODD), max_size=4),
    st.sampled_from((1e-42, 1e-7, 0.02, 1.0, 1e4, 1e30)),
)
integers = st.builds(
    TensorSpec,
    bits=st.integers(2, 8),
    group=st.sampled_from((-1, 0, 1, 7, 32, 128)),
    sym=st.booleans(),
    scale_dtype=st.sampled_from(("float16", "bfloat16", "float32")),
)
FLOATS = [
    TensorSpec(dtype="mx_fp", bits=4, group=32, scale_dtype="e8m0"),
    TensorSpec(dtype="mx_fp", bits=6, group=32, scale_dtype="e8m0"),
    TensorSpec(dtype="mx_fp", bits=8, group=32, scale_dtype="e8m0", variant="e5m2_rceil"),
    TensorSpec(dtype="mx_int", bits=4, group=32, scale_dtype="e8m0"),
    TensorSpec(dtype="nv_fp", bits=4, group=16, scale_dtype="e4m3"),
    TensorSpec(dtype="fp", bits=8, group=(7, 40), scale_dtype="bfloat16"),
    TensorSpec(dtype="fp", bits=8, group=0, scale_dtype="float32"),
    TensorSpec(dtype="fp", bits=8, group=-1, scale_dtype="float16", variant="e5m2"),
]


@settings(max_examples=120)
@given(w=matrices, spec=integers)
def test_compiled_integers_are_those_of_torch(w, spec):
    assert encode(w, spec).equals(in_torch(lambda: encode(w, spec)))


@settings(max_examples=100)
@given(w=matrices, spec=st.sampled_from(FLOATS))
def test_compiled_floats_are_those_of_torch(w, spec):
    assert encode(w, spec).equals(in_torch(lambda: encode(w, spec)))


@settings(max_examples=30)
@given(w=matrices, spec=integers, seed=st.integers(0, 99))
def test_grids_that_a_search_found_give_the_codes_of_torch(w, spec, seed):
    codec = codec_of(spec)
    knobs = codec.search(w, spec)
    assert codec.quantize(w, spec, knobs).equals(in_torch(lambda: codec.quantize(w, spec, knobs)))
    factor = torch.rand(len(knobs["scale"]), 1, generator=torch.Generator().manual_seed(seed))
    shrunk = {"low": factor, "high": 1 - factor / 2}
    assert codec.quantize(w, spec, shrunk).equals(in_torch(lambda: codec.quantize(w, spec, shrunk)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_matrix_and_a_part_of_one_are_rounded_like_copies(dtype):
    w, spec = matrix((96, 64), dtype, 0, ODD[:3], 0.02), TensorSpec(bits=4, group=32)
    codec = codec_of(spec)
    assert codec.quantize(w.t(), spec).equals(codec.quantize(w.t().contiguous(), spec))
    assert codec.quantize(w[5:, 7:39], spec).equals(codec.quantize(w[5:, 7:39].clone(), spec))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_are_left_to_torch(dtype, bad):
    w = torch.ones(4, 64, dtype=dtype)
    assert rows.ranges(w, 32) is not None
    w[3, 60] = bad
    assert rows.ranges(w, 32) is None


def test_a_matrix_of_many_parts_is_what_it_is_as_a_whole():
    w, spec = matrix((700, 1000), torch.bfloat16, 1, (), 0.02), TensorSpec(bits=3, group=64, sym=False)
    assert encode(w, spec).equals(codec_of(spec).quantize(w, spec))


def packed_in_torch(make):
    """What `make` gives where nothing can be compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bits, "library", lambda *_: None)
        return make()


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**31), st.booleans())
def test_compiled_packing_is_that_of_torch_and_is_undone(width, lines, cycles, seed, transposed):
    shape = (lines, cycles * bits.values_per_cycle(width))
    codes = torch.randint(1 << width, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    if transposed:
        codes = codes.t().contiguous().t()
    words = bits.pack(codes.t(), width)
    assert torch.equal(words, packed_in_torch(lambda: bits.pack(codes.t(), width)))
    assert torch.equal(words.t(), bits.pack_rows(codes, width))
    for table in (words, words.t().contiguous().t()):
        assert torch.equal(bits.unpack(table, width), codes.t())
        assert torch.equal(packed_in_torch(lambda table=table: bits.unpack(table, width)), codes.t())


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 20), st.integers(0, 2**31))
def test_compiled_awq_packing_is_that_of_torch_and_is_undone(count, words, seed):
    codes = torch.randint(16, (8 * words, count), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    packed = bits.pack_awq(codes.t())
    assert torch.equal(packed, packed_in_torch(lambda: bits.pack_awq(codes.t())))
    assert torch.equal(bits.unpack_awq(packed), codes.t())
    assert torch.equal(packed_in_torch(lambda: bits.unpack_awq(packed)), codes.t())
