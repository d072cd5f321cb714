"""Turn a quantized checkpoint folder into plain float32 weights, from the file layouts alone.

This is the yardstick of the comparison: numpy only, one arithmetic formula per layout, no code of any
package under test. It knows integer weights of 2, 3, 4 and 8 bits (in fact any width whose codes fill whole
words), any group size including -1 and one that does not divide the row, symmetric or not, in the packings
`auto_round:auto_gptq`, `auto_round`, `auto_round:auto_awq`, and in plain `gptq` and `awq` checkpoints.

It is strict on purpose. The width and group size of a layer are looked up in the folder's config and must
agree with the shapes of the stored tensors, so a wrong `extra_config` is an error here, not a silent success.

    python dequantize.py FOLDER OUT     write OUT/model.safetensors and OUT/config.json, float32, unquantized
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DTYPES = {"F16": "<f2", "F32": "<f4", "BF16": "<u2", "I32": "<i4", "I64": "<i8", "U8": "u1", "I8": "i1"}
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # nibble p of a word holds column 8 * j + AWQ_ORDER[p]
PACKINGS = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:awq": "awq",
}


class LayoutError(ValueError):
    """The folder contradicts itself, or uses a layout this file does not know."""


@dataclass(frozen=True)
class Layer:
    """What the config says about one layer; `group` -1 is one group per row, `layout` a value of PACKINGS."""

    bits: int
    group: int
    sym: bool
    layout: str


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one file; bfloat16 is widened to float32, all else keeps its type."""
    raw = np.fromfile(path, dtype=np.uint8)
    size = int(raw[:8].view("<u8")[0])
    header = json.loads(raw[8 : 8 + size].tobytes())
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(raw[begin:end].tobytes(), dtype=DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array
    return tensors


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write float32 `tensors` as one safetensors file."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array, dtype="<f4").tobytes())


def unpack_stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Read each row of int32 `words` (R, W) as a little-endian stream of codes: (R, 32 * W / bits).

    The 3-bit pattern of GPTQ files (ten codes, one cut by a word's end, ten, one cut, ten) is such a stream.
    """
    if words.shape[1] * 32 % bits:
        raise LayoutError(f"{words.shape[1]} words per row do not hold a whole number of {bits}-bit codes")
    octets = np.ascontiguousarray(words.astype("<i4")).view(np.uint8)
    ones = np.unpackbits(octets, axis=1, bitorder="little").reshape(words.shape[0], -1, bits)
    return (ones.astype(np.int32) << np.arange(bits, dtype=np.int32)).sum(axis=2)


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """4-bit codes of (R, W) int32 words, (R, 8 * W), columns back in order."""
    codes = unpack_stream(words, 4).reshape(words.shape[0], -1, 8)
    ordered = np.empty_like(codes)
    ordered[:, :, AWQ_ORDER] = codes
    return ordered.reshape(words.shape[0], -1)


def dequantize_layer(name: str, parts: dict[str, np.ndarray], layer: Layer) -> np.ndarray:
    """The float32 weight (O, I) of one layer from its `qweight`, `qzeros`, `scales` and `g_idx`, if any."""
    scales = parts["scales"].astype(np.float32)  # (G, O)
    if layer.layout == "awq":
        codes, zeros = unpack_awq(parts["qweight"]), unpack_awq(parts["qzeros"])  # (I, O), (G, O)
    else:
        codes = unpack_stream(parts["qweight"].T, layer.bits).T
        zeros = unpack_stream(parts["qzeros"], layer.bits)
    if layer.layout == "gptq":  # the file holds zero - 1, wrapped into the width of a code
        zeros = (zeros + 1) & (2**layer.bits - 1)
    rows, columns = codes.shape
    group = rows if layer.group == -1 else layer.group
    expected = (-(-rows // group), columns)
    if scales.shape != expected or zeros.shape != expected:
        stored = f"scales of {scales.shape}, zero points of {zeros.shape}"
        raise LayoutError(f"{name}: {layer} in the config asks {expected} of both, stored are {stored}")
    if layer.sym and not (zeros == 2 ** (layer.bits - 1)).all():
        raise LayoutError(f"{name}: symmetric, yet zero points {np.unique(zeros)} are stored")
    which = np.arange(rows) // group
    if "g_idx" in parts and not np.array_equal(parts["g_idx"], which):
        raise LayoutError(f"{name}: g_idx is not the plain order of groups of {group}")
    weight = (codes - zeros[which]).astype(np.float32) * scales[which]
    return np.ascontiguousarray(weight.T)


def layer_from_config(name: str, config: dict) -> Layer:
    """What `config` (the quantization_config of a checkpoint) says about the layer called `name`."""
    method = config["quant_method"]
    flat = {key: config[key] for key in ("bits", "group_size", "sym") if key in config}
    if method == "auto-round":
        layout = PACKINGS.get(config.get("packing_format", "auto_round:auto_gptq"))
        flat |= _named_or_matching(name, config.get("extra_config", {}))
    elif method == "gptq":
        layout = "gptq_v2" if config.get("checkpoint_format") == "gptq_v2" else "gptq"
        for pattern, change in config.get("dynamic", {}).items():
            if re.match(pattern.removeprefix("+:"), name):
                flat |= change
    elif method == "awq" and config.get("version", "gemm") == "gemm":
        layout = "awq"
        flat.setdefault("sym", not config["zero_point"])
        if any(part in name for part in config.get("modules_to_not_convert") or []):
            raise LayoutError(f"{name}: quantized in the file but named in modules_to_not_convert")
    else:
        layout = None
    if layout is None:
        raise LayoutError(f"{method} {config.get('packing_format')}: unknown layout")
    return Layer(bits=flat["bits"], group=flat["group_size"], sym=flat["sym"], layout=layout)


def _named_or_matching(name: str, extra: dict) -> dict:
    """The entry of `extra` under this very name, else the merge of every pattern that matches, in order."""
    if name in extra:
        return {key: value for key, value in extra[name].items() if value is not None}
    merged = {}
    for pattern, change in extra.items():
        if re.search(pattern, name):
            merged |= {key: value for key, value in change.items() if value is not None}
    return merged


def read_folder(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """(float32 weights by module name, config.json without its quantization_config) of a quantized folder."""
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    aside = folder / "quantization_config.json"
    if aside.exists() and json.loads(aside.read_text()) != quantization:
        raise LayoutError(f"{folder}: quantization_config.json differs from config.json")
    stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= read_safetensors(path)
    plain = {}
    for name, array in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            parts = {part: stored[f"{module}.{part}"] for part in ("qweight", "qzeros", "scales")}
            if f"{module}.g_idx" in stored:
                parts["g_idx"] = stored[f"{module}.g_idx"]
            layer = layer_from_config(module, quantization)
            plain[f"{module}.weight"] = dequantize_layer(module, parts, layer)
        elif kind not in ("qzeros", "scales", "g_idx"):
            plain[name] = array.astype(np.float32)
    return plain, config


def dequantize_folder(folder: Path, out: Path) -> None:
    """Write the float32 twin of `folder` to `out`, loadable by stock transformers."""
    plain, config = read_folder(folder)
    out.mkdir(parents=True, exist_ok=True)
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1))
    write_safetensors(out / "model.safetensors", plain)


if __name__ == "__main__":
    dequantize_folder(Path(sys.argv[1]), Path(sys.argv[2]))
