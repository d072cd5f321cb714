"""Make the other models of the comparison: a random Qwen3 with tied embeddings, 2 layers, bfloat16.

    python make_model.py TOKENIZER_FOLDER OUT [planted]

The tokenizer files and the vocabulary are those of TOKENIZER_FOLDER, so that one text serves all models. With
`planted`, some groups of weights are made awkward: of one sign, zero, constant, tiny, or with one huge value.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def build(vocabulary: int) -> Qwen3ForCausalLM:
    """The random model."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=3,
    )
    return Qwen3ForCausalLM(config).to(torch.bfloat16)


@torch.no_grad()
def plant(weight: torch.Tensor) -> None:
    """Make the first 128 columns of some rows of `weight` awkward; zero points 0 and maximal follow."""
    weight[0:16, :128] = weight[0:16, :128].abs()
    weight[16:32, :128] = -weight[16:32, :128].abs()
    weight[32:36, :128] = 0
    weight[36] = 0
    weight[40:44, :128] = 0.25
    weight[44:48, :128] = -0.25
    weight[48:52, :128] *= 1e-6
    weight[52, 3] = 8.0
    weight[53, 3] = -8.0


def make(source: Path, out: Path, *, planted: bool) -> None:
    """Write the model to `out`."""
    model = build(json.loads((source / "config.json").read_text())["vocab_size"])
    if planted:
        plant(model.model.layers[0].mlp.down_proj.weight)
        plant(model.model.layers[1].self_attn.v_proj.weight)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, out / name)


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]), planted="planted" in sys.argv[3:])
