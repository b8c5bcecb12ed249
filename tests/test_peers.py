"""The scripts that PortNet is compared with do the same work, or are refused."""

import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from portnet import philox, plugins, weights, workload
from portnet.contract import Settings
from portnet.record import Spec

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
EMULATED = "bfloat16" in plugins.probe(plugins.backends()["cpu"]).emulated
needs_bfloat16 = pytest.mark.skipif(EMULATED, reason="this processor emulates bfloat16: a step takes minutes")


def run(*arguments, script=None):
    command = [sys.executable, script or BENCHMARKS / "against_peers.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)


def rates(done):
    assert done.returncode == 0, done.stderr
    return {name: float(rate) for name, rate in re.findall(r"^(\S+) +([\d.e+]+) ", done.stdout, re.M)}


@pytest.mark.parametrize(
    ("asked", "batch", "names"),
    [
        (["train", "torchvision", "--peers", "torch", "torch-tuned"], 1, ["torch", "torch-tuned"]),
        pytest.param(
            ["train", "paper2012", "--peers", "torch-regions-bfloat16"],
            2,
            ["torch-regions-bfloat16"],
            marks=needs_bfloat16,
        ),
        (["infer", "paper2012", "--peers", "torch", "onnxruntime"], 1, ["torch", "onnxruntime"]),
    ],
    ids=["train", "regions", "infer"],
)
def test_peers_take_turns_with_portnet(asked, batch, names):
    found = rates(run(*asked, "--batch", batch, "--rounds", 1, "--blocks", 1))
    assert list(found) == ["cpu/eager/float32", *names]
    assert min(found.values()) > 0


def test_a_peer_that_computes_something_else_has_no_figure(tmp_path):
    for path in (BENCHMARKS / "against_peers.py", *(BENCHMARKS / "peers").glob("*.py")):
        target = tmp_path / path.relative_to(BENCHMARKS)
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text().replace("5, 5e-4, 0.75, 2.0)", "5, 5e-3, 0.75, 2.0)"))
    asked = ["infer", "paper2012", "--peers", "torch", "--batch", 1, "--rounds", 1, "--blocks", 1]
    done = run(*asked, script=tmp_path / "against_peers.py")
    assert done.returncode == 1
    assert "torch computes something else: its logits are off by" in done.stderr
    assert "images/s" not in done.stdout


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile loads torch.jit
def test_the_tuned_script_draws_portnets_masks(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    import torch_tuned

    ids = np.array([0, 1, 77, 1_281_166])
    for layer, count in ((0, 4096), (1, 9216)):
        drawn = torch_tuned.philox(torch.tensor(ids), 12, philox.Stream.DROPOUT + layer, count).numpy()
        np.testing.assert_array_equal(drawn, philox.keep_mask(0, layer, ids, 12, count, 0.5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile loads torch.jit
def test_the_tuned_scripts_loops_are_its_lrn(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    import torch_tuned

    x, g = (torch.randn(8, 96, 5, 5).contiguous(memory_format=torch.channels_last) * 30 for _ in range(2))
    x.requires_grad_()
    found, expected = torch_tuned.LrnLoops.apply(x), torch_tuned.Norm(96)(x.relu())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, g)[0] for y in (found, expected)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile loads torch.jit
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize(
    ("preset", "precision", "options", "steps"),
    [
        ("torchvision", "float32", {}, 2),
        pytest.param("paper2012", "bfloat16", {"regions": True}, 1, marks=needs_bfloat16),
    ],
    ids=["tuned", "regions"],
)
def test_the_tuned_scripts_step_is_portnets(preset, precision, options, steps, monkeypatch):
    """At a rate at which it can be seen; the second step has the velocity of the first."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    import against_peers
    import torch_tuned
    from turns import Asked

    rate = 0.01
    monkeypatch.setattr(torch_tuned, "RATE", rate)
    work = workload.AlexNet(Spec(backend="cpu", preset=preset, image_size=224, classes=1000, data="synthetic"))
    images, labels, _ = next(work.batches(2))
    start = weights.parity(work.graph, 0)
    asked = Asked(
        preset=preset, mode="train", precision=precision, weights=against_peers.inverted(work.graph, start),
        images=images, labels=labels, options={"device": "cpu", **options},
    )  # fmt: skip
    peer = torch_tuned.open_(asked)
    assert peer.weights is not None
    before = {name: value.copy() for name, value in peer.weights().items()}
    settings = Settings(precision=precision, engine="regions" if options else "eager", channels_last=True)
    with closing(plugins.backends()["cpu"].open(work.graph, start, settings)) as session:
        for step in range(steps):
            session.train_step(*map(session.put, (images, labels, np.arange(2))), step=step, learning_rate=rate)
        ours = session.weights()
    peer.steps(steps)
    found = peer.weights()
    for name, was in before.items():
        # With dropout that scales in training a layer's weights are a part of PortNet's, and move the inverse of it.
        part = float(np.vdot(was, start[name]) / np.vdot(start[name], start[name])) if start[name].any() else 1.0
        moved, expected = found[name] - was, (ours[name] - start[name]) / part
        assert np.linalg.norm(moved - expected) <= 0.01 * np.linalg.norm(expected), name


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--rounds", 0], "rounds and blocks must be at least 1"),
        (["--stacks", "cpu/graph"], "unknown part of the stack cpu/graph"),
        (["--batch", 0], "batch must be an integer of at least 1"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(asked, told):
    done = run("infer", "paper2012", "--peers", "torch", *asked)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
