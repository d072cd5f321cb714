"""Rotated checkpoints of this package and of auto-round 0.16, each read by both: KL between the readers.

    python benchmarks/consumers/rotated.py --ours OUR/python --peer UPSTREAM/python --folder /tmp/rotated

Both write `examples/novelist-8m` at MXFP4 with plain rounding and every kind of rotation; then both load all of it in
float32 and say the logits of 128 held-out tokens. Prints a row per checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

MODEL = Path(__file__).resolve().parents[2] / "examples" / "novelist-8m"
PLACES = {
    "quarot": {},
    "fused": {"online_r1_rotation": False},
    "r4": {"r3": True, "r4": True},
    "random": {"r4": True, "random_r1": True, "random_r2": True, "random_r4": True},
}
BLOCKS = {"blocks": "hadamard", "random blocks": "random_hadamard"}


def write(folder: Path, name: str) -> None:
    """A checkpoint with the rotation `name` below `folder`, by whichever auto_round is installed here."""
    from auto_round.algorithms.transforms.spinquant import SpinQuantConfig

    from auto_round import AutoRound

    wishes = {name: SpinQuantConfig(r1=True, r2=True, **more) for name, more in PLACES.items()}
    wishes |= {name: {"hadamard_type": kind} for name, kind in BLOCKS.items()}
    plain = {"iters": 0, "disable_opt_rtn": True, "disable_model_free": True}
    data = {"dataset": str(MODEL / "calibration.jsonl"), "nsamples": 8, "seqlen": 128}
    job = AutoRound(str(MODEL), scheme="MXFP4", rotation_config=wishes[name], **plain, **data)
    job.quantize_and_save(str(folder / name), format="auto_round")


def read(folder: Path) -> None:
    """The logits of every checkpoint below `folder`, into `logits.pt` there; a text where it cannot be read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = json.loads((MODEL / "heldout.jsonl").read_text().splitlines()[0])["text"]
    ids = torch.tensor([AutoTokenizer.from_pretrained(MODEL)(text)["input_ids"][:128]])
    found = {}
    for config in [MODEL / "config.json", *sorted(folder.rglob("config.json"))]:
        name = str(config.parent.relative_to(folder)) if config.is_relative_to(folder) else "original"
        try:
            model = AutoModelForCausalLM.from_pretrained(config.parent, dtype=torch.float32).eval()
            with torch.no_grad():
                found["/".join(name.split("/")[:2])] = model(ids).logits[0].log_softmax(-1)
        except Exception as error:  # whatever a reader says
            found["/".join(name.split("/")[:2])] = f"{type(error).__name__}: {error}"[:80].replace("\n", " ")
    torch.save(found, folder / "logits.pt")


def divergence(one: object, other: object) -> str:
    """KL of two readers' predictions, or what one of them said."""
    for said in (one, other):
        if isinstance(said, str):
            return said
    return f"{float((one.exp() * (one - other)).sum(-1).mean()):.5f}"


def main() -> None:
    """Drive both sides, or be one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ours")
    parser.add_argument("--peer")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--act", choices=["write", "read"])
    parser.add_argument("--kind")
    given = parser.parse_args()
    if given.act == "write":
        write(given.folder, given.kind)
    if given.act == "read":
        read(given.folder)
    if given.act:
        return
    sides = {"ours": given.ours, "peer": given.peer}

    def run(side: str, act: str, folder: Path, *more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            sides[side],
            str(Path(__file__).resolve()),
            "--folder",
            str(folder.resolve()),
            "--act",
            act,
            *more,
        ]
        # In an empty folder: a checkout's auto_round would hide the installed one.
        with tempfile.TemporaryDirectory() as empty:
            subprocess.run(command, check=True, cwd=empty, capture_output=True)

    for side in sides:
        for kind in (
            *PLACES,
            *BLOCKS,
        ):  # apart: a rotation of auto-round 0.16 leaks into later jobs of its process
            run(side, "write", given.folder / side, "--kind", kind)
    logits = {}
    for side in sides:
        run(side, "read", given.folder)
        import torch

        logits[side] = torch.load(given.folder / "logits.pt")
    print(
        "| written by | rotation | between readers | original to ours | original to upstream |\n|---|---|---|---|---|"
    )
    for name in [name for name in logits["ours"] if name != "original"]:
        mine, theirs = logits["ours"][name], logits["peer"][name]
        start = logits["ours"]["original"]
        columns = [divergence(mine, theirs), divergence(start, mine), divergence(start, theirs)]
        print(f"| {' | '.join([*name.split('/'), *columns])} |")


if __name__ == "__main__":
    main()
