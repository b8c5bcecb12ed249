"""The processor that this runs on, and what its memory allocator is told."""

import ctypes
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """The processor's model, or its architecture where the system does not say."""
    try:
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            # "Model" is what Arm boards give; not "model", which is a number on x86.
            if key.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


@cache
def instruction_sets() -> frozenset[str]:
    """The processor's instruction sets by Linux's names; empty where Linux does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((v.split() for k, _, v in (x.partition(":") for x in lines) if k.strip() == "flags"), ()))


def keep_freed_memory() -> None:
    """Tell glibc to keep large arrays' memory for the next ones, for the rest of this process.

    By default it gives them back to the system when they are freed, and every training step pays for their pages
    again: more than half the time on a small machine. Does nothing where there is no glibc. For programs only; a
    library must not decide this for its caller.
    """
    if sys.platform != "linux":
        return
    trim_threshold, mmap_max = -1, -4  # the parameters' numbers in malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
