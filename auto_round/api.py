"""`AutoRound`, the public class: documented keywords in, a quantized model and checkpoint folders out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from auto_round.assembly import steps_for
from auto_round.core.auto_scheme import AutoScheme
from auto_round.core.errors import AutoRoundError, FormatError, PlanError
from auto_round.core.placement import Placement
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.formats.base import Format, formats, parse_formats, sharing_a_plan
from auto_round.jobs.auto_scheme import Mix
from auto_round.jobs.budget import Chosen, parse_duration, within
from auto_round.jobs.export import CheckpointWriter
from auto_round.jobs.folders import claimed
from auto_round.jobs.journal import Journal, Resumed, earlier_steps
from auto_round.jobs.limits import KeptWithin
from auto_round.jobs.manifest import manifest
from auto_round.jobs.outline import Outline
from auto_round.jobs.planner import Making, StepMaker
from auto_round.jobs.quantize import Observer, Pass, quantize
from auto_round.jobs.report import Report
from auto_round.jobs.stream import CopyingWriter, Locked, StreamPass, stream
from auto_round.material import Material
from auto_round.mixing import with_mix
from auto_round.models.anatomy import Anatomy
from auto_round.models.device import execution_dtype
from auto_round.models.memory import peak_memory, peak_of, reset_peak
from auto_round.models.subject import Subject
from auto_round.options import Options
from auto_round.outputs import file_bytes, open_writers
from auto_round.planning import base_scheme, formats_for, plan_for, settled
from auto_round.recipes import RECIPES
from auto_round.sizing import Sizing, check_whole, limit
from auto_round.sources.base import Needs, Source
from auto_round.sources.blocks import LiveSource
from auto_round.sources.dataset import Calibration
from auto_round.sources.live_block import Execution
from auto_round.sources.tensors import TensorSource
from auto_round.spread import spread
from auto_round.steps.base import Step

logger = logging.getLogger("auto_round")


class Kept:
    """Keeps the quantized layers in memory, for `quantize` followed by `save_quantized`."""

    def __init__(self) -> None:
        self.layers: dict[str, Quantized] = {}
        self.vectors: dict[str, Tensor] = {}

    def add(self, name: str, q: Quantized) -> None:
        """One finished layer."""
        self.layers[name] = q

    def rewrite(self, name: str, tensor: Tensor) -> None:
        """A changed tensor that is not quantized."""
        self.vectors[name] = tensor


class AutoRound:
    """Quantizes a language model.

    model: a folder, a hub id, or a live transformers model. tokenizer: needed for text data with a live model.
    options: every field of `auto_round.options.Options`; an unknown one is a TypeError that names the nearest.
    """

    def __init__(self, model: str | Path | nn.Module, tokenizer: Any = None, **options: Any) -> None:
        self.options = settled(Options.of(options))
        self._budget = None if self.options.time_budget is None else parse_duration(self.options.time_budget)
        self.numbers = self.options.numbers()
        self.base = base_scheme(self.options)
        self.material = Material(model, tokenizer, self.options, self.base)
        max_ram = limit(self.options.max_ram, "max_ram")
        self.observers: list[Observer] = [] if max_ram is None else [KeptWithin(max_ram)]
        self._kept: Kept | None = None
        self.mix: Mix | None = None  # what an AutoScheme has become
        self.plan: Plan | None = None
        self.placement: Placement | None = None
        self.seconds: float | None = None
        self._scratch: Path | None = None

    def subject(self) -> Subject:
        """The model as files and layers."""
        return self.material.subject()

    @property
    def model(self) -> nn.Module | None:
        """The live model; None as long as it is a folder."""
        return self.material.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given, or that of the model's folder; None when there is none."""
        return self.material.tokenizer

    def steps(self, plan: Plan, *, at_once: int | None = None, iters: int | None = None) -> list[Step]:
        """The recipe as a list of steps, for the layers of `plan`.

        at_once: samples that run together, by default as many as were placed. iters: instead of those of the recipe.
        """
        placed = self.placement.micro_batch if self.placement else self.numbers.batch_size
        data = self.material.calibration
        return steps_for(
            plan, self.options, self.subject(), at_once=at_once or placed, iters=iters, data=data
        )

    def quantize(self) -> tuple[nn.Module, dict[str, dict[str, object]]]:
        """Quantize in memory. Returns the model, with the weights that the codes stand for, and layer settings."""
        kept = Kept()
        check_whole(self.material, "quantize() returns it; quantize_and_save() may do without")
        if self.material.rotator.untrained:
            self.material.train_rotations(self._plan_in_memory())
        model = self.material.live_model()
        plan = self._plan_in_memory()
        self._place([(plan, [])], keeps=True)
        steps = self.steps(plan)
        self._run(self._source(steps), Pass(plan, steps, [kept]))
        self._kept = kept
        return model, plan.flat()

    def save_quantized(
        self, output_dir: str | Path, format: str | None = None, *, inplace: bool = True
    ) -> nn.Module:
        """Write what `quantize` made; the model is not changed, whatever `inplace` says.

        Raises PlanError when nothing has been quantized yet.
        """
        if self._kept is None or self.plan is None:
            raise PlanError(
                "save_quantized: nothing is quantized yet; call quantize() first, or quantize_and_save()"
            )
        formats = self._formats(format)
        for fmt in formats:
            # Codes are made: a format may no longer change a layer's scheme, only take it or refuse.
            held = fmt.resolve(self.plan).check(self.plan)
            for name in self.plan.quantized():
                if held[name].weight is None:
                    raise FormatError(f"{name}: {held.why[name]}, so {fmt.name} cannot hold it")
        folder = Path(output_dir)
        opened = open_writers(self.material, folder, formats, self.plan, several=len(formats) > 1)
        with claimed(folder), opened as writers:
            for name, q in self._kept.layers.items():
                for writer in writers:
                    writer.add(name, q)
            for name, tensor in self._kept.vectors.items():
                for writer in writers:
                    writer.rewrite(name, tensor)
        return self.material.live_model()

    def quantize_and_save(
        self, output_dir: str | Path = "tmp_autoround", format: str | None = None, *, inplace: bool = True
    ) -> tuple[nn.Module | None, str | list[str]]:
        """Quantize and write, layer by layer. Returns (model, folder), or (model, folders) for several formats.

        Finished blocks are kept in a journal until the end: with resume=True, the same call goes on with what an
        interrupted one left, and writes the same bytes.
        The model gets the weights that the codes stand for, whatever `inplace` says. It is None when it was given by
        name and never loaded: when weights alone were enough, or it is large beside the free memory, or
        low_cpu_mem_usage=True. Then no more than one block of it is in memory at a time.
        """
        formats = self._formats(format)
        groups = sharing_a_plan(formats)
        if self.options.resume and len(groups) > 1:
            raise PlanError("resume: a run with several GGUF types keeps no journal; make them one by one")
        folders: list[str] = []
        with ExitStack() as stack:
            stack.enter_context(claimed(Path(output_dir)))
            plans = [self.make_plan(group) for group in groups]
            if self.material.train_rotations(plans[0]):
                plans = [self.make_plan(group) for group in groups]
            self.plan = plans[0]
            reset_peak()
            earlier = earlier_steps(Path(output_dir)) if self.options.resume and self._budget else None
            if earlier is not None:
                self._give_steps(Chosen(earlier, f"{earlier} steps, as in the run that is resumed"))
            self._place(list(zip(plans, groups)), measure=self.options.report is not None)
            self._scratch = Path(output_dir)
            report = Report()
            self.observers.append(report)
            # A second call on this object has a report of its own.
            stack.callback(self.observers.remove, report)
            # A journal belongs to one plan; of several types made in one pass it could restore only the first.
            journal = None
            if len(plans) == 1:
                journal = stack.enter_context(Journal(Path(output_dir), self.plan))
            passes = []
            steps = [self.steps(plan) for plan in plans]
            source = self._source(steps[0])
            _check_spread(self.options.distributed, source)
            for group, plan, its in zip(groups, plans, steps):
                about = None
                if isinstance(source, TensorSource):
                    about = manifest(self.subject(), plan, its, source.describe())
                opened = open_writers(
                    self.material, Path(output_dir), group, plan, several=len(formats) > 1, about=about
                )
                writers = stack.enter_context(opened)
                passes.append(Pass(plan, its, writers))
                folders += [str(writer.folder) for writer in writers]
            if isinstance(source, TensorSource):
                self._stream(source, passes)
            else:
                self._run(source, *passes, journal=journal)
        if self.options.report is not None and self.placement is not None:
            measured = {"ram": peak_memory(), "vram": peak_of(torch.device(self.placement.device))}
            report.write(Path(self.options.report), self.placement, measured, self.seconds)
        return self.model, folders if len(folders) > 1 else folders[0]

    def outline(self, format: str | None = None, *, rehearse: bool = True) -> Outline:
        """What `quantize_and_save` would do: layers, exact bytes of every format given, memory and time.

        format: one or several; None is every format there is, each with its size or the reason why it is not possible.
        rehearse: whether memory and time are measured on one block, with random tokens.
        """
        wanted = format or self.options.format
        sizes: dict[str, int | str] = {}
        makes: list[tuple[Plan, Sequence[Format]]] = []
        if wanted:
            makes = [(self.make_plan(group), group) for group in sharing_a_plan(self._formats(wanted))]
            for plan, group in makes:
                sizes |= {fmt.name: file_bytes(self.material, fmt, plan) for fmt in group}
        for fmt in () if wanted else formats().values():
            try:  # what was asked for by name must work; of all formats some cannot
                plan = self.make_plan(self._formats(fmt.name))
                sizes[fmt.name] = file_bytes(self.material, fmt, plan)
            except AutoRoundError as error:
                sizes[fmt.name] = str(error)
            else:
                makes = makes or [(plan, [fmt])]
        if not makes:
            raise FormatError("no format can hold this plan: " + "; ".join(map(str, sizes.values())))
        self._formats(wanted or makes[0][1][0].name)  # what is placed below; the others may have other layers
        self._place(makes, measure=rehearse, with_data=False)
        assert self.placement is not None, "it has been made"
        body, store = self.subject().anatomy, self.subject().files.store
        told = () if self.mix is None else (f"AutoScheme: {self.mix}",)
        return Outline(
            plans={", ".join(fmt.name for fmt in group): plan.noted(*told) for plan, group in makes}, sizes=sizes,
            blocks=len(body.in_order()), placement=self.placement, seconds=self.seconds,
            source_bytes=sum(info.nbytes for info in store.infos.values()),
        )  # fmt: skip

    def _formats(self, given: str | None) -> list[Format]:
        """The formats given here, in the options, or by the scheme."""
        if isinstance(self.options.scheme, AutoScheme):
            # From then on the job is as any other.
            self.options, self.mix = with_mix(self.material, self.options, given)
            self.material.options, self.base = self.options, base_scheme(self.options)
            self.material.base = self.base
        formats = formats_for(self.options, self.base, given)
        # Before the plan: it decides whether embedding and head are layers.
        self.material.whole = any(fmt.whole_model for fmt in formats)
        return formats

    def make_plan(self, formats: Sequence[Format]) -> Plan:
        """The plan for this model, options and formats; nothing is read but headers and configuration."""
        chosen = {} if self.mix is None else self.mix.chosen
        self.plan = plan_for(self.subject(), self.options, self.base, formats, chosen)
        self.material.turn(self.plan)
        return self.plan

    def _plan_in_memory(self) -> Plan:
        """A plan that the format given, or else `auto_round` if it can, is able to save later."""
        formats = self._formats(None)
        if self.options.format is not None or self.material.whole:
            return self.make_plan(formats)
        try:
            return self.make_plan(parse_formats("auto_round"))
        except FormatError as error:
            logger.info("the result can be saved in format fake only: %s", error)
            return self.make_plan(parse_formats("fake"))

    def _stream(self, source: TensorSource, passes: Sequence[Pass]) -> None:
        for observer in self.observers:
            observer.started(
                passes[0].plan, _block_count(self.subject().anatomy, passes, self.options.nblocks)
            )
        if self.options.distributed is not None:
            spread(self.material, source, passes, self.observers)
            return
        assert self.placement is not None and self.placement.workers, "streams are placed too"
        stream(source, list(map(_streamed, passes)), self.observers, workers=self.placement.workers)
        _finish(passes)

    def _run(self, source: Source, first: Pass, *others: Pass, journal: Journal | None = None) -> None:
        writers, observers = first.writers, self.observers
        for observer in observers:
            observer.started(
                first.plan, _block_count(self.subject().anatomy, (first, *others), self.options.nblocks)
            )
        if journal is not None:
            about = manifest(self.subject(), first.plan, first.steps, source.describe())
            journal.begin(about, resume=self.options.resume)
            # With the lists as they are: what comes out of the journal is not entered into it again.
            source = Resumed(source, journal, writers, observers)
            writers, observers = [journal, *writers], [journal, *observers]
        deterministic = self.options.enable_deterministic_algorithms
        with _deterministic() if deterministic else ExitStack():
            quantize(source, first.plan, first.steps, writers, observers, others)
        _finish((first, *others))

    def _source(self, steps: Sequence[Step]) -> Source:
        """Shards when weights are all that is needed, else the live model."""
        needs = max((step.needs for step in steps), default=Needs.NOTHING)
        requires = max((step.requires for step in steps), default=Needs.NOTHING)
        subject, data = self.subject(), self.material.samples(needs, requires)
        assert self.placement is not None, "jobs are placed before they run"
        if self.placement.workers is not None:
            logger.info("no forward is needed: quantizing straight from the checkpoint's shards")
            return TensorSource(subject.anatomy, subject.files.store, subject.names)
        return self._live_source(self.placement, data, quantized=requires is Needs.FORWARD)

    def _live_source(self, placement: Placement, data: Calibration | None, *, quantized: bool) -> LiveSource:
        device = torch.device(placement.device)
        execution = Execution(
            device=device,
            batch_size=placement.micro_batch,
            quantized_inputs=self.options.enable_quanted_input and quantized,
            amp=execution_dtype(device) if self.options.amp else None,
            percentile=self.options.act_percentile,
            tune_outside=not self.material.whole,
            activations=placement.activations,
            layers=placement.layers,
            nblocks=self.options.nblocks,
            compiled=bool(self.options.enable_torch_compile),
            language=self.options.enable_lfq,
            scratch=self._scratch if self._scratch and self._scratch.is_dir() else None,
        )
        return LiveSource(self.material.runnable(), self.subject().anatomy, execution, data)

    def _place(
        self,
        makes: Sequence[tuple[Plan, Sequence[Format]]],
        *,
        measure: bool = False,
        with_data: bool = True,
        keeps: bool = False,
    ) -> None:
        """Decide where things live and how many samples run at once. Raises PlanError when no limit can be kept."""
        sizing = Sizing(
            material=self.material, measure=measure, with_data=with_data, keeps=keeps,
            makings=[Making(plan, formats, self._step_maker(plan)) for plan, formats in makes],
            live=lambda placed, data, quantized: self._live_source(placed, data, quantized=quantized),
        )  # fmt: skip
        if self._budget is not None:
            most = self.options.iters or RECIPES["best"].iters
            self._give_steps(within(self._budget, sizing.seconds_by_steps(), most))
        self.placement, self.seconds = sizing.placement()

    def _step_maker(self, plan: Plan) -> StepMaker:
        return lambda at_once, iters: self.steps(plan, at_once=at_once, iters=iters)

    def _give_steps(self, chosen: Chosen) -> None:
        """Go on with the number of sign steps that the time budget allows; the budget is then settled."""
        logger.info("time budget: %s", chosen.why)
        start = self.options.start or "gptq"
        self.options = replace(self.options, iters=chosen.iters, start=start, time_budget=None)
        self.numbers, self._budget, self.material.options = self.options.numbers(), None, self.options


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()  # torch's own global switch: put back afterwards
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _streamed(each: Pass) -> StreamPass:
    """A pass whose writers take layers of several workers, one at a time where they cannot do better."""
    writers = [w if isinstance(w, CheckpointWriter) else Locked(cast(CopyingWriter, w)) for w in each.writers]
    return StreamPass(each.plan, each.steps, writers)


def _finish(passes: Sequence[Pass]) -> None:
    for step in (step for each in passes for step in each.steps):
        step.finish()


def _check_spread(distributed: str | None, source: Source) -> None:
    """Raise PlanError where other machines are asked for and `source` runs the model."""
    if distributed is not None and not isinstance(source, TensorSource):
        raise PlanError(
            f"distributed={distributed!r}: only streams are spread over machines, and this job runs the model; "
            "use model_free=True (--model_free), or iters=0 with disable_opt_rtn=True"
        )


def _block_count(body: Anatomy, passes: Sequence[Pass], nblocks: int) -> int:
    """Blocks that the loop goes through; a layer outside them, such as the head, is one of its own."""
    wanted = {name for each in passes for name in each.plan.quantized()}
    outside = [name for name in wanted if body.layers[name].block is None]
    return sum(-(-len(blocks) // nblocks) for blocks in body.block_lists) + len(outside)
