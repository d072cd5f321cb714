"""Progress and the closing table in the terminal. The library itself prints nothing."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from auto_round.core.plan import Plan
from auto_round.core.settings import settings
from auto_round.jobs.compare import weight_bytes
from auto_round.jobs.quantize import BlockResult
from auto_round.models.memory import peak_memory


class Show(AbstractContextManager["Show"]):
    """An observer that draws a progress bar and prints one line per block."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.results: list[BlockResult] = []
        self.plan: Plan | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._started = time.perf_counter()

    def __enter__(self) -> Show:
        self._handler = RichHandler(console=self.console, show_path=False, show_time=False, markup=False)
        logger = logging.getLogger("auto_round")
        logger.addHandler(self._handler)
        logger.setLevel(settings().log_level)
        disable_progress_bar()  # transformers draws bars of its own, which would tear ours apart
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        # A second run in this process would print every line twice.
        logging.getLogger("auto_round").removeHandler(self._handler)

    def started(self, plan: Plan, blocks: int) -> None:
        """Say what is about to be done and why."""
        self.plan = plan
        counts = Counter(str(scheme) for scheme in plan.values())
        described = ", ".join(f"{count} as {name}" for name, count in counts.items())
        self.console.print(f"{len(plan)} layers in {blocks} blocks: {described}")
        reasons = Counter(reason for name, reason in plan.why.items() if name in plan)
        for reason, count in reasons.items():
            self.console.print(f"  {count} because of {reason}", markup=False)
        self._task = self._progress.add_task("quantizing", total=blocks)

    def finished(self, result: BlockResult) -> None:
        """One line: the losses before and after, what was kept, the time."""
        self.results.append(result)
        report = result.report
        parts = [f"{name} {loss:.3g}" for name, loss in report.losses.items()]
        if report.losses:  # only tuning takes steps
            parts.append(_steps(result))
        parts += [*_experts(result), f"kept {report.kept}", f"{result.seconds:.1f}s"]
        self.console.print(f"{result.name}: {'  '.join(parts)}", markup=False)
        self._progress.advance(self._task)

    def summary(self, source: Path | None, folders: Sequence[str]) -> Table:
        """The closing table: one row per checkpoint, and below it what they share."""
        kept = Counter(result.report.kept for result in self.results if result.layers)
        shared = [
            ", ".join(f"{name} {count}" for name, count in kept.items()),
            f"{time.perf_counter() - self._started:.0f} s",
            f"peak memory {peak_memory() / 1e9:.2f} GB",
        ]
        table = Table(title="done", caption=" · ".join(part for part in shared if part), show_lines=False)
        table.add_column("folder", overflow="fold")
        for column in ("layers", "weights", "of original"):
            table.add_column(column, justify="right")
        original = weight_bytes(source) if source is not None else 0  # a live model has no files
        for folder in folders:
            size = weight_bytes(Path(folder))
            table.add_row(
                folder,
                str(len(self.plan.quantized()) if self.plan else 0),
                f"{size / 1e6:.1f} MB",
                f"{size / original:.1%}" if original else "-",
            )
        return table


def _steps(result: BlockResult) -> str:
    """Steps taken; of how many and why not all, when there were fewer."""
    report = result.report
    if not report.saved:
        return f"{report.iterations} steps"
    return f"{report.iterations} of {report.iterations + report.saved} steps, {report.why}"


def _experts(result: BlockResult) -> list[str]:
    """How the calibration tokens are spread over the experts of a block, if it has any."""
    counts = sorted(result.tokens.values())
    if not counts:
        return []
    starved = len({name.rpartition(".")[0] for name in result.starved})
    return [f"tokens per expert {counts[0]} to {counts[-1]}, {starved} of {len(counts)} starved"]
