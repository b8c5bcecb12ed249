"""The example distribution, installed as a stranger would install theirs: found, and right on every preset."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "third_party"

INFER = """
import numpy as np
import portnet
from portnet.contract import Settings
from portnet.plugins import probe

found = portnet.backends()
ours = found["onnx-reference"]
assert not [p for p in found.problems if p.distribution == "portnet-onnx-reference"], found.problems
print(probe(ours).name)
for preset in ("paper2012", "chm145", "caffe", "torchvision"):
    graph = portnet.graph(preset, image_size=99, classes=10)
    random = np.random.default_rng(0)
    weights = {
        name: random.normal(0, (2 / np.prod(shape[1:], initial=1)) ** 0.5 * 0.9, shape).astype(np.float32)
        for name, shape in graph.parameters.items()
    }
    images = random.normal(0, 60, (2, *graph.input)).astype(np.float32)
    session = ours.open(graph, weights, Settings())
    session.synchronize()
    logits = session.get(session.infer(session.put(images)))
    expected = found["reference"].open(graph, weights, Settings(precision="float64")).trace(images).logits
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    print(preset, error)
    assert error < 1e-5
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("third_party")
    shutil.copytree(EXAMPLE, folder / "source")  # a build leaves files behind
    pip = "install --quiet --no-deps --no-build-isolation --no-index --no-compile --target"
    subprocess.run([sys.executable, "-m", "pip", *pip.split(), folder / "site", folder / "source"], check=True)
    return folder / "site"


def run(script, site):
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "PORTNET_DISABLE_PLUGINS": ""}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)


def test_a_strangers_backend_is_found_and_right(installed):
    ran = run(INFER, installed)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.startswith("NumPy on ")


def test_listing_it_does_not_load_its_engine(installed):
    script = "import sys, portnet; assert 'onnx-reference' in portnet.backends(); assert 'onnx' not in sys.modules"
    ran = run(script, installed)
    assert ran.returncode == 0, ran.stderr
