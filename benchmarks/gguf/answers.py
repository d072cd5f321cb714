"""Whether a chat model in llama.cpp answers like the original, beside the files that llama.cpp itself quantizes.

python benchmarks/gguf/answers.py --llama /path/to/python --model DIR [--types q8_0,q4_k_m] [--calibration NAME ...]

DIR is a chat model, such as examples/fetch_smollm2.py makes. The original answers in torch, in float32, greedily. Then
each file is asked the same in chat mode; `kl` is over the tokens of the original's answers, `margin` how far the first
token of the original's first answer is above the best other one (near 0: a toss-up that any rounding decides).
"""

import argparse
import json
import logging
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from auto_round import AutoRound
from auto_round.formats.base import format_named

HERE = Path(__file__).parent
QUESTIONS = (
    "What is the capital of France?", "Which city is the capital of France?", "What is the capital of Italy?",
    "How many legs does a spider have?", "What color is the sky on a clear day?", "What is 2 + 2?",
    "Who wrote Romeo and Juliet?", "Name a fruit that is yellow.", "What do bees make?", "Is the sun a star?",
    "Which planet is closest to the sun?", "What is the opposite of hot?", "Write one sentence about the sea.",
    "What is the largest ocean on Earth?", "In which season do leaves fall?", "What is water made of?",
)  # fmt: skip
LENGTH = 32  # tokens of an answer


@torch.no_grad()
def original_answers(folder):
    """(prompts as token ids, answers as text, all tokens (N, T), where answers are predicted (N, T), logits there)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts, rows, texts = [], [], []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        row = model.generate(ids, max_new_tokens=LENGTH, do_sample=False)[0]
        prompts.append(ids[0].tolist())
        rows.append(row)
        texts.append(tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True))
    longest = max(len(row) for row in rows)
    tokens = torch.stack([torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows])
    places = torch.zeros(tokens.shape, dtype=torch.bool)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        places[i, len(prompt) - 1 : len(row) - 1] = True
    logits = torch.cat([model(input_ids=row[None]).logits[0][own] for row, own in zip(tokens, places)])
    return prompts, texts, tokens, places, logits


def run(python, *words):
    """What benchmarks/gguf/llama.py prints."""
    command = [python, str(HERE / "llama.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def judged(python, path, original, place):
    """What one file makes of the questions."""
    prompts, texts, tokens, places, logits = original
    (place / "questions.json").write_text(json.dumps(QUESTIONS))
    run(python, "answers", path, place / "questions.json", LENGTH, place / "answers.json")
    found = json.loads((place / "answers.json").read_text())
    np.save(place / "ids.npy", tokens.numpy())
    run(python, "logits", path, place / "ids.npy", place / "out.npy")
    scores = torch.from_numpy(np.load(place / "out.npy"))[places]
    p, q = logits.double().log_softmax(-1), scores.double().log_softmax(-1)
    first, best = scores[0], logits[0].argmax()
    others = torch.cat([first[:best], first[best + 1 :]])
    return {
        "prompts_identical": sum(a["prompt"] == b for a, b in zip(found, prompts, strict=True)),
        "same_answers": sum(a["text"].strip() == b.strip() for a, b in zip(found, texts, strict=True)),
        "of": len(QUESTIONS),
        "kl": round((p.exp() * (p - q)).sum(-1).mean().item(), 5),
        "top1": round((p.argmax(-1) == q.argmax(-1)).double().mean().item(), 4),
        "margin": round((first[best] - others.max()).item(), 3),
        "first_answer": found[0]["text"],
    }


def main():
    """One row for the bfloat16 file, and for each type one for llama.cpp's file and one for each of ours."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--types", default="q8_0,q4_k_m")
    parser.add_argument(
        "--calibration", nargs="*", default=["none", "self"], help="datasets; none: by weights alone"
    )
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("auto_round").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows, original = [], original_answers(options.model)

    def report(type_, by, path, place):
        rows.append({"type": type_, "by": by, **judged(options.llama, path, original, place)})
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)

    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        AutoRound(options.model, format="gguf:bf16", iters=0, model_free=True).quantize_and_save(
            place / "bf16"
        )
        (plain,) = (place / "bf16").glob("*.gguf")
        report("bf16", "ours", plain, place)
        for type_ in options.types.split(","):
            theirs = place / f"{type_}.gguf"
            run(options.llama, "quantize", plain, theirs, format_named(f"gguf:{type_}").file_type)
            report(type_, "llama.cpp", theirs, place)
            for name in options.calibration:
                data = {"nsamples": 0} if name == "none" else {"dataset": name, "nsamples": options.nsamples}
                job = AutoRound(options.model, format=f"gguf:{type_}", iters=0, seqlen=options.seqlen, **data)
                job.quantize_and_save(place / f"{type_}-{len(rows)}")
                (ours,) = (place / f"{type_}-{len(rows)}").glob("*.gguf")
                report(type_, f"ours, calibrated on {name}", ours, place)
    if options.out:
        options.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
