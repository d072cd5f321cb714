"""`AutoRound`, the public class: documented keywords in, a quantized model and checkpoint folders out."""

from __future__ import annotations

import logging
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.codecs.base import codec_of, preset
from auto_round.core.errors import (
    AutoRoundError,
    DataError,
    FormatError,
    ModelError,
    NotYetError,
    PlanError,
    SchemeError,
)
from auto_round.core.placement import Placement
from auto_round.core.plan import Plan
from auto_round.core.quantized import Quantized
from auto_round.core.scheme import FLAT_NAMES, QuantizationScheme, Scheme
from auto_round.core.selection import Selection, make_plan, parse_ignore, parse_layer_config, schemes_of
from auto_round.formats.base import Format, Provenance, formats, parse_formats, sharing_a_plan
from auto_round.jobs.export import CheckpointWriter
from auto_round.jobs.gguf_export import GgufWriter
from auto_round.jobs.journal import Journal, Resumed
from auto_round.jobs.ledger import Ledger
from auto_round.jobs.manifest import manifest
from auto_round.jobs.outline import Outline
from auto_round.jobs.placing import Wish, place
from auto_round.jobs.planner import SAMPLES
from auto_round.jobs.quantize import Observer, Pass, quantize
from auto_round.jobs.report import Report
from auto_round.jobs.starts import start
from auto_round.jobs.stream import Locked, stream
from auto_round.jobs.workers import cores
from auto_round.models import load
from auto_round.models.anatomy import experts_of
from auto_round.models.device import execution_dtype, parse_devices
from auto_round.models.imatrix import importance_of
from auto_round.models.memory import available_memory, peak_memory, peak_of, reset_peak
from auto_round.models.shards import parse_size
from auto_round.models.skeleton import Skeleton
from auto_round.models.stored import streamed_subject
from auto_round.models.subject import Subject, check_sources, check_streamed, open_subject
from auto_round.options import DEFAULT_SCHEME, Options
from auto_round.recipes import Recipe, algorithm_named, recipe_named, schedule_named
from auto_round.sources import plain
from auto_round.sources.base import Needs, Source
from auto_round.sources.blocks import Execution, LiveSource
from auto_round.sources.dataset import Calibration, Request, load_calibration
from auto_round.sources.dataset_names import DEFAULT_DATASET
from auto_round.sources.kv_cache import cache_ranges
from auto_round.sources.tensors import TensorSource
from auto_round.steps.base import Step
from auto_round.steps.inputs import InputRanges, needs_calibration
from auto_round.steps.search import Search
from auto_round.steps.sign_round import FEW_BITS, SignRound
from auto_round.version import __version__

logger = logging.getLogger("auto_round")
SMALL_SHARE = 1 / 16
"""A model of at most this share of the free memory is loaded as a whole, so that it can be returned."""


class Kept:
    """Keeps the quantized layers in memory, for `quantize` followed by `save_quantized`."""

    def __init__(self) -> None:
        self.layers: dict[str, Quantized] = {}

    def add(self, name: str, q: Quantized) -> None:
        """One finished layer."""
        self.layers[name] = q


class AutoRound:
    """Quantizes a language model.

    model: a folder, a hub id, or a live transformers model. tokenizer: needed for text data with a live model.
    options: every field of `auto_round.options.Options`; an unknown one is a TypeError that names the nearest.
    """

    def __init__(self, model: str | Path | nn.Module, tokenizer: Any = None, **options: Any) -> None:
        self.options = Options.of(options)
        self.numbers = self._numbers()
        self.observers: list[Observer] = []
        self._tokenizer = tokenizer
        self._kept: Kept | None = None
        self._cache_ranges: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._whole = False  # whether some format quantizes embedding and head too
        self.plan: Plan | None = None
        self.placement: Placement | None = None
        self.seconds: float | None = None
        self._scratch: Path | None = None
        self._calibration: Calibration | None = None
        self.base = base_scheme(self.options)
        if isinstance(model, nn.Module):
            self.model: nn.Module | None = model.eval()
            self.folder: Path | None = None
        else:
            self.model = None
            self.folder = load.resolve(str(model), platform=self.options.platform)
        self._subject: Subject | None = None

    def quantize(self) -> tuple[nn.Module, dict[str, dict[str, object]]]:
        """Quantize in memory. Returns the model, with the weights that the codes stand for, and layer settings."""
        kept = Kept()
        model = self._live_model()
        plan = self._plan_in_memory()
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
            held = fmt.resolve(self.plan).check(self.plan)
            for name in self.plan.quantized():
                if held[name].weight is None:
                    raise FormatError(f"{name}: {held.why[name]}, so {fmt.name} cannot hold it")
        with self._writers(Path(output_dir), formats, self.plan, several=len(formats) > 1) as writers:
            for name, q in self._kept.layers.items():
                for writer in writers:
                    writer.add(name, q)
        return self._live_model()

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
            plans = [self.make_plan(group) for group in groups]
            self.plan = plans[0]
            self._place(self.plan, measure=self.options.report is not None)
            self._scratch = Path(output_dir)
            report = Report()
            self.observers.append(report)
            stack.callback(self.observers.remove, report)
            reset_peak()
            journal = None
            if len(plans) == 1:
                journal = stack.enter_context(Journal(Path(output_dir), self.plan))
            passes = []
            steps = [self.steps(plan) for plan in plans]
            source = self._source(steps[0])
            for group, plan, its in zip(groups, plans, steps):
                about = None
                if isinstance(source, TensorSource):
                    about = manifest(self.subject(), plan, its, source.describe())
                opened = self._writers(Path(output_dir), group, plan, several=len(formats) > 1, about=about)
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
        plans: list[Plan] = []
        for fmt in parse_formats(wanted) if wanted else formats().values():
            try:
                before, found = self._whole, self._formats(fmt.name)
                if self._whole is not before:  # the embedding is a layer for some formats only
                    self._subject = None
                plan = self.make_plan(found)
                with tempfile.TemporaryDirectory() as folder:
                    sizes[fmt.name] = self._writer(fmt, Path(folder) / "out", plan).file_bytes()
            except AutoRoundError as error:
                if wanted:
                    raise
                sizes[fmt.name] = str(error)
                continue
            plans.append(plan)
        if not plans:
            raise FormatError("no format can hold this plan: " + "; ".join(map(str, sizes.values())))
        self._place(plans[0], measure=rehearse, with_data=False)
        assert self.placement is not None, "it has been made"
        body, store = self.subject().anatomy, self.subject().files.store
        return Outline(
            plan=plans[0], blocks=len(body.in_order()), sizes=sizes, placement=self.placement, seconds=self.seconds,
            source_bytes=sum(info.nbytes for info in store.infos.values()),
        )  # fmt: skip

    def _formats(self, given: str | None) -> list[Format]:
        """The formats given here or in the options, or what the scheme stands for: a GGUF scheme is a format too."""
        scheme = self.options.scheme
        meant = scheme.lower() if isinstance(scheme, str) and scheme.upper().startswith("GGUF:") else None
        formats = parse_formats(given or self.options.format or meant or "auto_round")
        whole = [fmt for fmt in formats if fmt.whole_model]
        for fmt in formats:
            if meant is not None and fmt.name != meant and (fmt.whole_model or fmt.holds_codes):
                raise PlanError(
                    f"scheme {scheme} is written by format {meant}, got format {fmt.name}. Leave one of them out"
                )
            if fmt.whole_model and meant is None and self.base != preset(DEFAULT_SCHEME):
                raise PlanError(
                    f"format {fmt.name} has a scheme of its own, got scheme {self.base}. "
                    "Leave scheme, bits, group_size and sym out; single layers can be changed with layer_config"
                )
        self._whole = bool(whole)
        return formats

    def make_plan(self, formats: Sequence[Format]) -> Plan:
        """The plan for this model, options and formats; nothing is read but headers and configuration."""
        subject = self.subject()
        whole = any(fmt.whole_model for fmt in formats)
        base = formats[0].scheme or self.base
        selection = Selection(
            base=base,
            layer_config=parse_layer_config(self.options.layer_config),
            ignore_layers=parse_ignore(self.options.ignore_layers),
        )
        body = subject.anatomy
        default = body.in_blocks()
        if self.options.quant_lm_head:
            if body.head is None:
                raise PlanError("quant_lm_head: this model has no output head")
            default.append(body.head)
        if whole:
            outside = [body.embedding, None if body.tied else body.head]
            default += [name for name in outside if name is not None and name not in default]
        plan = make_plan(body.shapes(), selection, preset, default=default, fused=body.fused())
        for fmt in formats:
            plan = fmt.adapt(plan, subject.files.config)
        for name in plan.quantized():
            _check_spec(name, plan[name])
        for fmt in formats:
            plan = fmt.resolve(plan).check(plan)
        if not plan.quantized() and base.weight is not None:
            raise PlanError(
                f"no layer is left to quantize: {'; '.join(sorted(set(plan.why.values()))) or 'no layer found'}"
            )
        if body.tied and body.head in plan.quantized():
            plan = plan.noted(f"{body.head} is tied to the embedding: untied, since it is to be quantized")
        plan = plan.noted(*body.notes, *(() if whole else _mixed(plan)))
        for note in plan.notes:
            logger.warning(note)
        check_sources(subject, plan)
        self.plan = plan
        return plan

    def _plan_in_memory(self) -> Plan:
        """A plan that the format given, or else `auto_round` if it can, is able to save later."""
        formats = self._formats(None)
        if self.options.format is not None or self._whole:
            return self.make_plan(formats)
        try:
            return self.make_plan(parse_formats("auto_round"))
        except FormatError as error:
            logger.info("the result can be saved in format fake only: %s", error)
            return self.make_plan(parse_formats("fake"))

    def subject(self) -> Subject:
        """The model as files and layers."""
        streams = self.folder is not None and load.has_safetensors(self.folder) and self._streams()
        if self._subject is None and self.folder is not None and streams:
            files = plain.open_folder(self.folder)
            self._subject = streamed_subject(
                files,
                embedding=self._whole,
                blocks=self.options.to_quant_block_names,
                trust_remote_code=self.options.trust_remote_code,
            )
            if self._subject is not None and not self.options.model_free:
                check_streamed(files, trust_remote_code=self.options.trust_remote_code)
        if self._subject is None:
            self._subject = open_subject(
                self.folder,
                self.model,
                self._live_model,
                tokenizer=self._tokenizer,
                trust_remote_code=self.options.trust_remote_code,
                blocks=self.options.to_quant_block_names,
                named=parse_layer_config(self.options.layer_config),
                head=self.options.quant_lm_head,
                embedding=self._whole,
                dtype=self.options.model_dtype or "auto",
                opener=plain.open_folder,
            )
        return self._subject

    def _streams(self) -> bool:
        """Whether weights are all that this job will look at, whatever data there is."""
        plain = self.options.model_free or (self.numbers.iters == 0 and self.numbers.disable_opt_rtn)
        given = schemes_of(parse_layer_config(self.options.layer_config), self.base, preset).values()
        acts = [scheme.act for scheme in (self.base, *given) if scheme.act is not None]
        if any(codec_of(act).needs_range(act) for act in acts):
            return False
        return plain and self.model is None and not self.options.disable_model_free

    def steps(self, plan: Plan, *, at_once: int | None = None, iters: int | None = None) -> list[Step]:
        """The recipe as a list of steps, for the layers of `plan`.

        at_once: samples that run together, fewer than the batch size when memory is short. iters: instead of those of
        the recipe.
        """
        numbers, options = self.numbers, self.options
        at_once = at_once or (self.placement.micro_batch if self.placement else numbers.batch_size)
        found: list[Step] = []
        if any(scheme.act is not None for scheme in plan.values()):
            found.append(
                InputRanges(calibrated=needs_calibration(plan), percentile=self.options.act_percentile)
            )
        kind = self.options.start_of(numbers)
        found += start(kind) if self.options.imatrix is None else [self._given_search(plan, kind)]
        if numbers.iters:
            found.append(
                SignRound(
                    iters=iters or numbers.iters,
                    lr=numbers.lr,
                    minmax_lr=options.minmax_lr,
                    batch_size=at_once,
                    gradient_accumulate_steps=options.gradient_accumulate_steps
                    * max(1, numbers.batch_size // at_once),
                    minmax=options.enable_minmax_tuning,
                    adam=options.enable_adam,
                    momentum=options.momentum,
                    best_state=not options.not_use_best_mse,
                    published=options.algorithm == "sign_round_published",
                    schedule=schedule_named(options.lr_scheduler),
                    patience=options.dynamic_max_gap,
                    trim_below=FEW_BITS if options.enable_alg_ext else 0,
                    seed=options.seed,
                )
            )
        return found

    def _given_search(self, plan: Plan, kind: str) -> Search:
        """The search that goes by an importance file."""
        assert self.options.imatrix is not None, "there is such a file"
        if kind == "none" or self.options.start == "gptq":
            raise PlanError("imatrix: an importance file serves the search of ranges, which is switched off")
        path = Path(self.options.imatrix)
        found = importance_of(
            path, {n: plan.shapes[n] for n in plan.quantized()}, self.subject().files.config
        )
        missing = [name for name in plan.quantized() if name not in found]
        if missing:
            logger.warning(
                "imatrix %s: nothing about %d layers, such as %s: by weights alone",
                path,
                len(missing),
                missing[0],
            )
        return Search(found)

    def _numbers(self) -> Recipe:
        options, configs = self.options, self.options.alg_configs
        if configs is not None:
            if options.algorithm is not None:
                raise PlanError("give algorithm or alg_configs, not both")
            for config in configs if isinstance(configs, (list, tuple)) else [configs]:
                options = (
                    config.merged(options)
                    if not isinstance(config, str)
                    else replace(options, algorithm=config)
                )
        if options.algorithm is not None:
            names = {algorithm_named(part) for part in options.algorithm.split(",") if part.strip()}
            if len(names) != 1:
                raise PlanError(f"algorithm {options.algorithm!r}: give exactly one of them")
            options = replace(options, algorithm=names.pop())
        self.options = options
        return options.numbers()

    def _is_quantized(self) -> bool:
        """Whether the model's own weights are packed: transformers would not load them as plain ones."""
        return self.folder is not None and "quantization_config" in load.read_config(self.folder)

    def _live_model(self) -> nn.Module:
        if self.model is None:
            assert self.folder is not None, "a model or a folder is given"
            if self._is_quantized():
                raise ModelError(
                    f"{self.folder} is quantized already and is read block by block: use quantize_and_save, "
                    "or give the original model"
                )
            self.model = load.load_model(
                self.folder,
                trust_remote_code=self.options.trust_remote_code,
                dtype=self.options.model_dtype or "auto",
            )
        return self.model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given, or that of the model's folder; None when there is none."""
        if self._tokenizer is None and self.folder is not None:
            self._tokenizer = load.load_tokenizer(
                self.folder, trust_remote_code=self.options.trust_remote_code
            )
        return self._tokenizer

    def _stream(self, source: TensorSource, passes: Sequence[Pass]) -> None:
        for observer in self.observers:
            observer.started(passes[0].plan, self._block_count(passes[0].plan))
        observers = self.observers
        for each in passes:
            writers = [w if isinstance(w, CheckpointWriter) else Locked(w) for w in each.writers]
            workers = self.options.workers or cores()
            stream(source, each.plan, each.steps, writers, observers, workers=workers)
            observers = []  # one account of the blocks is enough

    def _run(self, source: Source, first: Pass, *others: Pass, journal: Journal | None = None) -> None:
        writers, observers = first.writers, self.observers
        for observer in observers:
            observer.started(first.plan, self._block_count(first.plan))
        if journal is not None:
            about = manifest(self.subject(), first.plan, first.steps, source.describe())
            journal.begin(about, resume=self.options.resume)
            source = Resumed(source, journal, writers, observers)
            writers, observers = [journal, *writers], [journal, *observers]
        deterministic = self.options.enable_deterministic_algorithms
        with _deterministic() if deterministic else ExitStack():
            quantize(source, first.plan, first.steps, writers, observers, others)

    def _block_count(self, plan: Plan) -> int:
        """Blocks that the loop goes through; a layer outside them, such as the head, is one of its own."""
        body = self.subject().anatomy
        outside = [name for name in plan.quantized() if body.layers[name].block is None]
        return sum(len(blocks) for blocks in body.block_lists) + len(outside)

    def _source(self, steps: Sequence[Step]) -> Source:
        """Shards when weights are all that is needed, else the live model."""
        needs = max((step.needs for step in steps), default=Needs.NOTHING)
        requires = max((step.requires for step in steps), default=Needs.NOTHING)
        subject, streamable = self.subject(), self.model is None
        if self.options.model_free and requires > Needs.NOTHING:
            raise PlanError(
                "model_free quantizes from weights alone: use iters=0 and a scheme whose inputs need no calibration, "
                "or leave model_free out"
            )
        data = self._samples(needs, requires)
        if data is None and streamable and not self.options.disable_model_free:
            logger.info("no forward is needed: quantizing straight from the checkpoint's shards")
            return TensorSource(subject.anatomy, subject.files.store, subject.names)
        if self.placement is None:
            self.placement = Placement(
                device=str(parse_devices(self.options.device_map).main), micro_batch=self.numbers.batch_size
            )
        return self._live_source(self.placement, data, quantized=requires is Needs.FORWARD)

    def _samples(self, needs: Needs, requires: Needs) -> Calibration | None:
        """The calibration data that a recipe makes use of; loaded once."""
        if needs > Needs.NOTHING and not self.options.model_free and self._calibration is None:
            self._calibration = self._data(required=requires > Needs.NOTHING)
        return self._calibration

    def _live_source(self, placement: Placement, data: Calibration | None, *, quantized: bool) -> LiveSource:
        device = torch.device(placement.device)
        execution = Execution(
            device=device,
            batch_size=placement.micro_batch,
            quantized_inputs=self.options.enable_quanted_input and quantized,
            amp=execution_dtype(device) if self.options.amp else None,
            tune_outside=not self._whole,
            activations=placement.activations,
            layers=placement.layers,
            scratch=self._scratch if self._scratch and self._scratch.is_dir() else None,
        )
        return LiveSource(self._runnable(), self.subject().anatomy, execution, data)

    def _place(self, plan: Plan, *, measure: bool, with_data: bool = True) -> None:
        """Decide where things live and how many samples run at once. Raises PlanError when no limit can be kept."""
        devices = parse_devices(self.options.device_map)
        steps = self.steps(plan)
        needs = max((step.needs for step in steps), default=Needs.NOTHING)
        limits = [
            None if size is None else parse_size(size)
            for size in (self.options.max_ram, self.options.max_vram)
        ]
        if self.subject().tree is None or needs is Needs.NOTHING or self.numbers.nsamples == 0:
            self.placement = Placement(device=str(devices.main), micro_batch=self.numbers.batch_size)
            return
        tuned = any(step.requires is Needs.FORWARD for step in steps)
        if with_data:  # whatever it imports is part of the process before the peak
            self._samples(needs, max(step.requires for step in steps))
        seqlen = self._seqlen()
        tree = self.subject().tree
        rows = tree.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, operator]
        tokens = torch.randint(rows, (SAMPLES, seqlen), generator=torch.Generator().manual_seed(0))

        def source(at_once: int) -> LiveSource:
            place = Placement(device=str(devices.main), micro_batch=at_once)
            return self._live_source(place, Calibration(tokens), quantized=tuned)

        wish = Wish(
            subject=self.subject(), plan=plan, devices=devices, batch=self.numbers.batch_size,
            samples=self.numbers.nsamples, seqlen=seqlen, iters=self.numbers.iters,
            chains=3 if tuned and self.options.enable_quanted_input else 2, low_vram=self.options.low_gpu_mem_usage,
            source=source, steps=lambda at_once, iters: self.steps(plan, at_once=at_once, iters=iters),
        )  # fmt: skip
        self.placement, self.seconds = place(wish, max_ram=limits[0], max_vram=limits[1], measure=measure)

    def _runnable(self) -> nn.Module | Skeleton:
        """The model as a whole when there is one or is to be one, else its skeleton."""
        subject = self.subject()
        if self.model is not None or subject.located is None or subject.tree is None:
            return self._live_model()
        if self._fits_whole():
            subject.located.check(subject.tree)
            return self._live_model()
        return Skeleton(subject.tree, subject.located, subject.anatomy.in_order())

    def _fits_whole(self) -> bool:
        """Whether the model is loaded as a whole: as was said, else when it is small beside the free memory."""
        files = self.subject().files
        if self.options.low_cpu_mem_usage is not None:
            return not self.options.low_cpu_mem_usage
        if self.options.max_ram is not None or self._is_quantized():
            return False
        return sum(info.nbytes for info in files.store.infos.values()) <= SMALL_SHARE * available_memory()

    def _data(self, *, required: bool) -> Calibration | None:
        """The calibration data. A recipe that can do without falls back to weights alone when there is none."""
        nsamples = self.numbers.nsamples
        if nsamples == 0:
            if required and self.options.nsamples == 0:
                raise DataError(
                    "nsamples=0: tuning and calibrated input ranges need data; give nsamples, or use iters=0 and a "
                    "scheme with dynamic inputs"
                )
            if not required:
                return None
            nsamples = recipe_named(
                "default"
            ).nsamples  # the recipe has none, but the scheme's inputs need a range
        request = Request(
            nsamples=nsamples, seqlen=self._seqlen(), seed=self.options.seed, platform=self.options.platform
        )
        dataset = DEFAULT_DATASET if self.options.dataset is None else self.options.dataset
        try:
            data = load_calibration(dataset, self.tokenizer, request, self._live_model)
        except DataError as error:
            if required or self.options.dataset is not None:
                raise
            logger.warning("optimised RTN goes by weights alone: %s", error)
            return None
        tree = self.subject().tree
        assert tree is not None, "only jobs without data go by names alone"
        rows = tree.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        if int(data.tokens.max()) >= rows:
            raise DataError(
                f"dataset: token id {int(data.tokens.max())} is outside the model's vocabulary of {rows}; "
                "is the tokenizer the model's own?"
            )
        return data

    def _seqlen(self) -> int:
        """The wanted length, or what the model can take."""
        config = self.subject().files.config
        text = config.get("text_config") or config
        most = text.get("max_position_embeddings") or text.get("n_positions") or self.numbers.seqlen
        if self.numbers.seqlen > most:
            logger.warning(
                "seqlen %d is more than the model's %d positions: using %d", self.numbers.seqlen, most, most
            )
        return min(self.numbers.seqlen, most)

    @contextmanager
    def _writers(
        self,
        output_dir: Path,
        formats: Sequence[Format],
        plan: Plan,
        *,
        several: bool,
        about: Mapping[str, Any] | None = None,
    ) -> Iterator[list[CheckpointWriter | GgufWriter]]:
        """One writer per format: into `output_dir` itself, or into a sub-folder each when there are several.

        about: what a stream's outcome depends on, for the ledger of what it has written.
        """
        with ExitStack() as stack:
            writers: list[CheckpointWriter | GgufWriter] = []
            for fmt in formats:
                folder = output_dir / fmt.name.replace(":", "-").replace("_", "-") if several else output_dir
                writer = self._writer(fmt, folder, plan, about=about)
                stack.enter_context(writer)
                writers.append(writer)
            yield writers

    def _cache_scales(self, fmt: Format) -> dict[str, torch.Tensor]:
        """The tensors of `static_kv_dtype` for `fmt`; empty when it is not asked for."""
        wanted = self.options.static_kv_dtype
        if wanted is None:
            return {}
        fmt.cache_scales({}, wanted)  # refuses before the model is run
        if self._cache_ranges is None:
            data = self._data(required=True)
            assert data is not None, "required data is there or an error"
            model = self._live_model()
            model.to(parse_devices(self.options.device_map).main)
            self._cache_ranges = cache_ranges(model, data, self.numbers.batch_size)
        return fmt.cache_scales(self._cache_ranges, wanted)

    def _writer(
        self, fmt: Format, folder: Path, plan: Plan, *, about: Mapping[str, Any] | None = None
    ) -> CheckpointWriter | GgufWriter:
        """What writes `plan` in format `fmt` into `folder`; nothing is opened yet."""
        subject, provenance = self.subject(), self._provenance(plan)
        if fmt.whole_model:
            split = parse_size(self.options.split_size) if self.options.split_size else 0
            return GgufWriter(folder, fmt, subject, plan, provenance, max_shard_bytes=split)
        made, limit = fmt.resolve(plan), parse_size(self.options.max_shard_size)
        ledger = None if about is None else Ledger(about, resume=self.options.resume)
        return CheckpointWriter(
            folder,
            made,
            subject,
            plan,
            provenance,
            max_shard_bytes=limit,
            ledger=ledger,
            cache=self._cache_scales(made),
        )

    def _provenance(self, plan: Plan) -> Provenance:
        body, numbers = self.subject().anatomy, self.numbers
        lists = zip(body.prefixes, body.block_lists, strict=True)
        used = {body.layers[name].block for name in plan}
        tuning: dict[str, object] = {"enable_quanted_input": False}
        if numbers.iters:
            tuning = {"iters": numbers.iters, "nsamples": numbers.nsamples, "seqlen": numbers.seqlen}
            if not self.options.enable_quanted_input:
                tuning["enable_quanted_input"] = False
        return Provenance(
            version=__version__,
            blocks=tuple(prefix for prefix, blocks in lists if used & set(blocks)),
            tuning=tuning,
            float_layers=(*(name for name in body.layers if name not in plan), *body.routers),
            cache=self.options.static_kv_dtype or "",
        )


def base_scheme(options: Options) -> Scheme:
    """The scheme for all layers: `scheme` by name or object, with the single settings on top.

    Raises SchemeError or NotYetError.
    """
    given = options.scheme
    if isinstance(given, str):
        start = preset(given)
    elif isinstance(given, Scheme):
        start = given
    elif isinstance(given, QuantizationScheme):
        start = Scheme.from_flat({f.name: given[f.name] for f in fields(given)})
    elif isinstance(given, dict):
        start = Scheme.from_flat(given)
    else:
        raise NotYetError(
            f"scheme of type {type(given).__name__} is not there yet; give a name, a dict or QuantizationScheme"
        )
    given_fields = {f.name: getattr(options, f.name) for f in fields(options)}
    said = {name: given_fields[name] for name in FLAT_NAMES if given_fields.get(name) is not None}
    scheme = Scheme.from_flat(said, start) if said else start
    _check_codecs(scheme)
    return scheme


def _check_spec(name: str, scheme: Scheme) -> None:
    """Raise SchemeError, naming the layer, when its data type cannot do its settings."""
    try:
        _check_codecs(scheme)
    except SchemeError as error:
        raise SchemeError(f"{name}: {error}") from error


def _check_codecs(scheme: Scheme) -> None:
    if scheme.weight is not None:
        codec_of(scheme.weight)
    if scheme.act is not None:
        codec_of(scheme.act)


def _mixed(plan: Plan) -> Iterator[str]:
    """One remark per kind of fused set whose layers differ, with the number of blocks it is so in."""
    kinds: Counter[tuple[str, str]] = Counter()
    for names in plan.mixed_fused_sets():
        experts = experts_of(names[0])
        place = names[0].rpartition(".")[0] if experts is None else experts
        settings = ", ".join(f"{name.rsplit('.', 1)[-1]}: {plan[name]}" for name in names)
        if experts is not None:
            counts = Counter(str(plan[name]) for name in names)
            settings = ", ".join(f"{count} layers {scheme}" for scheme, count in counts.items())
        kinds[re.sub(r"\.\d+\.", ".*.", place), settings] += 1
    for (place, settings), count in kinds.items():
        yield f"{place} ({count} times): servers merge these layers and refuse different settings ({settings})"


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
