"""Functions in C for loops that torch is too slow for: compiled for this processor at first use, kept in a cache.

Each has a twin in torch, which takes over where there is no compiler. Plain C behind `ctypes`: a second to compile.
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
from functools import cache
from pathlib import Path

from auto_round.core.settings import settings

logger = logging.getLogger("auto_round")
# Infinity must stay a number: searches start from it as the error of "nothing found yet".
FLAGS = ("-O3", "-ffast-math", "-fno-finite-math-only", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
TIMEOUT = 120  # seconds


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The functions of the C file `source`, or None, and the reason in the log, when it cannot be compiled here."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        logger.info(
            "no C compiler (%s): %s runs in torch, several times slower", ", ".join(COMPILERS), source.stem
        )
        return None
    try:
        return ctypes.CDLL(str(_compiled(compiler, source)))
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[:1]  # the first line says it; the rest is context
        logger.info(
            "%s did not compile %s (%s): it runs in torch, several times slower", compiler, source, reason
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.info("%s cannot be compiled (%s): it runs in torch, several times slower", source, error)
    return None


def _compiled(compiler: str, source: Path) -> Path:
    """The compiled file, made now if the cache has none for this source, compiler and processor."""
    # On ARM it is -mcpu that chooses instructions and tuning both, as -march does on x86.
    tune = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [compiler, *FLAGS, tune]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    # Whatever changes the machine code changes the name, so a file that is there is never stale.
    parts = (source.read_text(), *command, version, _processor())
    mark = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    target = settings().kernel_cache / f"{source.stem}-{mark}.so"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # beside it: no rename across file systems
        made = Path(folder) / target.name
        command += [str(source), "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
        os.replace(made, target)  # atomic: another process sees all of it or nothing
    return target


def _processor() -> str:
    """What the processor can do: a home folder may be shared by different machines."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))})
    )
