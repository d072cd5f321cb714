"""A whole model of random weights, shaped like Llama 3.2 1B, on each kernel: for `decode.py --whole`."""

import shutil
import tempfile
import time
from pathlib import Path

import torch
from decode import HERE, SETTINGS, layer
from torch import nn

from auto_round import AutoRound

KERNELS = (("torch bfloat16", "plain"), ("cpu", "W4G128"), ("cpu:int8", "W4G128"), ("ark", "W4G128"), ("cpu", "W2G64"),
           ("cpu", "W8G128"))  # fmt: skip
LLAMA_CPP = ("q4_0", "q4_k_m", "q2_k_s", "q8_0")
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


def llama_cpp_seconds(kind, threads):
    """(for a prompt of `LONG`, per token after it) of the same shape in llama.cpp, or None where it is not installed.

    The file has the types that `--format gguf:KIND` means, head included; it is made once, of random weights.
    """
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    out = Path(tempfile.gettempdir()) / "auto_round_decode" / kind
    if not list(out.glob("*.gguf")):
        source = out.parent / "model"
        if not source.exists():
            model = model_of("torch bfloat16", "plain")
            model.save_pretrained(source)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(HERE.parent / "examples/novelist-8m" / file, source / file)
        AutoRound(str(source), format=f"gguf:{kind}", iters=0, disable_opt_rtn=True).quantize_and_save(
            str(out)
        )
    room = {"n_ctx": LONG + TOKENS + 1, "n_batch": LONG, "n_threads": threads, "n_threads_batch": threads}
    llama = Llama(str(next(out.glob("*.gguf"))), **room, verbose=False)
    first, later = [], []
    for _ in range(ROUNDS):
        llama.reset()
        start = time.perf_counter()
        llama.eval(torch.randint(0, 1000, (LONG,)).tolist())
        first.append(time.perf_counter() - start)
        llama.reset()
        llama.eval(torch.randint(0, 1000, (PROMPT,)).tolist())
        for _ in range(TOKENS):
            start = time.perf_counter()
            llama.eval([5])
            later.append(time.perf_counter() - start)
    return min(first), min(later)


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
        yield row_of(chip, threads, kernel, setting, prompt, token)
    for kind in LLAMA_CPP:
        found = llama_cpp_seconds(kind, threads)
        if found is not None:
            yield row_of(chip, threads, "llama.cpp", kind, *found)


def row_of(chip, threads, kernel, setting, prompt, token):
    """One line of the results."""
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
    return row
