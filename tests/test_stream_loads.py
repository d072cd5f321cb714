"""Streamed checkpoints in stock transformers give the logits of the dequantized weights, whatever the source was."""

import pytest
import torch
from models import loaded, logits, tiny
from stored_sources import in_fp8, in_mxfp4, rewritten

from auto_round import AutoRound

SMALL = {"model_free": True, "bits": 4, "group_size": 32}
FORMS = {
    "plain": (lambda tensors: (tensors, tensors), None),
    "fp8": (
        lambda tensors: in_fp8(tensors, "block", 32),
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
    ),
    "mxfp4": (in_mxfp4, {"quant_method": "mxfp4"}),
}


@pytest.mark.parametrize(
    "name, form",
    [
        ("llama", "plain"),
        ("qwen3", "plain"),
        ("qwen3-moe", "plain"),
        ("qwen3-moe", "fp8"),
        ("deepseek-v3", "fp8"),
        ("gpt-oss", "mxfp4"),
    ],
)
def test_a_streamed_checkpoint_gives_the_logits_of_its_dequantized_weights(name, form, tmp_path):
    # All matrices in whole groups, so that the packed checkpoint and the reference quantize the same ones.
    tiny(
        name, tmp_path / "m", dtype=torch.float32, **({"qk_rope_head_dim": 32} if "deepseek" in name else {})
    )
    change, config = FORMS[form]
    source = rewritten(tmp_path / "m", tmp_path / "source", lambda tensors: change(tensors)[0], config)
    plain = rewritten(tmp_path / "m", tmp_path / "plain", lambda tensors: change(tensors)[1])
    AutoRound(source, **SMALL).quantize_and_save(tmp_path / "codes")
    # The reference knows nothing of the source's form: plain weights, dequantized and stored in full.
    AutoRound(plain, **SMALL).quantize_and_save(tmp_path / "fake", format="fake")
    expected = logits(loaded(tmp_path / "fake"))
    torch.testing.assert_close(logits(loaded(tmp_path / "codes")), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(logits(loaded(plain)), expected, atol=1e-2)  # it has been quantized
