"""A quantized input embedding, which mlx-lm reads and which `layer_config` asks for by its full name."""

import json

import pytest
import torch
from models import samples, tiny
from safetensors.torch import load_file

from auto_round import AutoRound
from auto_round.core.errors import FormatError
from auto_round.jobs.verify import verify

NAME = "model.embed_tokens"
ASKED = {"layer_config": {NAME: {"bits": 8, "group_size": 64}}, "group_size": 32}


def exported(tmp_path, fmt="mlx,fake", *, tied=True, **options):
    """Folders of a tiny Llama with a quantized embedding, one per format."""
    tiny("llama", tmp_path / "model", tie_word_embeddings=tied)
    AutoRound(tmp_path / "model", **{**ASKED, **options}).quantize_and_save(tmp_path / "out", format=fmt)
    return [tmp_path / "out" / name for name in fmt.split(",")]


def rows(tensors):
    """What mlx computes of the packed table: scale * code + bias, four codes of 8 bits in a word, low ones first."""
    words = tensors[f"{NAME}.weight"].view(torch.int32)
    codes = torch.stack([(words >> shift) & 255 for shift in (0, 8, 16, 24)], -1).flatten(1)
    scale, bias = (
        tensors[f"{NAME}.{name}"].float().repeat_interleave(64, 1) for name in ("scales", "biases")
    )
    return codes * scale + bias


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("searched", [True, False])
def test_the_packed_table_is_the_plain_one(tmp_path, tied, searched):
    data = {"dataset": samples(4), "nsamples": 4, "seqlen": 32} if searched else {"disable_opt_rtn": True}
    mlx, fake = exported(tmp_path, tied=tied, iters=0, **data)
    packed, plain = load_file(mlx / "model.safetensors"), load_file(fake / "model.safetensors")
    assert torch.equal(rows(packed), plain[f"{NAME}.weight"].float())
    settings = json.loads((mlx / "config.json").read_text())
    assert settings["quantization"][NAME] == {"group_size": 64, "bits": 8}
    assert settings["tie_word_embeddings"] is tied  # mlx-lm multiplies by the packed table then
    assert ("lm_head.weight" in packed) is not tied
    assert not verify(mlx) and not verify(fake)


def test_other_readers_have_no_such_module(tmp_path):
    with pytest.raises(FormatError, match=r"model\.embed_tokens: readers of auto_round .* --format mlx"):
        exported(tmp_path, "auto_round", iters=0, disable_opt_rtn=True)


def test_nothing_is_said_about_an_embedding_that_nobody_named(tmp_path):
    folder = exported(tmp_path, iters=0, disable_opt_rtn=True, layer_config={"k_proj": {"bits": 8}})[0]
    settings = json.loads((folder / "config.json").read_text())
    assert settings["quantization"].get(NAME, False) is False
