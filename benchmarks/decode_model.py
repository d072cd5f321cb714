"""A whole model of random weights, shaped like Llama 3.2 1B, on each kernel: for `decode.py --whole`."""

import time

import torch
from decode import SETTINGS, layer
from torch import nn

KERNELS = (("torch bfloat16", "plain"), ("cpu", "W4G128"), ("cpu:int8", "W4G128"), ("ark", "W4G128"), ("cpu", "W2G64"),
           ("cpu", "W8G128"))  # fmt: skip
PROMPT, TOKENS, LONG, ROUNDS = 8, 8, 512, 3


def model_of(kernel, setting):
    """The model with every Linear but the head on `kernel`, or None where that cannot run here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from auto_round.core.scheme import TensorSpec
    from auto_round.inference.convert_model import join_layers

    config = LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear) and setting != "plain":
            bits, group = SETTINGS[setting]
            made = layer(
                kernel, TensorSpec(bits=bits, group=group), tuple(module.weight.shape), torch.bfloat16
            )
            if made is None:
                return None
            model.model.set_submodule(name, made)
    for name, tensor in list(model.named_parameters()):
        filled = torch.empty_like(tensor, device="cpu").uniform_(-0.03, 0.03)
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(filled))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    join_layers(model)
    return model.eval()


def seconds(model, prompt):
    """(for a whole prompt, per token after it): the least of some rounds."""
    ids = torch.randint(0, 1000, (1, prompt))
    first, later = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        first.append(time.perf_counter() - start)
        for _ in range(TOKENS if prompt == PROMPT else 0):
            start = time.perf_counter()
            out = model(out.logits.argmax(-1), past_key_values=out.past_key_values, use_cache=True)
            later.append(time.perf_counter() - start)
    return min(first), min(later, default=0.0)


def rows_of(chip, threads):
    """A row per kernel and setting."""
    torch.set_num_threads(threads)
    for kernel, setting in KERNELS:
        model = model_of(kernel, setting)
        if model is None:
            continue
        with torch.no_grad():  # as `generate`
            token, prompt = seconds(model, PROMPT)[1], seconds(model, LONG)[0]
        row = {
            "processor": chip,
            "model": "1b",
            "layer": "whole",
            "batch": 1,
            "threads": threads,
            "kernel": kernel,
        }
        row |= {"setting": setting, "tokens_s": round(1 / token, 2), "prompt_ms": round(prompt * 1e3, 1)}
        print(row, flush=True)
        yield row
