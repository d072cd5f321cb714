"""A stream on several machines: each file of the output is one piece of work, and one machine's at a time.

The process that was called plans, lays the files out, keeps the ledger, verifies and publishes; the others only fill
places. All see model and output under the same paths.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from auto_round.assembly import steps_for
from auto_round.core.errors import PlanError
from auto_round.core.plan import Plan
from auto_round.formats.base import parse_formats
from auto_round.jobs.cluster import in_cluster
from auto_round.jobs.export import CheckpointWriter, Written
from auto_round.jobs.quantize import BlockResult, Observer, Pass
from auto_round.jobs.stream import Progress, StreamPass, Unit, run_unit, work_of
from auto_round.material import Material
from auto_round.options import Options
from auto_round.outputs import writer_for
from auto_round.planning import base_scheme
from auto_round.sources.tensors import TensorSource
from auto_round.version import __version__


@dataclass(frozen=True, slots=True)
class Order:
    """All that another machine needs to know about the job."""

    version: str
    model: Path
    options: Options
    format: str
    folder: Path
    plan: Plan


@dataclass(slots=True)
class Share:
    """What goes to one file, or to several when layers in them share parameters."""

    units: list[Unit]
    copied: list[str]


@dataclass(frozen=True, slots=True)
class Prepared:
    """An order, ready to be worked on in this process."""

    source: TensorSource
    made: StreamPass
    writer: CheckpointWriter


def spread(
    material: Material, source: TensorSource, passes: Sequence[Pass], observers: Sequence[Observer]
) -> None:
    """Fill the places of the only writer of `passes` on the machines of `options.distributed`."""
    writer, plan, address = _only_writer(passes), passes[0].plan, material.options.distributed
    assert address is not None and material.folder is not None, "streams read folders"
    order = Order(
        version=__version__,
        model=material.folder.resolve(),
        options=material.options,
        format=writer.format.name,
        folder=writer.folder.resolve(),
        plan=plan,
    )
    work = work_of(source, [StreamPass(plan, (), [writer])])
    progress = Progress(work, observers)
    shares = by_file(work, writer)
    for written, results in in_cluster(fill, pickle.dumps(order), shares, address=address):
        writer.absorb(written)
        for result in results:
            progress.add(result)


def _only_writer(passes: Sequence[Pass]) -> CheckpointWriter:
    writers = [writer for each in passes for writer in each.writers]
    if len(writers) != 1 or not isinstance(writers[0], CheckpointWriter):
        raise PlanError(
            "distributed: machines fill one checkpoint of safetensors files; give one --format, other than gguf"
        )
    return writers[0]


def by_file(work: Sequence[Unit], writer: CheckpointWriter) -> list[Share]:
    """`work`, and the copies that `writer` wants, by the files that they go to.

    Two machines that write to one file at a time may undo each other's pages on network storage.
    """
    share_of: dict[str, Share] = {}
    for unit in work:
        files = {file for layer in unit.layers for file in writer.files_of(layer)}
        _joint(share_of, files).units.append(unit)
    for name in writer.to_copy():
        _joint(share_of, writer.files_of(name)).copied.append(name)
    return list({id(share): share for share in share_of.values()}.values())


def _joint(share_of: dict[str, Share], files: set[str]) -> Share:
    """The share of all `files`; those that they had are put together."""
    known = list({id(share_of[file]): share_of[file] for file in files if file in share_of}.values())
    first = known[0] if known else Share([], [])
    for other in known[1:]:
        first.units += other.units
        first.copied += other.copied
        files = files | {file for file, share in share_of.items() if share is other}
    share_of.update(dict.fromkeys(files, first))
    return first


def fill(order: bytes, share: Share) -> tuple[Written, list[BlockResult]]:
    """Do `share` in this process, on one core."""
    torch.set_num_threads(1)
    job = _prepared(order)
    with job.writer.joined():
        done = [run_unit(job.source, [job.made], unit) for unit in share.units]
        for name in share.copied:
            job.writer.copy(name)
    layers = [layer for unit in share.units for layer in unit.layers]
    return job.writer.written_of(layers, share.copied), [result for result in done if result is not None]


@lru_cache(maxsize=1)  # a process of the cluster does many pieces of one job, and headers need reading once
def _prepared(order: bytes) -> Prepared:
    what: Order = pickle.loads(order)
    if what.version != __version__:
        raise PlanError(
            f"distributed: this machine has auto-round {__version__}, the one that plans has {what.version}; "
            "install the same version on all of them"
        )
    material = Material(what.model, None, what.options, base_scheme(what.options))
    subject, (fmt,) = material.subject(), parse_formats(what.format)
    source = TensorSource(subject.anatomy, subject.files.store, subject.names)
    steps = steps_for(what.plan, what.options, subject, at_once=1)
    for step in steps:
        step.prepare(source, what.plan)
    writer = writer_for(material, fmt, what.folder, what.plan)
    assert isinstance(writer, CheckpointWriter), "others are refused before anything is sent"
    return Prepared(source, StreamPass(what.plan, steps, [writer]), writer)
