"""A recipe as a list of steps."""

from __future__ import annotations

import logging
from pathlib import Path

from auto_round.core.errors import PlanError
from auto_round.core.plan import Plan
from auto_round.jobs.starts import start
from auto_round.models.imatrix import Origin, importance_of, saver
from auto_round.models.subject import Subject
from auto_round.options import DUO_SCALING, Options
from auto_round.recipes import schedule_named
from auto_round.sources.dataset import Calibration
from auto_round.sources.dataset_names import name_of
from auto_round.steps.awq import Awq
from auto_round.steps.base import Step
from auto_round.steps.inputs import InputRanges, needs_calibration
from auto_round.steps.keep import Keep
from auto_round.steps.record import Record
from auto_round.steps.search import Search
from auto_round.steps.sign_round import FEW_BITS, SignRound

logger = logging.getLogger("auto_round")


def steps_for(
    plan: Plan,
    options: Options,
    subject: Subject,
    *,
    at_once: int,
    iters: int | None = None,
    data: Calibration | None = None,
) -> list[Step]:
    """The recipe as a list of steps, for the layers of `plan`.

    subject: the model. at_once: samples that run together, fewer than the batch size when memory is short.
    iters: instead of those of the recipe. data: what the job is calibrated on, as far as it is known yet.
    """
    numbers = options.numbers()
    found: list[Step] = []
    if options.enable_awq:
        if subject.files.packed:
            raise PlanError(
                "awq changes weights, and those of this model are quantized already: their grids would be lost. "
                "Give the original model, or leave awq out"
            )
        # Before anything is looked at: weights are others then.
        duo = DUO_SCALING[str(options.duo_scaling).casefold()]
        found.append(Awq(n_grid=options.n_grid, duo_scaling=duo))
    if any(scheme.act is not None for scheme in plan.values()):
        # Before the others: they run blocks with quantized inputs.
        found.append(InputRanges(calibrated=needs_calibration(plan), percentile=options.act_percentile))
    kind = options.start_of(numbers)
    before = start(kind)
    if options.imatrix is not None:
        # The file tells what the ranges go by; what goes by correlations of inputs needs data, if any is given.
        before = [
            _given_search(plan, options, subject, kind),
            *(before[1:] if options.dataset is not None else []),
        ]
    found += before
    if numbers.iters:
        found.append(
            SignRound(
                iters=iters or numbers.iters,
                lr=numbers.lr,
                minmax_lr=options.minmax_lr,
                batch_size=at_once,
                # Fewer samples at once take more turns per step, so that a step still sees a whole batch.
                gradient_accumulate_steps=options.gradient_accumulate_steps
                * max(1, numbers.batch_size // at_once),
                minmax=options.enable_minmax_tuning,
                adam=options.enable_adam,
                momentum=options.momentum,
                best_state=not options.not_use_best_mse,
                published=options.algorithm == "sign_round_published",
                schedule=schedule_named(options.lr_scheduler),
                patience=options.dynamic_max_gap,
                norm_bias=options.enable_norm_bias_tuning,
                trim_below=FEW_BITS if options.enable_alg_ext else 0,
                seed=options.seed,
            )
        )
    if options.save_imatrix is not None:
        found.append(_record(plan, options, subject, data))
    if subject.files.packed:
        found.append(Keep(subject.quantized))
    return found


def _record(plan: Plan, options: Options, subject: Subject, data: Calibration | None) -> Record:
    """What writes an importance file in the end."""
    assert options.save_imatrix is not None, "there is to be such a file"
    samples, seqlen = (0, 1) if data is None else (int(size) for size in data.tokens.shape)
    padded = None if data is None else data.valid
    tokens = samples * seqlen if padded is None else int(padded.sum())
    origin = Origin(samples, seqlen, tokens, (name_of(options.dataset),))
    return Record(saver(Path(options.save_imatrix), plan, subject.files.config, origin))


def _given_search(plan: Plan, options: Options, subject: Subject, kind: str) -> Search:
    """The search that goes by an importance file."""
    assert options.imatrix is not None, "there is such a file"
    if kind == "none":
        raise PlanError("imatrix: an importance file serves the search of ranges, which is switched off")
    if options.start == "gptq" and options.dataset is None:
        raise PlanError("start='gptq' goes by calibration data beside the imatrix: give a dataset")
    path = Path(options.imatrix)
    # Wrong file, wrong model: found out here, before any work.
    found = importance_of(path, {n: plan.shapes[n] for n in plan.quantized()}, subject.files.config)
    missing = [name for name in plan.quantized() if name not in found]
    if missing:
        logger.warning(
            "imatrix %s: nothing about %d layers, such as %s: by weights alone",
            path,
            len(missing),
            missing[0],
        )
    return Search(found)
