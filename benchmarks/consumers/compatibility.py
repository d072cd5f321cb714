"""Export every scheme in every newer format, load each folder with its readers, write docs/compatibility.md.

    python compatibility.py --venvs VENVS --dataset FILE.jsonl [--steps export,read,report] [--cells name,...]
                            [--models novelist,qwen3] [--readers name,...] [--work FOLDER]

The models are the demo model and a random tied Qwen3, in float32, so that the dequantized reference is exact. The
reference is a second folder of the same codes, run in float32 by stock transformers: format `fake`, or `auto_round`
with this package where inputs are quantized too. Nothing is done twice; run it with a python that has this package.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from report import divergence

from auto_round import AutoRound
from auto_round.core.errors import AutoRoundError
from auto_round.jobs.verify import verify

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FLOAT32_LIMIT, KERNEL_LIMIT = 1e-6, 1e-4
NOTHING = "not run here"
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Its kernels for 4-bit weights round inputs to 8 bits unless told not to.
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
MIXED = "{mlp:{bits:8,group_size:64},k_proj:{bits:16}}"


@dataclass(frozen=True)
class Cell:
    """One export. inputs: whether the scheme quantizes inputs too. options: further keywords of `AutoRound`."""

    format: str
    scheme: str
    options: tuple[tuple[str, object], ...] = ()
    inputs: bool = False

    @property
    def name(self) -> str:
        """Name of its folder."""
        words = "-".join(key for key, _ in self.options)
        return f"{self.format}-{self.scheme}-{words}".replace(":", "-").rstrip("-")

    @property
    def narrow(self) -> bool:
        """Whether compressed-tensors makes bfloat16 of its weights, whatever the model's type."""
        return self.scheme.startswith(("MX", "NV"))


ACTS = ("INT8", "FP8_STATIC", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "MXFP6", "MXFP8", "NVFP4", "MXINT4")
ASYM, G64, MIX = (("sym", False),), (("group_size", 64),), (("layer_config", MIXED),)
EMBEDDING = (("layer_config", "{model.embed_tokens:{bits:4,group_size:64}}"),)


def _cells() -> list[Cell]:
    cells = [Cell("mlx", s) for s in ("W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16")]
    cells += [Cell("mlx", "W4A16", o) for o in (ASYM, G64, MIX)]
    cells += [Cell("mlx", "W8A16", EMBEDDING), Cell("auto_round:mlx", "W4A16")]
    cells += [Cell("llm_compressor", s) for s in ("W2A16", "W3A16", "W4A16", "W8A16", "FPW8A16")]
    cells += [Cell("llm_compressor", "W4A16", o) for o in (ASYM, G64, MIX)]
    cells += [Cell("llm_compressor", s, inputs=True) for s in ACTS if s != "MXINT4"]
    cells += [Cell("fp8", "FP8_BLOCK", inputs=True), Cell("auto_round", "FPW8A16")]
    cells += [Cell("auto_round", s, inputs=True) for s in ACTS if s not in ("MXFP6", "FP8_DYNAMIC")]
    return [*cells, Cell("fake", "W4A16"), Cell("fake", "NVFP4")]


CELLS = _cells()
NOTES = (HERE / "notes.md").read_text().splitlines()


@dataclass(frozen=True)
class Reader:
    """Who loads a folder: its environment ("" is this python), the function of logits.py, the formats it is given."""

    name: str
    venv: str
    how: str
    formats: tuple[str, ...]
    title: str
    options: tuple[tuple[str, object], ...] = ()

    def job(self, cell: Cell) -> dict[str, object]:
        """What logits.py is told besides the folder."""
        sixteen = self.how == "vllm" or (self.how == "stock" and cell.narrow)
        job = {"override": False, "dtype": "bfloat16" if sixteen else "float32", **dict(self.options)}
        if self.how == "vllm" and cell.narrow:  # its emulation of FP8 cannot hold a static input scale
            job["vllm"] = {"kernel_config": {"linear_backend": "emulation"}}
        if self.name == "compressed-tensors" and cell.options == ASYM:
            job["dequantize"] = True
        return job


READERS = [
    Reader("ours", "", "auto_round", ("auto_round", "auto_round:mlx"), "transformers with this package"),
    Reader("compressed-tensors", "c_ct", "stock", ("llm_compressor",), "transformers, compressed-tensors"),
    Reader("transformers", "c_ct", "stock", ("fp8", "fake"), "transformers alone"),
    Reader("mlx-lm", "c_mlx", "mlx", ("mlx", "auto_round:mlx"), "mlx-lm"),
    Reader("vllm", "c_vllm", "vllm", ("llm_compressor", "auto_round"), "vLLM"),
    Reader("peer", "peer", "auto_round", ("auto_round",), "transformers with auto-round 0.16.1"),
]


def run(command: list[str], log: Path) -> int:
    """Run quietly, output to `log`."""
    environment = os.environ | SETTINGS
    if command[0] != sys.executable:
        environment.pop("PYTHONPATH", None)
    with open(log, "a") as file:
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode


def prepare(work: Path) -> None:
    """The models in float32, and the tokens."""
    import torch
    from make_model import make
    from transformers import AutoModelForCausalLM

    demo = ROOT / "examples/novelist-8m"
    if not (work / "models/random").exists():
        make(demo, work / "models/random", planted=False)
    for name, source in {"novelist": demo, "qwen3": work / "models/random"}.items():
        out = work / "models" / name
        if not out.exists():
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(out)
            for file in source.glob("token*"):
                shutil.copy(file, out)
    if not (work / "tokens.npy").exists():
        tokens = torch.randint(4, 4096, (4, 128), generator=torch.Generator().manual_seed(0))
        np.save(work / "tokens.npy", tokens.numpy())


def export(work: Path, model: str, cell: Cell, dataset: Path) -> None:
    """The folder and its reference, from one run; what was said when it failed."""
    home = work / "out" / model / cell.name
    if home.with_suffix(".json").exists():
        return
    formats = ",".join(dict.fromkeys((cell.format, *(["auto_round"] if cell.inputs else []), "fake")))
    record: dict[str, object] = {"code": 0}
    settings = {
        "scheme": cell.scheme,
        "dataset": str(dataset),
        "nsamples": 8,
        "seqlen": 128,
        "disable_opt_rtn": True,
        **dict(cell.options),
    }
    try:
        AutoRound(str(work / "models" / model), iters=0, **settings).quantize_and_save(home, format=formats)
        record["findings"] = [str(finding) for finding in verify(folder_of(work, model, cell))]
    except AutoRoundError as error:
        record |= {"code": 1, "words": str(error)[:300]}
    home.with_suffix(".json").write_text(json.dumps(record))
    print(f"export {model} {cell.name}: {record['code']}", flush=True)


def folder_of(work: Path, model: str, cell: Cell, fmt: str = "") -> Path:
    """The folder of one format of an export; that of the reference with `fmt`."""
    home = work / "out" / model / cell.name
    sub = home / (fmt or cell.format).replace(":", "-").replace("_", "-")
    return sub if sub.exists() else home


def read(work: Path, venvs: Path, reader: Reader, jobs: list[dict[str, object]]) -> None:
    """Load every folder of `jobs`; a process that dies is noted against the job it died in."""
    python = sys.executable if not reader.venv else str(venvs / reader.venv / "bin/python")
    jobs = [job for job in jobs if not Path(f"{job['out']}.json").exists()]
    while jobs and Path(python).exists():
        # A rule of another package is for one process; vLLM is for one model.
        ruled = [job for job in jobs if bool(job.get("rule")) == bool(jobs[0].get("rule"))]
        batch = jobs[:1] if reader.how == "vllm" else ruled
        plan = work / f"jobs-{reader.name}.json"
        plan.write_text(json.dumps({"tokens": str(work / "tokens.npy"), "jobs": batch}))
        code = run([python, str(HERE / "logits.py"), reader.how, str(plan)], plan.with_suffix(".log"))
        missing = [job for job in batch if not Path(f"{job['out']}.json").exists()]
        if missing:
            record = {"status": "died", "words": f"the process ended with code {code}"}
            Path(f"{missing[0]['out']}.json").write_text(json.dumps(record))
        jobs = [job for job in jobs if not Path(f"{job['out']}.json").exists()]
        print(f"read with {reader.name}: {len(jobs)} left", flush=True)


def jobs_of(work: Path, models: list[str], cells: list[Cell], reader: Reader | None) -> list[dict]:
    """What a reader, or the reference for None, has to load."""
    jobs = []
    for model in models:
        for cell in cells:
            record = work / "out" / model / f"{cell.name}.json"
            done = record.exists() and json.loads(record.read_text())["code"] == 0
            if not done or (reader is not None and cell.format not in reader.formats):
                continue
            out = work / "logits" / (reader.name if reader else "reference") / model / cell.name
            out.parent.mkdir(parents=True, exist_ok=True)
            job = reader.job(cell) if reader else {"override": False}
            twin = "" if reader else ("auto_round" if cell.inputs else "fake")
            jobs.append({**job, "folder": str(folder_of(work, model, cell, twin)), "out": str(out)})
            if cell.inputs and (reader is None or reader.name == "compressed-tensors"):
                alone = (
                    folder_of(work, model, cell, "fake")
                    if reader is None
                    else weights_alone(work, model, cell)
                )
                jobs.append({**job, "folder": str(alone), "out": f"{out}-weights"})
            if cell.inputs and reader is None:
                both = {**jobs[-2], "dtype": "bfloat16" if cell.narrow else "float32", "rule": True}
                jobs.append({**jobs[-2], "dtype": "bfloat16", "out": f"{out}-16"})
                jobs.append({**both, "out": f"{out}-rule"})
    return jobs


def weights_alone(work: Path, model: str, cell: Cell) -> Path:
    """The same weight files under settings that leave inputs alone: the bytes without the reader's own rounding."""
    folder = folder_of(work, model, cell)
    out = folder.with_name(f"{folder.name}-weights")
    if not out.exists():
        shutil.copytree(folder, out, copy_function=os.link)
        config = json.loads((folder / "config.json").read_text())
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None
        (out / "config.json").unlink()
        (out / "config.json").write_text(json.dumps(config))
    return out


def outcome(work: Path, venvs: Path, reader: Reader, model: str, cell: Cell) -> str:
    """One entry of the table."""
    if cell.format not in reader.formats:
        return ""
    name = f"{model}/{cell.name}"
    alone = compared(work, reader, f"{name}-weights")
    if reader.venv and not (venvs / reader.venv).exists():
        return "not run here"
    if reader.name == "transformers" and cell.format == "fp8":  # makes plain weights of them on a CPU
        return "weights " + compared(work, reader, name, f"{name}-weights")
    whole = compared(work, reader, name)
    if not cell.inputs or whole.partition(" ")[0] in ("not", "refused:", "died:"):
        return whole
    if " bfloat16" in whole:
        own = compared(work, Reader("reference", "", "", (), ""), f"{name}-16", name).partition(" ")[0]
        whole = f"{whole} next to {own} of ours"
    if reader.name == "compressed-tensors":
        return f"weights {alone}; inputs as servers {whole}, by its rule {compared(work, reader, name, f'{name}-rule')}"
    return whole


def compared(work: Path, reader: Reader, name: str, against: str = "") -> str:
    """What the reader made of one folder, next to its reference or another one."""
    base, reference = (
        work / "logits" / reader.name / name,
        work / "logits/reference" / f"{against or name}.npy",
    )
    if not Path(f"{base}.json").exists() or not reference.exists():
        return NOTHING
    record = json.loads(Path(f"{base}.json").read_text())
    if record["status"] != "loaded":
        return f"{record['status']}: {record['words'][:160]}".replace("|", "/")
    kl = divergence(np.load(reference), np.load(f"{base}.npy"))
    limit = FLOAT32_LIMIT if record["dtype"] == "float32" else KERNEL_LIMIT
    return f"{kl:.0e} {record['dtype']}" + ("" if kl <= limit else " (*)")


def write_report(work: Path, venvs: Path, models: list[str], cells: list[Cell], path: Path) -> None:
    """docs/compatibility.md."""
    lines = [
        "# Who reads what this package writes",
        "",
        f"Written by `benchmarks/consumers/compatibility.py` on {date.today()}. Every folder was exported from a",
        "float32 model, checked with `auto-round verify`, and loaded by its readers. A number is the divergence",
        "(nats per token) of the reader's distributions from those of our dequantized weights in float32, and the type",
        f"the reader computed in; at most {FLOAT32_LIMIT:g} in float32 and {KERNEL_LIMIT:g} in 16-bit kernels count as",
        "the same model, and (*) marks what is beyond. GPTQ and AWQ layouts are in",
        "[results.md](../benchmarks/consumers/results.md).",
        "",
        *NOTES,
    ]
    for model in models:
        lines += ["", f"## {model}", ""]
        lines += ["| format | scheme | verify | " + " | ".join(r.title for r in READERS) + " |"]
        lines += ["|---" * (3 + len(READERS)) + "|"]
        for cell in cells:
            record = work / "out" / model / f"{cell.name}.json"
            if not record.exists():
                continue
            said = json.loads(record.read_text())
            scheme = " ".join((cell.scheme, *(f"{key}={value}" for key, value in cell.options)))
            checked = (
                f"export failed: {said.get('words')}" if said["code"] else f"{len(said['findings'])} findings"
            )
            row = [
                cell.format,
                f"`{scheme}`",
                checked,
                *(outcome(work, venvs, r, model, cell) for r in READERS),
            ]
            lines.append(f"| {' | '.join(row)} |")
    path.write_text("\n".join(lines) + "\n")
    print(path)


def main() -> None:
    """Do the steps asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--venvs", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, default=ROOT / "examples/novelist-8m/calibration.jsonl")
    parser.add_argument("--work", type=Path, default=Path("/tmp/compatibility"))
    parser.add_argument("--steps", default="export,read,report")
    parser.add_argument("--models", default="novelist,qwen3")
    parser.add_argument("--cells", default="")
    parser.add_argument("--readers", default="")
    given = parser.parse_args()
    models, work = given.models.split(","), given.work
    cells = [cell for cell in CELLS if not given.cells or cell.name in given.cells.split(",")]
    readers = [r for r in READERS if not given.readers or r.name in given.readers.split(",")]
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    if "export" in given.steps:
        for model in models:
            for cell in cells:
                export(work, model, cell, given.dataset.resolve())
    if "read" in given.steps:
        own = Reader("reference", "", "auto_round", (), "")
        read(work, given.venvs, own, jobs_of(work, models, cells, None))
        for reader in readers:
            read(work, given.venvs, reader, jobs_of(work, models, cells, reader))
    if "report" in given.steps:
        write_report(work, given.venvs, models, cells, ROOT / "docs/compatibility.md")


if __name__ == "__main__":
    main()
