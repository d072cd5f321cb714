"""Whether llama.cpp cuts 200 varied strings into the same tokens as transformers.

python benchmarks/gguf/tokens.py --llama /path/to/python --model DIR
"""
# ruff: noqa: RUF001 - text of many scripts

import argparse
import json
import random
import subprocess
import tempfile
from pathlib import Path

import transformers

from auto_round import AutoRound

HERE = Path(__file__).parent
PIECES = (
    "Hello", " world", "  ", "\n", "\n\n", "\t", "123", "4567890", "3.14", "don't", "WE'LL", "naïve", "Ünïcödé",
    "привет мир", "你好，世界", "こんにちは", "한국어", "العربية", "हिन्दी १२३", "😀👍🏽",
    "def f(x_1):\n    return x**2", "<b>",
    "a/b\\c", "$100%", "...", "—", "“quotes”", "½²", "e\u0301", "\u200b", "\r\n", " \n ", "CamelCaseWord",
    "http://x.y/z?q=1",
)  # fmt: skip


def main():
    """Prints how many strings agree, and the first that do not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", required=True)
    parser.add_argument("--model", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    special, chance = list(tokenizer.all_special_tokens), random.Random(0)
    texts = ["".join(chance.choices([*PIECES, *special], k=chance.randint(1, 12))) for _ in range(200)]
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        AutoRound(options.model, format="gguf:q8_0", iters=0, model_free=True).quantize_and_save(place / "o")
        (path,) = (place / "o").glob("*.gguf")
        (place / "t.json").write_text(json.dumps(texts), encoding="utf-8")
        command = [
            options.llama,
            str(HERE / "llama.py"),
            "tokens",
            str(path),
            str(place / "t.json"),
            str(place / "i.json"),
        ]
        subprocess.run(command, check=True, capture_output=True)
        theirs = json.loads((place / "i.json").read_text())
    ours = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    wrong = [(text, a, b) for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    print(f"{len(texts) - len(wrong)} of {len(texts)} strings agree")
    for text, a, b in wrong[:3]:
        print(repr(text), a, b, sep="\n  ")


if __name__ == "__main__":
    main()
