"""The pictures of how-it-works.md, drawn anew.

    pip install -e .[docs] && python docs/pictures.py

`tuner` and `journal` are diagrams. `planner` is measured: the tensors alive while a random block is tuned, operation by
operation, with what the planner foretold from its rehearsal.
"""

import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import transformers
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from auto_round import AutoRound, api
from auto_round.jobs import planner
from auto_round.models.memory import Tally

OUT = Path(__file__).parent / "pictures"
INK, FLOAT, QUANTIZED, PAPER, DONE = "#333333", "#3b6ea5", "#c4622d", "#f4f1ea", "#5a8f5a"


def canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    """A figure of that many tenths of an inch, without axes."""
    figure, axes = plt.subplots(figsize=(width / 10, height / 10), dpi=110)
    axes.set_xlim(-1, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes,
    place: tuple[float, float],
    size: tuple[float, float],
    text: str,
    color: str = INK,
    fill: str = PAPER,
) -> None:
    """A rounded box around `text`, its lower left corner at `place`."""
    axes.add_patch(
        FancyBboxPatch(place, *size, boxstyle="round,pad=0.3,rounding_size=1", fc=fill, ec=color, lw=1.3)
    )
    middle = (place[0] + size[0] / 2, place[1] + size[1] / 2)
    axes.text(*middle, text, ha="center", va="center", fontsize=8, color=color, linespacing=1.35)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str = INK,
    bend: float = 0.0,
    dash: str = "-",
) -> None:
    """An arrow, bent sideways by `bend` of its length."""
    style = f"arc3,rad={bend}"
    shape = FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=11,
        color=color,
        lw=1.4,
        connectionstyle=style,
        linestyle=dash,
    )
    axes.add_patch(shape)


def save(figure: plt.Figure, name: str) -> None:
    """Write the picture."""
    figure.savefig(OUT / f"{name}.png", bbox_inches="tight", pad_inches=0.08)
    plt.close(figure)


def tuner() -> None:
    """The two chains through a block, and what is compared."""
    figure, axes = canvas(72, 34)
    axes.text(0, 31.5, "float chain: what the original model computes", color=FLOAT, fontsize=8)
    axes.text(
        0,
        0.5,
        "quantized chain: what arrives once the blocks before are quantized",
        color=QUANTIZED,
        fontsize=8,
    )
    for x, name in ((0, "hidden\nstates"), (58, "hidden\nstates")):
        box(axes, (x, 22), (9, 6), name, FLOAT)
        box(axes, (x, 5), (9, 6), name, QUANTIZED)
    box(axes, (17, 22), (17, 6), "block,\noriginal weights", FLOAT)
    box(axes, (17, 5), (17, 6), "block, fake weights\nquantize, dequantize", QUANTIZED)
    box(axes, (43.4, 13.2), (12, 6), "loss: mean\nsquared error")
    box(axes, (17, 13.7), (17, 5), "knobs: one per weight,\ntwo per group", INK, "#ffffff")
    arrow(axes, (9.6, 25), (16.4, 25), FLOAT)
    arrow(axes, (34.6, 25), (57.4, 25), FLOAT)
    arrow(axes, (9.6, 8), (16.4, 8), QUANTIZED)
    arrow(axes, (34.6, 8), (57.4, 8), QUANTIZED)
    arrow(axes, (49.4, 24.6), (49.4, 19.8), FLOAT)
    axes.text(50.2, 21.7, "target", color=FLOAT, fontsize=7)
    arrow(axes, (49.4, 8.4), (49.4, 12.6), QUANTIZED)
    axes.text(50.2, 10, "output", color=QUANTIZED, fontsize=7)
    arrow(axes, (42.8, 16.2), (34.7, 16.2))
    axes.text(38.8, 17, "sign of the\ngradient", fontsize=7, color=INK, ha="center")
    arrow(axes, (25.5, 13.2), (25.5, 11.7))
    axes.text(63, 16.2, "next\nblock", fontsize=8, color=INK, ha="center", va="center")
    save(figure, "tuner")


def journal() -> None:
    """A block on its way to the journal, and what a killed run finds there."""
    figure, axes = canvas(72, 33)
    steps = [
        "tune\nthe block",
        "write its codes\nto unfinished/",
        "sync to\ndisk",
        "rename to\nmodel.layers.2/",
        "next\nblock",
    ]
    for i, text in enumerate(steps):
        box(axes, (i * 14.8, 22), (11.4, 6), text, DONE if i > 2 else INK)
        if i:
            arrow(axes, (i * 14.8 - 2.8, 25), (i * 14.8 - 0.5, 25))
    axes.plot([0, 42.6], [20, 20], color=QUANTIZED, lw=1.5)
    axes.text(21, 17.6, "killed here: this block is tuned again", color=QUANTIZED, fontsize=8, ha="center")
    axes.plot([44.8, 70.8], [20, 20], color=DONE, lw=1.5)
    axes.text(57.8, 17.6, "killed here: the block is kept", color=DONE, fontsize=8, ha="center")
    axes.text(0, 13, "--resume", fontsize=9, color=INK, family="monospace")
    found = [
        "manifest:\nthe same job?",
        "blocks 0 to 2:\ncodes from the\njournal",
        "run them, float\nand quantized:\nboth chains",
        "block 3:\ntuned",
        "the same\nbytes",
    ]
    for i, text in enumerate(found):
        box(axes, (i * 14.8, 3), (11.4, 7), text, DONE if i == 1 else INK)
        if i:
            arrow(axes, (i * 14.8 - 2.8, 6.5), (i * 14.8 - 0.5, 6.5))
    save(figure, "journal")


class Curve(Tally):
    """A tally that keeps its value after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """As a tally does it."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.values.append(self.now["cpu"])
        return out


def measured(folder: Path) -> tuple[list[int], int, list[tuple[int, str]]]:
    """(bytes alive after each operation, bytes planned, where blocks begin) of a job on a random model."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    tokens = list(torch.randint(512, (16, 64), generator=torch.Generator().manual_seed(1)))
    job = AutoRound(
        folder / "model", dataset=tokens, nsamples=16, seqlen=64, batch_size=4, iters=8, max_ram="64GB",
        report=str(folder / "report.json"),
    )  # fmt: skip
    curve, begins, run = Curve(), [], api.quantize

    def watched(source, *rest):
        blocks = source.blocks

        def marking(*args):
            for block in blocks(*args):
                begins.append((len(curve.values), block.name))
                yield block

        source.blocks = marking
        with curve:
            run(source, *rest)

    api.quantize = watched
    bases, base_memory = [], planner.base_memory
    from auto_round.jobs import placing

    placing.base_memory = lambda: bases.append(base_memory()) or bases[-1]
    job.quantize_and_save(folder / "out")
    return curve.values, job.placement.ram - bases[-1], begins


def memory() -> None:
    """Tensors alive while three blocks are tuned, and the plan."""
    with tempfile.TemporaryDirectory() as folder:
        values, planned, begins = measured(Path(folder))
    figure, axes = plt.subplots(figsize=(7.2, 2.9), dpi=110)
    axes.fill_between(range(len(values)), [v / 1e6 for v in values], color=FLOAT, alpha=0.35, lw=0)
    axes.plot([v / 1e6 for v in values], color=FLOAT, lw=0.5)
    axes.axhline(planned / 1e6, color=QUANTIZED, lw=1.3)
    axes.text(
        len(values),
        planned / 1e6 * 1.02,
        "planned peak",
        color=QUANTIZED,
        fontsize=8,
        ha="right",
        va="bottom",
    )
    for number, (at, _) in enumerate(begins):
        axes.axvline(at, color=INK, lw=0.8, ls=":")
        axes.text(at, planned / 1e6 * 1.02, f" block {number}", fontsize=8, color=INK, va="bottom")
    axes.set_ylim(0, planned / 1e6 * 1.2)
    axes.set_xlim(0, len(values))
    axes.set_xlabel("operations", fontsize=8)
    axes.set_ylabel("MB of tensors alive", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, "planner")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    tuner()
    journal()
    memory()
