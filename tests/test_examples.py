"""The examples, run as a user runs them, in a few steps of a small size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import portnet

EXAMPLES = Path(__file__).parents[1] / "examples"
BACKEND = os.environ.get("PORTNET_TEST_BACKEND", "cpu")


def run(folder, script, *arguments):
    """The lines that an example prints; it must end well and say nothing on standard error."""
    command = [sys.executable, "-W", "error", EXAMPLES / script, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.splitlines()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the training example has run, and what it printed."""
    folder = tmp_path_factory.mktemp("examples")
    return folder, run(folder, "train.py", "--backend", BACKEND, "--steps", 3, "--image-size", 67)


def test_train(trained):
    folder, lines = trained
    assert lines[0].startswith("<AlexNet caffe, 20,209,034 parameters, float32, on " + BACKEND)
    loss = float(re.fullmatch(r"step 1: loss ([\d.]+)", lines[1]).group(1))
    assert loss == pytest.approx(np.log(10), rel=0.05)
    assert re.fullmatch(r"test: [\d.]+% of 360 digits are right", lines[2])
    assert lines[3:] == ["weights: digits.safetensors"]
    assert [path.name for path in folder.iterdir()] == ["digits.safetensors"]


def test_infer_on_another_backend(trained):
    folder, _ = trained
    digit = portnet.load_data("digits").test
    Image.fromarray(digit.read(0)).resize((50, 40)).save(folder / "digit.png")
    named = run(folder, "infer.py", folder / "digit.png", "--backend", "reference")
    assert " on reference (" in named[0]
    assert named[1].startswith(f"{folder / 'digit.png'}: ")
    assert re.fullmatch(r"(\d \d+\.\d%(, )?){3}", named[1].split(": ")[1])
    net = portnet.AlexNet.load(folder / "digits.safetensors", "reference")
    assert named[1].split(": ")[1].split()[0] == net.classify(folder / "digit.png")[0][0]

    batch = run(folder, "infer.py", "--backend", BACKEND)
    assert batch[1].split() == ["labels:", *map(str, digit.labels[:10])]
    answers = [net.classify(digit.read(i), top=1)[0][0] for i in range(10)]
    assert batch[2].split() == ["answers:", *answers]


def test_the_readme_tells_of_every_example():
    told = (EXAMPLES / "README.md").read_text()
    for path in EXAMPLES.iterdir():
        if path.name not in ("README.md", "__pycache__"):
            assert f"`{path.name}{'/' if path.is_dir() else ''}`" in told
