"""Run by an interpreter that has llama-cpp-python: what llama.cpp makes of a file. Talks through JSON and .npy files.

python llama.py logits FILE TOKENS.npy OUT.npy | tokens FILE TEXTS.json OUT.json
python llama.py answers FILE QUESTIONS.json LENGTH OUT.json
python llama.py quantize FILE OUT.gguf FTYPE [IMATRIX] | mixtures FILE FOLDER IMATRIX FTYPE... | speed FILE
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


def opened(path, **options):
    """The model in `path` on one thread."""
    settings = {
        "n_ctx": 512,
        "n_batch": 512,
        "n_threads": 1,
        "n_threads_batch": 1,
        "verbose": False,
        **options,
    }
    return llama_cpp.Llama(path, **settings)


def logits(path, tokens, out):
    """What the model says about rows of token ids, (N, T, V) float32."""
    model = opened(path, logits_all=True)
    found = []
    for row in np.load(tokens):
        model.reset()
        model.eval(row.tolist())
        found.append(np.array(model.scores[: len(row)], dtype=np.float32))
    np.save(out, np.stack(found))


def tokens(path, texts, out):
    """Token ids of texts, special tokens parsed, none added."""
    model = opened(path, vocab_only=True)
    with open(texts, encoding="utf-8") as file:
        cut = [model.tokenize(text.encode(), add_bos=False, special=True) for text in json.load(file)]
    with open(out, "w", encoding="utf-8") as file:
        json.dump(cut, file)


def answers(path, questions, length, out):
    """Answers in chat mode, with the template that is in the file: the ids of each prompt, and what comes after."""
    model = opened(path)
    found = []
    with open(questions, encoding="utf-8") as file:
        for question in json.load(file):
            chat = [{"role": "user", "content": question}]
            answer = model.create_chat_completion(chat, max_tokens=int(length), temperature=0.0)
            prompt = model.input_ids[: answer["usage"]["prompt_tokens"]].tolist()
            found.append({"prompt": prompt, "text": answer["choices"][0]["message"]["content"]})
    with open(out, "w", encoding="utf-8") as file:
        json.dump(found, file)


def quantize(path, out, ftype, imatrix=None):
    """llama.cpp's own quantizer on one thread; prints CPU seconds."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, int(ftype)
    if imatrix:
        params.imatrix = ctypes.cast(
            load_imatrix(imatrix), ctypes.POINTER(llama_cpp.llama_model_imatrix_data)
        )
    before = time.process_time()
    if llama_cpp.llama_model_quantize(path.encode(), out.encode(), params):
        raise SystemExit(f"llama.cpp could not quantize {path}")
    print(time.process_time() - before)


def mixtures(path, folder, imatrix, *ftypes):
    """A file for each type, called by its number."""
    for ftype in ftypes:
        quantize(path, f"{folder}/{ftype}.gguf", ftype, imatrix)


KEPT = []  # what the C side points to


def load_imatrix(path):
    """An importance file, tensor name -> values, as the quantizer takes it: an array that ends with a null name."""
    with np.load(path) as found:
        entries = (llama_cpp.llama_model_imatrix_data * (len(found.files) + 1))()
        for entry, name in zip(entries, found.files):
            values = np.ascontiguousarray(found[name], dtype=np.float32)
            KEPT.append((name.encode(), values))
            entry.name, entry.size = KEPT[-1][0], values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    KEPT.append(entries)
    return entries


def speed(path):
    """Tokens per second while generating, one thread."""
    model = opened(path)
    model.eval([1, 2, 3, 4])
    before = time.perf_counter()
    for _ in range(32):
        model.eval([5])
    print(32 / (time.perf_counter() - before))


if __name__ == "__main__":
    {f.__name__: f for f in (logits, tokens, answers, quantize, mixtures, speed)}[sys.argv[1]](*sys.argv[2:])
