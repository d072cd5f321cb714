"""Facts about architectures, as data: only what the module tree cannot tell."""

import re

FUSED_NAMES = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"query", "key", "value"}),
)
"""Siblings that servers merge into one matrix."""

ROUTER_ENDINGS = (".gate", ".router", ".shared_expert_gate", ".gate.wg")
"""Matrices that choose experts: tiny, and never quantized."""

STATE_ENDINGS = (".dt_proj", ".x_proj", ".in_proj_a", ".in_proj_b", ".in_proj_ba", ".A_log")
"""Small projections that steer the step size and the decay of state-space and linear attention."""


def left_alone(name: str) -> str | None:
    """Why the matrix `name` is never quantized, wherever it is, or None."""
    if name.endswith(ROUTER_ENDINGS):
        return "it chooses experts: tiny, and routing must not change"
    if name.endswith(STATE_ENDINGS):
        return "it steers a recurrent state: tiny, and errors add up over the sequence"
    return None


HEADS = ("lm_head", "embed_out", "output")
EMBEDDINGS = ("embed", "wte", "wpe", "relative_attention_bias")
"""Last words of the names of output heads, and words that mark tables of embeddings."""

PREDICTION = re.compile(r"(^|\.)(mtp|nextn|mtp_layers)(\.|$)")
"""Names of the layers that predict several tokens at once."""

INTERLEAVED_EXPERTS = ("gpt_oss",)
"""Values of model_type whose fused gate and up alternate row by row."""

FUSED_EXPERTS = {"Llama4TextExperts": (True, False)}
"""Modules of fused experts that do not tell their layout: class name -> (stored (I, O), gate and up interleaved)."""

NON_TEXT_WORDS = (
    "vision",
    "visual",
    "image",
    "audio",
    "speech",
    "multi_modal_projector",
    "mm_projector",
    "talker",
)
"""Words in a block list's path that mark a tower other than the language model."""

TRANSPOSED_ENDINGS = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn")}
"""Matrices stored (I, O) by model_type, for checkpoints whose module tree cannot be built."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
SIDE_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken", ".vocab", ".bpe", ".spm")
NEVER_COPIED = ("config.json", "quantization_config.json", "quantize_config.json", "quant_config.json")
"""What travels along with a checkpoint: files of `SIDE_SUFFIXES`, except indexes and those named here."""
