"""Algorithms on blocks made here: what GPTQ and the refit do, and that tuning starts from them and is never worse."""

import itertools

import pytest
import torch

from auto_round.codecs.base import codec_of, codecs, fake, presets
from auto_round.codecs.blocks import BlockCodec
from auto_round.core.plan import Plan
from auto_round.core.scheme import Scheme, TensorSpec
from auto_round.jobs.starts import start
from auto_round.sources.base import Block
from auto_round.stacks import columns
from auto_round.stacks.refit import refit
from auto_round.stacks.stack import Stack
from auto_round.steps.base import BlockReport, output_loss
from auto_round.steps.gptq import DAMPING, Gptq, feedback, rounded_in_order, swept, turns_of
from auto_round.steps.sign_round import SignRound

SPECS = [
    TensorSpec(bits=bits, group=group, sym=sym)
    for bits, group, sym in itertools.product((2, 4), (16, 20, -1), (True, False))
]
BLOCKS = [codecs()[name].spec() for name in ("q4_0", "q5_1", "q2_k", "q3_k", "q4_k")]


def block_for(spec):
    """A block whose rows `spec` can hold: those of ggml come in blocks of up to 256."""
    return Linears(width=256 if spec in BLOCKS else 48)


class Linears(Block):
    """Two layers with the same inputs, one after the other with a non-linearity between: a block that can be run."""

    def __init__(self, seed=0, samples=24, width=48):
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
        self.name, self.samples = "block", samples
        self._x = torch.randn(samples, width // 8, width, generator=generator) @ mixing
        self.weights = {
            name: torch.randn(48, width, generator=generator) * 0.1 for name in ("block.up", "block.gate")
        }
        flat = self._x.flatten(0, 1)
        self._gram = flat.t() @ flat

    def importance(self, layer):
        return self._gram

    def run(self, rows, weights=None):
        w = {**self.weights, **(weights or {})}
        x = self._x[list(rows)]
        return (x @ w["block.up"].t()) * (x @ w["block.gate"].t()).sigmoid()

    def target(self, rows):
        return self.run(rows)


def plan_of(block, spec):
    """Every layer of `block` gets `spec`."""
    shapes = {name: tuple(w.shape) for name, w in block.weights.items()}
    return Plan({name: Scheme(weight=spec) for name in shapes}, shapes=shapes, base=Scheme(weight=spec))


def stack_of(spec, seed=0, columns=48, rows=12):
    """One layer with correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    w = torch.randn(rows, columns, generator=generator) * 0.1
    return Stack({"layer": w}, x.t() @ x, spec, {})


def output_error(stack, weight):
    """tr(D gram D') in float64."""
    difference = (weight - stack.weight).double()
    return ((difference @ stack.gram.double()) * difference).sum().item()


def slow_gptq(stack):
    """The published recursion, one row at a time: round, then move the rest by least squares."""
    share = DAMPING[0] * stack.gram.diagonal().mean().double()
    gram = stack.gram.double() + share * torch.eye(len(stack.gram), dtype=torch.float64)
    order, grids = stack.gram.diagonal().argsort(descending=True).tolist(), stack.columns()
    made = torch.zeros_like(stack.weight)
    for row in range(len(stack.weight)):
        w, left = stack.weight[row].double(), list(order)
        while left:
            j = left.pop(0)
            grid = {key: value[row] for key, value in grids[j // stack.size].items()}
            made[row, j] = stack.snap(w[j].float(), grid)
            if (
                left
            ):  # minimise (w - w')' gram (w - w') over the columns left, with column j at its rounded value
                pull = torch.linalg.solve(gram[left][:, left], gram[left, j])
                w[left] += pull * (w[j] - made[row, j].double())
    return made


@pytest.mark.parametrize("sym", [True, False])
def test_gptq_is_its_definition(sym):
    stack = stack_of(TensorSpec(bits=3, group=16, sym=sym))
    expected = slow_gptq(stack)
    made = torch.stack(
        [
            stack.snap(c, stack.columns()[j // 16])
            for j, c in enumerate(rounded_in_order(stack, turns_of(stack.gram)).t())
        ]
    )
    assert (made.t() - expected).abs().gt(1e-6).float().mean() < 0.01  # ties fall differently in float64


@pytest.mark.parametrize("spec", [*SPECS, *BLOCKS], ids=str)
def test_each_step_of_the_start_lowers_the_output_error(spec):
    block = block_for(spec)
    plan, knobs, report = plan_of(block, spec), {}, BlockReport()
    errors = []
    for step in [None, *start("gptq")]:
        knobs = knobs if step is None else step.block(block, plan, knobs, report)
        made = {name: fake(w, spec, knobs.get(name, {})) - w for name, w in block.weights.items()}
        errors.append(sum(((d @ block._gram) * d).sum().item() for d in made.values()))
    assert all(after <= before * 1.001 for before, after in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.75 * errors[1], errors


def knobs_after(block, spec, steps):
    """What `steps` find for the layers of `block`."""
    knobs, report = {}, BlockReport()
    for step in steps:
        knobs = step.block(block, plan_of(block, spec), knobs, report)
    return knobs


EVERY = {name: scheme.weight for name, scheme in presets().items() if scheme.weight is not None}


@pytest.mark.parametrize("spec", dict.fromkeys(EVERY.values()), ids=str)
def test_optimised_rtn_makes_up_for_errors_where_the_data_type_asks_for_it(spec):
    block = Linears(width=256 if isinstance(codec_of(spec), BlockCodec) else 48)
    found = {kind: knobs_after(block, spec, start(kind)) for kind in ("rounding", "search")}
    error = {}
    for kind, knobs in found.items():
        made = [fake(w, spec, knobs[layer]) - w for layer, w in block.weights.items()]
        error[kind] = sum(((d @ block._gram) * d).sum().item() for d in made)
    if codec_of(spec).compensates(spec):
        assert error["rounding"] < 0.95 * error["search"]
    else:  # the very knobs of the search: no file changes
        for layer in block.weights:
            assert found["rounding"][layer].keys() == found["search"][layer].keys()
            assert all(torch.equal(v, found["search"][layer][k]) for k, v in found["rounding"][layer].items())


@pytest.mark.parametrize("spec", [*SPECS, *BLOCKS], ids=str)
def test_what_a_stack_says_is_what_the_codec_makes(spec):
    block = block_for(spec)
    knobs = Gptq().block(block, plan_of(block, spec), {}, BlockReport())
    again = Stack(block.weights, block._gram, spec, knobs)
    made = torch.cat([fake(w, spec, knobs[name]) for name, w in block.weights.items()])
    torch.testing.assert_close(again.fake, made)
    shape = again.weight.shape
    positions = (
        again.snap(again.moved.reshape(-1, again.size), again.grid).reshape(shape)
        if shape[1] % again.size == 0
        else made
    )
    assert (positions - made).abs().gt(1e-5).float().mean() < 0.001


def test_sweeping_stops_at_a_weight_that_no_single_change_improves():
    stack = stack_of(TensorSpec(bits=2, group=16))
    for _ in range(20):
        stack.offer(swept(stack, turns_of(stack.gram)))
    lowest = stack.loss(stack.fake)
    grids = stack.columns()
    for j in (0, 7, 40):
        step = grids[j // 16]["scale"].abs()
        for sign in (1.0, -1.0):
            other = stack.fake.clone()
            other[:, j] = stack.snap(other[:, j] + sign * step, grids[j // 16])
            assert (stack.loss(other) >= lowest * (1 - 1e-4)).all()


def test_a_refit_keeps_the_codes_and_finds_the_least_squares_scales():
    spec = TensorSpec(bits=3, group=16, scale_dtype="float32")
    stack = stack_of(spec)
    root = torch.linalg.cholesky(stack.gram.double()).t()
    before, codes = stack.loss(stack.fake), stack.fake / by_column(stack)
    refit(stack)
    torch.testing.assert_close(stack.fake, codes * by_column(stack))
    for row in range(len(codes)):
        parts = torch.block_diag(*codes[row].double().view(-1, 16, 1))  # a column for each group
        best = torch.linalg.lstsq(root @ parts, (root @ stack.weight[row].double()).unsqueeze(1)).solution
        torch.testing.assert_close(
            by_column(stack)[row, ::16].double(), best.squeeze(1), rtol=1e-2, atol=1e-6
        )
    assert (stack.loss(stack.fake) < before).all()


def by_column(stack):
    """The scale of every weight."""
    return torch.stack([grid["scale"] for grid in stack.columns()], 1).repeat_interleave(stack.size, 1)


COMPENSATED = [spec for spec in dict.fromkeys(EVERY.values()) if codec_of(spec).compensates(spec)]


@pytest.mark.parametrize("rows, width", [(1, 512), (130, 256)])
@pytest.mark.parametrize("spec", [*COMPENSATED, *SPECS], ids=str)
def test_compiled_columns_and_their_torch_twin_find_the_same(spec, rows, width, monkeypatch):
    width -= 0 if isinstance(codec_of(spec), BlockCodec) else 5  # the last group is shorter
    if columns.library(columns.SOURCE) is None:
        pytest.skip("there is no C compiler")
    found = []
    for served in (columns._served, lambda stack: False):
        monkeypatch.setattr(columns, "_served", served)
        stack = stack_of(spec, columns=width, rows=rows)
        first = rounded_in_order(stack, turns_of(stack.gram))
        stack.offer(first)
        after = swept(stack, turns_of(stack.gram))
        system, slope = columns.normal_equations(
            stack, list(columns.parts_of(stack).values()), slice(0, rows)
        )
        refit(stack)
        found.append((first, after, system, slope, stack.loss(stack.fake)))
    (first, after, system, slope, loss), (*positions, twin_system, twin_slope, twin_loss) = found
    for ours, twin in zip((first, after), positions):
        # Near a tie a weight may go the other way, and then all that make up for it.
        differ = (ours - twin).abs().gt(1e-3 * twin.abs().amax()).any(1)
        assert differ.sum() <= max(1, rows // 4)
    if torch.equal(stack.rounded(first), stack.rounded(positions[0])):
        torch.testing.assert_close(system, twin_system, rtol=1e-3, atol=1e-4 * system.abs().max().item())
        torch.testing.assert_close(slope, twin_slope, rtol=1e-3, atol=1e-4 * slope.abs().max().item())
    torch.testing.assert_close(loss.sum(), twin_loss.sum(), rtol=0.05, atol=0)


def test_an_offer_that_is_no_number_changes_nothing_then_or_later():
    stack = stack_of(TensorSpec(bits=2, group=16))
    plain, broken = stack.fake, stack.moved.clone()
    broken[3] = torch.nan
    stack.offer(broken)
    stack.rescale({"scale": stack.grid["scale"] * torch.nan}, torch.full((12, 1), torch.nan))
    assert torch.equal(stack.fake, plain)
    stack.offer(rounded_in_order(stack, turns_of(stack.gram)))
    assert (stack.loss(stack.fake) < stack.loss(plain)).all()


def test_a_stack_of_no_power_at_all_is_rounded_plainly():
    stack = Stack({"layer": torch.randn(5, 48)}, torch.zeros(48, 48), TensorSpec(bits=2, group=16), {})
    plain = stack.fake
    stack.offer(rounded_in_order(stack, turns_of(stack.gram)))
    stack.offer(swept(stack, turns_of(stack.gram)))
    refit(stack)
    assert torch.equal(stack.fake, plain)


def test_dead_and_dependent_channels_leave_everything_finite():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 48, generator=generator)  # rank 10
    x[:, 5] = 0
    x[:, 6] = x[:, 7]
    gram = x.t() @ x
    assert torch.isfinite(feedback(gram)).all()
    assert torch.isfinite(feedback(torch.zeros(8, 8))).all()
    hopeless = -torch.eye(8, dtype=torch.float64)  # no damping makes it positive
    assert torch.equal(feedback(hopeless), torch.eye(8, dtype=torch.float64))
    stack = Stack({"layer": torch.randn(4, 48, generator=generator)}, gram, TensorSpec(bits=2, group=16), {})
    before = output_error(stack, stack.fake)
    stack.offer(rounded_in_order(stack, turns_of(stack.gram)))
    assert torch.isfinite(stack.moved).all() and output_error(stack, stack.fake) <= before


@pytest.mark.parametrize("kind", ["none", "search", "gptq"])
def test_tuning_is_never_worse_than_its_start_or_plain_rounding(kind):
    block, spec = Linears(), TensorSpec(bits=2, group=16)
    plan, knobs, report = plan_of(block, spec), {}, BlockReport(kept="plain")
    for step in [*start(kind), SignRound(iters=15, batch_size=4)]:
        knobs = step.block(block, plan, knobs, report)
    assert report.losses[report.kept] == min(report.losses.values())
    rows = range(21, 24)  # an eighth is held out
    fakes = {name: fake(w, spec, knobs.get(name, {})) for name, w in block.weights.items()}
    loss = (block.run(rows, fakes) - block.target(rows)).square().mean().item()
    assert loss == pytest.approx(report.losses[report.kept], rel=1e-5)


def test_layers_tuned_as_one_matrix_become_what_they_become_alone(monkeypatch):
    from auto_round.steps import sign_round

    def tuned():
        block, spec = Linears(), TensorSpec(bits=2, group=16)
        plan, report, knobs = plan_of(block, spec), BlockReport(), {}
        for step in [*start("gptq"), SignRound(iters=10, batch_size=4)]:
            knobs = step.block(block, plan, knobs, report)
        return {name: fake(w, spec, knobs[name]) for name, w in block.weights.items()}

    together = tuned()
    monkeypatch.setattr(sign_round, "_alike", lambda block, specs: [(name,) for name in specs])
    alone = tuned()
    assert all(torch.equal(together[name], alone[name]) for name in together)


@pytest.mark.parametrize(
    ("kind", "minmax_lr", "share"), [("none", None, 1), ("search", None, 1 / 16), ("search", 0.04, 1 / 2)]
)
def test_a_range_that_was_searched_moves_a_sixteenth_as_far_as_an_offset(kind, minmax_lr, share):
    block, spec, knobs, report = Linears(), TensorSpec(bits=2, group=16), {}, BlockReport()
    one_step = SignRound(iters=1, lr=0.08, minmax_lr=minmax_lr, published=True, best_state=False)
    for step in [*start(kind), one_step]:
        knobs = step.block(block, plan_of(block, spec), knobs, report)
    ends = torch.cat([own[end] for own in knobs.values() for end in ("low", "high")])
    assert (ends - 1).abs().max() == pytest.approx(0.08 * share, rel=1e-4)
    assert max(own["round"].abs().max() for own in knobs.values()) == pytest.approx(0.08)


def test_the_published_procedure_keeps_what_it_tuned_and_holds_nothing_back():
    block, spec = Linears(), TensorSpec(bits=2, group=16)
    seen = set()
    run = block.run

    def noting(rows, weights=None):
        if torch.is_grad_enabled():
            seen.update(rows)
        return run(rows, weights)

    block.run = noting
    report = BlockReport()
    SignRound(iters=12, batch_size=8, published=True).block(block, plan_of(block, spec), {}, report)
    assert report.kept == "tuned" and seen == set(range(24))


def test_a_block_that_is_as_good_as_exact_is_not_tuned():
    block, report = Linears(), BlockReport()
    spec = TensorSpec(bits=8, group=16, scale_dtype="float32")
    for name in block.weights:  # exactly representable
        block.weights[name] = fake(block.weights[name], spec)
    SignRound(iters=12).block(block, plan_of(block, spec), {}, report)
    assert report.kept == "plain" and report.iterations == 0 and "tuned" not in report.losses
    assert report.saved == 12 and report.why == "as good as exact"


def test_tuning_ends_when_the_floor_is_reached_and_says_what_it_saved(monkeypatch):
    def tuned():
        report = BlockReport()
        spec = TensorSpec(bits=2, group=16)
        SignRound(iters=40).block(block := Linears(), plan_of(block, spec), {}, report)
        return report

    whole = tuned()
    assert (whole.iterations, whole.saved, whole.why) == (40, 0, "")
    between = (whole.losses["plain"] + whole.losses["tuned"]) / 2
    monkeypatch.setattr(SignRound, "_floor", lambda *_: between)
    report = tuned()
    assert report.losses["tuned"] <= between and report.kept == "tuned"
    assert 0 < report.iterations < 40 and report.iterations + report.saved == 40
    assert report.why == "as good as exact"


def test_patience_ends_tuning_after_the_best_state():
    block, report = Linears(), BlockReport()
    SignRound(iters=200, lr=0.5, schedule=lambda done: 1.0, patience=30).block(
        block, plan_of(block, TensorSpec(bits=4, group=16)), {}, report
    )
    assert 30 <= report.iterations < 200
    assert report.saved == 200 - report.iterations and report.why == "no better for 30 steps"


def test_the_schedule_is_asked_for_every_step():
    asked = []
    block = Linears()
    SignRound(iters=5, schedule=lambda done: asked.append(done) or 1.0).block(
        block, plan_of(block, TensorSpec(bits=2, group=16)), {}, BlockReport()
    )
    assert asked == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])


def test_a_trimmed_loss_leaves_out_the_values_furthest_off():
    generator = torch.Generator().manual_seed(0)
    out, target = torch.randn(2, 5, 100, generator=generator), torch.zeros(2, 5, 100)
    kept = out.square().flatten().sort().values[:-10]
    assert output_loss(out, target, None, trim=0.01).item() == pytest.approx((kept.sum() / 1000).item())
