"""Training is killed at random moments: a reduced form of `benchmarks/kill_training.py`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "kill_training.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks the processes that it kills")
@pytest.mark.parametrize("asked", [["20"], ["2", "--parallel", "towers"], ["2", "--parallel", "data"]], ids=" ".join)
def test_whatever_is_killed_ends_in_the_same_bits(asked):
    ran = subprocess.run([sys.executable, SCRIPT, *asked], capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.match(rf"{asked[0]} kills in \d+ runs of 30 steps .*every checkpoint was readable", ran.stdout)
