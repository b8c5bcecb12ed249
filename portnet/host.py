"""The processor that this runs on, by the name its maker gave it."""

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
