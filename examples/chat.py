"""Talk to a quantized chat model: `python examples/chat.py FOLDER [--backend cpu]`. An empty line ends it."""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoRoundConfig, AutoTokenizer, TextStreamer


def main() -> None:
    """Read a line, answer it, remember both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--backend", help="one of `auto-round list backend`; the best one otherwise")
    parser.add_argument("--tokens", type=int, default=200, help="longest answer")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    chosen = {"quantization_config": AutoRoundConfig(backend=given.backend)} if given.backend else {}
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype="auto", **chosen)
    messages: list[dict[str, str]] = []
    while line := input("> ").strip():
        messages.append({"role": "user", "content": line})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=given.tokens, do_sample=False, streamer=streamer)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
