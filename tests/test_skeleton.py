"""A model that is read block by block is the model that transformers loads as a whole, in less memory."""

import logging

import pytest
import torch
from models import KINDS, MOES, samples, tiny
from safetensors.torch import load_file, save_file
from torch import nn

from auto_round import AutoRound
from auto_round.core.errors import ModelError
from auto_round.models import load
from auto_round.models.skeleton import Skeleton
from auto_round.models.subject import Origin, open_subject

TUNED = {"iters": 2, "nsamples": 4, "seqlen": 16, "batch_size": 2, "group_size": 32, "disable_opt_rtn": True}
RTN = {"iters": 0, "disable_opt_rtn": True, "group_size": 32}


def skeleton_of(folder, dtype="auto"):
    """The skeleton of a model folder."""
    subject = open_subject(
        Origin(folder=folder, load_live=lambda: pytest.fail("loaded as a whole"), dtype=dtype)
    )
    return Skeleton(subject.tree, subject.located, subject.anatomy.in_order()), subject.anatomy


def bytes_of(folder):
    """Name -> contents of every file."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "auto") for name in (*KINDS, *MOES)] + [("llama", "float16"), ("deepseek-v3", "float16")],
)
def test_a_filled_skeleton_is_the_model_that_transformers_loads(name, dtype, tmp_path):
    tiny(name, tmp_path, dtype=torch.bfloat16)
    home, anatomy = skeleton_of(tmp_path, dtype)
    whole = load.load_model(tmp_path, dtype=dtype)
    home.fill_outside(None)
    for block in anatomy.in_order():
        home.fill(block)
    expected, found = whole.state_dict(), home.model.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
    for (key, tensor), other in zip(whole.named_buffers(), home.model.buffers(), strict=True):
        assert torch.equal(tensor, other) and tensor.dtype == other.dtype, key


def test_only_what_is_filled_is_in_memory(tmp_path):
    tiny("llama", tmp_path)
    home, anatomy = skeleton_of(tmp_path)

    def held():
        return {name for name, p in home.model.named_parameters() if not p.is_meta}

    assert not held()
    home.fill("model.layers.1")
    assert held() and all(name.startswith("model.layers.1.") for name in held())
    home.drop("model.layers.1")
    home.fill_outside(anatomy.head)
    assert held() == {"model.embed_tokens.weight", "model.norm.weight"}
    home.drop()
    assert not held()


@pytest.mark.parametrize(
    "options", [{}, {"quant_lm_head": True, "iters": 1}, {"enable_quanted_input": False}], ids=str
)
@pytest.mark.parametrize("name", ["llama", "qwen3-tied", "gpt2"])
def test_tuning_block_by_block_gives_the_bytes_of_tuning_the_whole_model(name, options, tmp_path):
    tiny(name, tmp_path / "model", dtype=torch.bfloat16)
    for whole in (True, False):
        job = AutoRound(
            tmp_path / "model",
            dataset=samples(4, 16),
            low_cpu_mem_usage=not whole,
            **{**TUNED, **options},
        )
        model, _ = job.quantize_and_save(tmp_path / str(whole))
        assert isinstance(model, nn.Module) == whole
    assert bytes_of(tmp_path / "True") == bytes_of(tmp_path / "False")


def without(folder, *names):
    """Remove tensors from the checkpoint in `folder`."""
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("options", [RTN, TUNED], ids=["streamed", "tuned"])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.input_layernorm.weight"])
def test_a_missing_tensor_that_is_only_copied_is_named(name, options, tmp_path):
    tiny("llama", tmp_path / "model")
    without(tmp_path / "model", name)
    with pytest.raises(ModelError, match=rf"{name} is missing.*Download it again"):
        AutoRound(tmp_path / "model", dataset=samples(4, 16), **options).quantize_and_save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_of_another_name_is_a_warning_and_the_model_is_loaded_as_a_whole(tmp_path, caplog):
    tiny("llama", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.old.norm"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, "auto_round"):
        AutoRound(tmp_path / "model", **RTN).quantize_and_save(tmp_path / "out")
    assert "model.norm.weight" in caplog.text and "another" in caplog.text


def test_a_tensor_of_another_shape_is_named_when_it_is_read(tmp_path):
    tiny("llama", tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] = torch.ones(63)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model.layers.1.input_layernorm.weight: shape \(63,\).*\(64,\)"):
        AutoRound(tmp_path / "model", dataset=samples(4, 16), **TUNED).quantize_and_save(tmp_path / "out")
