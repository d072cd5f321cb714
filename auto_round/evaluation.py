"""Benchmarks by lm-evaluation-harness, of a checkpoint folder, a hub id or a GGUF file (extra `eval`).

What was quantized here is loaded as users load it: by stock transformers with the kernels of this machine, or by vLLM.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from auto_round.api import AutoRound
from auto_round.core.errors import DataError, ModelError, PlanError, nearest
from auto_round.core.settings import settings as settings_of_environment
from auto_round.core.settings import show_cuda_devices
from auto_round.models import load
from auto_round.models.checkpoint import has_safetensors
from auto_round.models.device import parse_devices
from auto_round.models.gguf_file import gguf_files

logger = logging.getLogger("auto_round")
DEFAULT_TASKS = (
    *("lambada_openai", "hellaswag", "winogrande", "piqa", "mmlu", "wikitext", "truthfulqa_mc1"),
    *("truthfulqa_mc2", "openbookqa", "boolq", "rte", "arc_easy", "arc_challenge"),
)
"""What `--tasks default` stands for, and an evaluation that names none."""
BACKENDS = ("hf", "vllm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What to run. tasks: names of lm-eval's tasks or groups, or YAML files of own ones.

    batch_size: None lets lm-eval find the largest that fits a device with memory of its own, and is 8 on a CPU.
    limit: documents per task, or their share when below 1. backend: "hf" or "vllm", the latter with `vllm_args`.
    task_by_task: one after the other, so that one which fails leaves the others' scores. dtype: of the model's
    floating-point tensors. device_map: as for quantizing; several devices share the model.
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    batch_size: int | str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    gen_kwargs: str | None = None
    fewshot_as_multiturn: bool = False
    task_by_task: bool = False
    backend: str = "hf"
    vllm_args: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    add_bos_token: bool | None = None
    device_map: Any = None
    seed: int = 42
    trust_remote_code: bool = False
    platform: str = "hf"

    def check(self) -> None:
        """Raise PlanError for what would fail after hours: a package that is missing, a task that does not exist."""
        if self.backend not in BACKENDS:
            raise PlanError(f"evaluation backend {self.backend!r}: give one of {', '.join(BACKENDS)}")
        if self.vllm_args and self.backend != "vllm":
            raise PlanError(
                f"vllm_args {dict(self.vllm_args)}: they are for the backend vllm, not {self.backend}"
            )
        for package in ("lm_eval", *(["vllm"] if self.backend == "vllm" else [])):
            if importlib.util.find_spec(package) is None:
                extra = "auto-round[eval]" if package == "lm_eval" else package
                raise PlanError(f"evaluation needs {package}, which is not installed: pip install '{extra}'")
        if self.limit is not None and self.limit <= 0:
            raise PlanError(f"limit {self.limit:g}: give a number of documents, or a share between 0 and 1")
        _dtype(self.dtype)
        _tasks(self.tasks)


@dataclass(frozen=True, slots=True)
class Scores:
    """results: task or group -> metric -> value. failed: task -> why it has no score. text: lm-eval's own table."""

    results: Mapping[str, Mapping[str, Any]]
    failed: Mapping[str, str]
    text: str

    def write(self, path: Path) -> None:
        """Write the scores as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"results": self.results, "failed": self.failed}
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")


def evaluate(model: str | Path, settings: Evaluation) -> Scores:
    """Run `settings.tasks` on `model`.

    Raises PlanError for settings that cannot be carried out, ModelError for a model that cannot be loaded, and
    DataError when a task's data cannot be had; task by task, that is noted in `Scores.failed` instead.
    """
    settings.check()
    tasks = _tasks(settings.tasks)
    subject = _Subject(model, settings)
    rounds = [[name] for name in tasks.names] if settings.task_by_task else [tasks.names]
    found: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for names in rounds:
        try:
            found.append(_run(subject, tasks, names, settings))
        except DataError as error:
            if not settings.task_by_task:
                raise
            logger.warning("%s", error)
            failed[names[0]] = str(error)
    return _scores(found, failed)


class _Tasks:
    """Names of tasks, and lm-eval's index that has all of them."""

    def __init__(self, wanted: Iterable[str]) -> None:
        from lm_eval import tasks as of_lm_eval  # imports take seconds, and it is an extra

        paths = [Path(name) for name in wanted if name.endswith((".yaml", ".yml"))]
        if absent := [str(path) for path in paths if not path.is_file()]:
            raise PlanError(
                f"task {absent[0]!r}: no such file. Give a YAML file of lm-eval's, or a task's name"
            )
        self.names = [_name_in(Path(name)) if Path(name) in paths else name for name in wanted]
        own = sorted({path.resolve().parent for path in paths})
        # Reading the folders of the tasks named takes a second, reading all of them a quarter of a minute.
        root = Path(of_lm_eval.__file__).parent
        near = [root / part for name in self.names for part in (name, name.partition("_")[0])]
        few = [*(folder for folder in dict.fromkeys(near) if folder.is_dir()), *own]
        self.index = of_lm_eval.TaskManager(include_defaults=False, include_path=few)
        if self._unknown():
            self.index = of_lm_eval.TaskManager(include_path=own)
        if unknown := self._unknown():
            hint = nearest(unknown[0], self.index.all_tasks)
            raise PlanError(f"task {unknown[0]!r} is none of lm-eval's.{hint} `lm-eval ls tasks` lists them")

    def _unknown(self) -> list[str]:
        return [name for name in self.names if name not in self.index.task_index]


@cache
def _tasks(wanted: tuple[str, ...]) -> _Tasks:
    # Looking through all of lm-eval's takes a quarter of a minute, and a job asks before and after it quantizes.
    return _Tasks(wanted)


def _name_in(path: Path) -> str:
    """The name that the YAML file at `path` gives its task or group."""
    for line in path.read_text().splitlines():
        key, colon, value = line.partition(":")
        if colon and key in ("task", "group") and value.strip():
            return value.strip().strip("'\"")
    raise PlanError(f"{path}: it has no line `task: NAME`, which lm-eval's tasks have")


class _Subject:
    """A model as lm-eval wants it, loaded when first asked for."""

    def __init__(self, model: str | Path, settings: Evaluation) -> None:
        self._given, self._settings = str(model), settings
        self._lm: Any = None
        self.batch_size = settings.batch_size

    @property
    def lm(self) -> Any:
        """lm-eval's object."""
        if self._lm is None:
            self._lm = self._of_vllm() if self._settings.backend == "vllm" else self._of_transformers()
        return self._lm

    def smaller(self) -> bool:
        """Halve the batch after memory ran out; False when it is one already."""
        lm = self.lm
        tried = max([*getattr(lm, "batch_sizes", {}).values(), _whole(lm.batch_size)])
        if tried <= 1:
            return False
        self.batch_size = tried // 2
        lm.batch_size_per_gpu, lm.batch_schedule = self.batch_size, 1
        torch.cuda.empty_cache()
        logger.warning("out of memory with %d documents at once: once more with %d", tried, self.batch_size)
        return True

    def _of_transformers(self) -> Any:
        from lm_eval.models.huggingface import HFLM

        settings = self._settings
        place = load.resolve(self._given, platform=settings.platform)
        devices = parse_devices(settings.device_map).devices
        if self.batch_size is None:
            self.batch_size = 8 if devices[0].type == "cpu" else "auto:8"
        gguf = place.is_file() or (gguf_files(place) and not has_safetensors(place))
        model, tokenizer = self._dequantized(place) if gguf else self._loaded(place, devices)
        if tokenizer is None:
            raise ModelError(
                f"{place}: it has no tokenizer, and tasks are text. Put its files beside the weights"
            )
        return HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=self.batch_size,
            add_bos_token=settings.add_bos_token,
            trust_remote_code=settings.trust_remote_code,
        )

    def _dequantized(self, place: Path) -> tuple[Any, Any]:
        """A GGUF file as plain weights, which is what its types mean."""
        settings = self._settings
        material = AutoRound(place, trust_remote_code=settings.trust_remote_code).material
        model = material.live_model().to(parse_devices(settings.device_map).main)
        return model if settings.dtype == "auto" else model.to(_dtype(settings.dtype)), material.tokenizer

    def _loaded(self, folder: Path, devices: tuple[torch.device, ...]) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM

        settings = self._settings
        where: dict[str, Any] = {"device_map": str(devices[0])}
        if len(devices) > 1:
            free = {device.index: torch.cuda.mem_get_info(device)[0] for device in devices}
            where = {"device_map": "auto", "max_memory": free}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=_dtype(settings.dtype), trust_remote_code=settings.trust_remote_code, **where
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ModelError(f"{folder}: transformers cannot load this model: {error}") from error
        return model.eval(), load.load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)

    def _of_vllm(self) -> Any:
        from lm_eval.models.vllm_causallms import VLLM

        settings = self._settings
        chosen = [part for part in str(settings.device_map or "").split(",") if part.strip().isdigit()]
        seen = settings_of_environment().cuda_devices or chosen
        own: dict[str, Any] = {
            "dtype": str(_dtype(settings.dtype)).removeprefix("torch."),
            "trust_remote_code": settings.trust_remote_code,
            "add_bos_token": settings.add_bos_token,
            "batch_size": self.batch_size or "auto",
            "seed": settings.seed,
        }
        if seen:
            show_cuda_devices(seen)
            own["tensor_parallel_size"] = len(seen)
        place = load.resolve(self._given, platform=settings.platform)
        try:
            return VLLM(pretrained=str(place), **{**own, **settings.vllm_args})
        except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise ModelError(f"{place}: vLLM cannot load this model: {error}") from error


def _dtype(said: str) -> Any:
    """`said` for transformers: "auto", or a dtype by its name in torch or a short one."""
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
    name = said.removeprefix("torch.")
    found = getattr(torch, short.get(name, name), None)
    if name != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise PlanError(f"dtype {said!r} of the evaluation: give auto, bfloat16, float16 or float32")
    return "auto" if name == "auto" else found


def _whole(batch_size: Any) -> int:
    return int(batch_size) if str(batch_size).isdigit() else 1


def _run(subject: _Subject, tasks: _Tasks, names: list[str], settings: Evaluation) -> dict[str, Any]:
    """lm-eval's results for these tasks. Raises DataError when their data cannot be had."""
    from lm_eval import simple_evaluate

    lm = subject.lm
    limit = settings.limit if settings.limit is None or settings.limit < 1 else int(settings.limit)
    while True:
        try:
            found = simple_evaluate(
                model=lm,
                tasks=names,
                batch_size=subject.batch_size,
                num_fewshot=settings.num_fewshot,
                limit=limit,
                gen_kwargs=settings.gen_kwargs,
                fewshot_as_multiturn=settings.fewshot_as_multiturn,
                task_manager=tasks.index,
                log_samples=False,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        except torch.OutOfMemoryError:
            if not (settings.task_by_task and subject.smaller()):
                raise
        except (OSError, ValueError) as error:  # of files and hubs: arithmetic raises neither
            said = str(error) or type(error).__name__
            raise DataError(
                f"task {', '.join(names)}: {said}. Is its dataset on this machine, or its hub within reach?"
            ) from error
        else:
            assert found is not None, "lm-eval answers its first process, which this is"
            return dict(found)


def _scores(found: list[dict[str, Any]], failed: Mapping[str, str]) -> Scores:
    """What several runs found, as one."""
    from lm_eval.utils import make_table

    if not found:
        return Scores({}, failed, "")
    whole = dict(found[0])
    for part in found[1:]:
        for key, value in part.items():
            if isinstance(value, dict) and isinstance(whole.get(key), dict):
                whole[key] = {**whole[key], **value}
            else:
                whole.setdefault(key, value)
    text = make_table(whole)
    if whole.get("groups"):
        text += "\n" + make_table(whole, "groups")
    return Scores(whole["results"], failed, text)


def parse_vllm_args(text: str | None) -> dict[str, Any]:
    """`tensor_parallel_size=2,gpu_memory_utilization=0.8`, with or without dashes, as values by name.

    Raises PlanError for a part that is no KEY=VALUE.
    """
    found: dict[str, Any] = {}
    for part in filter(None, (text or "").replace(" --", ",").split(",")):
        key, equals, value = part.strip().lstrip("-").replace(" ", "=", 1).partition("=")
        if not (equals and key and value):
            raise PlanError(
                f"--vllm-args: {part.strip()!r} is no KEY=VALUE. Example: "
                "--vllm-args tensor_parallel_size=2,gpu_memory_utilization=0.8"
            )
        found[key.strip().replace("-", "_")] = _typed(value.strip())
    return found


def _typed(value: str) -> Any:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
