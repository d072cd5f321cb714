"""Calibration data: the grammar of `--dataset`, lists of every kind, chat templates, dropped samples, messages."""

import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import SENTENCES, samples, tiny, tokenizer, tokens
from torch.utils.data import DataLoader

from auto_round import AutoRound
from auto_round.core.errors import AutoRoundError, DataError
from auto_round.sources.dataset import Calibration, Request, load_calibration
from auto_round.sources.dataset_spec import Part, parse_spec, split_outside_quotes

SEQLEN = 32
LONG = [" ".join(SENTENCES[i:] + SENTENCES[:i]) for i in range(3)]
SHORT = "Rain."


def load(dataset, nsamples=4, seqlen=SEQLEN, seed=42, chat=True):
    """Calibration samples for `dataset` with the tiny tokenizer."""
    return load_calibration(
        dataset, tokenizer(chat=chat), Request(nsamples=nsamples, seqlen=seqlen, seed=seed)
    )


def ids(text):
    """Token ids of `text`."""
    return tokenizer()(text)["input_ids"]


def decoded(data):
    """The samples as text."""
    return [tokenizer().decode(row) for row in data.tokens]


def write(path, items):
    """`items` as .json, .jsonl or .txt; the path as text."""
    text = {
        ".json": lambda: json.dumps(items),
        ".jsonl": lambda: "\n".join(json.dumps(item) for item in items),
        ".txt": lambda: "\n\n".join(items),
    }[path.suffix]()
    path.write_text(text, encoding="utf-8")
    return str(path)


# ----------------------------------------------------------------------------------------------------------- grammar


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("NeelNanda/pile-10k", [Part("NeelNanda/pile-10k")]),
        ("NeelNanda/pile-10k:train", [Part("NeelNanda/pile-10k", split=("train",))]),
        (
            "./tmp.json,NeelNanda/pile-10k:num=256,mbpp:num=128",
            [Part("./tmp.json"), Part("NeelNanda/pile-10k", num=256), Part("mbpp", num=128)],
        ),
        ("a:split=train+test:num=3", [Part("a", num=3, split=("train", "test"))]),
        ("a:concat=True", [Part("a", concat=True)]),
        ("a:concat", [Part("a", concat=True)]),
        ("a:concat=False", [Part("a")]),
        ("a:apply_chat_template", [Part("a", chat=True)]),
        (
            'a:apply_chat_template:system_prompt="You are a helpful assistant."',
            [Part("a", chat=True, system_prompt="You are a helpful assistant.")],
        ),
        ("a:system_prompt='Hi, you: there'", [Part("a", chat=True, system_prompt="Hi, you: there")]),
        (" a : num = 3 , b ", [Part("a", num=3), Part("b")]),
        ("/data/my set.jsonl", [Part("/data/my set.jsonl")]),
    ],
)
def test_the_guides_data_sets_are_understood(text, parts):
    assert parse_spec(text) == parts


pieces = st.text("abc./-_ 1", min_size=1, max_size=5).map(str.strip).filter(bool)
quoted = st.text("abc ,:+=", max_size=6).map(lambda text: f'"{text}"')


@given(st.lists(st.tuples(pieces, st.lists(pieces | quoted, max_size=3)), min_size=1, max_size=3))
def test_marks_inside_quotes_never_split(items):
    text = ",".join(":".join([name, *options]) for name, options in items)
    found = [split_outside_quotes(item, ":") for item in split_outside_quotes(text, ",")]
    assert found == [[name, *options] for name, options in items]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:nmu=3", ["'nmu'", "Did you mean 'num'", "Known"]),
        ("a:num=many", ["num='many'", "positive"]),
        ("a:num=0", ["num='0'", "positive"]),
        ("a:num", ["num=''", "positive"]),
        ("", ["names nothing"]),
        (" , ", ["names nothing"]),
    ],
)
def test_a_wrong_specification_is_an_error_that_quotes_it(text, words):
    with pytest.raises(DataError) as caught:
        parse_spec(text)
    assert all(word in str(caught.value) for word in words) and text in str(caught.value)


# -------------------------------------------------------------------------------------------------------- local files


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
def test_a_local_file_of_texts_gives_their_tokens(tmp_path, suffix):
    data = load(write(tmp_path / f"a{suffix}", LONG), nsamples=3)
    assert sorted(data.tokens.tolist()) == sorted(ids(text)[:SEQLEN] for text in LONG)
    assert data.attention_mask is None and data.valid is None and data.tokens.dtype == torch.int64


@pytest.mark.parametrize("column", ["text", "content", "code", "prompt", "question"])
def test_every_usual_column_is_read(tmp_path, column):
    path = write(tmp_path / "a.jsonl", [{"id": 1, column: text} for text in LONG])
    assert len(load(path, nsamples=3).tokens) == 3


def test_a_single_column_may_have_any_name(tmp_path):
    assert len(load(write(tmp_path / "a.json", [{"anything": text} for text in LONG])).tokens) == 3


def test_a_dict_of_texts_is_read_as_its_values(tmp_path):
    assert len(load(write(tmp_path / "a.json", dict(enumerate(LONG)))).tokens) == 3


def test_an_item_without_a_known_column_is_an_error_that_lists_its_columns(tmp_path):
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "a.json", [{"title": "x", "body": "y"}]))
    assert all(word in str(caught.value) for word in ("a.json", "title", "body", "text"))


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_messages_go_through_the_chat_template(tmp_path, key):
    messages = [{"role": "user", "content": LONG[0]}, {"role": "assistant", "content": LONG[1]}]
    (text,) = decoded(load(write(tmp_path / "a.jsonl", [{key: messages}]), nsamples=1, seqlen=64))
    assert text.startswith("<|user|>The old lady")


def test_a_chat_template_can_be_applied_to_plain_text(tmp_path):
    path = write(tmp_path / "a.txt", LONG)
    assert all(
        text.startswith("<|user|>") for text in decoded(load(f"{path}:apply_chat_template", nsamples=3))
    )
    prompt = load(f'{path}:apply_chat_template:system_prompt="Be brief, yes: brief."', nsamples=3, seqlen=64)
    assert all(text.startswith("<|system|>Be brief, yes: brief.<|end|><|user|>") for text in decoded(prompt))


def test_a_missing_chat_template_is_an_error_that_says_so(tmp_path):
    path = write(tmp_path / "a.txt", LONG)
    with pytest.raises(DataError, match="chat template"):
        load(f"{path}:apply_chat_template", chat=False)


# ---------------------------------------------------------------------------------------------- numbers and combining


@pytest.mark.parametrize("num", [1, 2, 5])
def test_num_limits_one_data_set(tmp_path, num):
    path = write(tmp_path / "a.jsonl", [f"{i} {text}" for i in range(4) for text in LONG])
    assert len(load(f"{path}:num={num}", nsamples=8).tokens) == num


def test_data_sets_share_the_samples_unless_told(tmp_path):
    names = {}
    for letter in "ab":
        names[letter] = write(
            tmp_path / f"{letter}.jsonl", [f"{letter * 3} {i} {LONG[0]}" for i in range(12)]
        )
    count = lambda spec: [sum(t.startswith(x * 3) for t in decoded(load(spec, nsamples=8))) for x in "ab"]  # noqa: E731
    assert count(f"{names['a']},{names['b']}") == [4, 4]
    assert count(f"{names['a']}:num=6,{names['b']}") == [6, 2]
    assert count(f"{names['a']}:num=3,{names['b']}:num=2") == [3, 2]


def test_the_order_of_samples_depends_on_the_seed_alone(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"{i} {LONG[0]}" for i in range(8)])
    one, again, other = (load(path, nsamples=8, seed=seed).tokens for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert sorted(one.tolist()) == sorted(other.tolist())


def test_short_samples_are_dropped_and_counted(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [LONG[0], SHORT, LONG[1], SHORT])
    with caplog.at_level(logging.INFO, "auto_round"):
        data = load(path, nsamples=4)
    assert len(data.tokens) == 2
    assert (
        f"2 samples of 32 tokens (64 in all) from {path}, 4 wanted; dropped 2 shorter than 32 tokens of 4 read"
        in caplog.text
    )
    assert "concat=True" in caplog.text


def test_long_samples_are_cut_and_nothing_is_said_when_there_are_enough(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "auto_round"):
        data = load(write(tmp_path / "a.jsonl", LONG), nsamples=2)
    assert data.tokens.shape == (2, SEQLEN)
    assert "calibration: 2 samples of 32 tokens" in caplog.text and "dropped" not in caplog.text


def test_few_tokens_are_pointed_out(tmp_path, caplog):
    load(write(tmp_path / "a.jsonl", LONG), nsamples=2)
    assert "only 64 calibration tokens" in caplog.text


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".txt"])
def test_concatenation_makes_samples_of_short_texts(tmp_path, suffix):
    texts = [f"{SHORT} {i}." for i in range(40)]
    path = write(tmp_path / f"a{suffix}", texts)
    with pytest.raises(DataError, match="no usable calibration sample"):
        load(path)
    data = load(f"{path}:concat=True")
    joined = ids("\n\n".join(texts)) if suffix == ".txt" else [token for text in texts for token in ids(text)]
    assert sorted(data.tokens.tolist()) == sorted(joined[i * SEQLEN : (i + 1) * SEQLEN] for i in range(4))


def test_the_error_without_any_sample_names_a_length_that_would_do(tmp_path):
    path = write(tmp_path / "a.jsonl", [" ".join(LONG)])
    with pytest.raises(DataError) as caught:
        load(path, seqlen=100_000)
    longest = len(ids(" ".join(LONG)))
    assert f"the longest has {longest}" in str(caught.value) and f"--seqlen {longest // 32 * 32} " in str(
        caught.value
    )
    assert len(load(path, seqlen=longest // 32 * 32).tokens) == 1


@pytest.mark.parametrize("text", ["Tiny.", "word " * 10])
def test_the_length_that_is_proposed_is_never_longer_than_the_text(tmp_path, text):
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "a.jsonl", [text]), seqlen=1000)
    proposed = int(str(caught.value).split("--seqlen ")[1].split()[0])
    assert proposed <= len(ids(text))


# -------------------------------------------------------------------------------------------------------------- lists

ROWS = tokens(4, SEQLEN)
LISTS = {
    "tensors": list(ROWS),
    "tensors of a batch": [ROWS[:2], ROWS[2:]],
    "one by one": [row.unsqueeze(0) for row in ROWS],
    "numbers": ROWS.tolist(),
    "tuples of numbers": [tuple(row) for row in ROWS.tolist()],
    "dicts": [{"input_ids": row} for row in ROWS],
    "dicts of numbers": [{"input_ids": row} for row in ROWS.tolist()],
    "dicts with masks": [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ROWS],
    "dicts of batches": [{"input_ids": ROWS[:3]}, {"input_ids": ROWS[3:]}],
    "tuples": [(row.unsqueeze(0), None) for row in ROWS],
    "a generator": (row for row in ROWS),
    "a loader": DataLoader(list(ROWS), batch_size=2),
    "a loader of dicts": DataLoader([{"input_ids": row} for row in ROWS], batch_size=3),
    "a tensor": ROWS,
    "longer rows": list(torch.cat([ROWS, ROWS], dim=1)),
}


@pytest.mark.parametrize("kind", LISTS)
def test_token_ids_of_every_shape_are_taken_as_they_are(kind):
    data = load_calibration(LISTS[kind], None, Request(nsamples=4, seqlen=SEQLEN, seed=0))
    assert torch.equal(data.tokens, ROWS) and data.attention_mask is None


@pytest.mark.parametrize(
    "data", [LONG, [{"text": text} for text in LONG], tuple(LONG)], ids=["list", "dicts", "tuple"]
)
def test_a_list_of_texts_is_tokenized_in_its_order(data):
    assert load(data, nsamples=3).tokens.tolist() == [ids(text)[:SEQLEN] for text in LONG]


def test_the_guides_custom_data_with_a_tokenizer_is_taken():
    found = [
        tokenizer()(text * 3, truncation=True, max_length=SEQLEN, return_tensors="pt").data for text in LONG
    ]
    data = load_calibration(found, None, Request(nsamples=3, seqlen=SEQLEN, seed=0))
    assert data.tokens.tolist() == [ids(text * 3)[:SEQLEN] for text in LONG]


def test_masks_are_kept_when_something_is_padding():
    mask = torch.ones_like(ROWS)
    mask[1, 20:] = 0
    found = [{"input_ids": row, "attention_mask": own} for row, own in zip(ROWS, mask)]
    data = load_calibration(found, None, Request(nsamples=4, seqlen=SEQLEN, seed=0))
    assert torch.equal(data.attention_mask, mask) and torch.equal(data.valid, mask.bool())


def test_masked_and_unmasked_samples_may_be_mixed():
    masked = {"input_ids": ROWS[0], "attention_mask": torch.tensor([0] * 8 + [1] * 24)}
    data = load_calibration([masked, ROWS[1]], None, Request(nsamples=2, seqlen=SEQLEN, seed=0))
    assert data.attention_mask.sum(1).tolist() == [24, 32]


def test_no_more_is_read_of_a_source_than_is_wanted():
    source = iter([ROWS[0]] * 100)
    data = load_calibration(source, None, Request(nsamples=3, seqlen=SEQLEN, seed=0))
    assert len(data.tokens) == 3 and len(list(source)) >= 96


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (5, ["int"]),
        ([3, 4], ["int", "token ids"]),
        ([None], ["NoneType", "token ids"]),
        ([{"labels": [1, 2], "pixels": [3]}], ["labels", "pixels", "text"]),
        ([["words", 3]], ["list of str", "token ids"]),
        ([[1.5, 2.5]], ["list of float", "token ids"]),
        ([[]], ["list", "token ids"]),
    ],
    ids=str,
)
def test_samples_of_a_wrong_kind_are_an_error_that_names_it(data, words):
    with pytest.raises(AutoRoundError) as caught:
        load(data, seqlen=2)
    assert all(word in str(caught.value) for word in words), caught.value


# ------------------------------------------------------------------------------------------------------- through a job


def test_a_length_beyond_the_models_positions_is_shortened_and_said(caplog):
    made = AutoRound(tiny("llama"), iters=1, nsamples=2, seqlen=4096, dataset=samples(2, 128), batch_size=2)
    made.quantize()
    assert "seqlen 4096 is more than the model's 128 positions: using 128" in caplog.text


@pytest.mark.parametrize(
    ("kind", "options", "count"),
    [
        ("llama", {}, 32),
        ("llama", {"seqlen": 32}, 64),
        ("llama", {"seqlen": 8}, 128),  # never more than the recipe has
        ("llama", {"iters": 1}, 128),
        ("llama", {"nsamples": 20}, 20),
        ("llama", {"dataset": "texts.jsonl:num=30"}, 128),
        ("llama", {"dataset": ["a text"] * 300}, 128),
        ("llama", {"save_imatrix": "imatrix.gguf"}, 128),
        ("mixtral", {}, 128),
        ("llama", {"disable_opt_rtn": True, "recipe": "rtn"}, 0),
    ],
)
def test_without_tuning_as_many_samples_are_looked_at_as_are_of_use(kind, options, count):
    made = AutoRound(
        tiny(kind, intermediate_size=128), **{"iters": 0, "seqlen": 128, "dataset": "texts.jsonl", **options}
    )
    assert made.material.nsamples() == count


def test_ranges_of_inputs_are_calibrated_on_all_samples(tmp_path):
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text * 200}) + "\n" for text in SENTENCES * 40))
    common = {"tokenizer": tokenizer(), "iters": 0, "seqlen": 128, "dataset": str(texts)}
    made = {scheme: AutoRound(tiny("llama"), scheme=scheme, **common) for scheme in ("W4A16", "FP8_STATIC")}
    for job in made.values():
        job.quantize()
    assert len(made["W4A16"].material.calibration.tokens) < len(
        made["FP8_STATIC"].material.calibration.tokens
    )


def test_optimised_rtn_without_data_goes_by_weights_and_says_so(caplog):
    made = AutoRound(tiny("llama"), iters=0, seqlen=SEQLEN)
    made.quantize()
    assert "optimised RTN goes by weights alone" in caplog.text and "NeelNanda/pile-10k" in caplog.text


def test_calibration_is_a_plain_value():
    data = Calibration(ROWS)
    with pytest.raises(AttributeError):
        data.tokens = ROWS
