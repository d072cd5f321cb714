"""Kernels: every backend that runs here agrees with the definition and gives back what it loaded, or says why not."""

import copy

import pytest
import torch

from auto_round.backends.base import AWQ, GPTQ, Site, backends, choose, named
from auto_round.codecs.base import codec_of
from auto_round.core import bits as packing
from auto_round.core.errors import FormatError
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import TensorSpec
from auto_round.formats.base import format_named

OURS = [
    name
    for name in backends()
    if name.split(":")[0] in ("cpu", "ark", "mlx", "triton", "gptqmodel") and name != "triton"
]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def site_of(
    spec,
    shape,
    *,
    fmt=GPTQ[0],
    dtype=torch.float32,
    bias=None,
    device="cpu",
    name="model.layers.0.mlp.up_proj",
):
    """One layer as a loader meets it."""
    return Site(
        name=name, format=format_named(fmt), spec=spec, shape=shape, device=device, dtype=dtype, bias=bias
    )


def usable(name, site):
    """The backend called `name`, if it runs `site` here; else the test is skipped with the reason."""
    backend = backends()[name]
    reason = backend.reject(site) or backend.missing() or backend.prepare()
    if reason:
        pytest.skip(f"{name}: {reason}")
    return backend


def random_quantized(spec, shape, seed=0):
    """A quantized random matrix."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1
    return codec_of(spec).quantize(w, spec)


def layer(backend, site, q, *, seed=1):
    """A module of `backend` that holds `q`, as if loaded from a checkpoint."""
    module = backend.build(site)
    for name, tensor in site.format.write(q).items():
        module._buffers[name] = tensor
    if site.bias is not None:
        noise = torch.randn(site.shape[0], generator=torch.Generator().manual_seed(seed))
        module._buffers["bias"] = noise.to(site.bias)
    backend.finish(module, cache=False)
    return module


def inputs(rows, columns, dtype, seed=2):
    """Inputs with a few large channels, as activations have them."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[:, ::17] *= 20
    return x.to(dtype)


def exact(q, x, bias):
    """The product in float64, by the definition of the integers."""
    w = codec_of(q.spec).dequantize(q).double()
    y = x.double() @ w.t()
    return y if bias is None else y + bias.double()


GRID = [
    (bits, group, sym, fmt)
    for bits in (2, 3, 4, 8)
    for group in (32, 64, 128, -1)
    for sym, fmt in ((True, GPTQ[0]), (False, "auto_round:gptqmodel"))
]
GRID += [(4, group, sym, AWQ[0]) for group in (32, 128) for sym in (True, False)]


CASES = [
    (name, *point, dtype)
    for i, point in enumerate(GRID)
    for j, dtype in enumerate(TOLERANCE)
    for name in OURS
    if dtype in backends()[name].limits[0].dtypes
    if name != "triton:interpreter" or (i + j) % 3 == 0  # its interpreter is slow
]


@pytest.mark.parametrize(("name", "bits", "group", "sym", "fmt", "dtype"), CASES)
def test_every_kernel_agrees_with_the_definition(name, bits, group, sym, fmt, dtype):
    spec = TensorSpec(bits=bits, group=group, sym=sym)
    for shape, bias in (((96, 256), None), ((64, 384), dtype))[-1 if name == "triton:interpreter" else 0 :]:
        site = site_of(spec, shape, fmt=fmt, dtype=dtype, bias=bias)
        backend = usable(name, site)
        q = random_quantized(spec, shape)
        module = layer(backend, site, q)
        for rows in (1, 3, 8):
            x = inputs(rows, shape[1], dtype)
            want = exact(q, x, module.bias)
            got = module(x.reshape(rows, 1, -1)).reshape(rows, -1)
            limit = 1.5e-2 if name.endswith("int8") else TOLERANCE[dtype]
            if name == "ark" and dtype == torch.float16:
                limit = TOLERANCE[torch.bfloat16]  # what it computes in where the processor has AMX
            assert got.dtype == dtype
            assert (got.double() - want).norm() <= limit * want.norm(), (name, shape, rows)


@pytest.mark.parametrize(("bits", "group", "sym", "fmt"), GRID)
@pytest.mark.parametrize("name", [*OURS, "torch"])
def test_a_repacked_layer_saves_the_tensors_it_was_loaded_from(name, bits, group, sym, fmt):
    spec = TensorSpec(bits=bits, group=group, sym=sym)
    site = site_of(spec, (96, 256), fmt=fmt, bias=torch.float32)
    q = random_quantized(spec, (96, 256))
    module = layer(usable(name, site), site, q)
    saved, loaded = module.state_dict(), {**site.format.write(q), "bias": module.bias}
    assert saved.keys() == loaded.keys()
    for key, tensor in loaded.items():
        assert saved[key].dtype == tensor.dtype and torch.equal(saved[key], tensor), key


@pytest.mark.parametrize("name", [*OURS, "torch"])
def test_a_layer_gives_its_weight_back_and_survives_a_copy_and_a_cast(name):
    spec = TensorSpec(bits=4, group=32)
    site = site_of(spec, (64, 128))
    q = random_quantized(spec, (64, 128))
    module = copy.deepcopy(layer(usable(name, site), site, q)).to(torch.bfloat16)
    assert torch.equal(module.dequantized(torch.float32), codec_of(spec).dequantize(q))


@pytest.mark.parametrize("name", ["torch", "cpu", "triton:interpreter"])
@pytest.mark.parametrize("sym", [True, False])
def test_gradients_reach_the_inputs(name, sym):
    spec = TensorSpec(bits=4, group=32, sym=sym)
    site = site_of(spec, (64, 96), fmt="auto_round:gptqmodel")
    q = random_quantized(spec, (64, 96))
    module = layer(usable(name, site), site, q)
    x = inputs(5, 96, torch.float32).requires_grad_()
    upstream = inputs(5, 64, torch.float32, seed=3)
    module(x).backward(upstream)
    want = upstream.double() @ codec_of(spec).dequantize(q).double()
    assert (x.grad.double() - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_many_rows_agree_whatever_multiplies_them(bits, dtype):
    # Rows that fill no tile of the matrix unit, an odd number of tiles, columns that fill no block.
    shape = (96 if bits == 3 else 112, 160)
    for group, sym, rows in ((32, False, 256), (-1, True, 300), (32, True, 33), (160, False, 50)):
        spec = TensorSpec(bits=bits, group=group, sym=sym)
        site = site_of(spec, shape, fmt="auto_round:gptqmodel", dtype=dtype, bias=dtype)
        q = random_quantized(spec, shape)
        module = layer(usable("cpu", site), site, q)
        x = inputs(rows, 160, dtype)
        want = exact(q, x, module.bias)
        got = module(x)
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()
        last = (got[-1].double() - want[-1]).norm() / want[-1].norm()  # it may be in a part that is not full
        assert last <= TOLERANCE[dtype], (group, rows)
        few = module(x[:7])  # these are summed as integers
        assert (few.double() - want[:7]).norm() <= TOLERANCE[dtype] * want[:7].norm()


def test_a_row_that_is_not_finite_spoils_no_other_of_many():
    spec = TensorSpec(bits=4, group=32)
    for dtype in TOLERANCE:
        site = site_of(spec, (64, 96), dtype=dtype)
        module = layer(usable("cpu", site), site, random_quantized(spec, (64, 96)))
        x = inputs(40, 96, dtype)
        x[3, 5], x[21, 95] = torch.nan, torch.nan
        spoilt = torch.isnan(module(x)).any(1).nonzero().flatten()
        assert spoilt.tolist() == [3, 21], dtype


def joined(dtype, *, sym=True):
    """(layers of 64, 32 and 40 rows that are multiplied in one call, the same ones called one by one)."""
    spec = TensorSpec(bits=4, group=32, sym=sym)
    layers = []
    for i, rows in enumerate((64, 32, 40)):
        site = site_of(spec, (rows, 96), fmt="auto_round:gptqmodel", dtype=dtype, bias=dtype if i else None)
        layers.append(layer(usable("cpu", site), site, random_quantized(spec, (rows, 96), seed=i)))
    alone = copy.deepcopy(layers)
    backends()["cpu"].join(layers)
    assert all(one.together is layers[0].together for one in layers) and alone[0].together is None
    return layers, alone


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
def test_layers_multiplied_together_give_what_they_give_alone(dtype, rows):
    layers, alone = joined(dtype, sym=rows % 2 == 0)
    with torch.no_grad():
        for seed in (1, 2):
            x = inputs(rows, 96, dtype, seed=seed).reshape(1, rows, 96)
            for one, other in zip(layers, alone):
                assert torch.equal(one(x), other(x))
    assert layers[0].together.waiting is None  # and keep nothing afterwards


def test_layers_multiplied_together_notice_another_input():
    layers, alone = joined(torch.float32)
    calls = [0, 1, 0, 2, 2, 1, 0, 0, 1, 2] * 3  # in any order, with some left out
    with torch.no_grad():
        x = inputs(1, 96, torch.float32)
        for step, which in enumerate(calls):
            if step % 3 == 1:
                x = inputs(1, 96, torch.float32, seed=step)
            elif step % 3 == 2:
                x.mul_(1.5)  # the same tensor with other values
            assert torch.equal(layers[which](x), alone[which](x)), step
    assert all(one.together is None for one in layers)  # too much was made in vain
    x = inputs(1, 96, torch.float32).requires_grad_()
    layers, _ = joined(torch.float32)
    sum(one(x).sum() for one in layers).backward()
    assert x.grad.abs().sum() > 0


def test_layers_multiplied_together_survive_a_copy_a_cast_and_saving():
    layers, alone = joined(torch.float32)
    tree = torch.nn.ModuleList(layers)
    twin = copy.deepcopy(tree).to(torch.bfloat16)
    assert twin[1].together is twin[0].together is not layers[0].together
    assert tree.state_dict().keys() == torch.nn.ModuleList(alone).state_dict().keys()
    assert len(list(tree.modules())) == 4
    x = inputs(2, 96, torch.bfloat16)
    with torch.no_grad():
        for one, other in zip(twin, torch.nn.ModuleList(alone).to(torch.bfloat16)):
            assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_odd_shapes_and_hostile_inputs_of_the_cpu_kernels(rows):
    spec = TensorSpec(bits=4, group=-1)
    site = site_of(spec, (32, 96), dtype=torch.float32)
    q = random_quantized(spec, (32, 96))
    module = layer(usable("cpu", site), site, q)
    x = inputs(rows, 96, torch.float32)
    assert module(x).shape == (rows, 32)
    assert not module(torch.zeros(rows, 96)).any()
    if rows > 1:
        x[0, 3], x[1, 5] = torch.nan, torch.inf
        y = module(x)
        assert torch.isnan(y[:2]).all() and torch.isfinite(y[2:]).all()
        tiny, huge = torch.full((1, 96), 1e-42), torch.full((1, 96), 3e38)
        assert torch.isfinite(module(tiny)).all() and not torch.isnan(module(huge)).any()


def test_the_cpu_kernels_give_the_same_bits_with_any_number_of_threads():
    spec = TensorSpec(bits=4, group=128)
    site = site_of(spec, (512, 512), dtype=torch.bfloat16)
    module = layer(usable("cpu", site), site, random_quantized(spec, (512, 512)))
    x = inputs(7, 512, torch.bfloat16)
    one = module(x)
    torch.set_num_threads(2)
    try:
        assert torch.equal(module(x), one)
    finally:
        torch.set_num_threads(1)


def check_tiles(kernels, bits):
    """That `kernels` lay codes as layout.py says, and that it undoes that."""
    from auto_round.backends.cpu.layout import untile_codes, words_of

    rows = kernels.rows()
    codes = torch.randint(
        0, 1 << bits, (17, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    tiled = kernels.tile(words_of(codes, bits), bits)
    assert tiled.shape == (-(-17 // rows), 2, 4 * rows * bits) and torch.equal(
        untile_codes(tiled, bits, (17, 40)), codes
    )
    for columns in (32, 96, 64 if bits == 3 else 80):  # a last unit that is not whole, where words allow it
        for count in (5, 17, 300):
            noise = torch.Generator().manual_seed(columns)
            others = torch.randint(0, 1 << bits, (count, columns), generator=noise, dtype=torch.uint8)
            made = kernels.tile(packing.pack(others.t(), bits), bits)
            assert torch.equal(untile_codes(made, bits, (count, columns)), others)
    for row, column in ((0, 0), (3, 17), (8, 39), (16, 12)):
        unit, (q, k) = tiled[row // rows, column // 32].tolist(), divmod(column % 32, 4)
        at = 4 * (row % rows) + k  # byte within a vector
        if bits == 8:
            found = unit[4 * rows * q + at]
        elif bits == 4:
            found = unit[4 * rows * (q // 2) + at] >> 4 * (q % 2) & 15
        else:
            found = unit[4 * rows * (q // 4) + at] >> 2 * (q % 4) & 3
        if bits == 3:
            found |= (unit[8 * rows + at] >> q & 1) << 2
        assert found == codes[row, column]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_bytes_of_a_tile_are_what_the_layout_file_says(bits):
    usable("cpu", site_of(TensorSpec(bits=bits), (64, 128)))
    check_tiles(torch.ops.auto_round_cpu, bits)


def test_without_a_compiler_the_next_best_runs_and_the_remedy_is_told(monkeypatch):
    site = site_of(TensorSpec(bits=3, group=16), (64, 128))
    assert choose(site).backend.name == "torch"
    site = site_of(TensorSpec(), (64, 128))
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    choice = choose(site)
    assert choice.backend.name != "cpu"
    assert choice.better["cpu"] == "needs a C++ compiler: install g++ or clang++"


def test_a_compiler_that_fails_is_told_with_its_message(tmp_path, monkeypatch):
    from auto_round.backends.cpu import build

    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'kernels.cpp:1: fatal error: no such header' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("AR_KERNEL_CACHE", str(tmp_path))
    with pytest.raises(build.BuildError, match="no such header"):
        build.load("auto_round_broken")
    assert not list(tmp_path.glob("*.so"))


@pytest.mark.slow
@pytest.mark.parametrize("define", ["PLAIN", "NARROW", "NO_AMX"])
def test_the_kernels_of_lesser_processors_agree(define):
    from auto_round.backends.cpu import build, layout

    told = build.load(f"auto_round_cpu_{define.lower()}", f"AUTO_ROUND_{define}")
    assert told == "plain C++" if define == "PLAIN" else "AMX" not in told
    kernels = getattr(torch.ops, f"auto_round_cpu_{define.lower()}")
    generator, tile = torch.Generator().manual_seed(0), kernels.rows()
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 1 << bits, (24, 128), generator=generator, dtype=torch.uint8)
        scales = torch.rand(24, 2, generator=generator).half()
        zeros = torch.randint(0, 1 << bits, (24, 2), generator=generator, dtype=torch.uint8)
        columns = torch.arange(128) // 64
        w = (codes.double() - zeros.double()[:, columns]) * scales.double()[:, columns]
        check_tiles(kernels, bits)
        tiles = (
            kernels.tile(layout.words_of(codes, bits), bits),
            *(layout.tile_groups(t, tile) for t in (scales, zeros)),
        )
        for dtype, limbs in ((torch.float32, 3), (torch.bfloat16, 2)):
            for rows in (6, 40):
                x = inputs(rows, 128, dtype)
                y = kernels.linear(x, *tiles, None, bits, 64, 24, limbs)
                want = x.double() @ w.t()
                assert (y.double() - want).norm() <= TOLERANCE[dtype] * want.norm()


def test_an_unknown_backend_is_answered_with_the_nearest_name():
    with pytest.raises(FormatError, match="Did you mean 'torch'"):
        choose(site_of(TensorSpec(), (64, 128)), "torhc")


NAMES = """
    ark marlin exllamav2 gptqmodel:exllamav2 gptq:exllamav2 gptq:cuda triton awq gptqmodel:awq gptqmodel:awq_exllamav2
    gptqmodel:awq_marlin gptqmodel:awq_gemm gptqmodel:awq_torch hpu torch mlx gptq gptqmodel auto_gptq auto_awq auto
    auto_gptq:exllamav2 auto_gptq:tritonv2 auto_gptq:cuda auto_round:tritonv2 auto_round:tritonv2_zp auto_round:torch
    auto_round:torch_zp gptqmodel:marlin gptqmodel:marlin_zp auto_awq:gemm auto_round_kernel auto_round_kernel_zp
    auto_round_kernel_awq hpu_zp MARLIN
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_every_name_of_a_backend_is_known(name):
    assert named(name)


@pytest.fixture
def everything_installed(monkeypatch):
    """As if every library were there, so that only the layer decides."""
    monkeypatch.setattr("auto_round.backends.base.is_met", lambda requirement: True)


SELECTION = [
    ({"bits": 4}, GPTQ[0], "cuda", torch.float16, "marlin"),
    ({"bits": 8, "group": 32}, GPTQ[0], "cuda", torch.bfloat16, "marlin"),
    ({"bits": 4, "sym": False}, GPTQ[0], "cuda", torch.float16, "gptqmodel:exllamav2"),
    ({"bits": 4, "sym": False}, "auto_round:gptqmodel", "cuda", torch.bfloat16, "gptqmodel:exllamav2"),
    ({"bits": 4, "group": 256}, GPTQ[0], "cuda", torch.float16, "gptq:exllamav2"),
    ({"bits": 2, "group": 64}, GPTQ[0], "cuda", torch.bfloat16, "triton"),
    ({"bits": 3}, GPTQ[0], "cuda", torch.float32, "triton"),
    ({"bits": 4}, AWQ[0], "cuda", torch.bfloat16, "gptqmodel:awq_exllamav2"),
    ({"bits": 4, "group": 16}, AWQ[0], "cuda", torch.float16, "awq"),
    ({"bits": 4}, GPTQ[0], "hpu", torch.bfloat16, "hpu"),
    ({"bits": 8}, GPTQ[0], "hpu", torch.bfloat16, "torch"),
    ({"bits": 4}, GPTQ[0], "xpu", torch.float16, "ark"),
    ({"bits": 4, "sym": False}, GPTQ[0], "xpu", torch.float16, "triton"),
    ({"bits": 4}, GPTQ[0], "mps", torch.float16, "mlx"),
    ({"bits": 3, "group": 16}, GPTQ[0], "cpu", torch.float16, "torch"),
]


@pytest.mark.parametrize(("spec", "fmt", "device", "dtype", "expected"), SELECTION)
def test_the_best_backend_is_chosen(everything_installed, spec, fmt, device, dtype, expected):
    site = site_of(TensorSpec(**spec), (128, 256), fmt=fmt, device=device, dtype=dtype)
    assert choose(site).backend.name == expected


def test_a_forced_backend_that_cannot_names_the_layer_the_reason_and_the_remedy():
    site = site_of(TensorSpec(), (64, 128), device="cuda", dtype=torch.float16)
    with pytest.raises(
        FormatError, match=r"layers\.0.*'marlin'.*pip install \"gptqmodel>=2\.0\"|cannot run it"
    ):
        choose(site, "marlin")
    with pytest.raises(FormatError, match="symmetric False is not among True"):
        choose(site_of(TensorSpec(sym=False), (64, 128), device="cuda", dtype=torch.float16), "marlin")
    with pytest.raises(FormatError, match="device cpu is not among cuda"):
        choose(site_of(TensorSpec(), (64, 128), dtype=torch.float16), "exllamav2")


def test_a_requirement_is_told_with_the_version_that_is_here():
    missing = backends()["awq"].missing()
    assert "autoawq" in missing and "transformers<4.57.0 (here: " in missing and "pip install" in missing


def counting(shape=(8, 32)):
    """A 4-bit matrix whose code at row r, column c is (r + c) % 16, one group per row, zero point r % 3 + 1."""
    spec = TensorSpec(bits=4, group=-1, sym=False)
    rows, columns = torch.arange(shape[0]), torch.arange(shape[1])
    codes = ((rows[:, None] + columns) % 16).to(torch.uint8)
    params = {
        "scale": (rows + 1).half().reshape(-1, 1) / 16,
        "zero": (rows % 3 + 1).to(torch.uint8).reshape(-1, 1),
    }
    return Quantized(spec=spec, shape=shape, codes=codes, params=params)


def as_hex(words):
    """int32 words as unsigned hexadecimal numbers."""
    return [f"{word & 0xFFFFFFFF:08x}" for word in words.flatten().tolist()]


def test_what_gptqmodel_starts_from_has_these_bytes():
    from auto_round.backends.gptqmodel import gptq_tensors

    tensors = gptq_tensors(counting(), 0)
    assert as_hex(tensors["qweight"][:, 0]) == ["76543210", "fedcba98"] * 2
    assert as_hex(tensors["qweight"][0]) == [
        *("76543210", "87654321", "98765432", "a9876543", "ba987654", "cba98765", "dcba9876", "edcba987")
    ]
    assert as_hex(tensors["qzeros"]) == ["21321321"]
    assert as_hex(gptq_tensors(counting(), 1)["qzeros"]) == ["10210210"]
    assert not tensors["g_idx"].any() and tensors["scales"][0].tolist() == [r / 16 for r in range(1, 9)]


def test_what_gaudi_reads_has_these_bytes_and_is_given_back():
    q = counting()
    site = site_of(q.spec, q.shape, fmt="auto_round:gptqmodel", device="hpu", dtype=torch.bfloat16)
    module = layer(backends()["hpu"], site, q)
    assert as_hex(module.words[:3]) == ["76543210", "87654321", "98765432"]
    assert as_hex(module.zeros) == ["21321321"] and module.scales.shape == (1, 8)
    assert module.quantized().equals(q)


LIBRARIES = [
    name for name in backends() if name.startswith(("gptqmodel:", "gptq:", "awq")) or name == "marlin"
]


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_buffers_of_a_library_backend_are_those_of_the_checkpoint(name):
    row = backends()[name].limits[0]
    site = site_of(TensorSpec(), (128, 256), fmt=row.packings[0], device="cuda", dtype=row.dtypes[0])
    module = backends()[name].build(site)
    want = site.format.write(random_quantized(site.spec, site.shape))
    found = dict(module.named_buffers())
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {
        k: (v.shape, v.dtype) for k, v in want.items()
    }
    assert all(buffer.device.type == "meta" for buffer in found.values())
