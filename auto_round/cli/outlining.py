"""`auto-round plan MODEL` and `--dry-run`: what a job would do, as text."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from auto_round.jobs.outline import Outline, reasons, schemes


def show_outline(outline: Outline, console: Console) -> None:
    """Print layers with reasons, output bytes by format, planned memory and time."""
    count = len(outline.plan)
    console.print(
        f"{count} layers in {outline.blocks} blocks; the original has {outline.source_bytes:,} bytes of weights"
    )
    for names, plan in outline.plans.items():
        if len(outline.plans) > 1:
            console.print(f"{names}:", markup=False)
        for scheme, layers in schemes(plan).items():
            console.print(f"  {layers} as {scheme}", markup=False)
        for reason, layers in reasons(plan).items():
            console.print(f"  {layers} because of {reason}", markup=False)
        for note in plan.notes:
            console.print(f"  note: {note}", markup=False)
    table = Table("format", "bytes of weight files", "of original", title="output")
    for name, size in outline.sizes.items():
        exact = f"{size:,}" if isinstance(size, int) else size  # the reason why not, in its place
        share = f"{size / outline.source_bytes:.1%}" if isinstance(size, int) else "-"
        table.add_row(name, exact, share)
    console.print(table)
    placed = outline.placement
    if placed.workers is not None:
        console.print(
            f"weights are all that is looked at: {placed.workers} layers at once, straight from the shards"
        )
    else:
        console.print(
            f"blocks run on {placed.device}, {placed.micro_batch} samples at once; "
            f"hidden states in {placed.activations}"
        )
    for reason in placed.why:
        console.print(f"  {reason}", markup=False)
    if placed.ram is not None:
        console.print(
            f"planned peak of main memory {placed.ram:,} bytes, of device memory {placed.vram or 0:,}"
        )
    if outline.seconds is not None:
        console.print(f"estimated time {outline.seconds:,.0f} s, from a rehearsal")
