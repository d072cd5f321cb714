"""Quantized sources: what is streamed from them is what is streamed from the plain weights that they stand for."""

import json
import shutil

import pytest
import torch
from models import samples, tiny
from safetensors.torch import load_file, save_file

from auto_round import AutoRound
from auto_round.core.errors import ModelError
from auto_round.sources.plain import open_folder

RTN = {"group_size": 32, "iters": 0, "disable_opt_rtn": True}


def rewritten(source, folder, change, quantization=None):
    """A copy of the model in `source` with `change` applied to its tensors, in two shards that split partners."""
    shutil.copytree(source, folder)
    tensors = change(load_file(source / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for i in (0, 1):
        part = {name: tensors[name].contiguous() for name in names[i::2]}
        save_file(part, folder / f"part-{i}.safetensors")
        index.update(dict.fromkeys(part, f"part-{i}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = json.loads((folder / "config.json").read_text())
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def streamed(folder, out, **options):
    """Tensors of the result of streaming `folder` to four bits."""
    AutoRound(folder, **{**RTN, **options}).quantize_and_save(out)
    assert "fp8" not in (out / "config.json").read_text()
    return {n: t for path in sorted(out.glob("*.safetensors")) for n, t in load_file(path).items()}


def assert_same(found, expected):
    """Bit for bit the same tensors."""
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]), name


def is_matrix(name):
    """Whether FP8 checkpoints quantize it."""
    return name.endswith("_proj.weight")


def block_scale(w, i, j, size):
    """Scale of one block of `size` x `size`, by hand."""
    return w[i * size : (i + 1) * size, j * size : (j + 1) * size].float().abs().max() / 448


@pytest.mark.parametrize("kind", ["block", "row", "tensor"])
def test_fp8_sources_are_read_as_the_weights_that_they_stand_for(kind, tmp_path):
    tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    plain_values, size = {}, 32

    def change(tensors):
        out = {}
        for name, w in tensors.items():
            if not is_matrix(name):
                out[name] = plain_values[name] = w
                continue
            w = w.float()
            if kind == "block":
                scale = torch.tensor(
                    [
                        [block_scale(w, i, j, size) for j in range(w.shape[1] // size)]
                        for i in range(w.shape[0] // size)
                    ]
                )
                full = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)
            elif kind == "row":
                scale = full = w.abs().amax(1, keepdim=True) / 448
            else:
                scale, full = (w.abs().max() / 448).reshape(1), w.abs().max() / 448
            out[name] = (w / full).to(torch.float8_e4m3fn)
            out[f"{name}_scale_inv" if kind == "block" else f"{name}_scale"] = scale
            plain_values[name] = (out[name].float() * full).to(torch.bfloat16)
        return out

    config = {"quant_method": "fp8", "weight_block_size": [size, size]}
    source = rewritten(tmp_path / "m", tmp_path / "fp8", change, config)
    plain = rewritten(tmp_path / "m", tmp_path / "plain", lambda tensors: plain_values)
    assert_same(streamed(source, tmp_path / "a"), streamed(plain, tmp_path / "b"))


def test_a_missing_partner_is_named(tmp_path):
    tiny("llama", tmp_path / "m", dtype=torch.bfloat16)

    def change(tensors):
        return {n: w.to(torch.float8_e4m3fn) if is_matrix(n) else w for n, w in tensors.items()}

    source = rewritten(tmp_path / "m", tmp_path / "fp8", change, {"quant_method": "fp8"})
    with pytest.raises(ModelError, match=r"down_proj.weight is FP8, but none of weight_scale_inv"):
        streamed(source, tmp_path / "out")


def test_mxfp4_experts_are_read_as_the_weights_that_they_stand_for(tmp_path):
    tiny("gpt-oss", tmp_path / "m", dtype=torch.bfloat16)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-value for value in values]
    plain_values = {}
    make = torch.Generator().manual_seed(0)

    def change(tensors):
        out = {}
        for name, w in tensors.items():
            if not name.endswith(("gate_up_proj", "down_proj")):
                out[name] = plain_values[name] = w
                continue
            experts, columns, rows = w.shape
            blocks = torch.randint(
                0, 256, (experts, rows, columns // 32, 16), generator=make, dtype=torch.uint8
            )
            scales = torch.randint(
                118, 124, (experts, rows, columns // 32), generator=make, dtype=torch.uint8
            )
            out[f"{name}_blocks"], out[f"{name}_scales"] = blocks, scales
            full = torch.empty(experts, rows, columns)
            for e in range(experts):
                for r in range(rows):
                    row = []
                    for bytes_, scale in zip(blocks[e, r].tolist(), scales[e, r].tolist()):
                        for byte in bytes_:
                            row += [
                                values[byte & 15] * 2.0 ** (scale - 127),
                                values[byte >> 4] * 2.0 ** (scale - 127),
                            ]
                    full[e, r] = torch.tensor(row)
            plain_values[name] = full.transpose(1, 2).to(torch.bfloat16)
        return out

    source = rewritten(tmp_path / "m", tmp_path / "mxfp4", change, {"quant_method": "mxfp4"})
    plain = rewritten(tmp_path / "m", tmp_path / "plain", lambda tensors: plain_values)
    assert_same(streamed(source, tmp_path / "a"), streamed(plain, tmp_path / "b"))


@pytest.mark.parametrize(
    "fmt, options",
    [
        ("auto_round", {}),
        ("auto_round", {"sym": False, "bits": 2}),
        ("auto_gptq", {"bits": 8}),
        ("auto_awq", {"sym": False}),
        ("llm_compressor", {}),
        ("llm_compressor", {"scheme": "NVFP4", "act_bits": 16, "group_size": None}),
    ],
    ids=str,
)
def test_packed_sources_are_read_as_their_dequantized_weights_with_a_warning(fmt, options, tmp_path, caplog):
    tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    for name in (fmt, "fake"):
        AutoRound(tmp_path / "m", **{**RTN, **options}).quantize_and_save(tmp_path / name, format=name)
    caplog.clear()
    bits = 2  # symmetric: too few levels for the grid of any source here
    found = streamed(tmp_path / fmt, tmp_path / "a", bits=bits)
    assert "a second time, which costs accuracy" in caplog.text and "14 layers from" in caplog.text
    expected = streamed(tmp_path / "fake", tmp_path / "b", bits=bits)
    codes = [name for name in expected if name.endswith("qweight")]
    # A format may ask for another float dtype, in which the dequantized weights are then rounded.
    differing = [n for n in codes if not torch.equal(found[n], expected[n])]
    dtype = json.loads((tmp_path / fmt / "config.json").read_text())["dtype"]
    assert found.keys() == expected.keys() and (not differing or dtype != "bfloat16")


def test_quantized_sources_can_be_tuned_block_by_block(tmp_path):
    tiny("llama", tmp_path / "m", dtype=torch.bfloat16)
    for name in ("auto_round", "fake"):
        AutoRound(tmp_path / "m", **{**RTN, "bits": 8}).quantize_and_save(tmp_path / name, format=name)
    results = []
    for name in ("auto_round", "fake"):
        job = AutoRound(
            tmp_path / name, dataset=samples(4), group_size=32, iters=2, nsamples=4, seqlen=32, batch_size=2
        )
        job.quantize_and_save(tmp_path / f"{name}-out")
        results.append(load_file(tmp_path / f"{name}-out" / "model.safetensors"))
    assert_same(*results)


def test_a_plain_folder_is_opened_as_it_is(tmp_path):
    model = tiny("llama", tmp_path / "m")
    files = open_folder(tmp_path / "m")
    assert set(files.store.infos) == set(model.state_dict())
