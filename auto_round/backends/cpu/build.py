"""Compiles kernels.cpp for this processor, once: the library is cached under a name made of all that went into it."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from auto_round.core.native import compiled
from auto_round.core.settings import settings

SOURCE, *HEADERS = (Path(__file__).with_name(name) for name in ("kernels.cpp", "vectors.h", "amx.h"))
# The last two let loops vectorise; they give up errno and traps, which nobody reads, and no digit of a result.
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT = 600  # seconds; half a minute is usual
ANNOUNCE = "compiling the CPU kernels once, about half a minute, into %s"


class BuildError(RuntimeError):
    """The compiler refused, with its first message."""


def compiler() -> str | None:
    """The C++ compiler to use: $CXX, c++, g++ or clang++, or None."""
    return next(
        (path for name in (settings().cxx, "c++", "g++", "clang++") if name and (path := shutil.which(name))),
        None,
    )


@cache
def load(namespace: str = "auto_round_cpu", *defines: str) -> str:
    """Register the operators of kernels.cpp as `torch.ops.<namespace>`; the instructions they use.

    Compiles when the cache has no library for this source, torch, compiler and processor. Raises BuildError.
    """
    found = compiler()
    if found is None:
        raise BuildError("there is no C++ compiler; install g++ or clang++")
    torch.ops.load_library(str(_library(found, namespace, defines)))
    return str(getattr(torch.ops, namespace).instructions())


def _library(found: str, namespace: str, defines: tuple[str, ...]) -> Path:
    """The compiled library."""
    root = Path(torch.__file__).parent
    # Torch's own ABI, else std::string links to nothing; and from torch/lib the OpenMP runtime that torch itself uses,
    # so that the same threads serve both.
    link = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    link += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    link += [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    command = [found, *FLAGS, f"-DAUTO_ROUND_LIBRARY={namespace}", *(f"-D{d}" for d in defines)]
    try:
        return compiled(
            command,
            SOURCE,
            timeout=TIMEOUT,
            link=link,
            name=namespace,
            versions=[torch.__version__, *(header.read_text() for header in HEADERS)],
            announce=ANNOUNCE,
        )
    except subprocess.CalledProcessError as error:
        raise BuildError(f"{found} failed: {_first_error(error.stderr)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{found} did not run: {error}") from error


def _first_error(text: str) -> str:
    lines = text.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")
