"""Data sets by name: each registered one on a stand-in with its columns, folders, objects, and the model's own text."""

import json
import logging
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
from models import samples, tiny, tokenizer
from test_dataset import LONG, SEQLEN, decoded, ids, load, write
from torch.utils.data import DataLoader

from auto_round import AutoRound
from auto_round.core.errors import DataError
from auto_round.sources.dataset import Request, load_calibration
from auto_round.sources.dataset_names import DEFAULT_DATASET, KNOWN, known
from auto_round.sources.dataset_spec import parse_spec
from auto_round.sources.self_text import Author, sample_tokens

CHAT = [{"role": "user", "content": LONG[0]}, {"role": "assistant", "content": LONG[1]}]
EXTRA = {"meta": {"source": "x"}, "id": 7, "score": 0.5}
SCHEMAS = {
    "NeelNanda/pile-10k": lambda text: {"text": text, "meta": {"pile_set_name": "x"}},
    "swift/pile-val-backup": lambda text: {"text": text, "meta": {"pile_set_name": "x"}},
    "mit-han-lab/pile-val-backup": lambda text: {"text": text, "meta": {"pile_set_name": "x"}},
    "BAAI/CCI3-HQ": lambda text: {"id": "1", "text": text, "score": 3.1},
    "codeparrot/github-code-clean": lambda text: {
        "code": text, "repo_name": "r", "path": "p", "language": "C", "license": "mit", "size": 9,
    },
    "nvidia/OpenCodeInstruct": lambda text: {
        "id": "1", "input": text, "output": "def f(): ...", "domain": "x", "unit_tests": "[]",
    },
    "HuggingFaceH4/ultrachat_200k": lambda text: {
        "prompt": "p", "prompt_id": "1", "messages": [{"content": text, "role": "user"}],
    },
    "openbmb/Ultra-FineWeb": lambda text: {"content": text, "score": 0.9, "source": "x"},
    "HuggingFaceFW/fineweb-edu": lambda text: {"text": text, "id": "1", "dump": "d", "url": "u", "score": 3.0},
    "madao33/new-title-chinese": lambda text: {"title": "t", "content": text},
    "google-research-datasets/mbpp": lambda text: {
        "task_id": 1, "text": text, "code": "def f(): ...", "test_list": ["assert f()"], "test_setup_code": "",
    },
}  # fmt: skip
"""Columns as on the hub."""
BEGINS = {"HuggingFaceH4/ultrachat_200k": "<|user|>"}


class Hub:
    """Stands for `load_dataset` and `MsDataset.load`: notes what is asked for and gives rows of one schema."""

    def __init__(self, row, count=6):
        self.row, self.count, self.calls = row, count, []

    def __call__(self, where, config=None, *, split, streaming=False, subset_name=None, use_streaming=False):
        self.calls.append((where, config or subset_name, split, streaming or use_streaming))
        rows = [self.row(f"{split} {i} {LONG[i % 3]}") for i in range(self.count)]
        found = datasets.Dataset.from_list(rows)
        return found.to_iterable_dataset() if streaming or use_streaming else found


@pytest.fixture
def hub(monkeypatch):
    """Puts a `Hub` in the place of both libraries."""

    def put(row, count=6):
        made = Hub(row, count)
        monkeypatch.setattr(datasets, "load_dataset", made)
        fake = SimpleNamespace(MsDataset=SimpleNamespace(load=made))
        monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(msdatasets=fake))
        monkeypatch.setitem(sys.modules, "modelscope.msdatasets", fake)
        return made

    return put


def test_every_registered_data_set_has_a_stand_in():
    assert {one.names[0] for one in KNOWN} == set(SCHEMAS) and known(DEFAULT_DATASET)


@pytest.mark.parametrize(
    "text",
    [
        "NeelNanda/pile-10k", "swift/pile-val-backup", "BAAI/CCI3-HQ", "codeparrot/github-code-clean",
        "HuggingFaceH4/ultrachat_200k", "madao33/new-title-chinese", "mbpp", "openbmb/Ultra-FineWeb",
        "NeelNanda/pile-10k:train", "NeelNanda/pile-10k:concat=True", "NeelNanda/pile-10k:apply_chat_template",
        'NeelNanda/pile-10k:apply_chat_template:system_prompt="You are a helpful assistant."',
        "NeelNanda/pile-10k:num=256,mbpp:num=128",
    ],
)  # fmt: skip
def test_every_line_of_the_guide_names_a_registered_data_set(text):
    assert all(known(part.name) for part in parse_spec(text))


@pytest.mark.parametrize("one", KNOWN, ids=lambda one: one.names[0])
def test_a_registered_data_set_gives_samples(one, hub):
    asked = hub(SCHEMAS[one.names[0]])
    for name in one.names:
        data = load(name)
        begins = BEGINS.get(one.names[0], "") + one.splits[0]
        assert len(data.tokens) == 4 and all(text.startswith(begins) for text in decoded(data))
    expected = [
        (one.hub or one.modelscope, config, split, one.large)
        for config in one.configs
        for split in one.splits
    ]
    assert asked.calls == expected * len(one.names)


@pytest.mark.parametrize("one", [one for one in KNOWN if one.modelscope], ids=lambda one: one.names[0])
def test_modelscope_is_asked_on_request(one, hub):
    asked = hub(SCHEMAS[one.names[0]])
    load_calibration(
        one.names[0], tokenizer(), Request(nsamples=2, seqlen=SEQLEN, seed=0, platform="model_scope")
    )
    assert {call[0] for call in asked.calls} == {one.modelscope}


def test_a_data_set_that_modelscope_lacks_is_an_error_that_names_others(hub):
    hub(SCHEMAS["NeelNanda/pile-10k"])
    request = Request(nsamples=2, seqlen=SEQLEN, seed=0, platform="model_scope")
    with pytest.raises(DataError, match=r"pile-10k.*not on ModelScope.*swift/pile-val-backup"):
        load_calibration("pile-10k", tokenizer(), request)


def test_instruction_columns_are_read_together(hub):
    hub(lambda text: {"text": "Add.", "code": text})
    assert all(text.startswith("Add.\ntrain") for text in decoded(load("mbpp")))
    chat = decoded(load("mbpp:apply_chat_template"))
    assert all(text.startswith("<|user|>Add.<|end|><|assistant|>train") for text in chat)


def test_splits_are_read_in_turn(hub):
    asked = hub(SCHEMAS["google-research-datasets/mbpp"])
    texts = decoded(load("mbpp:split=train+test"))
    assert [call[2] for call in asked.calls] == ["train", "test"]
    assert sorted(text.split()[0] for text in texts) == ["test", "test", "train", "train"]


def test_a_changed_schema_is_an_error_that_lists_the_columns(hub):
    hub(lambda text: {"body": text})
    with pytest.raises(DataError, match=r"pile-10k.*no column 'text' any more; it has body"):
        load("pile-10k")


def test_any_other_hub_name_is_read_by_its_usual_columns(hub):
    asked = hub(lambda text: {"question": text, "answer": "yes"})
    assert len(load("someone/something").tokens) == 4
    assert asked.calls == [("someone/something", None, "train", False)]


def test_the_samples_of_a_hub_data_set_depend_on_the_seed(hub):
    hub(SCHEMAS["NeelNanda/pile-10k"], count=50)
    one, again, other = (decoded(load("pile-10k", seed=seed)) for seed in (1, 1, 2))
    assert one == again and set(one) != set(other)


def test_the_guides_combination_is_read(tmp_path, monkeypatch, hub):
    hub(lambda text: {"text": text, "code": "pass", "meta": "x"}, count=400)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tmp.json", [f"local {i} {LONG[0]}" for i in range(40)])
    data = load("./tmp.json,NeelNanda/pile-10k:num=256,mbpp:num=128", nsamples=400)
    locals_ = sum(text.startswith("local") for text in decoded(data))
    assert (len(data.tokens), locals_) == (400, 16)


def test_an_unreachable_hub_is_an_error_with_the_remedies(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError) as caught:
        load("NeelNanda/pile10k")
    for word in ("no route", "Did you mean 'NeelNanda/pile-10k'", ".parquet", "--dataset self", "mbpp"):
        assert word in str(caught.value)


# ------------------------------------------------------------------------------------------- files, folders, objects


def test_parquet_files_and_folders_of_files_are_read(tmp_path):
    rows = [{"text": f"{i} {LONG[0]}", "id": i} for i in range(8)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert len(load(str(tmp_path / "a.parquet")).tokens) == 4
    write(tmp_path / "b.jsonl", [f"lines {LONG[1]}"] * 4)
    (tmp_path / "notes.md").write_text("ignored")
    texts = decoded(load(str(tmp_path)))
    assert sum(text.startswith("lines") for text in texts) == 2
    joined = load(f"{tmp_path}:concat=True", nsamples=8)
    assert joined.tokens.shape == (8, SEQLEN)


def test_a_folder_made_by_save_to_disk_is_read(tmp_path):
    made = datasets.Dataset.from_list([{"text": text} for text in LONG])
    made.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "split")
    assert len(load(str(tmp_path / "plain"), nsamples=3).tokens) == 3
    assert len(load(f"{tmp_path / 'split'}:split=test", nsamples=6).tokens) == 3
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load(f"{tmp_path / 'split'}:split=dev")


def test_an_empty_folder_and_a_damaged_file_are_errors_that_name_them(tmp_path):
    with pytest.raises(DataError, match=r"no \.json"):
        load(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"a\.parquet.*cannot be read"):
        load(str(tmp_path / "a.parquet"))


MADE = datasets.Dataset.from_list([{"text": text, "id": 1} for text in LONG])
OBJECTS = {
    "Dataset": MADE,
    "IterableDataset": MADE.to_iterable_dataset(),
    "DatasetDict": datasets.DatasetDict({"train": MADE}),
    "columns": {"text": LONG},
    "chats": [[{"role": "user", "content": text}] for text in LONG],
    "ShareGPT": [{"conversations": [{"from": "human", "value": text}]} for text in LONG],
    "pairs": [{"prompt": text, "response": "Yes."} for text in LONG],
    "an instruction with input": [
        {"instruction": "Sum up.", "input": text, "output": "Rain."} for text in LONG
    ],
    "a loader of texts": DataLoader(LONG, batch_size=2),
    "a loader of dicts": DataLoader([{"id": i, "text": text} for i, text in enumerate(LONG)], batch_size=2),
    "ids by text": [{"input_ids": text} for text in LONG],
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_of_every_kind_are_read(kind):
    texts = decoded(load(OBJECTS[kind], nsamples=3))
    begins = {"chats": "<|user|>", "ShareGPT": "<|user|>", "an instruction with input": "Sum up.\n"}.get(
        kind, ""
    )
    assert [text.removeprefix(begins)[:12] for text in texts] == [text[:12] for text in LONG]


def test_a_data_set_of_ids_is_taken_as_it_is():
    rows = samples(3)
    made = datasets.Dataset.from_list(
        [{"input_ids": row.tolist(), "attention_mask": [1] * 32} for row in rows]
    )
    assert torch.equal(load(made, nsamples=3).tokens, torch.stack(rows))


def test_chat_without_a_template_is_read_as_text():
    (text,) = decoded(load([CHAT], nsamples=1, chat=False))
    assert text.startswith(LONG[0][:20])


def test_a_system_prompt_replaces_that_of_the_data(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": [{"role": "system", "content": "Old."}, *CHAT]}])
    (text,) = decoded(load(f'{path}:system_prompt="New, of course: new."', nsamples=1, seqlen=64))
    assert text.startswith("<|system|>New, of course: new.<|end|><|user|>")


def test_what_is_used_and_dropped_is_said(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [LONG[0], "", "Rain.", LONG[1]])
    with caplog.at_level(logging.INFO, "auto_round"):
        load(path, nsamples=2)
    assert f"2 samples of 32 tokens (64 in all) from {path}" in caplog.text
    assert "dropped 1 shorter than 32 tokens and 1 empty of 4 read" in caplog.text


def test_a_chat_turn_without_content_is_an_error_that_lists_its_keys(tmp_path):
    with pytest.raises(DataError, match=r"role and content.*it has role, text"):
        load(write(tmp_path / "a.json", [{"messages": [{"role": "user", "text": "x"}]}]))


# ---------------------------------------------------------------------------------------------------- the model itself


def test_a_model_writes_the_same_text_for_the_same_seed():
    model = tiny("llama")
    one, again, other = (
        torch.stack(sample_tokens(model, tokenizer(), count=3, length=12, seed=seed)) for seed in (1, 1, 2)
    )
    assert one.shape == (3, 12) and torch.equal(one, again) and not torch.equal(one, other)
    assert (one[:, 0] == tokenizer().bos_token_id).all()
    assert not torch.isin(one, torch.tensor([tokenizer().eos_token_id, tokenizer().pad_token_id])).any()


def test_what_a_model_writes_follows_its_distribution():
    model = tiny("llama")
    drawn = torch.stack(sample_tokens(model, tokenizer(), count=600, length=2, seed=0))[:, 1]
    logits = model(input_ids=torch.tensor([[tokenizer().bos_token_id]])).logits[0, -1].detach()
    logits[[tokenizer().eos_token_id, tokenizer().pad_token_id]] = -torch.inf
    expected = logits.softmax(-1)
    counted = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    slack = 5 * (expected * (1 - expected) / len(drawn)).sqrt() + 1e-3
    assert ((counted - expected).abs() <= slack).all()


def test_quantization_calibrates_on_the_models_own_text(tmp_path, caplog):
    options = {"group_size": 32, "seqlen": 32, "nsamples": 4, "batch_size": 2, "iters": 2}
    model = tiny("llama", tmp_path / "model")
    with caplog.at_level(logging.INFO, "auto_round"):
        AutoRound(tmp_path / "model", dataset="self", **options).quantize_and_save(tmp_path / "a")
    assert "the model writes its own calibration text, 4 x 32 tokens: some" in caplog.text
    assert "the model wrote 4 samples of 32 tokens" in caplog.text and "from self" in caplog.text
    AutoRound(model, tokenizer(), dataset="self", **options).quantize_and_save(tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


def test_the_models_text_can_be_a_part(tmp_path):
    path = write(tmp_path / "a.jsonl", LONG)
    data = load_calibration(
        f"{path}:num=2,self:num=3",
        tokenizer(),
        Request(nsamples=5, seqlen=SEQLEN, seed=0),
        lambda: Author(tiny("llama")),
    )
    own = [row for row in data.tokens.tolist() if row not in [ids(text)[:SEQLEN] for text in LONG]]
    assert len(data.tokens) == 5 and len(own) == 3


def test_a_file_called_self_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "a.json").write_text(json.dumps(LONG))
    assert len(load("self", nsamples=3).tokens) == 3
