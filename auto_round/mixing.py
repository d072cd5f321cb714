"""From an `AutoScheme` to a scheme for each layer, before the job itself is planned."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from auto_round.codecs.base import codec_of, preset
from auto_round.core.auto_scheme import AutoScheme
from auto_round.core.errors import AutoRoundError, PlanError
from auto_round.core.plan import Plan
from auto_round.core.scheme import Scheme
from auto_round.formats.base import Format
from auto_round.jobs.auto_scheme import (
    NSAMPLES,
    SEQLEN,
    Candidates,
    Mix,
    Sensitivities,
    agreeing,
    stored_bits,
)
from auto_round.jobs.planner import base_memory, rounded
from auto_round.jobs.quantize import Pass
from auto_round.jobs.starts import start
from auto_round.material import Material
from auto_round.models.anatomy import Anatomy
from auto_round.models.device import execution_dtype, parse_devices
from auto_round.options import Options
from auto_round.planning import base_scheme, formats_for, selected
from auto_round.sizing import limit
from auto_round.sources.base import Needs
from auto_round.sources.blocks import LiveSource
from auto_round.sources.live_block import Execution
from auto_round.steps.base import Step

logger = logging.getLogger("auto_round")


def with_mix(material: Material, options: Options, given: str | None) -> tuple[Options, Mix]:
    """(`options` with the scheme that most weights get, what each layer gets) for those whose scheme is a budget.

    given: the formats, when they are not in `options`.
    """
    wish, named = options.scheme, (given or options.format or "").upper()
    assert isinstance(wish, AutoScheme), "nothing is to be chosen"
    labels = wish.schemes(preset)

    def with_base(label: str) -> Options:
        # A GGUF scheme by its name, which says more than a data type does: the format of the whole file.
        whole = named if named.startswith("GGUF:") else label
        return replace(options, scheme=whole if label.startswith("GGUF:") else labels[label])

    first = with_base(next(iter(labels)))
    formats = formats_for(first, base_scheme(first), given)
    model = material.model if material.model is not None else material.given
    mix = mixed(model, material.tokenizer, options, formats)
    return with_base(mix.base), mix


def mixed(model: str | Path | nn.Module, tokenizer: Any, options: Options, formats: Sequence[Format]) -> Mix:
    """The choice that `options.scheme`, an `AutoScheme`, stands for; what `formats` cannot hold is refused first.

    Raises PlanError for a budget that is not possible, or a limit of memory that cannot be kept.
    """
    wish = options.scheme
    assert isinstance(wish, AutoScheme), "nothing is to be chosen"
    schemes = wish.schemes(preset)
    scoring = scoring_options(options, wish, next(iter(schemes.values())))
    material = Material(model, tokenizer, scoring, scoring.scheme)
    body = material.subject().anatomy
    plan = selected(body, scoring, scoring.scheme)
    candidates = _candidates(body, plan, schemes, wish, merged=any(fmt.merged for fmt in formats))
    candidates.check(wish.avg_bits)
    plans = {
        label: plan.override(dict.fromkeys(candidates.layers, scheme), "AutoScheme")
        for label, scheme in schemes.items()
    }
    for label, each in plans.items():
        _check_formats(label, each, formats)
    _check_memory(material, scoring, len(schemes))
    data = material.samples(Needs.FORWARD, Needs.FORWARD)
    assert data is not None, "required data is there or an error"
    device = parse_devices(scoring.device_map).main
    execution = Execution(
        device=device, quantized_inputs=False, amp=execution_dtype(device) if scoring.amp else None,
        activations="file" if wish.low_gpu_mem_usage else "memory", compiled=bool(scoring.enable_torch_compile),
    )  # fmt: skip
    logger.info(
        "AutoScheme: %d layers in %d groups, %d options, measured on %d samples of %d tokens",
        len(candidates.layers), len(candidates.groups), len(schemes), *data.tokens.shape,
    )  # fmt: skip
    found = Sensitivities(candidates)
    tokens = data.tokens.numel() if data.valid is None else int(data.valid.sum())
    passes = {label: Pass(each, _steps(options), []) for label, each in plans.items()}
    with torch.no_grad():
        found.measure(LiveSource(material.runnable(), body, execution, data), passes, tokens, options.seed)
    mix = found.choose(wish.avg_bits)
    logger.info("AutoScheme: %s", mix)
    return mix


def _steps(options: Options) -> list[Step]:
    """What weights go through before they are tuned, if they are: errors are those of what is really rounded."""
    numbers = options.numbers()
    if options.model_free:
        return [] if numbers.disable_opt_rtn else start("search")
    return start(options.start_of(numbers))


def _check_formats(label: str, plan: Plan, formats: Sequence[Format]) -> None:
    for fmt in formats:
        if fmt.whole_model:  # finds another type for what it cannot hold
            continue
        try:
            fmt.resolve(plan).check(plan)
        except AutoRoundError as error:
            raise type(error)(f"AutoScheme option {label}: {error}") from error


def scoring_options(options: Options, wish: AutoScheme, scheme: Scheme) -> Options:
    """Those of the job with the wish's own data and machine, for a model that is run and not quantized."""

    def said(value: Any, otherwise: Any) -> Any:
        return otherwise if value is None else value

    seqlen = min(SEQLEN, options.numbers().seqlen)
    return Options(
        scheme=scheme, layer_config=options.layer_config, ignore_layers=options.ignore_layers,
        quant_lm_head=options.quant_lm_head, to_quant_block_names=options.to_quant_block_names,
        nsamples=said(wish.nsamples, NSAMPLES), seqlen=said(wish.seqlen, seqlen), seed=options.seed, amp=options.amp,
        dataset=said(wish.dataset, options.dataset), device_map=said(wish.device_map, options.device_map),
        enable_torch_compile=said(wish.enable_torch_compile, options.enable_torch_compile),
        low_cpu_mem_usage=said(options.low_cpu_mem_usage, wish.low_cpu_mem_usage),
        model_dtype=options.model_dtype, max_ram=options.max_ram,
        trust_remote_code=options.trust_remote_code, platform=options.platform, disable_model_free=True,
    )  # fmt: skip


def _candidates(
    body: Anatomy, plan: Plan, schemes: Mapping[str, Scheme], wish: AutoScheme, *, merged: bool
) -> Candidates:
    layers = {}
    for name, shape in plan.shapes.items():
        specs = [scheme.weight for scheme in schemes.values() if scheme.weight is not None]
        refused = next((why for spec in specs if (why := codec_of(spec).rejects_row(shape[1]))), None)
        if refused is not None:
            logger.info("AutoScheme: %s is left to the format: %s", name, refused)
        elif name not in plan.why:
            layers[name] = shape
    if not layers:
        raise PlanError(
            "AutoScheme: no layer is left to choose for; leave some out of layer_config and ignore_layers"
        )
    fixed = {name: plan[name] for name in plan.quantized() if name in plan.why}
    groups = agreeing(
        {name: body.layers[name].block for name in layers},
        body.fused() if merged else (),
        wish.shared_layers or (),
    )
    codes_only = wish.ignore_scale_zp_bits
    return Candidates(
        schemes=schemes, layers=layers, groups=groups, codes_only=codes_only,
        taken=sum(stored_bits(scheme, plan.shapes[n], codes_only=codes_only) for n, scheme in fixed.items()),
        counted=sum(plan.shapes[n][0] * plan.shapes[n][1] for n in fixed),
    )  # fmt: skip


def _check_memory(material: Material, scoring: Options, options: int) -> None:
    """Raise PlanError when measuring so many options would break `max_ram`, naming the smallest that would do."""
    most = limit(scoring.max_ram, "max_ram")
    if most is None:
        return
    tree = material.subject().tree
    assert tree is not None, "jobs with data have a module tree"
    blocks = material.subject().anatomy.in_order()
    sizes = [sum(p.numel() for p in tree.get_submodule(name).parameters()) for name in blocks]
    outside = sum(p.numel() for p in tree.parameters()) - sum(sizes)
    # Of a block float32 weights, rounded ones, room to work, and errors of every option in 16 bits; embedding and head.
    least = base_memory() + max((12 + 2 * options) * max(sizes), 8 * outside)
    if least > most:
        raise PlanError(
            f"max_ram {most:,} bytes is not enough for AutoScheme, which takes {least:,}. Give --max-ram "
            f"{rounded(least)}, or a scheme per layer in layer_config"
        )
