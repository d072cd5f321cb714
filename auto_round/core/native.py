"""Code compiled for this processor at first use, and kept in a cache: C for loops that torch is too slow for.

Each C function has a twin in torch, which takes over where there is no compiler. Plain C behind `ctypes`: a second to
compile. `compiled` serves other languages too.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from auto_round.core.settings import settings

logger = logging.getLogger("auto_round")
# The parts of -ffast-math that let sums be vectorized. The whole of it links code (GCC < 13) that makes the processor
# flush denormal numbers to zero in the process that loads the library; and infinity must stay a number.
FAST = (
    "-fassociative-math",
    "-freciprocal-math",
    "-fno-signed-zeros",
    "-fno-trapping-math",
    "-fno-math-errno",
)
# Loops are vectorized, but every operation is rounded by itself, as torch does it: no sums in another order, no
# reciprocals, no multiplication and addition in one.
EXACT = ("-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off")
FLAGS = ("-O3", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT = 120  # seconds


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The numbers that the C files know dtypes by."""


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Where the values of `tensor` begin. The caller keeps the tensor for as long as C reads it."""
    return ctypes.c_void_p(tensor.data_ptr())


def in_threads(run: Callable[[slice], None], rows: int, most: int | None = None) -> None:
    """`run` on every part of `rows` rows, of at most `most`, on as many threads as torch has."""
    threads = torch.get_num_threads()
    step = max(1, min(-(-rows // threads), rows if most is None else most))
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if len(parts) == 1:
        run(parts[0])
        return
    # ctypes releases the interpreter lock for the call, so threads do run at once; `list` raises their errors.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, parts))


@cache
def library(source: Path, arithmetic: tuple[str, ...] = FAST) -> ctypes.CDLL | None:
    """The functions of the C file `source`, or None, and the reason in the log, when it cannot be compiled here.

    arithmetic: flags that say what the compiler may do with it, `FAST` or `EXACT`.
    """
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        logger.info(
            "no C compiler (%s): %s runs in torch, several times slower", ", ".join(COMPILERS), source.stem
        )
        return None
    try:
        return ctypes.CDLL(
            str(compiled([compiler, *FLAGS, *arithmetic], source, link=["-lm"], timeout=TIMEOUT))
        )
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[:1]  # the first line says it; the rest is context
        logger.info(
            "%s did not compile %s (%s): it runs in torch, several times slower", compiler, source, reason
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.info("%s cannot be compiled (%s): it runs in torch, several times slower", source, error)
    return None


def compiled(
    command: Sequence[str],
    source: Path,
    *,
    timeout: int,
    link: Sequence[str] = (),
    name: str = "",
    versions: Sequence[str] = (),
    announce: str = "",
) -> Path:
    """The library that the compiler and flags `command` make of `source`, made now if the cache has none.

    link: arguments that only say where things are. name: of the file, by default that of the source. versions: of what
    else decides the outcome. announce: a message for the log when it has to be made, with the cache's folder for %s.
    Raises what `subprocess.run` does when the compiler fails.
    """
    command = [*command, _native()]
    target = settings().kernel_cache / f"{name or source.stem}-{_fingerprint(command, source, versions)}.so"
    if target.is_file():
        return target
    if announce:
        logger.info(announce, target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # beside it: no rename across file systems
        made = Path(folder) / target.name
        command += [str(source), "-o", str(made), *link]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=timeout)
        os.replace(made, target)  # atomic: another process sees all of it or nothing
    return target


def _native() -> str:
    """The flag for the instructions of this very processor."""
    # On ARM it is -mcpu that chooses instructions and tuning both, as -march does on x86.
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _fingerprint(command: Sequence[str], source: Path, versions: Sequence[str]) -> str:
    """A hash of all that decides the machine code, so that a file that is there is never stale."""
    compiler = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    parts = (source.read_text(), *command, compiler, *versions, _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What the processor can do: a home folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return f"{platform.machine()} {platform.processor()}"
    keys = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in info.read_text().splitlines() if line.startswith(keys)}))
