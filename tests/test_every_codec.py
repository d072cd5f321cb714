"""Every data type in every format that takes it: all shapes, dtypes and awkward contents, from the registries alone."""

import pytest
import torch

from auto_round.codecs.base import codec_of, fake, presets
from auto_round.core.errors import FormatError, ModelError, SchemeError
from auto_round.core.plan import Plan
from auto_round.formats.base import formats
from auto_round.jobs.quantize import check_finite, encode
from auto_round.sources.base import Block

SHAPES = [(32, 256), (64, 96), (1, 256), (33, 100)]
PRESETS = {name: scheme for name, scheme in presets().items() if scheme.weight is not None}
SCHEMES = {scheme: name for name, scheme in reversed(PRESETS.items())}  # every one once
FORMATS = {name: fmt for name, fmt in formats().items() if fmt.holds_codes and not fmt.whole_model}


def held(fmt, scheme, shape):
    """What `fmt` takes a layer of `shape` for: the concrete format, or None when it leaves or refuses the layer."""
    plan = Plan({"layer": scheme}, shapes={"layer": shape}, base=scheme)
    try:
        kept = fmt.check(plan)
    except FormatError:
        return None
    return fmt.resolve(kept) if kept.quantized() else None


HOLDERS = [
    (name, preset)
    for name, fmt in FORMATS.items()
    for scheme, preset in SCHEMES.items()
    if held(fmt, scheme, SHAPES[0])
]
EACH = pytest.mark.parametrize("preset", SCHEMES.values())


def contents(shape, dtype):
    """Kind -> a weight of that kind, as a model of `dtype` has it."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    plain = torch.randn(shape, generator=generator) * 0.05
    gaps, spike, one_sided = plain.clone(), plain.clone(), plain.abs()
    gaps[:, : shape[1] // 2] = 0
    spike[-1, -1] = 30.0
    least = torch.finfo(dtype).smallest_normal
    found = {
        "plain": plain,
        "zero": torch.zeros(shape),
        "groups of zeros": gaps,
        "one large value": spike,
        "one sign": one_sided,
        "denormal": plain.sign() * least / 4,
        "tiny": plain * 1e-6,
        "large": plain * 1e4,
        "one value": torch.full(shape, -0.25),
    }
    return {kind: w.to(dtype) for kind, w in found.items()}


@pytest.mark.parametrize(("name", "preset"), HOLDERS)
def test_whatever_a_weight_holds_it_is_read_back_as_it_was_made(name, preset):
    scheme = PRESETS[preset]
    for shape in SHAPES:
        fmt = held(FORMATS[name], scheme, shape)
        for kind, w in contents(shape, torch.bfloat16).items() if fmt else ():
            q = encode("layer", w, scheme.weight, {})
            again = fmt.read(fmt.write(q), scheme.weight, shape)
            assert again.equals(q), (kind, shape)


def test_every_scheme_has_a_format_that_keeps_its_codes():
    held_somewhere = {preset for _, preset in HOLDERS}
    assert {name for name in SCHEMES.values() if not name.startswith("GGUF")} <= held_somewhere


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_made_of_any_weight_is_finite_and_of_its_shape(preset, dtype):
    spec = PRESETS[preset].weight
    block = getattr(codec_of(spec), "block", 1)  # of ggml's types
    for shape in SHAPES:
        if shape[1] % block:
            with pytest.raises(SchemeError, match=f"rows of {shape[1]}"):
                encode("layer", torch.ones(shape), spec, {})
            continue
        for kind, w in contents(shape, dtype).items():
            made = codec_of(spec).dequantize(encode("layer", w, spec, {}))
            assert made.shape == shape and bool(made.isfinite().all()), (kind, shape)


@EACH
def test_the_error_is_a_share_of_the_largest_value_and_zeros_stay(preset):
    spec = PRESETS[preset].weight
    block = getattr(codec_of(spec), "block", 1)
    # Elements with exponents have steps of a quarter of the value, or of a third where the scale is a power of two.
    step = 2.0 ** (1 - spec.bits) if spec.dtype == "int" or block > 1 else 0.25
    for shape in SHAPES:
        if shape[1] % block:
            continue
        for kind, w in contents(shape, torch.float32).items():
            made = fake(w, spec)
            largest = w.abs().max().item()
            if kind == "denormal":  # below what any scale can hold
                assert made.abs().max() <= 1e-4
                continue
            bound = 1.3 * step * largest + 1e-6
            assert (made - w).abs().max().item() <= bound, (kind, shape)
            if kind == "zero":
                assert made.count_nonzero() == 0


@EACH
def test_a_huge_weight_is_stored_or_refused_by_name(preset):
    spec = PRESETS[preset].weight
    w = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 1e30
    try:
        q = encode("model.layers.0.k_proj", w, spec, {})
    except SchemeError as error:
        assert "model.layers.0.k_proj: " in str(error) and "overflow" in str(error)
        return
    made = codec_of(spec).dequantize(q)
    assert bool(made.isfinite().all()) and (made - w).abs().max() <= 0.3 * w.abs().max()


class One(Block):
    """A block of one layer."""

    def __init__(self, w):
        self.name, self.weights = "block", {"model.layers.0.k_proj": w}


@EACH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named(preset, bad):
    w = torch.ones(4, 256)
    w[2, 7] = bad
    with pytest.raises(
        ModelError, match=r"model\.layers\.0\.k_proj\.weight has 1 values that are NaN or Inf"
    ):
        check_finite(One(w), {"model.layers.0.k_proj": PRESETS[preset].weight})


@EACH
def test_what_is_added_to_fill_a_group_changes_no_value(preset):
    spec = PRESETS[preset].weight
    if preset.startswith("GGUF") or not isinstance(spec.group, int) or spec.group < 1:
        return
    w = contents((3, 2 * spec.group), torch.float32)["plain"]
    short = w[:, : spec.group + 5]
    w = torch.cat([short, torch.zeros(3, spec.group - 5)], 1)
    ties = (
        {"global_scale": codec_of(spec).tie([w], spec)[0]["global_scale"]}
        if spec.scale_dtype == "e4m3"
        else {}
    )
    whole = fake(w, spec, ties)[:, : spec.group + 5]
    assert torch.equal(fake(short, spec, ties), whole) or not spec.sym
