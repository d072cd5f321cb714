"""Compiles kernels.cpp for this processor, once: the library is cached under a name made of all that went into it."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from auto_round.core.settings import settings

logger = logging.getLogger("auto_round")

SOURCE = Path(__file__).with_name("kernels.cpp")
# The last two let loops vectorise; they give up errno and traps, which nobody reads, and no digit of a result.
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
TIMEOUT = 600  # seconds; half a minute is usual


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
    command = [found, *FLAGS, _native(), f"-DAUTO_ROUND_LIBRARY={namespace}", *(f"-D{d}" for d in defines)]
    target = settings().kernel_cache / f"{namespace}-{_fingerprint(command)}.so"
    if target.is_file():
        return target
    logger.info("compiling the CPU kernels once, about half a minute, into %s", target.parent)
    root = Path(torch.__file__).parent
    command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    # Torch's own, else std::string links to nothing.
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        # torch/lib holds the OpenMP runtime that torch itself uses: the same threads serve both.
        command += [str(SOURCE), "-o", str(made), f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.CalledProcessError as error:
            raise BuildError(f"{found} failed: {_first_error(error.stderr)}") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{found} did not run: {error}") from error
        # Renaming is atomic: another process either sees the whole library or compiles its own.
        os.replace(made, target)
    return target


def _native() -> str:
    """The flag for the instructions of this very processor."""
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _fingerprint(command: list[str]) -> str:
    """A hash of all that decides the library: source, command, compiler, torch, processor."""
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    parts = (SOURCE.read_text(), *command, version, torch.__version__, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the processor can do: a home folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return f"{platform.machine()} {platform.processor()}"
    keys = ("flags", "Features", "model name")
    lines = [line for line in info.read_text().splitlines() if line.startswith(keys)]
    return "\n".join(sorted(set(lines)))


def _first_error(text: str) -> str:
    lines = text.splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")
