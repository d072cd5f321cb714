"""`auto-round eval MODEL`, `--eval` and `--tasks`: benchmarks of lm-eval, their table on standard output."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from rich.console import Console

from auto_round.cli.arguments import ALL_TASKS, Evaluating, Host, Machine
from auto_round.core.errors import DataError
from auto_round.evaluation import DEFAULT_TASKS, Evaluation, evaluate, parse_vllm_args


def settings_of(flags: Evaluating, host: Host | Machine, seed: int = 42) -> Evaluation:
    """The flags as settings. Raises PlanError for what cannot be carried out."""
    named = [part.strip() for part in (flags.tasks or ALL_TASKS).split(",") if part.strip()]
    wanted = [task for part in named for task in (DEFAULT_TASKS if part == ALL_TASKS else (part,))]
    settings = Evaluation(
        tasks=tuple(dict.fromkeys(wanted)),
        batch_size=int(flags.eval_bs) if flags.eval_bs and flags.eval_bs.isdigit() else flags.eval_bs,
        limit=flags.limit,
        num_fewshot=flags.num_fewshot,
        gen_kwargs=flags.eval_gen_kwargs,
        fewshot_as_multiturn=flags.fewshot_as_multiturn,
        task_by_task=flags.eval_task_by_task,
        backend=flags.eval_backend,
        vllm_args=parse_vllm_args(flags.vllm_args),
        dtype=flags.eval_model_dtype,
        add_bos_token=flags.add_bos_token or None,
        device_map=host.device_map,
        seed=host.seed if isinstance(host, Host) else seed,
        trust_remote_code=host.trust_remote_code and not host.disable_trust_remote_code,
        platform=host.platform,
    )
    settings.check()
    return settings


def show_scores(model: str, settings: Evaluation, output: str | None) -> None:
    """Evaluate `model`, print the table, and write the scores to the file `output`.

    Raises DataError when a task has no score, after the others were shown and written.
    """
    logging.getLogger("lm_eval").setLevel(
        logging.ERROR
    )  # it warns of how it is called, which nobody here can change
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"evaluating {model} on {', '.join(settings.tasks)}", markup=False)
    started = time.perf_counter()
    scores = evaluate(model, settings)
    sys.stdout.write(scores.text + "\n")  # as it is: rich would fold the table
    console.print(f"evaluated in {time.perf_counter() - started:.0f} s")
    if output is not None:
        scores.write(Path(output))
    if scores.failed:
        raise DataError(
            f"{len(scores.failed)} of {len(settings.tasks)} tasks failed: {', '.join(scores.failed)}"
        )
