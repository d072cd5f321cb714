"""Checkpoints as they are published: split into shards that part partners, with weights in FP8 or MXFP4."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]


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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = json.loads((folder / "config.json").read_text())
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def is_matrix(name):
    """Whether FP8 checkpoints quantize it."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight"))


def block_scale(w, i, j, size):
    """Scale of one block of `size` x `size`, by hand."""
    return w[i * size : (i + 1) * size, j * size : (j + 1) * size].float().abs().max() / 448


def in_fp8(tensors, kind, size):
    """(tensors with matrices in FP8 with scales per "block", "row" or "tensor", what they stand for)."""
    stored, plain = {}, {}
    for name, w in tensors.items():
        if not is_matrix(name):
            stored[name] = plain[name] = w
            continue
        dtype, w = w.dtype, w.float()
        rows, columns = (-(-n // size) for n in w.shape)
        if kind == "block":
            scale = torch.tensor([[block_scale(w, i, j, size) for j in range(columns)] for i in range(rows)])
            full = scale.repeat_interleave(size, 0).repeat_interleave(size, 1)[: w.shape[0], : w.shape[1]]
        elif kind == "row":
            scale = full = w.abs().amax(1, keepdim=True) / 448
        else:
            scale, full = (w.abs().max() / 448).reshape(1), w.abs().max() / 448
        stored[name] = (w / full).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv" if kind == "block" else f"{name}_scale"] = scale
        plain[name] = (stored[name].float() * full).to(dtype)
    return stored, plain


def in_mxfp4(tensors, seed=0):
    """(tensors of GPT-OSS with random experts in MXFP4, what they stand for)."""
    stored, plain = {}, {}
    make = torch.Generator().manual_seed(seed)
    for name, w in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = plain[name] = w
            continue
        experts, columns, rows = w.shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=make, dtype=torch.uint8)
        scales = torch.randint(118, 124, shape, generator=make, dtype=torch.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        full = torch.empty(experts, rows, columns)
        for e in range(experts):
            for r in range(rows):
                row = []
                for pairs, scale in zip(blocks[e, r].tolist(), scales[e, r].tolist()):
                    for byte in pairs:
                        row += [E2M1[code] * 2.0 ** (scale - 127) for code in (byte & 15, byte >> 4)]
                full[e, r] = torch.tensor(row)
        plain[name] = full.transpose(1, 2).to(w.dtype)
    return stored, plain
