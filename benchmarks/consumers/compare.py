"""Export with two packages, read every folder with every consumer, compare the logits, write results.md.

    python compare.py --venvs VENVS --model FOLDER --dataset FILE.jsonl [--steps export,read,report]
                      [--sides ours,peer] [--readers ours,peer,...] [--cells name,...] [--models qwen3]

VENVS is the folder that make_venvs.sh filled. Everything is kept under --work and nothing is done twice: a
cell whose result is there is skipped, so a broken run continues where it stopped. The reference for every
folder is its float32 twin, made by dequantize.py and run by stock transformers. Needs numpy and tokenizers:
run it with the python of any of the environments.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dequantize import LayoutError, dequantize_folder
from grid import CALIBRATION, CELLS, READERS, Cell, Reader, wanted

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SIDES = ("ours", "peer")
SHAPE = (4, 128)  # sequences, tokens


@dataclass(frozen=True)
class Run:
    """Where things are, and what was asked for."""

    work: Path
    venvs: Path
    dataset: Path
    source: Path  # the first model, whose tokenizer serves both
    models: dict[str, Path]
    cells: list[Cell]
    sides: tuple[str, ...]
    readers: list[Reader]

    def export_home(self, side: str, model: str, cell: Cell) -> Path:
        """The --output_dir given to that export."""
        return self.work / "exports" / side / model / cell.name

    def exported(self, side: str, model: str, cell: Cell) -> Path | None:
        """The checkpoint folder of that export, or None when there is none."""
        found = sorted(self.export_home(side, model, cell).rglob("config.json"))
        return found[0].parent if len(found) == 1 else None

    def out(self, reader: str, side: str, model: str, cell: str) -> Path:
        """Path, less its suffix, of what a reader says about one folder."""
        return self.work / "logits" / reader / side / model / cell

    def python(self, venv: str) -> str:
        """The interpreter of one environment."""
        return str(self.venvs / venv / "bin" / "python")


SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    # One process, so that a refusal of vLLM comes back as an exception with its own words.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Its kernels for 4-bit weights round inputs to 8 bits unless told not to.
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def run_quietly(command: list[str], log: Path) -> int:
    """Run `command` on one thread and without network, its output appended to `log`; return its exit code."""
    environment = os.environ | SETTINGS
    environment.pop("PYTHONPATH", None)
    with open(log, "a") as file:
        # Elsewhere: from this repository `-m auto_round` would be ours, whoever's environment it is.
        return subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=log.parent
        ).returncode


def prepare(run: Run) -> None:
    """The made models, and the fixed tokens: the first 128 of each of the first four texts of the dataset."""
    from tokenizers import Tokenizer

    run.work.mkdir(parents=True, exist_ok=True)
    for name, path in run.models.items():
        if not path.exists():
            command = [run.python("ours"), str(HERE / "make_model.py"), str(run.source), str(path), name]
            subprocess.run(command, check=True)
    if not (run.work / "tokens.npy").exists():
        tokenizer = Tokenizer.from_file(str(run.source / "tokenizer.json"))
        with open(run.dataset) as lines:
            texts = [json.loads(next(lines))["text"] for _ in range(SHAPE[0])]
        np.save(run.work / "tokens.npy", [tokenizer.encode(text).ids[: SHAPE[1]] for text in texts])


def commit() -> str:
    """The commit of this repository, and whether files of the package have changed since."""
    git = ["git", "-C", str(REPOSITORY)]
    name = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "auto_round"]).returncode
    return f"{name} and uncommitted changes" if changed else name


def export(run: Run, side: str, model: str, cell: Cell) -> None:
    """Run one package's command line once; its output goes to the log, its last words to the record."""
    home = run.export_home(side, model, cell)
    record = home.with_suffix(".json")
    if record.exists():
        return
    home.mkdir(parents=True, exist_ok=True)
    command = [
        run.python(side),
        "-m",
        "auto_round",
        *cell.options,
        *CALIBRATION,
        "--model",
        str(run.models[model]),
    ]
    command += ["--dataset", str(run.dataset), "--output_dir", str(home)]
    start = time.perf_counter()
    log = home.with_suffix(".log")
    code = run_quietly(command, log)
    lines = log.read_text().strip().splitlines() or [""]
    result = {"code": code, "seconds": round(time.perf_counter() - start, 1), "options": list(cell.options)}
    if side == "ours":
        result["commit"] = commit()
    if code:
        result["words"] = lines[-1][-400:]
    elif side == "ours" and run.exported(side, model, cell) != home:
        result["words"] = f"one format, so OUT itself is expected, got {run.exported(side, model, cell)}"
    record.write_text(json.dumps(result, indent=1))
    print(f"export {side} {model} {cell.name}: {code} in {result['seconds']} s", flush=True)


def pending_jobs(run: Run, reader: Reader) -> list[dict]:
    """What `reader` has still to read."""
    jobs = []
    for side in run.sides:
        for model in run.models:
            for cell in run.cells:
                folder, out = run.exported(side, model, cell), run.out(reader.name, side, model, cell.name)
                if reader.takes(cell, model) and folder and not Path(f"{out}.json").exists():
                    out.parent.mkdir(parents=True, exist_ok=True)
                    jobs.append({"folder": str(folder), "out": str(out), "override": cell.needs_override})
    return jobs


def read(run: Run, venv: str, how: str, jobs: list[dict]) -> None:
    """Do `jobs` in one process; if it dies, note that against the job it died in and go on with a new one."""
    while jobs:
        # vLLM keeps its workers and memory for the life of the process.
        batch = jobs[:1] if how == "vllm" else jobs
        plan = run.work / f"jobs-{how}-{venv}.json"
        plan.write_text(json.dumps({"tokens": str(run.work / "tokens.npy"), "jobs": batch}))
        log = plan.with_suffix(".log")
        code = run_quietly([run.python(venv), str(HERE / "logits.py"), how, str(plan)], log)
        missing = [job for job in batch if not Path(job["out"] + ".json").exists()]
        if missing:
            record = {"status": "died", "words": f"process ended with code {code}, see {log.name}"}
            Path(missing[0]["out"] + ".json").write_text(json.dumps(record))
        jobs = [job for job in jobs if not Path(job["out"] + ".json").exists()]
        print(f"read with {how} in {venv}: {len(jobs)} left", flush=True)


def read_reference(run: Run) -> None:
    """Logits of the float32 twins of all folders, and of the unquantized models."""
    jobs = []
    for model, path in run.models.items():
        out = run.out("reference", "original", model, "float")
        out.parent.mkdir(parents=True, exist_ok=True)
        if not Path(f"{out}.json").exists():
            jobs.append({"folder": str(path), "out": str(out), "override": False})
    for job in pending_jobs(run, Reader("reference", "ours", "plain", tuple({c.group for c in CELLS}), "")):
        twin = Path(job["out"] + "-twin")
        try:
            dequantize_folder(Path(job["folder"]), twin)
            jobs.append(job | {"folder": str(twin)})
        except (LayoutError, KeyError) as error:
            refusal = {"status": "refused", "words": f"{type(error).__name__}: {error}"}
            Path(job["out"] + ".json").write_text(json.dumps(refusal))
    read(run, "ours", "plain", jobs)
    for job in jobs:
        if job["folder"].endswith("-twin"):
            shutil.rmtree(job["folder"])


def parse(arguments: list[str]) -> tuple[Run, list[str]]:
    """The command line, as a Run and the steps to do."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache/auto-round-consumers")
    parser.add_argument("--work", type=Path, default=Path("/tmp/consumers"))
    parser.add_argument("--model", type=Path, default=REPOSITORY / "examples/novelist-8m")
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--steps", default="export,read,report")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--readers", default=",".join(reader.name for reader in READERS))
    parser.add_argument("--cells", default="")
    parser.add_argument("--models", default="novelist,qwen3,planted")
    given = parser.parse_args(arguments)
    cells, models = given.cells.split(","), {"novelist": given.model.resolve()}
    models |= {name: given.work.resolve() / "models" / name for name in ("qwen3", "planted")}
    run = Run(
        work=given.work.resolve(),
        venvs=given.venvs.absolute(),  # links of a venv must stay links
        dataset=given.dataset.resolve(),
        source=given.model.resolve(),
        models={name: path for name, path in models.items() if name in given.models.split(",")},
        cells=[cell for cell in CELLS if given.cells == "" or cell.name in cells],
        sides=tuple(given.sides.split(",")),
        readers=[reader for reader in READERS if reader.name in given.readers.split(",")],
    )
    return run, given.steps.split(",")


def main() -> None:
    """Do the steps asked for."""
    run, steps = parse(sys.argv[1:])
    prepare(run)
    if "export" in steps:
        for side in run.sides:
            for model in run.models:
                for cell in run.cells:
                    if wanted(cell, model):
                        export(run, side, model, cell)
    if "read" in steps:
        read_reference(run)
        for reader in run.readers:
            read(run, reader.venv, reader.how, pending_jobs(run, reader))
    if "report" in steps:
        from report import write_report

        write_report(run, HERE / "results.md")


if __name__ == "__main__":
    main()
