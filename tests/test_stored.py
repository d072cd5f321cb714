"""Checkpoints read by the names of their tensors: the layers of the module tree, and architectures nobody knows."""

import json

import pytest
import torch
from models import KINDS, MOES, tiny
from safetensors.torch import save_file

from auto_round.core.errors import ModelError
from auto_round.models.checkpoint import TensorInfo
from auto_round.models.load import open_folder
from auto_round.models.stored import anatomy_of_names, fused_experts, stored_subject, tells_all
from auto_round.models.subject import Origin, open_subject


def by_tree(folder):
    """The subject as the module tree shows it."""
    return open_subject(Origin(folder=folder, load_live=lambda: pytest.fail("not needed")))


@pytest.mark.parametrize("name", [name for name in (*KINDS, *MOES) if name != "gpt-neox"])
def test_names_alone_show_the_layers_of_the_module_tree(name, tmp_path):
    tiny(name, tmp_path)
    tree, names = by_tree(tmp_path), stored_subject(open_folder(tmp_path))
    assert tells_all(names.files.store.infos, names.files.config)
    assert dict(names.files.store.infos) == dict(tree.files.store.infos)
    ours, theirs = names.anatomy, tree.anatomy
    assert (ours.block_lists, ours.head, ours.tied) == (theirs.block_lists, theirs.head, theirs.tied)
    facts = {n: (x.shape, x.transposed, x.block) for n, x in ours.layers.items()}
    assert facts == {n: (x.shape, x.transposed, x.block) for n, x in theirs.layers.items()}
    assert set(ours.fused()) == set(theirs.fused()) and set(ours.routers) == set(theirs.routers)
    assert {n: names.stored_name(n) for n in ours.layers} == {n: tree.stored_name(n) for n in theirs.layers}


def test_names_that_transformers_changes_while_loading_do_not_tell_all(tmp_path):
    tiny("gpt-neox", tmp_path)  # its head is stored as embed_out and called lm_head
    subject = stored_subject(open_folder(tmp_path))
    assert not tells_all(subject.files.store.infos, subject.files.config)
    assert not tells_all(infos(h__0__mlp__weight=(4, 4)), {})


def infos(**shapes):
    """Headers of bfloat16 tensors; "__" stands for a dot."""
    return {name.replace("__", "."): TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}


def test_every_tensor_of_an_unknown_architecture_is_a_layer_or_left_with_a_reason():
    found = infos(
        trunk__tok_embed__weight=(512, 64),
        trunk__cells__0__mixer__query__weight=(64, 64),
        trunk__cells__0__mixer__state__dt_proj__weight=(64, 4),
        trunk__cells__0__mixer__A_log=(64, 16),
        trunk__cells__0__mixer__conv1d__weight=(64, 1, 4),
        trunk__cells__0__pre_norm__weight=(64,),
        trunk__cells__0__moe__router__weight=(4, 64),
        trunk__cells__0__moe__experts__0__up__weight=(96, 64),
        trunk__cells__0__moe__experts__w13=(4, 192, 64),
        trunk__cells__1__mixer__query__weight=(64, 64),
        trunk__cells__2__mixer__query__weight=(64, 64),
        trunk__mtp__cells__0__proj__weight=(64, 128),
        visual__blocks__0__attn__qkv__weight=(96, 32),
        lm_head__weight=(512, 64),
    )
    body = anatomy_of_names(found, {"model_type": "nobody", "num_hidden_layers": 2, "vocab_size": 512})
    assert body.in_blocks() == [
        "trunk.cells.0.mixer.query",
        "trunk.cells.0.moe.experts.0.up",
        "trunk.cells.1.mixer.query",
    ]
    assert body.block_lists == (("trunk.cells.0", "trunk.cells.1"),)
    assert (body.head, body.tied) == ("lm_head", False)
    assert {layer.tensor for layer in body.layers.values()} | set(body.left) == set(found)
    words = {
        "dt_proj": "recurrent",
        "A_log": "no matrix",
        "conv1d": "no matrix",
        "pre_norm": "no matrix",
        "router": "chooses experts",
        "w13": "layout is not known",
        "cells.2": "beyond num_hidden_layers",
        "mtp": "several tokens",
        "visual": "tower",
        "tok_embed": "embeddings",
    }
    for part, word in words.items():
        (reason,) = [reason for tensor, reason in body.left.items() if part in tensor]
        assert word in reason, part


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("hidden, inner", [(64, 96), (64, 64), (64, 32)])
def test_the_orientation_of_fused_experts_shows_in_their_shapes(turned, hidden, inner):
    first, last = (4, 2 * inner, hidden), (4, hidden, inner)
    if turned:
        first, last = (4, hidden, 2 * inner), (4, inner, hidden)
    found = infos(m__layers__0__experts__gate_up_proj=first, m__layers__0__experts__down_proj=last)
    (experts,) = fused_experts(found, {"hidden_size": hidden})
    assert experts.transposed is turned and experts.gated


def test_a_head_without_a_tensor_is_the_embedding():
    found = infos(m__embed_tokens__weight=(512, 64), m__layers__0__up__weight=(64, 64))
    body = anatomy_of_names(found, {"vocab_size": 512})
    assert (body.head, body.tied, body.layers["lm_head"].shape) == ("lm_head", True, (512, 64))
    untied = anatomy_of_names(found, {"vocab_size": 512, "tie_word_embeddings": False})
    assert (untied.head, untied.tied) == (None, False)


def test_a_checkpoint_without_blocks_is_refused(tmp_path):
    save_file({"embed.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody"}))
    with pytest.raises(ModelError, match="no list of blocks"):
        stored_subject(open_folder(tmp_path))
