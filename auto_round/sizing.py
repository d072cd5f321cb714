"""Where a job's tensors live, decided before the work: from limits, presets and devices to a `Placement`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from auto_round.core.errors import PlanError
from auto_round.core.placement import Placement
from auto_round.jobs.placing import Wish, place, place_stream, seconds_by_steps
from auto_round.jobs.planner import SAMPLES, Making, Stage, base_memory, rounded
from auto_round.jobs.workers import cores
from auto_round.material import Material
from auto_round.models.anatomy import hidden_width
from auto_round.models.device import Devices, parse_devices
from auto_round.models.memory import exact_allocations
from auto_round.models.shards import parse_size
from auto_round.sources.base import Needs
from auto_round.sources.blocks import LiveSource
from auto_round.sources.dataset import Calibration
from auto_round.sources.tensors import TensorSource
from auto_round.steps.base import Step


def limit(size: str | int | None, name: str) -> int | None:
    """The limit called `name` in bytes; None when there is none."""
    return None if size is None else parse_size(size, name)


def check_whole(material: Material, why: str) -> None:
    """Raise PlanError when loading the model as a whole, because of `why`, would break the limit by itself."""
    max_ram = limit(material.options.max_ram, "max_ram")
    if max_ram is None or material.model is not None:
        return
    least = base_memory() + material.weight_bytes()
    if least > max_ram:
        raise PlanError(
            f"max_ram {max_ram:,} bytes is not enough: the model is to be in memory as a whole ({why}), which takes "
            f"{material.weight_bytes():,}. Leave that out, or give --max-ram {rounded(least)} or more"
        )


LiveMaker = Callable[[Placement, "Calibration | None", bool], LiveSource]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    """What decides where things live. makings: the plans of the job with their steps and formats.
    live: makes the source of a placement, of data, and of whether its inputs are quantized. keeps: whether the codes
    stay in memory. measure: whether memory and time are to be known even if there is no limit. with_data: whether the
    calibration data is loaded first, so that it counts as part of the process."""

    material: Material
    makings: Sequence[Making]
    live: LiveMaker
    keeps: bool = False
    measure: bool = False
    with_data: bool = True

    def placement(self) -> tuple[Placement, float | None]:
        """The placement, and the estimated seconds when something was measured. Raises PlanError for a limit that
        cannot be kept, naming the smallest that can."""
        options = self.material.options
        devices = parse_devices(
            options.device_map
        )  # raises for one that is not there, also when none is needed
        max_ram, max_vram = limit(options.max_ram, "max_ram"), limit(options.max_vram, "max_vram")
        if max_ram is not None:
            exact_allocations()
        steps, needs, requires = self._steps()
        if options.model_free and requires > Needs.NOTHING:
            raise PlanError(
                "model_free quantizes from weights alone: use iters=0 and a scheme whose inputs need no calibration, "
                "or leave model_free out"
            )
        data = self.material.samples(needs, requires) if self.with_data else None
        if self.streams(needs, data):
            subject = self.material.subject()
            found, seconds = place_stream(
                TensorSource(subject.anatomy, subject.files.store, subject.names), self.makings,
                workers=options.workers or cores(), max_ram=max_ram, measure=self.measure,
            )  # fmt: skip
            return replace(found, why=(*self._unused(), *found.why)), seconds
        home = self.material.weights_home()
        if home.whole:
            check_whole(self.material, home.why)
        wish = self._wish(steps, needs, data, devices)
        found, seconds = place(wish, max_ram=max_ram, max_vram=max_vram, measure=self.measure)
        where = "in memory as a whole" if home.whole else "read block by block"
        found = replace(found, why=(f"weights are {where}: {home.why}", *found.why))
        written = self.material.author_bytes
        return (found if found.ram is None else replace(found, ram=max(found.ram, written))), seconds

    def seconds_by_steps(self) -> Callable[[int], float]:
        """Estimated seconds of the job by its number of sign steps."""
        devices = parse_devices(self.material.options.device_map)
        steps, needs, requires = self._steps()
        data = self.material.samples(needs, requires) if self.with_data else None
        return seconds_by_steps(self._wish(steps, needs, data, devices))

    def _steps(self) -> tuple[list[Step], Needs, Needs]:
        """(the steps of all plans, what they make use of, what they cannot do without)."""
        size = self.material.options.numbers().batch_size
        steps = [step for making in self.makings for step in making.steps(size, None)]
        needs = max((step.needs for step in steps), default=Needs.NOTHING)
        return steps, needs, max((step.requires for step in steps), default=Needs.NOTHING)

    def streams(self, needs: Needs, data: Calibration | None) -> bool:
        """Whether weights are all that is looked at, straight from the shards."""
        options, material = self.material.options, self.material
        fed = data is not None or (
            not self.with_data and needs > Needs.NOTHING and bool(options.numbers().nsamples)
        )
        return not fed and material.model is None and not options.disable_model_free

    def _unused(self) -> tuple[str, ...]:
        """What was asked for and has nothing to do in a stream."""
        if not self.material.options.low_gpu_mem_usage:
            return ()
        return (
            "low_gpu_mem_usage: weights are all that is looked at, so there are no hidden states to move",
        )

    def _wish(self, steps: Sequence[Step], needs: Needs, data: Calibration | None, devices: Devices) -> Wish:
        material, options = self.material, self.material.options
        numbers = options.numbers()
        seqlen, tuned = material.seqlen(), any(step.requires is Needs.FORWARD for step in steps)
        two = tuned and options.enable_quanted_input
        tree = material.subject().tree
        assert tree is not None, "only streams go by names alone"
        rows = tree.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        width = hidden_width(tree)
        padded = data is not None and data.attention_mask is not None
        fed = needs is not Needs.NOTHING and (data is not None or not self.with_data)

        def source(length: int) -> LiveSource:
            # Any tokens: how long a block takes and what it holds depend on their number.
            tokens = torch.randint(rows, (SAMPLES, length), generator=torch.Generator().manual_seed(0))
            mask = (
                (torch.arange(length) > 0).long().expand(SAMPLES, length) if padded and length > 1 else None
            )
            one = Placement(device=str(devices.main), micro_batch=1)
            return self.live(one, Calibration(tokens, mask) if fed else None, tuned)

        states = seqlen * width * torch.float32.itemsize if fed else 0
        stage = Stage(
            source=source, makings=self.makings, seqlen=seqlen, states=states,
            drawn=min(SAMPLES - 1, numbers.batch_size * options.gradient_accumulate_steps),
        )  # fmt: skip
        return Wish(
            subject=material.subject(), devices=devices, batch=numbers.batch_size,
            samples=len(data.tokens) if data is not None else material.nsamples(), iters=numbers.iters,
            # Targets take the place of the float chain, but where starved experts are fed from it once more. After the
            # blocks both chains stay while the layer there has its own.
            chains=3 if two and material.subject().anatomy.experts else 2, chains_outside=4 if two else 2,
            nblocks=options.nblocks,
            low_vram=options.low_gpu_mem_usage,
            resident=material.weights_home().whole, keeps=self.keeps, stage=stage,
        )  # fmt: skip
