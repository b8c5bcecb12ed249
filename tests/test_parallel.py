"""Several processes that train one network, in real groups on this machine, against the one process.

A group is started once for all its cases, since starting it takes seconds.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import parallel_worker
import pytest

import portnet
from portnet import plugins, towers
from portnet.alexnet import PRESETS
from portnet.contract import Settings, Unavailable, Unsupported
from portnet.errors import InputError

WORKER = Path(parallel_worker.__file__)
WITH_TOWERS = [name for name in PRESETS if name not in ("caffe", "torchvision")]
CASES = {
    ("towers", 2): [f"{p}/{precision}/portable/1" for p in WITH_TOWERS for precision in ("float64", "float32")]
    + ["paper2012/float32/stock/1", "paper2012/float32/portable/4", "paper2012/float16/portable/1", "full size"],
    ("data", 2): ["paper2012/float64/portable/1", "caffe/float32/portable/2", "torchvision/float16/portable/1"],
    ("data", 4): ["paper2012/float64/portable/2", "torchvision/float32/portable/1"],
}
# What a processor emulates, it also sums in few bits.
EMULATED = "float16" in plugins.probe(plugins.backends()["cpu"]).emulated
BOUND = {"float64": 1e-11, "float32": 2e-5, "float16": 1e-1 if EMULATED else 5e-2}
"""Largest distance, relative to the norm: what the order of sums explains, which is all that differs."""


def run_group(way, size, out, cases):
    command = plugins.backends()["cpu"].launcher(size, 0)
    ran = subprocess.run(
        [*command, str(WORKER), way, str(out), *cases],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    with np.load(out) as found:
        return dict(found)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """What every group found, by its way and size."""
    folder, cache = tmp_path_factory.mktemp("groups"), {}

    def found(way, size):
        if (way, size) not in cache:
            cache[way, size] = run_group(way, size, folder / f"{way}{size}.npz", CASES[way, size])
        return cache[way, size]

    return found


@pytest.fixture(scope="module")
def alone():
    cache = {}

    def found(case):
        if case not in cache:
            cache[case] = parallel_worker.everything(("", case.split("/")))[0]
        return cache[case]

    return found


def distance(value, expected):
    return float(np.linalg.norm(np.asarray(value, np.float64) - expected) / np.linalg.norm(expected))


EVERY = [(way, size, case) for (way, size), cases in CASES.items() for case in cases if case != "full size"]


@pytest.mark.parametrize(("way", "size", "case"), EVERY, ids=[f"{w}-{n}-{c}" for w, n, c in EVERY])
def test_a_group_trains_the_same_network(groups, alone, way, size, case):
    """Gradients (towers), every loss, weights and velocities after five steps, and the logits then."""
    found = {key.partition(": ")[2]: v for key, v in groups(way, size).items() if key.startswith(f"{case}: ")}
    expected, bound = alone(case), BOUND[case.split("/")[1]]
    compared = [
        key for key in expected if key.split()[0] in ("gradient", "state", "logits", "loss", "losses", "inference")
    ]
    if way == "data":
        compared = [key for key in compared if key.split()[0] not in ("gradient", "logits", "loss")]
    assert sum(key.startswith("state velocity.") for key in compared) == 16
    errors = {key: distance(found[key], expected[key]) for key in compared if key != "state loss_scale"}
    assert max(errors.values()) <= bound, {k: v for k, v in errors.items() if v > bound}
    assert found["resumed"], "a session that is restored goes on in the same bits"
    np.testing.assert_array_equal(found["total"], [size, size * (size - 1) / 2] if way == "data" else [1, 0])
    if way == "towers":
        assert found["elsewhere"] == 0


def test_what_crosses_between_the_towers(groups):
    """The bytes that were handed to the collective operations, against the figures of the specification."""
    traffic = json.loads(str(groups("towers", 2)["full size: traffic"]))
    assert traffic["all_gather"] == [3, 2 * (11_075_584 + 2_359_296 + 1_048_576) * 2 // 128]
    assert traffic["reduce_scatter"] == traffic["all_gather"]
    assert traffic["send_recv"] == [2, 2 * 1_048_576 * 2 // 128]
    assert sum(size for _, size in traffic.values()) == 60_030_976 * 2 // 128
    narrow = json.loads(str(groups("towers", 2)["paper2012/float16/portable/1: traffic"]))
    wide = json.loads(str(groups("towers", 2)["paper2012/float32/portable/1: traffic"]))
    assert narrow.pop("all_reduce") == [5, 5 * 2 * 4]  # whether a step's gradients are finite, in both
    assert narrow == {name: [calls, size // 2] for name, (calls, size) in wide.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_what_crosses_between_parts_of_the_batch(groups, size):
    """Every gradient once, by a ring: 2 (N - 1) times its bytes; and the loss."""
    case = CASES["data", size][-1]
    parameters = parallel_worker.network(case.split("/")[0]).parameter_count
    traffic = json.loads(str(groups("data", size)[f"{case}: traffic"]))
    assert traffic.keys() == {"all_reduce"}
    assert traffic["all_reduce"][1] == 5 * 2 * (size - 1) * 4 * (parameters + 1)


# The cut, as data.


@pytest.mark.parametrize("preset", WITH_TOWERS)
def test_the_cut_of_2012(preset):
    cut = towers.split(portnet.graph(preset))
    assert [(e.before, e.one_way) for e in cut.exchanges] == [
        ("conv3", False), ("fc6", False), ("fc7", False), ("fc8", True)
    ]  # fmt: skip
    assert [e.bytes(128) // (2 if e.one_way else 4) for e in cut.exchanges] == [11075584, 2359296, 1048576, 1048576]
    assert cut.bytes(128) == 60_030_976
    assert [cut.parameter_count(device) for device in (0, 1)] == [32_531_112, 28_434_112]


@pytest.mark.parametrize("preset", WITH_TOWERS)
def test_halves_are_the_whole_again(preset):
    graph = parallel_worker.network(preset)
    cut = towers.split(graph)
    whole = {name: np.arange(np.prod(shape)).reshape(shape) for name, shape in graph.parameters.items()}
    halves = [cut.take(whole, device) for device in (0, 1)]
    for device, half in enumerate(halves):
        shapes = {f"{x.name}.{k}": s for x in cut.layers(device) for k, s in x.parameters().items()}
        assert {name: value.shape for name, value in half.items()} == shapes
    joined = cut.join(halves)
    assert joined.keys() == whole.keys()
    assert all(np.array_equal(joined[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("preset", "why"),
    [
        ("caffe", "norm1 normalises over the channels of both"),
        ("torchvision", "none of its convolutions has two groups"),
    ],
)
def test_networks_without_towers(preset, why):
    with pytest.raises(InputError, match=rf"preset {preset} has no towers: {why}; those of 2012 have, paper2012"):
        towers.split(portnet.graph(preset))


# Wrong use.


def open_alone(**settings):
    return parallel_worker.opened(parallel_worker.network("paper2012"), **settings)


def test_a_process_that_belongs_to_no_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Unavailable, match=r"belongs to no group: RANK, .* not set; start it by torchrun"):
        open_alone(way="data")


def test_backends_and_engines_that_cannot():
    backends = plugins.backends()
    for name in ("reference", "onnxruntime-cpu", "mps", "accelerator"):
        assert backends[name].parallel == ()
        with pytest.raises(Unsupported, match="no collective operations"):
            backends[name].launcher(2, 0)
    for name, library in (("cpu", "gloo"), ("cuda", "nccl"), ("rocm", "nccl"), ("xpu", "xccl")):
        assert (backends[name].parallel, backends[name].collectives) == (("data", "towers"), library)
    with pytest.raises(Unsupported, match="does not train in parallel by 'data'; it has no collective operations"):
        backends["reference"].check(Settings(parallel="data"))
    for engine in ("compile",):
        with pytest.raises(Unsupported, match=f"train together in engine eager, not {engine}"):
            backends["cpu"].check(Settings(parallel="towers", engine=engine))


def portnet_train(*arguments, status):
    ran = subprocess.run(
        [sys.executable, "-m", "portnet.cli", "train", "--backend", "cpu", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == status, ran.stderr
    return ran.stderr


MISTAKES = {
    "preset": (["--parallel", "towers", "--preset", "caffe"], "preset caffe has no towers"),
    "processes": (
        ["--parallel", "towers", "--preset", "paper2012", "--processes", 3],
        "two towers take 2 processes, no",
    ),
    "how many": (["--parallel", "data"], "say how many processes are to share each batch"),
    "batch": (
        ["--parallel", "data", "--processes", 3],
        "a batch of 64 cannot be split evenly over 3 processes; give a",
    ),
    "parts": (
        ["--parallel", "data", "--processes", 2, "--accumulate", 3, "--batch", 64],
        "cannot be split evenly over 2 processes of 3 parts one after the other; give a multiple of 6",
    ),
    "alone": (["--processes", 2], "--processes 2, but no --parallel"),
}


@pytest.mark.parametrize(("arguments", "says"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_refused_before_anything_is_started(arguments, says):
    assert says in portnet_train(*arguments, status=2)


def test_the_command_starts_its_group_and_goes_on_elsewhere(tmp_path):
    """Towers from the command line, then the rest in one process from the towers' checkpoint."""
    small = ["--preset", "paper2012", "--image-size", 67, "--bias", 0.1, "--batch", 16, "--checkpoints", tmp_path / "c"]
    err = portnet_train(*small, "--steps", 2, "--parallel", "towers", "--save", tmp_path / "w", status=0)
    assert re.search(r"\[2/2\] step 2, loss 2\.\d+", err)
    assert (tmp_path / "w").exists()
    err = portnet_train(*small, "--steps", 3, status=0)
    assert "parallel was 'towers', now '': not bit for bit from here on" in err
    assert re.search(r"\[3/3\] step 3, loss 2\.\d+", err)
