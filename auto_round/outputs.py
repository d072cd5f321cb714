"""The writers of a job, one per format."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from auto_round.core.plan import Plan
from auto_round.core.rotation import stored
from auto_round.formats.base import Format, Provenance
from auto_round.jobs.export import CheckpointWriter
from auto_round.jobs.gguf_export import GgufWriter
from auto_round.jobs.ledger import Ledger
from auto_round.material import Material
from auto_round.models.imatrix import origin_of, read_imatrix
from auto_round.models.shards import parse_size
from auto_round.models.subject import Subject
from auto_round.options import Options
from auto_round.sources.dataset_names import name_of
from auto_round.version import __version__


@contextmanager
def open_writers(
    material: Material,
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
            # auto_round:auto_gptq goes to auto-round-auto-gptq, as scripts that read upstream's output expect.
            folder = output_dir / fmt.name.replace(":", "-").replace("_", "-") if several else output_dir
            writer = writer_for(material, fmt, folder, plan, about=about)
            stack.enter_context(writer)
            writers.append(writer)
        yield writers


def file_bytes(material: Material, fmt: Format, plan: Plan) -> int:
    """Exact bytes of the weight files of `plan` in format `fmt`."""
    # A writer wants a folder, and writes nothing into it before it is opened.
    with tempfile.TemporaryDirectory() as folder:
        return writer_for(material, fmt, Path(folder) / "out", plan).file_bytes()


def writer_for(
    material: Material,
    fmt: Format,
    folder: Path,
    plan: Plan,
    *,
    about: Mapping[str, Any] | None = None,
) -> CheckpointWriter | GgufWriter:
    """What writes `plan` in format `fmt` into `folder`; nothing is opened yet."""
    subject, options = material.subject(), material.options
    provenance = provenance_of(subject, plan, options)
    provenance = replace(
        provenance,
        importance=_importance(material, plan),
        tuning={**provenance.tuning, **_told(material)},
    )
    if fmt.whole_model:
        split = parse_size(options.split_size, "split_size") if options.split_size else 0
        return GgufWriter(folder, fmt, subject, plan, provenance, max_shard_bytes=split)
    made, limit = fmt.resolve(plan), parse_size(options.max_shard_size)
    # Only a stream fills files out of order; a tuned job has the journal for its blocks.
    ledger = None if about is None else Ledger(about, resume=options.resume)
    return CheckpointWriter(
        folder,
        made,
        subject,
        plan,
        provenance,
        max_shard_bytes=limit,
        ledger=ledger,
        more={**_cache_scales(material, made), **_rotations(material)},
    )


def provenance_of(subject: Subject, plan: Plan, options: Options) -> Provenance:
    """How the checkpoint of `plan` comes to be, for its configuration."""
    body, numbers = subject.anatomy, options.numbers()
    lists = zip(body.prefixes, body.block_lists, strict=True)
    used = {body.layers[name].block for name in plan}
    # As upstream writes it: false where nothing is tuned, left out where it is the default.
    tuning: dict[str, object] = {"enable_quanted_input": False}
    if numbers.iters:
        tuning = {"iters": numbers.iters, "nsamples": numbers.nsamples, "seqlen": numbers.seqlen}
        if not options.enable_quanted_input:
            tuning["enable_quanted_input"] = False
    return Provenance(
        version=__version__,
        blocks=tuple(prefix for prefix, blocks in lists if used & set(blocks)),
        tuning=tuning,
        float_layers=(*(name for name in body.layers if name not in plan), *body.routers),
        cache=options.static_kv_dtype or "",
    )


def _importance(material: Material, plan: Plan) -> dict[str, object]:
    """Where the importance of inputs came from; empty when weights alone counted."""
    options, data = material.options, material.calibration
    entries = len(plan.quantized())
    if options.imatrix is not None:
        path = Path(options.imatrix)
        return {"file": path.name, "entries_count": len(read_imatrix(path)), **origin_of(path)}
    if data is None:
        return {}
    return {"dataset": name_of(options.dataset), "entries_count": entries, "chunks_count": len(data.tokens)}


def _told(material: Material) -> dict[str, object]:
    """What a configuration says of rotations that readers have to carry out."""
    wish = material.rotator.wish
    return wish.described(material.subject().files.config) if wish is not None and wish.online else {}


def _rotations(material: Material) -> dict[str, torch.Tensor]:
    """The tensors that tell the rotation of each layer's inputs."""
    return {
        f"{material.subject().stored_name(name)}.{suffix}": tensor
        for name, (place, rotation) in material.rotator.turns.items()
        for suffix, tensor in stored(place, rotation).items()
    }


def _cache_scales(material: Material, fmt: Format) -> dict[str, torch.Tensor]:
    """The tensors of `static_kv_dtype` for `fmt`; empty when it is not asked for."""
    wanted = material.options.static_kv_dtype
    if wanted is None:
        return {}
    fmt.cache_scales({}, wanted)  # refuses before the model is run
    return fmt.cache_scales(material.cache_ranges(), wanted)
