"""Fitting grids to blocks: sums stand for values, no neighbour beats least squares, storage is never worse."""

import itertools

import pytest
import torch

from auto_round.core.fitting import (
    Blocks,
    Ladder,
    fit_line,
    fit_scale,
    half,
    quantize_scales,
    refine,
    settled_line,
    settled_scale,
)
from auto_round.core.groups import group_rows, groups_per_row
from auto_round.core.minifloat import E2M1, E4M3, e8m0_byte, e8m0_value
from auto_round.core.rounding import all_finite, cast_to_storage, straight_through

UNSIGNED, SIGNED = (0, 15), (-8, 7)
WEIGHTED = (False, True)


def values(seed=0, size=32, count=24):
    """(K, N): a block down each column, of very different magnitudes, one of them all zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, count, generator=generator) * torch.logspace(-3, 2, count)
    x[:, 3] = 0
    return x


def weights(x, weighted):
    """Weights of the values, or None."""
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) + 0.1 if weighted else None


def error_by_hand(x, weight, scale, low, bounds):
    """sum(weight * (fake - x)^2) of every block, one value after the other."""
    found = []
    for n in range(x.shape[1]):
        s, offset = float(scale[n]), float(low[n]) if isinstance(low, torch.Tensor) else low
        total = 0.0
        for k in range(x.shape[0]):
            level = 0 if s == 0 else round((float(x[k, n]) - offset) / s)
            fake = s * min(max(level, bounds[0]), bounds[1]) + offset
            total += (1.0 if weight is None else float(weight[k, n])) * (fake - float(x[k, n])) ** 2
        found.append(total)
    return torch.tensor(found)


@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize("with_low", [False, True])
def test_the_exact_error_is_its_definition(weighted, with_low):
    x = values()
    weight = weights(x, weighted)
    scale, low = x.abs().amax(0) / 7, x.amin(0) if with_low else 0.0
    bounds = UNSIGNED if with_low else SIGNED
    found = Blocks(x, weight).error(scale, low, bounds)
    assert found.allclose(error_by_hand(x, weight, scale, low, bounds), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("weighted", WEIGHTED)
def test_six_sums_tell_the_error_of_any_grid_on_the_same_levels(weighted):
    x = values()
    blocks = Blocks(x, weights(x, weighted))
    scale, low = (x.amax(0) - x.amin(0)) / 15, x.amin(0)
    q = blocks.levels(scale, low, UNSIGNED).clone()
    moments = blocks.moments(q)
    for s, o in ((scale, low), (scale * 1.1, low * 0.9), (scale * 0, low)):
        difference = (s * q + o - x).square() * (1 if blocks.weight is None else blocks.weight)
        assert moments.error(s, o).allclose(difference.sum(0), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("weighted", WEIGHTED)
def test_no_other_line_has_less_error_on_the_same_levels(weighted):
    x = values()
    blocks = Blocks(x, weights(x, weighted))
    q = blocks.levels((x.amax(0) - x.amin(0)) / 15, x.amin(0), UNSIGNED)
    moments = blocks.moments(q)
    scale, low = moments.line(None)
    least = moments.error(scale, low)
    for ds, dl in itertools.product((0.97, 1.0, 1.03), repeat=2):
        assert (moments.error(scale * ds, low * dl) >= least - 1e-4 * moments.wxx.clamp(min=1e-12)).all()


def test_a_bounded_offset_is_kept_and_the_scale_makes_the_best_of_it():
    x = values() + 1.0
    blocks = Blocks(x, None)
    moments = blocks.moments(blocks.levels(x.amax(0) / 15, 0.0, UNSIGNED))
    scale, low = moments.line(0.0)
    assert (low <= 0).all()
    bounded = low == 0
    assert bounded.any()
    assert torch.equal(scale[bounded], moments.best_scale(0.0)[bounded])


def test_levels_that_are_all_the_same_become_the_mean():
    x = values(size=8)
    moments = Blocks(x, None).moments(torch.full_like(x, 3.0))
    scale, low = moments.line(None)
    assert (scale == 0).all() and low.allclose(x.mean(0), atol=1e-6)


def test_blocks_of_zeros_stay_zero_without_nan():
    x = torch.zeros(16, 4)
    blocks = Blocks(x, None)
    scale = fit_scale(blocks, SIGNED, deltas=(0.0, 0.5), refits=1)
    line = fit_line(blocks, UNSIGNED, deltas=(0.0, 0.5), highest=None, refits=1)
    for found in (scale, *line):
        assert (found == 0).all()


@pytest.mark.parametrize("weighted", WEIGHTED)
def test_more_candidates_have_less_error(weighted):
    x = values()
    blocks = Blocks(x, weights(x, weighted))
    errors = []
    for deltas, refits in (((0.0,), 0), ((0.0, 0.4, 0.8), 0), ((0.0, 0.4, 0.8), 2)):
        scale = fit_scale(blocks, SIGNED, deltas=deltas, refits=refits)
        errors.append((blocks.error(scale, 0.0, SIGNED) / x.square().sum(0).clamp(min=1e-12)).sum())
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("weighted", WEIGHTED)
def test_a_settled_grid_is_in_float16_and_no_worse_than_its_start(weighted):
    x = values()
    blocks = Blocks(x, weights(x, weighted))
    start = x.abs().amax(0) / 7
    scale = settled_scale(blocks, start, SIGNED)
    assert torch.equal(scale, half(scale))
    assert (blocks.error(scale, 0.0, SIGNED) <= blocks.error(half(start), 0.0, SIGNED)).all()
    spread, bottom = (x.amax(0) - x.amin(0)) / 15, x.amin(0)
    scale, low = settled_line(blocks, spread, bottom, UNSIGNED)
    assert torch.equal(scale, half(scale)) and torch.equal(low, half(low))
    before = blocks.error(half(spread), half(bottom), UNSIGNED)
    assert (blocks.error(scale, low, UNSIGNED) <= before).all()


LADDERS = {
    "with offsets": Ladder(blocks=8, levels=UNSIGNED, scales=(0, 63), offsets=(0, 63)),
    "without": Ladder(blocks=8, levels=SIGNED, scales=(-32, 31), offsets=None),
}


def two_levels(x, ladder, *, weight=None):
    """(blocks, grid of two levels) as fitted before any refinement."""
    blocks = Blocks(x, weight)
    if ladder.offsets is None:
        scale, low = fit_scale(blocks, ladder.levels, deltas=(0.0,), refits=1), 0.0
    else:
        scale, low = fit_line(blocks, ladder.levels, deltas=(0.0,), highest=0.0, refits=1)
    moments = blocks.moments(blocks.levels(scale, low, ladder.levels))
    return blocks, quantize_scales(moments, scale, low, ladder)


@pytest.mark.parametrize("ladder", LADDERS.values(), ids=LADDERS)
def test_two_level_grids_are_what_the_file_can_hold(ladder):
    _, grid = two_levels(values(), ladder)
    assert torch.equal(grid.d, half(grid.d)) and torch.equal(grid.dmin, half(grid.dmin))
    assert torch.equal(grid.s, grid.s.round()) and torch.equal(grid.m, grid.m.round())
    assert ladder.scales[0] <= grid.s.min() and grid.s.max() <= ladder.scales[1]
    assert (grid.d.repeat_interleave(8) * grid.s).allclose(grid.scale())
    if ladder.offsets is not None:
        assert grid.m.min() >= 0 and grid.m.max() <= 63 and (grid.low() <= 0).all()


@pytest.mark.parametrize("rounds", [1, 2, 3])
@pytest.mark.parametrize("weighted", WEIGHTED)
@pytest.mark.parametrize("ladder", LADDERS.values(), ids=LADDERS)
def test_refining_lowers_the_exact_error_of_every_super_block(ladder, weighted, rounds):
    x = values()
    blocks, grid = two_levels(x, ladder, weight=weights(x, weighted))
    before = blocks.error(grid.scale(), grid.low(), ladder.levels).view(-1, 8).sum(1)
    refined = refine(blocks, grid, rounds=rounds)
    after = blocks.error(refined.scale(), refined.low(), ladder.levels).view(-1, 8).sum(1)
    assert (after <= before * (1 + 1e-5) + 1e-9).all() and after.sum() < before.sum()
    assert torch.equal(refined.d, half(refined.d)) and torch.equal(refined.s, refined.s.round())


# Rounding with gradients, and what is finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_straight_through_rounding_is_exact_going_forward(dtype):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 4096)
    assert torch.equal(cast_to_storage(x, dtype), x.to(dtype).float())
    assert torch.equal(straight_through(torch.round, x), x.round())


def test_straight_through_rounding_passes_gradients_on_unchanged():
    x = torch.linspace(-3, 3, 20).requires_grad_()
    straight_through(torch.round, x * 2).sum().backward()
    assert (x.grad == 2).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_sum_that_overflows_does_not_make_its_terms_infinite(dtype):
    x = torch.full((64,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(x)
    for bad in (torch.inf, -torch.inf, torch.nan):
        x[7] = bad
        assert not all_finite(x)


def test_infinities_that_cancel_are_seen():
    assert not all_finite(torch.tensor([torch.inf, -torch.inf, 1.0]))
    assert all_finite(torch.empty(0))


@pytest.mark.parametrize("element", [E2M1, E4M3], ids=["e2m1", "e4m3"])
def test_steps_are_the_distances_between_neighbouring_values(element):
    positive = sorted({v for v in element.values() if v == v and v >= 0})
    for low, high in itertools.pairwise(positive):
        between = torch.tensor([(low + high) / 2])
        assert element.step(between).item() == high - low


def test_every_byte_of_a_power_of_two_scale_is_read_and_written():
    byte = torch.arange(255, dtype=torch.uint8)
    scale = e8m0_value(byte)
    assert torch.equal(e8m0_byte(scale), byte)
    assert scale[127] == 1 and scale[0] == 2.0**-127 and scale[254] == 2.0**127


@pytest.mark.parametrize("group", [7, -1, 0, (3, 5)], ids=str)
def test_scales_fill_a_table_of_rows_of_groups(group):
    shape = (6, 20)
    rows, columns = group_rows(shape, group), groups_per_row(shape, group)
    expected = {7: (6, 3), -1: (6, 1), 0: (1, 1), (3, 5): (2, 4)}
    assert (rows, columns) == expected[group]
