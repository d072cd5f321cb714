"""Every option of a quantization job, once: the API takes them as keywords, the command line as flags.

Names are the public ones of the user guide. `None` means "not said": the recipe or the scheme decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from auto_round.core.errors import NotYetError, PlanError, nearest
from auto_round.recipes import Recipe, recipe_named, schedule_named

DEFAULT_SCHEME = "W4A16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user asked for."""

    scheme: Any = DEFAULT_SCHEME
    schemes: Any = None
    """Schemes to choose from, with `bits` as the average: short for an `AutoScheme`."""
    bits: float | None = None
    group_size: int | None = None
    sym: bool | None = None
    data_type: str | None = None
    scale_dtype: str | None = None
    act_bits: int | None = None
    act_group_size: int | None = None
    act_sym: bool | None = None
    act_data_type: str | None = None
    act_dynamic: bool | None = None
    act_percentile: float = 100.0
    super_bits: int | None = None
    super_group_size: int | None = None
    layer_config: Any = None
    ignore_layers: Any = None
    quant_lm_head: bool = False
    to_quant_block_names: Any = None

    recipe: str = "default"
    algorithm: str | None = None
    start: str | None = None
    enable_awq: bool = False
    duo_scaling: bool | str = "true"
    n_grid: int = 20
    alg_configs: Any = None
    iters: int | None = None
    lr: float | None = None
    minmax_lr: float | None = None
    momentum: float = 0.0
    nsamples: int | None = None
    seqlen: int | None = None
    batch_size: int | None = None
    gradient_accumulate_steps: int = 1
    enable_minmax_tuning: bool = True
    enable_quanted_input: bool = True
    enable_adam: bool = False
    not_use_best_mse: bool = False
    disable_opt_rtn: bool | None = None
    enable_opt_rtn: bool | None = None
    seed: int = 42
    time_budget: str | float | None = None

    dataset: Any = None
    device_map: Any = None
    amp: bool = True
    model_dtype: str | None = None
    low_gpu_mem_usage: bool = False
    low_cpu_mem_usage: bool | None = None
    max_ram: str | int | None = None
    max_vram: str | int | None = None
    report: str | None = None
    enable_torch_compile: bool | None = None
    enable_deterministic_algorithms: bool = False
    trust_remote_code: bool = False
    platform: str = "hf"
    model_free: bool = False
    disable_model_free: bool = False
    workers: int | None = None
    distributed: str | None = None
    format: str | None = None
    resume: bool = False
    max_shard_size: str | int = "5GB"
    split_size: str | int | None = None
    imatrix: str | None = None
    save_imatrix: str | None = None

    nblocks: int = 1
    enable_alg_ext: bool = False
    enable_norm_bias_tuning: bool = False
    enable_lfq: bool = False
    dynamic_max_gap: int = -1
    lr_scheduler: Any = None
    rotation_config: Any = None
    static_kv_dtype: str | None = None
    static_attention_dtype: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Options from keywords; deprecated spellings are understood.

        Raises TypeError with the nearest known name for an unknown keyword, NotYetError for one of later work.
        """
        named = {ALIASES.get(key, key): value for key, value in given.items()}
        known = [f.name for f in fields(cls)]
        for key in named:
            if key not in known:
                raise TypeError(
                    f"AutoRound() got an unexpected keyword {key!r}.{nearest(key, [*known, *ALIASES])}"
                )
        options = cls(**named)
        options.check()
        return options

    def check(self) -> None:
        """Raise NotYetError for what this version does not do, PlanError for numbers out of range."""
        defaults = {f.name: f.default for f in fields(self)}
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, sentence in LATER.items():
            # The default and None ask for nothing, so scripts that pass every keyword go on working.
            if values[name] != defaults[name] and values[name] is not None:
                raise NotYetError(f"{name}={values[name]!r}: {sentence}")
        if self.start not in (None, *STARTS):
            raise PlanError(f"start must be one of {', '.join(STARTS)}, got {self.start!r}")
        if not 50 <= self.act_percentile <= 100:
            raise PlanError(
                f"act_percentile must be 50 to 100, got {self.act_percentile!r}; 100 is the maximum"
            )
        if self.save_imatrix is not None and self.resume:
            raise PlanError("save_imatrix: a journal does not hold importance, so leave resume out")
        schedule_named(self.lr_scheduler)
        if self.rotation_config is not None:
            self.check_rotations()
        if not self.numbers().iters:
            for name in TUNING_ONLY:
                if values[name] != defaults[name]:
                    raise PlanError(
                        f"{name}={values[name]!r} is about tuning, and this recipe does none: leave it out, or "
                        "give iters"
                    )
        for name, least in AT_LEAST.items():
            value = values[name]
            if value is not None and (isinstance(value, bool) or value < least):  # True is 1 to Python
                raise PlanError(f"{name} must be {least} or more, got {value!r}")

    def check_rotations(self) -> None:
        """Raise PlanError for rotations that nobody knows, or for what does not go with them."""
        from auto_round.core.rotation import rotations_of  # torch, which other options can do without

        rotations_of(self.rotation_config)
        for name in NOT_WITH_ROTATIONS:
            if getattr(self, name):
                raise PlanError(
                    f"{name}={getattr(self, name)!r} goes by the model as it is stored, and rotation_config turns it: "
                    "leave one of them out"
                )

    def check_awq(self) -> None:
        """Raise PlanError for what does not go with AWQ, or is about it alone."""
        if str(self.duo_scaling).casefold() not in DUO_SCALING:
            raise PlanError(f"duo_scaling must be one of {', '.join(DUO_SCALING)}, got {self.duo_scaling!r}")
        if self.enable_awq:
            for name in NOT_WITH_AWQ:
                if getattr(self, name) is not None:
                    raise PlanError(
                        f"{name}={getattr(self, name)!r} is about inputs as they are, and awq changes their size: "
                        "leave one of them out"
                    )
        elif DUO_SCALING[str(self.duo_scaling).casefold()] is not True or self.n_grid != 20:
            raise PlanError(
                "duo_scaling and n_grid are about awq: give algorithm='awq' too, or leave them out"
            )

    def numbers(self) -> Recipe:
        """The recipe's numbers with what was said explicitly."""
        base = recipe_named(self.recipe)

        def said(value: Any, otherwise: Any) -> Any:
            return otherwise if value is None else value

        # model_free means plain rounding unless something else is asked for.
        disable = said(self.disable_opt_rtn, base.disable_opt_rtn or self.model_free)
        if self.algorithm == "rtn" and self.enable_opt_rtn is None:
            disable = said(self.disable_opt_rtn, True)  # "rtn" by name means plain rounding
        return Recipe(
            iters=0
            if self.algorithm in ("rtn", "opt_rtn", "gptq")
            else said(self.iters, 0 if self.model_free else base.iters),
            nsamples=said(self.nsamples, base.nsamples),
            seqlen=said(self.seqlen, base.seqlen),
            batch_size=said(self.batch_size, base.batch_size),
            lr=said(self.lr, base.lr),
            disable_opt_rtn=disable and not self.enable_opt_rtn,
        )

    def start_of(self, numbers: Recipe) -> str:
        """The start said, or the best known one for what follows: see `jobs.starts.start`."""
        if self.algorithm == "sign_round_published" or (numbers.disable_opt_rtn and self.start is None):
            return "none"
        return self.start or ("gptq" if numbers.iters or self.algorithm == "gptq" else "rounding")


ALIASES = {
    "device": "device_map",
    "fp_layers": "ignore_layers",
    "bs": "batch_size",
    "train_bs": "batch_size",
    "adam": "enable_adam",
    "iter": "iters",
    "nsample": "nsamples",
    "seq_len": "seqlen",
    "dtype": "data_type",
    "act_dtype": "act_data_type",
    "algorithms": "algorithm",
    "awq_duo_scaling": "duo_scaling",
    "awq_n_grid": "n_grid",
}
"""Other spellings of keywords."""

DUO_SCALING = {"true": True, "false": False, "both": None}
"""Whether AWQ goes by the size of weights too, as it is written: None tries both."""

NOT_WITH_AWQ = ("imatrix", "save_imatrix", "static_kv_dtype")

NOT_WITH_ROTATIONS = ("imatrix", "save_imatrix", "model_free", "distributed")

STARTS = ("gptq", "search", "none")

AT_LEAST = {
    "iters": 0,
    "workers": 1,
    "nblocks": 1,
    "n_grid": 2,
    "nsamples": 0,
    "seqlen": 1,
    "batch_size": 1,
    "gradient_accumulate_steps": 1,
    "lr": 0,
    "minmax_lr": 0,
}
"""Smallest sensible numbers."""

TUNING_ONLY = ("nblocks", "enable_norm_bias_tuning", "enable_lfq", "time_budget")
"""Options that mean nothing without sign steps."""

LATER = {
    "static_attention_dtype": "quantized attention is not there yet",
    "super_bits": "scales of scales (GGUF) are not there yet",
    "super_group_size": "scales of scales (GGUF) are not there yet",
}
"""Options of later work: any value but the default is refused with this sentence."""
