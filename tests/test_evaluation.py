"""Benchmarks by lm-eval: every spelling of the guide, on tasks of our own that need no network."""

import json

import pytest
import torch
from models import SENTENCES, tiny

from auto_round.cli import evaluating, main
from auto_round.cli.main import execute
from auto_round.core.errors import DataError, ModelError, PlanError
from auto_round.evaluation import DEFAULT_TASKS, Evaluation, evaluate, parse_vllm_args

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports, about themselves

YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
RTN = ["--iters", "0", "--disable_opt_rtn"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("evaluation") / "model"
    tiny("llama", folder)
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A task of twelve questions with two answers, as YAML file."""
    folder = tmp_path_factory.mktemp("tasks")
    words = [text.split() for text in SENTENCES]
    rows = []
    for i in range(12):
        mine, other = words[i % len(words)], words[(i + 1 + i // len(words)) % len(words)]
        ends = [" ".join(mine[2:5]), " ".join(other[2:5])]
        rows.append({"question": " ".join(mine[:2]), "choices": ends, "label": 0})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "ends.yaml").write_text(YAML.format(name="ends", data=folder / "rows.jsonl"))
    (folder / "lost.yaml").write_text(YAML.format(name="lost", data=folder / "absent.jsonl"))
    return folder / "ends.yaml"


def accuracy_by_hand(model, task):
    """Share of questions whose right answer has the higher log-likelihood, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    net = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    right = []
    for line in task.with_name("rows.jsonl").read_text().splitlines():
        row, scores = json.loads(line), []
        for choice in row["choices"]:
            start = len(tokenizer(row["question"])["input_ids"])
            ids = torch.tensor([tokenizer(f"{row['question']} {choice}")["input_ids"]])
            with torch.no_grad():
                logits = net(ids).logits.float().log_softmax(-1)[0, start - 1 : -1]
            scores.append(logits.gather(-1, ids[0, start:, None]).sum())
        right.append(scores.index(max(scores)) == row["label"])
    return sum(right) / len(right)


def test_an_original_gets_the_score_that_transformers_alone_gives(model, task, tmp_path, capsys):
    argv = [str(model), "--eval", "--tasks", str(task), "--eval_bs", "4", "--eval_output"]
    assert execute("default", [*argv, str(tmp_path / "scores.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("|Tasks") and "|ends " in out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["results"]["ends"]["acc,none"] == pytest.approx(accuracy_by_hand(model, task))


@pytest.mark.parametrize(
    "what", [["--group_size", "32", "--format", "auto_gptq,auto_round"], ["--format", "gguf:q4_0"]]
)
def test_the_last_format_that_was_written_is_evaluated(model, task, tmp_path, capsys, what):
    argv = ["--model", str(model), *RTN, *what, "--output_dir", str(tmp_path / "out")]
    assert execute("default", [*argv, "--tasks", str(task), "--limit", "3"]) == 0
    said = capsys.readouterr()
    assert "|ends " in said.out
    assert f"evaluating {tmp_path / 'out'}" in said.err


def test_a_task_that_fails_leaves_the_others_when_they_come_one_by_one(model, task, tmp_path):
    tasks = (str(task.with_name("lost.yaml")), str(task))
    scores = evaluate(model, Evaluation(tasks=tasks, task_by_task=True, limit=2))
    assert list(scores.failed) == ["lost"] and list(scores.results) == ["ends"]
    with pytest.raises(DataError, match=r"task lost.*absent"):
        evaluate(model, Evaluation(tasks=tasks[:1], limit=2))
    argv = ["eval", str(model), "--tasks", ",".join(tasks), "--limit", "2", "--eval_task_by_task"]
    assert execute("default", argv) == 1


def test_memory_that_runs_out_halves_the_batch(model, task, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    tried = []
    plain = HFLM._model_call

    def greedy(self, inputs, *args, **kwargs):
        tried.append(len(inputs))
        if len(inputs) > 2:
            raise torch.OutOfMemoryError("as if")
        return plain(self, inputs, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_model_call", greedy)
    scores = evaluate(model, Evaluation(tasks=(str(task),), task_by_task=True, batch_size=8))
    assert scores.results["ends"]["acc,none"] >= 0 and tried[0] == 8 and max(tried[2:]) == 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tasks": ("lambada_opnai",)}, "did you mean 'lambada_openai'"),
        ({"tasks": ("./absent.yaml",)}, "no such file"),
        ({"backend": "vlm"}, "hf, vllm"),
        ({"backend": "vllm"}, "vllm, which is not installed"),
        ({"vllm_args": {"seed": 1}}, "for the backend vllm"),
        ({"dtype": "int3"}, "bfloat16"),
        ({"limit": 0}, "number of documents"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_said_before_any_work(changed, said):
    with pytest.raises(PlanError, match=f"(?i){said}"):
        Evaluation(**{"tasks": ("piqa",), **changed}).check()


def test_a_misspelt_task_stops_a_job_before_it_quantizes(model, tmp_path, capsys):
    argv = [str(model), *RTN, "--tasks", "piqua", "--output_dir", str(tmp_path / "out")]
    assert execute("default", argv) == 2
    assert "piqa" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_transformers_cannot_load_is_named(task, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=tmp_path.name):
        evaluate(tmp_path, Evaluation(tasks=(str(task),)))


@pytest.fixture
def asked(monkeypatch):
    """A function from arguments to the model and the `Evaluation` they stand for; nothing is run."""
    seen = []
    monkeypatch.setattr(Evaluation, "check", lambda self: None)
    monkeypatch.setattr(
        evaluating, "show_scores", lambda model, settings, output: seen.append((model, settings))
    )
    monkeypatch.setattr(main, "_quantize", lambda *groups: ["./out"])

    def ask(*argv):
        assert execute("default", list(argv)) == 0
        return seen.pop()

    return ask


@pytest.mark.parametrize(
    ("argv", "model", "expected"),
    [
        (["--model=./m", "--eval", "--device_map", "0,1", "--tasks", "lambada_openai", "--eval_bs", "16"], "./m",
         {"tasks": ("lambada_openai",), "device_map": "0,1", "batch_size": 16}),
        (["./m", "--eval", "--device_map", "0,1", "--tasks", "lambada_openai", "--eval_backend", "vllm"], "./m",
         {"tasks": ("lambada_openai",), "device_map": "0,1", "backend": "vllm"}),
        (["./m", "--eval", "--tasks", "lambada_openai", "--eval_backend", "vllm",
          "--vllm_args=tensor_parallel_size=2,gpu_memory_utilization=0.8"], "./m",
         {"tasks": ("lambada_openai",), "backend": "vllm",
          "vllm_args": {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.8}}),
        (["--model", "./m", "--bits", "4", "--format", "auto_round,auto_gptq", "--tasks", "mmlu"], "./out",
         {"tasks": ("mmlu",)}),
        (["--model", "./m", "--bits", "4", "--tasks", "mmlu", "--eval_backend", "vllm"], "./out",
         {"tasks": ("mmlu",), "backend": "vllm"}),
        (["./m", "--eval", "--eval_backend", "vllm", "--vllm_args", "--seed=3,--dtype half"], "./m",
         {"backend": "vllm", "vllm_args": {"seed": 3, "dtype": "half"}}),
        (["./m", "--eval"], "./m", {}),
        (["./m", "--tasks", "--bits", "4"], "./out", {}),
        (["./m", "--task"], "./out", {}),
        (["eval", "./m", "--limit", "0.1", "--num_fewshot", "5", "--add_bos_token", "--eval_bs", "auto:4"], "./m",
         {"limit": 0.1, "num_fewshot": 5, "add_bos_token": True, "batch_size": "auto:4"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_the_lines_of_the_guide_are_understood(asked, argv, model, expected):
    given, settings = asked(*argv)
    assert (given, settings) == (model, Evaluation(**{"tasks": DEFAULT_TASKS, **expected}))


def test_flags_about_benchmarks_need_benchmarks(model, capsys):
    assert execute("default", [str(model), "--eval_bs", "4"]) == 2
    assert "--eval-bs is about benchmarks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("a=1,b=0.5,c=true,d=word", {"a": 1, "b": 0.5, "c": True, "d": "word"}),
        ("--tensor-parallel-size=2,--dtype=half", {"tensor_parallel_size": 2, "dtype": "half"}),
        ("--tensor_parallel_size 2 --seed 3", {"tensor_parallel_size": 2, "seed": 3}),
    ],
)
def test_arguments_of_vllm_are_numbers_truths_and_words(text, expected):
    assert parse_vllm_args(text) == expected


@pytest.mark.parametrize("text", ["a", "a=", "=1", "--a"])
def test_an_argument_of_vllm_without_a_value_is_refused(text):
    with pytest.raises(PlanError, match="KEY=VALUE"):
        parse_vllm_args(text)
