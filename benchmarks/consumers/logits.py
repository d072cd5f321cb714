"""Load quantized folders with one consumer, in that consumer's environment, and save the logits it gives.

    python logits.py HOW JOBS.json

HOW is a name of HOW below; JOBS is {"tokens": file.npy, "jobs": [{"folder", "out", "override"}, ...]}. Each
job leaves OUT.json, with the status and, when refused, the consumer's own words; and OUT.npy, float32 (rows,
tokens, vocabulary). Where auto_round does not compute in float32 of its own accord, OUT.npy is from its
modules cast to float32 and OUT.native.npy is what it gives by itself.
"""

import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

# Logits, logits in the consumer's own type where that is not float32, what the consumer says about itself.
Answer = tuple[np.ndarray, np.ndarray | None, dict]


def _forward(model, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(tokens).to(model.device)).logits.float().numpy()


def _describe(model) -> dict:
    """The type the model computes in, and how many of each linear class it holds."""
    kinds = Counter(f"{type(m).__module__.split('.')[0]}.{type(m).__name__}" for m in model.modules())
    linears = {kind: count for kind, count in kinds.items() if "inear" in kind}
    return {"dtype": str(model.dtype).removeprefix("torch."), "linears": linears}


def _load_stock(folder: str, *, override: bool, dtype: str = "float32"):
    """`from_pretrained` of stock transformers; `override` asks auto_round to read a GPTQ or AWQ folder."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {}
    if override:
        from transformers import AutoRoundConfig

        options["quantization_config"] = AutoRoundConfig()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()


def _divide_as_compressed_tensors() -> None:
    """Make this package find the scales of inputs by the rules of compressed-tensors 0.20; the process is used up.

    Integers: the largest magnitude over 127.5. MX: a power of two that goes up where the largest magnitude, rounded to
    one bit of mantissa more than the element has, would (1.75 and above; the element of 6 bits has three).
    """
    import torch

    from auto_round.codecs import integer, mx

    power = mx.power_of_two_scale

    def rounded(largest, element, *, up):
        bits = element.mantissa if element.bits == 6 else 1
        ceiling = 2 - 2.0 ** -(bits + 1)
        mantissa, exponent = torch.frexp(largest)
        bumped = torch.where(
            mantissa * 2 >= ceiling, torch.ldexp(torch.ones_like(largest), exponent), largest
        )
        return power(bumped, element, up=up)

    mx.power_of_two_scale = rounded
    integer._both_ways = lambda largest, spec: largest / (integer.middle(spec) - 0.5)


def auto_round(job: dict, tokens: np.ndarray) -> Answer:
    """Whatever package called auto_round is installed here, through stock transformers, float32 asked for."""
    import torch

    if job.get("rule"):
        _divide_as_compressed_tensors()
    model = _load_stock(job["folder"], override=job["override"], dtype=job.get("dtype", "float32"))
    if "dtype" in job:  # as asked for, whatever it is
        return _forward(model, tokens), None, _describe(model)
    about, native = _describe(model), None
    if about["dtype"] != "float32":
        native = _forward(model, tokens)
        # A quantized model refuses `.float()`; the method of its base class casts scales and norms. The rotary
        # frequencies are made anew: they lost their digits in the 16-bit type and are no part of the checkpoint.
        model = torch.nn.Module.float(model)
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return _forward(model, tokens), native, about


def plain(job: dict, tokens: np.ndarray) -> Answer:
    """An unquantized folder with stock transformers in float32: the reference."""
    model = _load_stock(job["folder"], override=False)
    return _forward(model, tokens), None, _describe(model)


def gptqmodel(job: dict, tokens: np.ndarray) -> Answer:
    """Stock transformers, whose GPTQ and AWQ quantizers call gptqmodel."""
    model = _load_stock(job["folder"], override=False)
    return _forward(model, tokens), None, _describe(model)


def gptqmodel_own(job: dict, tokens: np.ndarray) -> Answer:
    """gptqmodel's own loader, which knows the `dynamic` entry of mixed widths that optimum ignores."""
    from gptqmodel import BACKEND, GPTQModel

    loaded = GPTQModel.load(job["folder"], device="cpu", backend=BACKEND.TORCH)
    return _forward(loaded.model.float().eval(), tokens), None, _describe(loaded.model)


def autoawq(job: dict, tokens: np.ndarray) -> Answer:
    """AutoAWQ's own loader and its plain torch kernel, which computes in float16."""
    import awq.models.base
    import torch

    # On a CPU AutoAWQ takes the kernels of intel_extension_for_pytorch, which stopped at torch 2.8. Any other
    # device name makes it keep its own layers, whose torch path runs anywhere.
    awq.models.base.get_best_device = lambda: "none"
    loaded = awq.AutoAWQForCausalLM.from_quantized(
        job["folder"], fuse_layers=False, device_map={"": "cpu"}, torch_dtype=torch.float16
    )
    return _forward(loaded.model.eval(), tokens), None, _describe(loaded.model)


def stock(job: dict, tokens: np.ndarray) -> Answer:
    """Whatever stock transformers makes of the folder, in the type asked for.

    With job["dequantize"], compressed-tensors is told to make plain weights while loading.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options = {}
    if job.get("dequantize"):
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    dtype = getattr(torch, job.get("dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=dtype, **options).eval()
    return _forward(model, tokens), None, _describe(model)


def mlx(job: dict, tokens: np.ndarray) -> Answer:
    """mlx-lm on the CPU of any machine; its type follows from the stored scales and the other weights."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(job["folder"]))
    logits = model(mx.array(tokens.astype(np.int32)))
    return np.array(logits.astype(mx.float32)), None, {"dtype": str(logits.dtype).removeprefix("mlx.core.")}


def vllm(job: dict, tokens: np.ndarray) -> Answer:
    """vLLM's log-probabilities of the prompt; the last position has none and repeats the one before.

    Float32 is refused for quantized models on a CPU, so this is 16-bit arithmetic.
    """
    from vllm import LLM, SamplingParams

    rows, length = tokens.shape
    dtype, more = job.get("dtype", "float16"), job.get("vllm", {})
    llm = LLM(
        job["folder"], dtype=dtype, max_model_len=length + 8, max_logprobs=-1, enforce_eager=True, **more
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False, flat_logprobs=True)
    answers = llm.generate([{"prompt_token_ids": row.tolist()} for row in tokens], sampling, use_tqdm=False)
    said = np.full((rows, length, llm.llm_engine.model_config.get_vocab_size()), np.nan, dtype=np.float32)
    for row, answer in zip(said, answers):
        flat = answer.prompt_logprobs
        # Entry i is about token i, so it is what the model says at position i - 1; entry 0 is empty.
        for i in range(1, length):
            entry = slice(flat.start_indices[i], flat.end_indices[i])
            row[i - 1, flat.token_ids[entry]] = flat.logprobs[entry]
        row[-1] = row[-2]
    return said, None, {"dtype": dtype}


def ort(job: dict, tokens: np.ndarray) -> Answer:
    """onnxruntime-genai's model builder, int4 weights and float32 arithmetic, then ONNX Runtime on a CPU."""
    out = Path(job["out"] + "-onnx")
    try:
        _build_onnx(job["folder"], out)
        return _run_onnx(job["folder"], out / "model.onnx", tokens), None, {"dtype": "float32"}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _build_onnx(folder: str, out: Path) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", str(out)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(out / "cache"), "--extra_options"]
    # The builder would round the float lm_head and embedding to 4 bits too.
    command += ["accuracy_level=1", "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(built.stderr.strip().splitlines()[-1])


def _run_onnx(folder: str, model: Path, tokens: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    config = json.loads((Path(folder) / "config.json").read_text())
    empty = np.zeros((len(tokens), config["num_key_value_heads"], 0, config["head_dim"]), dtype=np.float32)
    feeds = {entry.name: empty for entry in session.get_inputs() if entry.name.startswith("past_key_values")}
    feeds |= {"input_ids": tokens.astype(np.int64), "attention_mask": np.ones(tokens.shape, dtype=np.int64)}
    return session.run(["logits"], feeds)[0].astype(np.float32)


HOW = {f.__name__: f for f in (auto_round, plain, stock, mlx, gptqmodel, gptqmodel_own, autoawq, vllm, ort)}


def _words(error: BaseException) -> str:
    """The consumer's message, shortened to what a table can hold."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def run_job(how: str, job: dict, tokens: np.ndarray) -> dict:
    """Do one job and say how it went; a refusal is a result, not a failure of this script."""
    start = time.perf_counter()
    try:
        logits, native, about = HOW[how](job, tokens)
    except (Exception, SystemExit) as error:  # consumers raise anything, and some leave with exit(-1)
        return {"status": "refused", "words": _words(error)}
    np.save(job["out"] + ".npy", logits.astype(np.float32))
    if native is not None:
        np.save(job["out"] + ".native.npy", native.astype(np.float32))
    return {"status": "loaded", "seconds": round(time.perf_counter() - start, 2)} | about


def main() -> None:
    """Run every job of the file named on the command line, one thread."""
    how, work = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    if how not in ("ort", "mlx"):
        import torch

        torch.set_num_threads(1)
    tokens = np.load(work["tokens"])
    for job in work["jobs"]:
        result = run_job(how, job, tokens)
        Path(job["out"] + ".json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
