"""Integer codes in GPTQ and AWQ words: every bit where the readers look for it, every zero point as it was."""

import pytest
import torch

from auto_round.codecs.base import codec_of, encode
from auto_round.core import bits as packing
from auto_round.core.errors import FormatError
from auto_round.core.layouts import (
    bias_of,
    middle,
    read_awq,
    read_gptq,
    write_awq,
    write_gptq,
    zero_from_bias,
    zeros_of,
)
from auto_round.core.quantized import Quantized, input_tensors, inputs_among
from auto_round.core.rounding import STORAGE
from auto_round.core.scheme import TensorSpec

ROWS, COLUMNS = 32, 96


def quantized(bits, *, sym, group=32, shape=(ROWS, COLUMNS), seed=0, scale_dtype="float16"):
    """A matrix in integers, its zero points anywhere when asymmetric."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + torch.linspace(-1, 1, shape[1])
    return encode(w, TensorSpec(bits=bits, sym=sym, group=group, scale_dtype=scale_dtype), {})


def word_bits(words, position, bits):
    """`bits` bits at `position` of a stream of int32 words, lowest first, bit by bit."""
    return sum((int(words[(position + i) // 32]) >> (position + i) % 32 & 1) << i for i in range(bits))


def code_at(q, row, column):
    """The code of one weight, from its group."""
    size = q.codes.shape[1]
    per_row = -(-q.shape[1] // size)
    return int(q.codes[row * per_row + column // size, column % size])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_words_hold_each_code_at_its_place(bits, sym, offset):
    q = quantized(bits, sym=sym)
    tensors = write_gptq(q, zero_offset=offset)
    assert tensors["qweight"].shape == (COLUMNS * bits // 32, ROWS)
    for row, column in ((0, 0), (5, 33), (31, 95), (17, 64)):
        assert word_bits(tensors["qweight"][:, row], column * bits, bits) == code_at(q, row, column)
    zeros = zeros_of(q).reshape(ROWS, -1)
    for row, group in ((0, 0), (9, 1), (31, 2)):
        stored = word_bits(tensors["qzeros"][group], row * bits, bits)
        assert (stored + offset) % (1 << bits) == int(zeros[row, group])
    assert torch.equal(tensors["scales"].t().reshape(-1, 1), q.params["scale"])


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("group", [32, 40, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_gptq_gives_back_what_it_was_given(bits, sym, group, offset):
    q = quantized(bits, sym=sym, group=group)
    assert read_gptq(write_gptq(q, zero_offset=offset), q.spec, q.shape, zero_offset=offset).equals(q)


@pytest.mark.parametrize("sym", [True, False])
def test_awq_words_hold_columns_in_the_order_of_its_kernels(sym):
    q = quantized(4, sym=sym)
    tensors = write_awq(q)
    assert tensors["qweight"].shape == (COLUMNS, ROWS // 8)
    for column, row in ((0, 0), (40, 13), (95, 31)):
        word = int(tensors["qweight"][column, row // 8]) & 0xFFFFFFFF
        nibble = (0, 2, 4, 6, 1, 3, 5, 7).index(row % 8)
        assert word >> 4 * nibble & 15 == code_at(q, row, column)
    assert read_awq(tensors, q.spec, q.shape).equals(q)


def test_eight_codes_make_the_golden_awq_word():
    codes = torch.arange(8, dtype=torch.uint8).reshape(8, 1).repeat(4, 32)
    spec = TensorSpec(bits=4, group=32)
    q = Quantized(spec, (32, 32), codes, {"scale": torch.ones(32, 1, dtype=torch.float16)})
    assert {int(word) for word in write_awq(q)["qweight"][:, 0]} == {0x75316420}


@pytest.mark.parametrize("write", [lambda q: write_gptq(q, zero_offset=1), write_awq])
def test_symmetric_layers_with_other_zero_points_are_refused(write):
    q = quantized(4, sym=False)
    sym = TensorSpec(bits=4, group=32)
    reader = read_awq if write is write_awq else lambda *args: read_gptq(*args, zero_offset=1)
    with pytest.raises(FormatError, match="symmetric 4-bit layer has zero points other than 8"):
        reader(write(q), sym, q.shape)


@pytest.mark.parametrize("name", ["qweight", "qzeros", "scales"])
def test_a_missing_or_misshapen_tensor_is_named(name):
    q = quantized(4, sym=True)
    tensors = write_gptq(q, zero_offset=1)
    short = {**tensors, name: tensors[name][:-1]}
    with pytest.raises(FormatError, match=f"tensor {name} has shape .* expected"):
        read_gptq(short, q.spec, q.shape, zero_offset=1)
    del tensors[name]
    with pytest.raises(
        FormatError, match=f"tensor {name} is missing; this layer needs qweight, qzeros, scales"
    ):
        read_gptq(tensors, q.spec, q.shape, zero_offset=1)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", STORAGE)
def test_zero_points_survive_as_biases_where_the_dtype_is_fine_enough(bits, dtype):
    q = quantized(bits, sym=False, scale_dtype=dtype)
    if (1 << bits) * torch.finfo(STORAGE[dtype]).eps <= 1:
        assert torch.equal(zero_from_bias(q.params["scale"], bias_of(q)), q.params["zero"])


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_bias_of_a_symmetric_layer_is_exact(bits):
    q = quantized(bits, sym=True)
    assert torch.equal(bias_of(q).float(), -q.params["scale"].float() * middle(q.spec))


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_keeps_codes_at_any_count_that_fills_words(bits):
    cycle = packing.values_per_cycle(bits)
    assert cycle * bits % 32 == 0 and cycle <= 32
    for count in (cycle, 2 * cycle, 5 * cycle):
        codes = torch.randint(0, 1 << bits, (count, 3), dtype=torch.uint8)
        words = packing.pack(codes, bits)
        assert words.shape == (count * bits // 32, 3) and words.dtype == torch.int32
        assert torch.equal(packing.unpack(words, bits), codes)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_that_end_within_a_cycle_are_refused(bits):
    words = torch.zeros(packing.values_per_cycle(bits) * bits // 32 + 1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"{len(words)} words hold no whole number of"):
        packing.unpack(words, bits)


# Quantized


def test_equality_looks_at_bits_dtypes_and_input_ranges():
    q = quantized(4, sym=False)
    same = Quantized(q.spec, q.shape, q.codes.clone(), dict(q.params))
    assert q.equals(same)
    scale = q.params["scale"]
    others = [
        Quantized(q.spec, (COLUMNS, ROWS), q.codes, q.params),
        Quantized(TensorSpec(bits=4, group=32, sym=True), q.shape, q.codes, q.params),
        Quantized(q.spec, q.shape, q.codes ^ 1, q.params),
        Quantized(q.spec, q.shape, q.codes, {**q.params, "scale": scale.float()}),
        Quantized(q.spec, q.shape, q.codes, {"scale": scale}),
        Quantized(q.spec, q.shape, q.codes, q.params, {"scale": torch.ones(1)}),
    ]
    assert not any(q.equals(other) for other in others)


def test_input_ranges_go_to_the_file_under_names_of_their_own():
    q = quantized(4, sym=True)
    ranged = Quantized(q.spec, q.shape, q.codes, q.params, {"scale": torch.ones(1)})
    assert input_tensors(ranged).keys() == {"input_scale"}
    assert inputs_among(ranged.tensors()).keys() == {"scale"}
    assert torch.equal(ranged.tensors()["scale"], q.params["scale"])  # that of the weights is not hidden


def test_padding_reads_back_as_zero_weights():
    q = quantized(4, sym=False, group=40)
    again = read_gptq(write_gptq(q, zero_offset=0), q.spec, q.shape, zero_offset=0)
    padding = again.codes.reshape(ROWS, -1)[:, COLUMNS:]
    assert padding.numel()
    zeros = again.params["zero"].reshape(ROWS, -1)[:, -1:]
    assert torch.equal(padding, zeros.expand_as(padding))
    assert torch.equal(codec_of(q.spec).dequantize(again), codec_of(q.spec).dequantize(q))
