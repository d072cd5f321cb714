"""Compare two checkpoint folders by their description: config, file names, tensor names, types and shapes.

python layouts.py FOLDER FOLDER     print every difference
"""

import json
import sys
from pathlib import Path

ABSENT = "absent"
PASSING = {
    "autoround_version",
    "transformers_version",
    "quantization_config",
}  # differ, or are compared by key


def header(folder: Path) -> tuple[dict[str, str], object]:
    """({tensor: "TYPE [shape]"}, metadata) over all safetensors files of a folder."""
    tensors, metadata = {}, None
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = entries.pop("__metadata__", metadata)
        tensors |= {name: f"{entry['dtype']} {entry['shape']}" for name, entry in entries.items()}
    return tensors, metadata


def _unequal(what: str, a: dict, b: dict) -> list[str]:
    keys = sorted((set(a) | set(b)) - PASSING)
    pairs = [(key, a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys]
    return [f"{what} {key}: `{short(x)}` against `{short(y)}`" for key, x, y in pairs if x != y]


def short(value: object) -> str:
    """`value` as text a line can hold."""
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def differences(one: Path, other: Path) -> list[str]:
    """What the two folders say differently, one line each."""
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    found = _unequal("config", *configs)
    found += _unequal("quantization", *(config.get("quantization_config", {}) for config in configs))
    (tensors, metadata), (other_tensors, other_metadata) = header(one), header(other)
    found += _unequal("tensor", tensors, other_tensors)
    found += _unequal("safetensors", {"metadata": metadata}, {"metadata": other_metadata})
    files = [{path.name: "present" for path in folder.iterdir() if path.is_file()} for folder in (one, other)]
    return found + _unequal("file", *files)


if __name__ == "__main__":
    print("\n".join(differences(Path(sys.argv[1]), Path(sys.argv[2]))))
