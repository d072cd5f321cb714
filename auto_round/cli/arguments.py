"""The command line as typed data: one dataclass per group of flags, and their translation to `Options`.

Only spellings, help texts and defaults live here. Every flag is accepted with "-" and with "_".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any

from cyclopts import Group, Parameter

from auto_round.core.auto_scheme import AutoScheme
from auto_round.core.errors import NotYetError, PlanError
from auto_round.options import Options


def _flag(*names: str, help: str = "") -> Parameter:
    return Parameter(name=[f"--{name}" for name in names] or None, help=help)


def _switch(*names: str, help: str = "") -> Parameter:
    # No "--no-" twin, which cyclopts would make: published commands spell the opposite "--disable-".
    return Parameter(name=[f"--{name}" for name in names] or None, help=help, negative="")


Text = str | None
Number = int | None
Real = float | None


@Parameter(name="*", group=Group("Output", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the checkpoint goes and in which formats."""

    output_dir: Annotated[
        str, _flag("output-dir", help="Folder to write; several formats get a sub-folder each.")
    ] = "./tmp_autoround"
    format: Annotated[
        Text,
        _flag(
            "format",
            "formats",
            help="One or several of `auto-round list format`, comma separated; default auto_round, or that of a GGUF "
            "scheme.",
        ),
    ] = None
    max_shard_size: Annotated[str, _flag("max-shard-size", help="Largest weight file, such as 5GB.")] = "5GB"
    report: Annotated[
        Text, _flag("report", help="JSON file with blocks, placement, planned and measured memory.")
    ] = None
    dry_run: Annotated[
        bool, _switch("dry-run", help="Show layers, sizes, memory and time; quantize nothing.")
    ] = False
    resume: Annotated[
        bool, _switch("resume", help="Go on with the blocks that an interrupted run finished.")
    ] = False
    split_size: Annotated[Text, _flag("split-size", help="Cut a GGUF file into parts of this size.")] = None


@Parameter(name="*", group=Group("Scheme", sort_key=2))
@dataclass(frozen=True, kw_only=True)
class SchemeFlags:
    """Number formats, globally and per layer."""

    scheme: Annotated[str, _flag("scheme", help="One of `auto-round list scheme`.")] = "W4A16"
    bits: Annotated[
        Real, _flag("bits", help="Overrides the scheme's bits; with --schemes, bits per weight on average.")
    ] = None
    avg_bits: Annotated[
        Real,
        _flag("avg-bits", "target-bits", help="Bits per weight on average, chosen per layer from --options."),
    ] = None
    options: Annotated[
        tuple[str, ...],
        Parameter(name=["--options", "--schemes"], consume_multiple=True, negative="",
                  help="Schemes that layers may get: W2A16G64,W4A16,BF16."),
    ] = ()  # fmt: skip
    shared_layers: Annotated[
        tuple[str, ...],
        Parameter(consume_multiple=True, negative="",
                  help="Layers that get the same scheme in a block, a,b or a b; again for another set."),
    ] = ()  # fmt: skip
    ignore_scale_zp_bits: Annotated[
        bool, _switch("ignore-scale-zp-bits", help="Averages count codes alone, without scales.")
    ] = False
    group_size: Annotated[Text, _flag("group-size", help="Weights that share a scale; -1: one per row.")] = (
        None
    )
    asym: Annotated[bool, _switch("asym", help="Asymmetric: with zero points.")] = False
    data_type: Annotated[Text, _flag("data-type", "dtype", help="Data type of the weights.")] = None
    scale_dtype: Annotated[Text, _flag("scale-dtype", help="Dtype of stored scales.")] = None
    act_bits: Annotated[Number, _flag("act-bits", help="Bits of activations; 16 leaves them alone.")] = None
    act_group_size: Annotated[Number, _flag("act-group-size")] = None
    act_asym: Annotated[bool, _switch("act-asym")] = False
    act_data_type: Annotated[Text, _flag("act-data-type", "act-dtype")] = None
    disable_act_dynamic: Annotated[bool, _switch("disable-act-dynamic")] = False
    act_percentile: Annotated[
        float, _flag("act-percentile", help="Per cent of inputs that calibrated ranges hold.")
    ] = 100.0
    super_bits: Annotated[Number, _flag("super-bits")] = None
    super_group_size: Annotated[Number, _flag("super-group-size")] = None
    layer_config: Annotated[
        Text, _flag("layer-config", help="Settings per layer: {k_proj:{bits:8},mlp:{group_size:32}}.")
    ] = None
    ignore_layers: Annotated[
        Text, _flag("ignore-layers", "fp-layers", help="Layers left in floating point, comma separated.")
    ] = None
    quant_lm_head: Annotated[bool, _flag("quant-lm-head", help="Quantize the output head too.")] = False
    static_kv_dtype: Annotated[
        Text, _flag("static-kv-dtype", help="fp8: scales for keys and values in the server's cache.")
    ] = None
    to_quant_block_names: Annotated[Text, _flag("to-quant-block-names", help="Only these blocks.")] = None


@Parameter(name="*", group=Group("Tuning", sort_key=3))
@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Algorithm and its numbers; what is not said comes from the recipe."""

    algorithm: Annotated[
        Text,
        _flag(
            "algorithm",
            "algorithms",
            "alg",
            "algs",
            help="auto_round, sign_round_published, gptq, opt_rtn or rtn; awq, alone or before one of them.",
        ),
    ] = None
    duo_scaling: Annotated[
        str,
        _flag("duo-scaling", "awq-duo-scaling", help="AWQ by the size of weights too: true, false or both."),
    ] = "true"
    rotation_config: Annotated[
        Text,
        _flag(
            "rotation-config",
            help='quarot, default (blocks of 32 in every layer), or JSON: {"r1":true,"r4":true}.',
        ),
    ] = None
    rotation_type: Annotated[
        Text, _flag("rotation-type", help="hadamard or random_hadamard: blocks in every layer.")
    ] = None
    rotation_block_size: Annotated[
        Number, _flag("rotation-block-size", help="Channels that such a block has; default 32.")
    ] = None
    n_grid: Annotated[
        int, _flag("n-grid", "awq-n-grid", help="AWQ: factors tried for each set of channels.")
    ] = 20
    start: Annotated[Text, _flag("start", help="Before tuning: gptq (default), search or none.")] = None
    iters: Annotated[Number, _flag("iters", "iter", help="Sign steps per block; 0: round to nearest.")] = None
    lr: Annotated[Real, _flag("lr", help="Step size; default 1 / iters.")] = None
    minmax_lr: Annotated[
        Real, _flag("minmax-lr", help="Step size of the ranges; default lr, less where searched.")
    ] = None
    momentum: Annotated[float, _flag("momentum")] = 0.0
    batch_size: Annotated[Number, _flag("batch-size", "train-bs", "bs", help="Samples per step.")] = None
    gradient_accumulate_steps: Annotated[
        int, _flag("gradient-accumulate-steps", help="Batches per step.")
    ] = 1
    enable_minmax_tuning: Annotated[bool, _switch("enable-minmax-tuning")] = False
    disable_minmax_tuning: Annotated[
        bool, _switch("disable-minmax-tuning", help="Keep the ranges fixed.")
    ] = False
    enable_quanted_input: Annotated[bool, _switch("enable-quanted-input")] = False
    disable_quanted_input: Annotated[bool, _switch("disable-quanted-input", help="Tune on float inputs.")] = (
        False
    )
    enable_adam: Annotated[bool, _switch("enable-adam", "adam", help="AdamW instead of sign steps.")] = False
    not_use_best_mse: Annotated[
        bool, _switch("not-use-best-mse", help="Keep the last state, not the best.")
    ] = False
    disable_opt_rtn: Annotated[
        bool | None, _switch("disable-opt-rtn", help="Plain rounding: no search, no GPTQ.")
    ] = None
    enable_opt_rtn: Annotated[
        bool | None, _switch("enable-opt-rtn", help="Search of ranges; with data GPTQ too.")
    ] = None
    seed: Annotated[int, _flag("seed", help="Same seed, same bytes.")] = 42
    nblocks: Annotated[int, _flag("nblocks", help="Consecutive blocks that are tuned together.")] = 1
    time_budget: Annotated[
        Text, _flag("time-budget", help="Such as 10m: as many steps as fit, from a rehearsal of one block.")
    ] = None
    enable_alg_ext: Annotated[
        bool, _switch("enable-alg-ext", help="SignRoundV2: outliers are left out of the loss below 4 bits.")
    ] = False
    enable_norm_bias_tuning: Annotated[
        bool, _flag("enable-norm-bias-tuning", help="Norms and biases are tuned too.")
    ] = False
    enable_lfq: Annotated[
        bool, _switch("enable-lfq", help="The last block is tuned on the model's predictions.")
    ] = False
    dynamic_max_gap: Annotated[
        int, _flag("dynamic-max-gap", help="Stop a block that many steps after its best; -1: never.")
    ] = -1
    lr_scheduler: Annotated[Text, _flag("lr-scheduler", help="linear (default), cosine or constant.")] = None


@Parameter(name="*", group=Group("Data and machine", sort_key=4))
@dataclass(frozen=True, kw_only=True)
class Machine:
    """Calibration data, devices and memory."""

    dataset: Annotated[
        Text,
        _flag(
            "dataset",
            help="Hub name, local .json, .jsonl, .txt, .parquet or folder, or self, with options: "
            "a.jsonl:num=64:concat=True,self:num=64.",
        ),
    ] = None
    imatrix: Annotated[
        Text,
        _flag("imatrix", help="Importance file of llama.cpp, in the place of data when scales are searched."),
    ] = None
    save_imatrix: Annotated[
        Text,
        _flag("save-imatrix", help="Write such a file of the calibration data: FILE.gguf, .dat or .imatrix."),
    ] = None
    nsamples: Annotated[
        Number,
        _flag(
            "nsamples",
            "nsample",
            help="Calibration samples; fewer by default if more are of no use.",
        ),
    ] = None
    seqlen: Annotated[Number, _flag("seqlen", "seq-len", help="Tokens per sample.")] = None
    device_map: Annotated[
        Text, _flag("device-map", "device", "devices", help="cpu, auto, cuda:0, 0,1,2, or layer:device,...")
    ] = None
    platform: Annotated[str, _flag("platform", help="hf or model_scope.")] = "hf"
    model_dtype: Annotated[Text, _flag("model-dtype", help="Load the model in this dtype.")] = None
    trust_remote_code: Annotated[
        bool, _switch("trust-remote-code", help="Run code that comes with the model.")
    ] = False
    disable_trust_remote_code: Annotated[bool, _switch("disable-trust-remote-code")] = False
    low_gpu_mem_usage: Annotated[
        bool,
        _switch(
            "low-gpu-mem-usage", help="Hidden states stay in main memory, also when the device has room."
        ),
    ] = False
    low_cpu_mem_usage: Annotated[
        bool,
        _switch("low-cpu-mem-usage", help="Only one block is in memory at a time, the default here."),
    ] = False
    disable_low_cpu_mem_usage: Annotated[
        bool, _switch("disable-low-cpu-mem-usage", help="Load the model as a whole.")
    ] = False
    max_ram: Annotated[Text, _flag("max-ram", help="Most main memory to use, such as 8GB.")] = None
    max_vram: Annotated[Text, _flag("max-vram", help="Most device memory to use, such as 20GB.")] = None
    enable_torch_compile: Annotated[
        bool, _switch("enable-torch-compile", help="Blocks are compiled; eager where that fails.")
    ] = False
    disable_torch_compile: Annotated[bool, _switch("disable-torch-compile")] = False
    disable_amp: Annotated[bool, _switch("disable-amp", help="float32 matrix products.")] = False
    enable_deterministic_algorithms: Annotated[
        bool, _switch("enable-deterministic-algorithms", help="An operation without such a form is an error.")
    ] = False
    disable_deterministic_algorithms: Annotated[bool, _switch("disable-deterministic-algorithms")] = False
    model_free: Annotated[
        bool, _switch("model-free", help="From the checkpoint's shards, no model is built.")
    ] = False
    disable_model_free: Annotated[bool, _switch("disable-model-free", help="Always build the model.")] = False
    workers: Annotated[Number, _flag("workers", help="Layers streamed at a time; default: one per core.")] = (
        None
    )
    distributed: Annotated[
        Text, _flag("distributed", help="Stream on a Ray cluster: ray://host:10001, host:6379 or auto.")
    ] = None


@Parameter(name="*", group=Group("Evaluation", sort_key=5))
@dataclass(frozen=True, kw_only=True)
class Evaluating:
    """Benchmarks of lm-eval: of a model as it is (`--eval`), or of the result (`--tasks`)."""

    tasks: Annotated[
        Text,
        _flag(
            "tasks",
            "task",
            help="Tasks of lm-eval, comma separated, or YAML files; alone: the usual thirteen.",
        ),
    ] = None
    eval_bs: Annotated[Text, _flag("eval-bs", help="Documents at once; default: as many as fit.")] = None
    eval_backend: Annotated[str, _flag("eval-backend", help="hf or vllm.")] = "hf"
    vllm_args: Annotated[
        Text, _flag("vllm-args", help="tensor_parallel_size=2,gpu_memory_utilization=0.8 and the like.")
    ] = None
    eval_task_by_task: Annotated[
        bool, _switch("eval-task-by-task", help="One after the other: one that fails leaves the others.")
    ] = False
    eval_model_dtype: Annotated[str, _flag("eval-model-dtype", help="Load the model in this dtype.")] = "auto"
    limit: Annotated[Real, _flag("limit", help="Documents per task, or their share when below 1.")] = None
    num_fewshot: Annotated[Number, _flag("num-fewshot", help="Examples in front of a question.")] = None
    eval_gen_kwargs: Annotated[Text, _flag("eval-gen-kwargs", help="temperature=0.7,top_p=0.9 ...")] = None
    fewshot_as_multiturn: Annotated[
        bool, _switch("fewshot-as-multiturn", help="Examples as turns of a chat.")
    ] = False
    add_bos_token: Annotated[bool, _switch("add-bos-token", help="Whatever the tokenizer says.")] = False
    eval_output: Annotated[Text, _flag("eval-output", help="JSON file for the scores.")] = None

    def needless(self) -> str | None:
        """A flag that was given without --tasks, which it is about."""
        given = (f for f in fields(self) if getattr(self, f.name) != f.default)
        return None if self.tasks is not None else next((f.name for f in given), None)


@Parameter(name="*", group=Group("Machine", sort_key=4))
@dataclass(frozen=True, kw_only=True)
class Host:
    """Where a model is evaluated, and how it is found."""

    device_map: Annotated[
        Text, _flag("device-map", "device", "devices", help="cpu, auto, cuda:0 or 0,1,2.")
    ] = None
    platform: Annotated[str, _flag("platform", help="hf or model_scope.")] = "hf"
    seed: Annotated[int, _flag("seed")] = 42
    trust_remote_code: Annotated[
        bool, _switch("trust-remote-code", help="Run code that comes with the model.")
    ] = False
    disable_trust_remote_code: Annotated[bool, _switch("disable-trust-remote-code")] = False


@Parameter(name="*", group=Group("Not there yet", sort_key=9))
@dataclass(frozen=True, kw_only=True)
class Later:
    """Flags of later work: understood, and answered with one sentence."""

    static_attention_dtype: Annotated[Text, _flag("static-attention-dtype")] = None
    mllm: Annotated[bool, _switch("mllm")] = False
    quant_nontext_module: Annotated[bool, _switch("quant-nontext-module")] = False
    template: Annotated[Text, _flag("template")] = None
    extra_data_dir: Annotated[Text, _flag("extra-data-dir")] = None

    def refuse(self) -> None:
        """Raise NotYetError for the first of these flags that was given."""
        for f in fields(self):
            if getattr(self, f.name) != f.default:  # a flag that repeats the default asks for nothing
                raise NotYetError(
                    f"--{f.name.replace('_', '-')}: {WHAT.get(f.name, 'this flag')} is not there yet"
                )


WHAT = {
    "static_attention_dtype": "quantizing attention",
    **dict.fromkeys(
        ("mllm", "quant_nontext_module", "template", "extra_data_dir"), "quantizing vision and audio parts"
    ),
}


def to_options(recipe: str, output: Output, scheme: SchemeFlags, tuning: Tuning, machine: Machine) -> Options:
    """The flags as `Options`. Raises what `Options.of` raises, and PlanError for a number that is none."""
    plain = {
        "recipe": recipe,
        "format": output.format,
        "max_shard_size": output.max_shard_size,
        "resume": output.resume,
        "report": output.report,
        "split_size": output.split_size,
        **_scheme(scheme),
        "rotation_config": _rotation(tuning),
        "group_size": _group("group-size", scheme.group_size),
        # None where nothing was said: a scheme may be asymmetric by itself, and a GGUF type always says.
        "sym": False if scheme.asym else None,
        "act_sym": False if scheme.act_asym else None,
        "act_dynamic": False if scheme.disable_act_dynamic else None,
        "enable_minmax_tuning": not tuning.disable_minmax_tuning,
        "enable_quanted_input": not tuning.disable_quanted_input,
        # None: nothing was said, and the command decides.
        "low_cpu_mem_usage": False
        if machine.disable_low_cpu_mem_usage
        else machine.low_cpu_mem_usage or None,
        "enable_torch_compile": machine.enable_torch_compile or None,
        "amp": not machine.disable_amp,
        "trust_remote_code": machine.trust_remote_code and not machine.disable_trust_remote_code,
    }
    # All other flags have the name of their option; one without an option belongs to the command itself.
    names = {f.name for f in fields(Options)} - plain.keys()
    for group in (scheme, tuning, machine):
        plain.update({f.name: getattr(group, f.name) for f in fields(group) if f.name in names})
    return Options.of(plain)


def _scheme(flags: SchemeFlags) -> dict[str, Any]:
    """The options `scheme` and `bits`: one scheme for all, or several to choose from."""
    average = flags.avg_bits if flags.avg_bits is not None else flags.bits
    if not flags.options:
        for name in ("avg_bits", "shared_layers", "ignore_scale_zp_bits"):
            if getattr(flags, name):
                raise PlanError(
                    f"--{name.replace('_', '-')} is about choosing a scheme per layer: give --options, the schemes to "
                    "choose from, such as W2A16G64,W4A16"
                )
        return {
            "scheme": flags.scheme,
            "bits": flags.bits if flags.bits is None else _whole("bits", flags.bits),
        }
    if flags.scheme != SchemeFlags.scheme:
        raise PlanError(
            f"--scheme {flags.scheme} is for all layers, and --options are to choose from: give one of them"
        )
    if average is None:
        raise PlanError(
            "--options are what --avg-bits, the bits per weight on average, chooses from: give it too"
        )
    sets = [text.split(",") for text in flags.shared_layers]
    if sets and all(len(names) == 1 for names in sets):
        sets = [list(flags.shared_layers)]  # names apart are one set
    wish = AutoScheme(
        avg_bits=average,
        options=" ".join(flags.options),
        shared_layers=sets,
        ignore_scale_zp_bits=flags.ignore_scale_zp_bits,
    )
    return {"scheme": wish, "bits": None}


def _rotation(flags: Tuning) -> Any:
    """The option `rotation_config`: that flag, or what the two others say in its place."""
    if flags.rotation_type is None and flags.rotation_block_size is None:
        return flags.rotation_config
    if flags.rotation_config not in (None, "default"):
        raise PlanError(
            "--rotation-type and --rotation-block-size say what --rotation-config says: give one of them"
        )
    return {
        "hadamard_type": flags.rotation_type or "hadamard",
        "block_size": flags.rotation_block_size,
    }


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise PlanError(
            f"--{name} {value:g} is no whole number of bits. An average over layers needs schemes to choose from: "
            f"--avg-bits {value:g} --options W2A16G64,W4A16"
        )
    return int(value)


def _group(name: str, text: str | None) -> Any:
    if text is None:
        return None
    if re.fullmatch(r"-?\d+(,\d+)?", text.strip()):
        return [int(part) for part in text.split(",")] if "," in text else int(text)
    raise PlanError(f"--{name} {text!r}: give a positive number, -1 (one per row) or 0 (one per tensor)")


ALL_TASKS = "default"
"""What a bare `--tasks` asks for."""


def normalized(argv: Sequence[str]) -> list[str]:
    """`argv` with "_" in flag names as "-", so that both spellings mean the same.

    `--eval`, wherever it stands, is the command `eval`, and `--tasks` without a name asks for the usual ones.
    """

    def flag(word: str) -> str:
        name, equals, value = word.partition("=")
        return name.replace("_", "-") + equals + value

    # Values keep theirs: folders have underscores.
    words = [flag(word) if word.startswith("--") else word for word in argv]
    if "--eval" in words:
        words = ["eval", *(word for word in words if word != "--eval")]
    for i in reversed([i for i, word in enumerate(words[:-1]) if word == "--vllm-args"]):
        words[i : i + 2] = [f"{words[i]}={words[i + 1]}"]  # its value may start with dashes
    bare = [i for i, word in enumerate(words) if word in ("--tasks", "--task")]
    for i in reversed(bare):
        if i + 1 == len(words) or words[i + 1].startswith("--"):
            words.insert(i + 1, ALL_TASKS)
    return words
