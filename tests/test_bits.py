"""Packing: every width, against a loop over single bits."""

import pytest
import torch

from auto_round.core import bits as packing

WIDTHS = range(2, 9)


def slow_pack(column, bits):
    """One column of codes as words, bit by bit."""
    stream = [(code >> i) & 1 for code in column for i in range(bits)]
    words = [sum(bit << i for i, bit in enumerate(stream[k : k + 32])) for k in range(0, len(stream), 32)]
    return [word - (1 << 32) if word >= 1 << 31 else word for word in words]


@pytest.mark.parametrize("bits", WIDTHS)
def test_packing_is_the_little_endian_bit_stream(bits):
    codes = torch.randint(0, 1 << bits, (64, 3), generator=torch.Generator().manual_seed(bits))
    packed = packing.pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (64 * bits // 32, 3)
    for column in range(3):
        assert packed[:, column].tolist() == slow_pack(codes[:, column].tolist(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_unpack_is_the_inverse_of_pack(bits):
    codes = torch.randint(0, 1 << bits, (96, 5), dtype=torch.uint8)
    assert torch.equal(packing.unpack(packing.pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_meta_device_tells_the_packed_shape(bits):
    packed = packing.pack(torch.empty(64, 7, device="meta", dtype=torch.uint8), bits)
    assert packed.device.type == "meta" and packed.shape == (64 * bits // 32, 7)


def test_codes_that_do_not_fill_words_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        packing.pack(torch.zeros(33, 1, dtype=torch.uint8), 3)
