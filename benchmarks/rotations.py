"""Rotations in every decoder of transformers, tiny and random: how far a rotated model is from what it was.

    python benchmarks/rotations.py [--types llama,gpt2]

Each type is rotated in five ways, without quantizing: "r1" fused into weights, "r2", "r3", "online" (R1 and R4 turn
inputs), and "blocks" (every layer's inputs). A row of `results/rotations.jsonl` has the relative difference of the
logits in float32, or what was said. The tables of `auto_round/models/quirks.py` are those that come out right.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from architectures import _relative as relative
from architectures import build
from models import tokenizer, tokens
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from auto_round import AutoRound, SpinQuantConfig
from auto_round.formats.base import parse_formats
from auto_round.models import quirks

RESULTS = Path(__file__).parent / "results" / "rotations.jsonl"
WAYS = {
    "r1": SpinQuantConfig(r2=False, online_r1_rotation=False),
    "r2": SpinQuantConfig(r1=False, r2=True),
    "r3": SpinQuantConfig(r1=False, r2=False, r3=True),
    "online": SpinQuantConfig(r1=True, r2=False, r4=True),
    "blocks": "default",
}


class Every(frozenset):
    """A table that has every type, so that all are tried."""

    def __contains__(self, _name: object) -> bool:
        return True


def rotated(folder: str, way: Any) -> torch.nn.Module:
    """The float model in `folder` after rotation."""
    job = AutoRound(
        folder,
        rotation_config=way,
        scheme="W8A16",
        group_size=32,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
    )
    job.make_plan(parse_formats("auto_round"))
    return job.material.live_model().float()


def trial(name: str) -> dict[str, Any]:
    """One row."""
    row: dict[str, Any] = {"type": name, "model_type": name, **dict.fromkeys(WAYS)}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        try:
            model, ids = build(name).float().eval(), tokens(2, 16, seed=9)
            row["model_type"] = model.config.model_type
            model.save_pretrained(folder)
            tokenizer().save_pretrained(folder)
            before = model(input_ids=ids, use_cache=False).logits.float()
        except Exception as error:  # whatever a model of another project says
            return {**row, "error": f"{type(error).__name__}: {error}"[:200]}
        for key, way in WAYS.items():
            try:
                row[key] = relative(
                    rotated(folder, way)(input_ids=ids, use_cache=False).logits.float(), before
                )
            except Exception as error:
                row[key] = f"{type(error).__name__}: {error}".replace(folder, "FOLDER")[:200]
    return row


def main() -> None:
    """Run the types that have no row yet, and count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--types", help="comma separated; default: all")
    wanted = parser.parse_args().types
    warnings.simplefilter("ignore")
    quirks.PLAIN_STREAMS = quirks.PLAIN_VALUES = Every({"all"})
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    for name in wanted.split(",") if wanted else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if name not in {row["type"] for row in rows}:
            rows.append(trial(name))
            with RESULTS.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    for key in WAYS:
        numbers = [row[key] for row in rows if isinstance(row[key], float)]
        right = sum(number < 1e-4 for number in numbers)
        print(
            f"{key}: {right} right, {len(numbers) - right} wrong, {len(rows) - len(numbers)} refused or not built"
        )


if __name__ == "__main__":
    main()
