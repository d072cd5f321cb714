"""Core types: flat settings and back, spellings of data types, groups of every kind."""

import itertools

import pytest
import torch

from auto_round.core.errors import SchemeError
from auto_round.core.groups import group_count, group_rows, group_size, groups_per_row, merge, split
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.core.spelling import spell, spelled

MX4 = {"bits": 4, "group_size": 32, "sym": True, "data_type": "mx_fp"}
FLAT = {
    "ints": {"bits": 4, "group_size": 128, "sym": False, "data_type": "int"},
    "weights and inputs": {**MX4, "act_bits": 4, "act_group_size": 32, "act_sym": True}
    | {"act_data_type": "mx_fp_rceil", "act_dynamic": True},
    "global scale of inputs": {"bits": 4, "group_size": 16, "sym": True, "data_type": "nv_fp"}
    | {"act_bits": 4, "act_group_size": 16, "act_sym": True}
    | {"act_data_type": "nv_fp4_with_static_gs", "act_dynamic": True},
    "scales in e5m3": {"bits": 4, "group_size": 16, "sym": True, "data_type": "nvfp4_v2"},
    "blocks": {"bits": 8, "group_size": [128, 128], "sym": True, "data_type": "fp"}
    | {"act_bits": 8, "act_group_size": 128, "act_sym": True, "act_data_type": "fp", "act_dynamic": True},
    "other scales": {"bits": 8, "group_size": -1, "sym": True, "data_type": "fp", "scale_dtype": "float32"},
    "float": {"bits": 16, "data_type": "float"},
}


@pytest.mark.parametrize("name", FLAT)
def test_flat_settings_survive_being_read_and_written(name):
    assert Scheme.from_flat(FLAT[name]).to_flat() == FLAT[name]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("int", ("int", 0, "", "float16")),
        ("mx_fp", ("mx_fp", 0, "", "e8m0")),
        ("mxfp4", ("mx_fp", 4, "", "e8m0")),
        ("MX_FP8E5M2", ("mx_fp", 8, "e5m2", "e8m0")),
        ("mx_fp8e4m3", ("mx_fp", 8, "", "e8m0")),
        ("mxfp_rceil", ("mx_fp", 0, "rceil", "e8m0")),
        ("mx_int4", ("mx_int", 4, "", "e8m0")),
        ("nvfp4", ("nv_fp", 4, "", "e4m3")),
        ("nv_fp4_with_static_gs", ("nv_fp", 4, "static_gs", "e4m3")),
        ("nvfp4_v2", ("nv_fp", 4, "", "e5m3")),
        ("fp8", ("fp", 8, "", "bfloat16")),
        ("fp8_e5m2", ("fp", 8, "e5m2", "bfloat16")),
        ("int_asym_dq", ("int_asym_dq", 0, "", "float16")),
    ],
)
def test_a_data_type_has_many_spellings(text, word):
    assert spelled(text) == word
    found = spelled(text)
    again = spelled(spell(found.dtype, found.bits or 4, found.variant, found.scale_dtype))
    assert (again.dtype, again.variant, again.scale_dtype) == (found.dtype, found.variant, found.scale_dtype)


def test_what_is_not_said_about_inputs_is_as_for_the_weights():
    act = Scheme.from_flat({**MX4, "act_bits": 8}).act
    assert act == TensorSpec(dtype="mx_fp", bits=8, group=32, scale_dtype="e8m0")
    block = Scheme.from_flat({"bits": 8, "data_type": "fp8", "group_size": [128, 64], "act_bits": 8}).act
    assert (block.group, block.scale_dtype) == (64, "float32")  # found at run time: not rounded


def test_float_inputs_are_inputs_that_are_not_quantized():
    assert Scheme.from_flat({**MX4, "act_bits": 16, "act_data_type": "float"}).act is None
    assert Scheme.from_flat({"act_bits": 16}, Scheme.from_flat({**MX4, "act_bits": 4})).act is None
    assert Scheme.from_flat({"bits": 16}, Scheme.from_flat({**MX4, "act_bits": 4})).act is None


def test_a_layer_inherits_the_inputs_of_the_base():
    base = Scheme.from_flat({**MX4, "act_bits": 4})
    assert Scheme.from_flat({"bits": 8}, base).act == base.act


@pytest.mark.parametrize("group", [32, 40, 128, -1, 0, (16, 32), (128, 128), (5, 7)], ids=str)
@pytest.mark.parametrize("shape", [(48, 96), (1, 64), (33, 100)], ids=str)
def test_groups_are_put_together_as_they_were_cut(shape, group):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    groups = split(w, group)
    assert groups.shape == (group_count(shape, group), group_size(shape, group))
    assert group_count(shape, group) == group_rows(shape, group) * groups_per_row(shape, group)
    assert torch.equal(merge(groups, shape, group), w)
    assert groups.square().sum().allclose(w.square().sum())  # the padding is zero


def test_a_block_holds_what_lies_in_it():
    w = torch.arange(6 * 10).reshape(6, 10)
    blocks = split(w, (4, 4))
    for number, (row, column) in enumerate(itertools.product((0, 4), (0, 4, 8))):
        inside = w[row : row + 4, column : column + 4]
        kept = blocks[number].reshape(4, 4)[: inside.shape[0], : inside.shape[1]]
        assert torch.equal(kept, inside)


def test_a_block_without_extent_is_an_error():
    with pytest.raises(SchemeError, match=r"\(0, 4\)"):
        split(torch.zeros(8, 8), (0, 4))
