"""The tables of decode.md, from the rows that decode.py wrote."""

from decode import BLOCKS, SHAPES

HEAD = """# Speed of quantized layers on the CPU

Written by `decode.py --report` from `results/decode.jsonl`; the command that measures is at the top of that file.
Milliseconds of one call, in brackets the speed relative to torch's bfloat16 product in the same cell; "memory" is the
bytes of the weight per second relative to a copy's. Inputs are bfloat16 but for "torch float32", "ark float32" and
llama.cpp. Less is better; a busy machine was shared by all kernels of a cell alike, and cells are not compared with
one another. One section per processor.
"""


def entry(row):
    """One cell of a table."""
    return f"{row['ms']:.2f} ({row['speedup']:.2f}x, memory {row['bandwidth']:.0%})"


def table(title, found):
    """Kernels down, layers across. found: {column: rows}."""
    keys = list(dict.fromkeys((row["kernel"], row["setting"]) for rows in found.values() for row in rows))
    lines = [
        f"### {title}",
        "",
        "| kernel | setting | " + " | ".join(found) + " |",
        "|---" * (2 + len(found)) + "|",
    ]
    for key in keys:
        rows = [
            next((r for r in rows if (r["kernel"], r["setting"]) == key), None) for rows in found.values()
        ]
        lines.append(
            f"| {key[0]} | {key[1]} | " + " | ".join("" if r is None else entry(r) for r in rows) + " |"
        )
    return [*lines, ""]


def tokens(cells, threads, batch):
    """Tokens per second of all quantized layers of a model, where every layer of it was measured."""
    lines = []
    for model, shapes in SHAPES.items():
        picked = [cells.get((model, name, batch, threads)) for name in shapes]
        if None in picked:
            continue
        times = {}
        for name, rows in zip(shapes, picked):
            for row in rows:
                count = 2 if name == "gate" else 1  # 70B's gate stands for its up too
                times.setdefault((row["kernel"], row["setting"]), []).append(count * row["ms"])
        for (kernel, setting), ms in times.items():
            if len(ms) == len(shapes):
                speed = batch * 1e3 / (BLOCKS[model] * sum(ms))
                lines.append(f"| {model} | {kernel} | {setting} | {speed:.1f} |")
    if not lines:
        return []
    head = [f"### Tokens per second, layers of whole models, batch {batch}, {threads} threads", "",
            "| model | kernel | setting | tokens/s |", "|---|---|---|---|"]  # fmt: skip
    return [*head, *lines, ""]


def goals(cells):
    """Of each goal, the worst cell."""
    lines = ["### Goals", "", "| goal | cells | worst | holds |", "|---|---|---|---|"]
    wanted = (
        ("W4 decode at least 2.5 x torch bfloat16", 1, ("torch bfloat16", "plain"), ("cpu", "W4G128"), 2.5),
        ("W4 decode at least 1.0 x ark", 1, ("ark", "W4G128"), ("cpu", "W4G128"), 1.0),
        ("W4 decode at least 1.0 x ark in float32", 1, ("ark float32", "W4G128"), ("cpu", "W4G128"), 1.0),
        ("W4 decode at least 0.8 x llama.cpp q4_0", 1, ("llama.cpp", "q4_0"), ("cpu", "W4G128"), 0.8),
        ("W4 decode, 8-bit inputs, against q4_0", 1, ("llama.cpp", "q4_0"), ("cpu:int8", "W4G128"), 0.8),
        ("W2 decode faster than W4", 1, ("cpu", "W4G128"), ("cpu", "W2G64"), 1.0),
        ("prefill 512 at least 0.8 x torch bfloat16", 512, ("torch bfloat16", "plain"), ("cpu", "W4G128"), 0.8),
        ("prefill 512 against torch float32", 512, ("torch float32", "plain"), ("cpu", "W4G128"), 0.8),
    )  # fmt: skip
    for text, batch, base, ours, least in wanted:
        ratios = {}
        for cell, rows in cells.items():
            times = {(row["kernel"], row["setting"]): row["ms"] for row in rows}
            if cell[2] == batch and base in times and ours in times:
                ratios[cell] = times[base] / times[ours]
        if ratios:
            worst = min(ratios, key=ratios.get)
            where = f"{worst[0]} {worst[1]}, {worst[3]} threads"
            held = sum(ratio >= least for ratio in ratios.values())
            lines.append(
                f"| {text} | {len(ratios)} | {ratios[worst]:.2f} ({where}) | {held} of {len(ratios)} |"
            )
    return [*lines, ""]


def whole(cells):
    """Whole models, prompt and answer."""
    rows = [row for cell, found in cells.items() if cell[1] == "whole" for row in found]
    if not rows:
        return []
    lines = ["### A whole model of random weights, shaped like Llama 3.2 1B", "",
             "The head stays bfloat16, as it does by default: a fifth of the parameters, half of the bytes per token.",
             "llama.cpp's is quantized, as its types have it.",
             "Tokens per second after a prompt of 8 tokens, and milliseconds for a prompt of 512; batch 1. Rows called",
             "\"one by one\" were measured before layers with the same input shared a call (decision 0083); those of",
             "AVX-512 VNNI without AMX before prompts took half the time (decision 0103).", "",
             "| threads | kernel | setting | tokens/s | ms for 512 tokens |", "|---|---|---|---|---|"]  # fmt: skip
    lines += [
        f"| {r['threads']} | {r['kernel']} | {r['setting']} | {r['tokens_s']:.1f} | {r['prompt_ms']:.0f} |"
        for r in rows
    ]
    return [*lines, ""]


def section(chip, cells):
    """What was measured on one processor. cells: {(model, layer, batch, threads): rows}."""
    layers = {cell: rows for cell, rows in cells.items() if cell[1] != "whole"}
    lines = [f"## {chip}", "", *(goals(layers) if layers else []), *whole(cells)]
    groups = sorted({(threads, batch) for _, _, batch, threads in layers})
    for threads, batch in groups:
        lines += tokens(layers, threads, batch)
    for threads, batch in groups:
        found = {f"{m} {n}": rows for (m, n, b, t), rows in layers.items() if (t, b) == (threads, batch)}
        lines += table(f"Batch {batch}, {threads} {'thread' if threads == 1 else 'threads'}", found)
    return lines


def report(cells):
    """The page. cells: {(processor, model, layer, batch, threads): rows}."""
    lines = [HEAD]
    for chip in reversed(list(dict.fromkeys(cell[0] for cell in cells))):  # the newest first
        lines += section(chip, {cell[1:]: rows for cell, rows in cells.items() if cell[0] == chip})
    return "\n".join(lines)
