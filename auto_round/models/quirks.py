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

SHARED_PARTS = (".shared_transf.", ".shared_transformer.")
"""Parts that several blocks share (Zamba): written once, while every block has a module of its own for them."""

RESCALED = {"rwkv": (".attention.output", ".feed_forward.value")}
"""Matrices that the model's code halves in place before it runs, by model_type: codes cannot be halved."""


def left_alone(name: str, model_type: str = "") -> str | None:
    """Why the matrix `name` is never quantized, wherever it is, or None."""
    if any(part in name for part in SHARED_PARTS):
        return "several blocks share it"
    if name.endswith(RESCALED.get(model_type, ())):
        return "the model's own code rescales it in place"
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

FUSED_EXPERTS = {"Llama4TextExperts": (True, False), "LongcatFlashExperts": (False, False)}
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

CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
TRANSPOSED_ENDINGS = {"gpt2": CONV1D, "openai-gpt": CONV1D}
"""Matrices stored (I, O) by model_type, for checkpoints whose module tree cannot be built."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")
SIDE_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken", ".vocab", ".bpe", ".spm")
NEVER_COPIED = ("config.json", "quantization_config.json", "quantize_config.json", "quant_config.json")
"""What travels along with a checkpoint: files of `SIDE_SUFFIXES`, except indexes and those named here."""

PLAIN_STREAMS = frozenset(
    """
    arcee cwm ernie4_5 granite granite_swa helium internlm3 iquestcoder llama ministral ministral3 mistral qwen2
    qwen3 seed_oss smollm3
    """.split()  # noqa: SIM905 - a list of so many words is read as one
)
"""Architectures (`model_type`) whose weights can take up a rotation of the hidden states: `models.turning` names what
reads and writes them, with norms that divide by the root mean square and multiply. Found by running all decoders
(benchmarks/rotations.py)."""

PLAIN_VALUES = frozenset(
    """
    apertus arcee cohere cohere2 cohere2_moe cohere_compass_text cwm diffllama dots1 ernie4_5 ernie4_5_moe exaone4
    exaone_moe falcon_h1 flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text gemma4_unified_text glm
    glm4 glm4_moe gpt_oss granite granite_swa granitemoe_swa helium hunyuan_v1_dense hunyuan_v1_moe hy_v3
    hyperclovax internlm3 iquestcoder jais2 kolibri1 laguna lfm3 llama llama4_text mellum mimo_v2_flash minimax
    minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral nanochat nemotron nemotron_h olmo olmo2 olmo3
    olmoe phimoe qwen2 qwen2_moe qwen3 qwen3_moe recurrent_gemma seed_oss smollm3 solar_open stablelm starcoder2
    vaultgemma zamba zamba2
    """.split()  # noqa: SIM905 - a list of so many words is read as one
)
"""Architectures whose values go from v_proj to o_proj by weighted sums alone. Found by running them, too."""

NORMS_AFTER_POSITIONS = ("query_layernorm", "key_layernorm")
"""Children of attention modules that scale queries and keys, channel by channel, when positions are in them."""
