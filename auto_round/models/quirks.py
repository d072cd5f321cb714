"""Facts about architectures, as data: only what the module tree cannot tell."""

FUSED_NAMES = (
    frozenset({"q_proj", "k_proj", "v_proj"}),
    frozenset({"gate_proj", "up_proj"}),
    frozenset({"w1", "w3"}),
    frozenset({"query", "key", "value"}),
)
"""Siblings that servers merge into one matrix."""

ROUTER_ENDINGS = (".gate", ".router", ".shared_expert_gate", ".gate.wg")
"""Matrices that choose experts: tiny, and never quantized."""

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
