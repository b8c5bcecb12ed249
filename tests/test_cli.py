"""The command line: what it prints where, and its exit status: 0 done, 1 a run or a check failed, 2 a mistake."""

import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

import portnet
from portnet import alexnet, cli, conformance, console, launch, onnx_export, plugins, record
from portnet.contract import Backend, Device, LibraryLayer, Session
from portnet.errors import Unavailable
from portnet.graph import Flatten, Linear, Normal, Normalisation, Recipe
from portnet.plugins import Problem, Registry
from portnet.record import Record
from portnet.trainer import Result

BACKEND = os.environ.get("PORTNET_TEST_BACKEND", "cpu")
COMMANDS = (
    *("ablate", "backends", "check", "compare", "data", "diff", "divergence", "export", "infer", "measure", "project"),
    *("quantize", "records", "report", "scale", "summary", "train"),
)
TINY = ("--preset", "tiny", "--backend", "reference")


def make_tiny(*, image_size: int = 16, classes: int = 10):
    """A preset that trains on the digits in no time."""
    return alexnet._graph(
        "tiny",
        image_size,
        [Flatten(name="flatten")],
        lambda features: [Linear(name="fc", in_features=features, out_features=classes, weight_init=Normal(std=0.01))],
        Recipe(learning_rate=0.01, momentum=0.9, weight_decay=5e-4),
        Normalisation(mean=(60, 60, 60), scale=(64, 64, 64)),
    )


@pytest.fixture(autouse=True)
def _tiny_is_a_preset(monkeypatch):
    monkeypatch.setitem(alexnet.PRESETS, "tiny", make_tiny)


def portnet_(*arguments, status=0):
    """Run the command line; returns its standard output and its standard error."""
    environment = {"COLUMNS": "160", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    ran = CliRunner().invoke(cli.main, [str(a) for a in arguments], env=environment)
    assert ran.exit_code == status, (ran.stdout, ran.stderr, ran.exception)
    assert ran.exception is None or isinstance(ran.exception, SystemExit)
    assert "\x1b" not in ran.output, "escape codes where there is no terminal"
    return ran.stdout, ran.stderr


def message(*arguments, status=2):
    """The one line that a failed command says; it prints nothing else."""
    out, err = portnet_(*arguments, status=status)
    assert err.startswith("portnet: ")
    assert err.count("\n") == 1
    assert not out
    return err


def png(path, value=0, size=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of two classes; two of them are for testing."""
    for i in range(10):
        png(tmp_path / "data" / ("dark" if i < 5 else "light") / f"{i}.png", 20 * i)
    return tmp_path / "data"


@pytest.fixture
def trained(tmp_path, folder):
    """A file of trained weights."""
    path = tmp_path / "net.safetensors"
    portnet_("train", *TINY, "--data", folder, "--epochs", 5, "--batch", 4, "--save", path)
    return path


class Present(Backend):
    name, vendor, modes, note = "present", "Someone", ("infer", "train"), "not yet verified"

    def probe(self):
        precisions = {"precisions": ("float32", "tf32"), "emulated": ("tf32",)}
        return Device(name="the device [rev 2]", memory=2**30, versions={"driver": "7"}, **precisions)

    def open(self, graph, weights, settings):
        raise NotImplementedError


class Absent(Present):
    name, modes, note = "absent", ("infer",), ""

    def probe(self):
        raise Unavailable("no [bold] device", "plug one in")


class Raising(Present):
    name = "raising"

    def probe(self):
        raise RuntimeError("the driver is from another age")


@pytest.fixture
def three(monkeypatch):
    problem = Problem(plugin="theirs", distribution="their-dist", message="ImportError: no [cuda]", remedy="mend it")
    registry = Registry([Present(), Absent(), Raising()], [problem])
    monkeypatch.setattr(plugins, "backends", lambda: registry)


# The group.


def test_the_commands():
    assert tuple(sorted(cli.main.commands)) == COMMANDS
    out, _ = portnet_("--help")
    assert "What would leaving CUDA cost?" in out
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]\w+ ", out, re.MULTILINE), name


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command, flag):
    out, err = portnet_(command, flag)
    assert out.startswith(f"Usage: main {command} ")
    assert not err
    for parameter in cli.main.commands[command].params:
        assert parameter.param_type_name == "argument" or max(parameter.opts, key=len) in out


def test_version():
    assert portnet_("--version")[0] == f"portnet, version {portnet.__version__}\n"


def test_unknown_commands_and_options():
    assert "No such command 'trian'" in portnet_("trian", status=2)[1]
    assert "No such option" in portnet_("train", "--step", 5, "--bakend", "cpu", status=2)[1]


def test_an_interruption_is_a_failed_run(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(portnet, "load_data", interrupted)
    assert "Aborted!" in portnet_("train", status=1)[1]


# backends


def test_backends_as_a_table(three):
    out, err = portnet_("backends")
    table, rest = out.split("Not available:")
    cells = [cell.strip() for cell in re.split("[│┃]", table)]
    for cell in (
        "present",
        "Someone",
        "infer, train",
        "the device [rev 2] (not yet verified)",
        "float32, tf32 (emulated)",
    ):
        assert cell in cells
    assert "absent" not in table
    assert "  absent, Someone: no [bold] device\n      plug one in\n" in rest
    assert "raising, Someone (not yet verified): the probe of raising raised RuntimeError: the driver is from" in rest
    assert "Broken plug-in theirs (their-dist): ImportError: no [cuda]; mend it\n" in rest
    assert not err


def test_backends_as_json(three):
    out, err = portnet_("backends", "--json")
    found = json.loads(out)
    by_name = {b["name"]: b for b in found["backends"]}
    assert by_name["present"] == {
        "name": "present",
        "vendor": "Someone",
        "modes": ["infer", "train"],
        "available": True,
        "device": {
            "name": "the device [rev 2]",
            "precisions": ["float32", "tf32"],
            "memory": 2**30,
            "unified": False,
            "emulated": ["tf32"],
            "versions": {"driver": "7"},
        },
        "reason": None,
        "remedy": None,
        "note": "not yet verified",
    }
    absent = by_name["absent"]
    assert (absent["available"], absent["device"]) == (False, None)
    assert (absent["reason"], absent["remedy"]) == ("no [bold] device", "plug one in")
    assert "RuntimeError" in by_name["raising"]["reason"]
    (problem,) = found["problems"]
    assert (problem["plugin"], problem["distribution"], problem["remedy"]) == ("theirs", "their-dist", "mend it")
    assert not err


def test_backends_of_this_machine():
    found = {b["name"]: b for b in json.loads(portnet_("backends", "--json")[0])["backends"]}
    assert set(found) == set(portnet.backends())
    assert found["reference"]["available"]
    for b in found.values():
        assert b["available"] or (b["reason"] and b["remedy"])


# summary


def test_summary():
    out, _ = portnet_("summary")
    assert out == portnet.graph("paper2012").summary() + "\n"
    assert "60,965,224" in out
    out, _ = portnet_("summary", "caffe", "--image-size", 99, "--classes", 10)
    assert out == portnet.graph("caffe", image_size=99, classes=10).summary() + "\n"


def test_summary_of_what_is_not_there():
    assert "unknown preset 'cafe'; did you mean caffe?" in message("summary", "cafe")
    assert "the image is too small" in message("summary", "caffe", "--image-size", 10)


# train


def test_train_says_what_it_did(tmp_path):
    path = tmp_path / "net.safetensors"
    out, _ = portnet_("train", *TINY, "--steps", 40, "--batch", 32, "--save", path)
    lines = out.splitlines()
    assert lines[0].startswith("<AlexNet tiny, 7,690 parameters, float32, on reference")
    first, last = map(float, re.fullmatch(r"loss ([\d.]+) -> ([\d.]+) in 40 steps of 32", lines[1]).groups())
    assert last < 0.5 * first
    top1, top5 = map(float, re.fullmatch(r"test: top-1 ([\d.]+)%, top-5 ([\d.]+)% of 360 pictures", lines[2]).groups())
    assert 75 < top1 < top5 <= 100
    assert lines[3:] == [f"weights: {path}"]
    net = portnet.AlexNet.load(path, "reference")
    splits = portnet.load_data("digits")
    assert net.class_names == splits.train.class_names
    assert net.graph.normalisation.mean == splits.train.mean
    assert f"{net.evaluate(splits).top1:.1%}" == f"{top1}%"


SPEED = r", [\d.e+]+ images/s, about \d+ s left"


def test_progress_without_a_terminal_is_plain_lines_on_standard_error():
    _, err = portnet_("train", *TINY, "--steps", 40, "--batch", 8)
    lines = err.splitlines()
    assert [line.split()[0] for line in lines] == [f"[{4 * i}/40]" for i in range(1, 11)]
    assert all(re.fullmatch(rf"\[\d+/40\] step \d+, loss \d\.\d{{3}}{SPEED}", line) for line in lines)
    _, err = portnet_("train", *TINY, "--steps", 35, "--batch", 8)
    assert [line.split()[0] for line in err.splitlines()][-3:] == ["[30/35]", "[33/35]", "[35/35]"]
    _, err = portnet_("train", *TINY, "--steps", 3, "--batch", 8)
    assert [line.split(",")[0] for line in err.splitlines()] == [f"[{i}/3] step {i}" for i in (1, 2, 3)]


def test_train_as_json(tmp_path):
    path = tmp_path / "net.safetensors"
    out, err = portnet_("train", *TINY, "--steps", 5, "--batch", 16, "--json", "--save", path)
    told = json.loads(out)
    assert not err
    assert len(told["losses"]) == 5
    assert told["weights"] == str(path)
    assert told["test"].keys() == {"top1", "top5", "loss", "count"}
    assert told["test"]["count"] == 360
    splits = portnet.load_data("digits")
    net = portnet.AlexNet("reference", "tiny", classes=10, mean=splits.train.mean)
    assert net.fit(splits, steps=5, batch=16) == told["losses"]
    assert net.evaluate(splits).loss == told["test"]["loss"]
    assert json.loads(portnet_("train", *TINY, "--steps", 1, "--json")[0])["weights"] is None


def test_train_takes_its_options():
    def losses(*options):
        return json.loads(portnet_("train", "--preset", "tiny", "--steps", 2, "--json", *options)[0])["losses"]

    usual = losses("--backend", "reference")
    for options in (["--seed", 1], ["--precision", "bfloat16"], ["--image-size", 20], ["--batch", 8],
                    ["--learning-rate", 0.1], ["--data", "synthetic"]):  # fmt: skip
        assert losses("--backend", "reference", *options) != usual, options
    np.testing.assert_allclose(losses("--backend", BACKEND, "--formulation", "stock"), usual, rtol=1e-5)


def test_the_digits_are_trained_on_as_caffe_in_batches_of_64(monkeypatch):
    """On digits paper2012's loss stays flat for hundreds of steps."""
    seen = {}

    class FakeNet:
        def __init__(self, backend, preset, **options):
            seen.update(options, preset=preset)

        session = Session

        def train(self, splits, **asked):
            seen.update(asked)
            return Result(losses=[1.0], step=1)

        def evaluate(self, splits, *, views, workers):
            return portnet.training.Evaluation(top1=1, top5=1, loss=0, count=1)

    monkeypatch.setattr(portnet, "AlexNet", FakeNet)
    portnet_("train")
    assert (seen["preset"], seen["steps"], seen["epochs"], seen["batch"]) == ("caffe", 210, None, 64)
    assert (seen["classes"], seen["learning_rate"], seen["schedule"]) == (10, None, "constant")
    assert (seen["validate"], seen["workers"]) == (0, 0)


def test_train_on_a_folder(folder):
    out, err = portnet_("train", *TINY, "--data", folder, "--epochs", 2, "--batch", 4)
    assert "in 4 steps of 4" in out
    assert "of 2 pictures" in out
    assert err.splitlines()[-1].startswith("[4/4] step 4")
    # A batch is no larger than there are pictures, unless asked for.
    assert "in 1 steps of 8" in portnet_("train", *TINY, "--data", folder, "--epochs", 1)[0]


def test_train_with_an_unreadable_picture(folder):
    broken = folder / "dark" / "broken.png"
    broken.write_bytes(b"no picture")
    assert f"cannot read {broken} as a picture" in message("train", *TINY, "--data", folder, "--steps", 1)
    out, err = portnet_("train", *TINY, "--data", folder, "--steps", 1, "--skip-unreadable", "--json")
    assert err == f"portnet: left out, unreadable: {broken}\nportnet: 1 picture left out\n"
    assert len(json.loads(out)["losses"]) == 1


TRAINING_MISTAKES = {
    "backend": (["--backend", "cdua"], "unknown backend 'cdua'; did you mean cuda?"),
    "preset": (["--preset", "cafe"], "unknown preset 'cafe'; did you mean caffe?"),
    "data": (["--data", "digit"], "unknown data set 'digit'; did you mean digits?"),
    "data's folder": (["--data", "no/where"], "there is no folder no/where"),
    "size": (["--image-size", "-1"], "image_size must be a positive integer, got -1"),
    "batch": (["--batch", "5000", "--epochs", "1"], "a batch of 5000 needs at least as many images to train on"),
    "rate": (["--learning-rate", "nan"], "the learning rate must be a finite number of at least 0, got nan"),
}


@pytest.mark.parametrize(("options", "says"), TRAINING_MISTAKES.values(), ids=TRAINING_MISTAKES)
def test_mistakes_in_training(options, says):
    assert says in message("train", *TINY, "--json", *options)


def test_mistakes_that_click_finds():
    assert "give --steps or --epochs, not both" in portnet_("train", "--steps", 1, "--epochs", 1, status=2)[1]
    for option, value in (("--steps", 0), ("--batch", 0), ("--seed", -1), ("--seed", 2**64), ("--precision", "int8")):
        assert f"Invalid value for '{option}'" in portnet_("train", option, value, status=2)[1]


def test_where_weights_cannot_be_saved_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(portnet, "load_data", lambda *_, **__: pytest.fail("it has begun"))
    missing = tmp_path / "missing"
    assert f"no folder {missing}" in portnet_("train", "--save", missing / "net", status=2)[1]
    assert "it is a folder" in portnet_("train", "--save", tmp_path, status=2)[1]


def test_failed_runs(three, tmp_path):
    assert "no [bold] device; plug one in" in message("train", "--backend", "absent", status=1)


def test_training_that_diverges_is_a_failed_run(tmp_path):
    path = tmp_path / "net"
    options = ["train", "--preset", "tiny", "--backend", BACKEND, "--json", "--save", path, "--learning-rate"]
    assert "try a lower learning rate" in message(*options, 1e30, "--steps", 8, status=1)
    # No loss is wrong yet, but the weights are.
    assert "the loss on the test split is" in message(*options, 1e38, "--steps", 1, status=1)
    assert not path.exists()


def test_training_where_there_is_only_inference():
    options = ["--preset", "tiny", "--backend", "onnxruntime-cpu", "--json"]
    assert "onnxruntime-cpu does not train, it only infers" in message("train", *options, status=1)


# infer


def test_infer(trained, tmp_path):
    dark, light = png(tmp_path / "a.png", 10), png(tmp_path / "b.png", 190)
    out, err = portnet_("infer", dark, light, "--weights", trained, "--backend", "reference")
    first, second = out.splitlines()
    assert re.fullmatch(rf"{re.escape(str(dark))}: dark [\d.]+%, light [\d.]+%", first)
    assert re.fullmatch(rf"{re.escape(str(light))}: light [\d.]+%, dark [\d.]+%", second)
    assert not err
    out, _ = portnet_("infer", dark, light, "--weights", trained, "--backend", "reference", "--top", 1)
    assert [line.rsplit(" ", 2)[1] for line in out.splitlines()] == ["dark", "light"]


def test_infer_as_json(trained, tmp_path):
    pictures = [png(tmp_path / "a.png", 10), png(tmp_path / "b.png", 190)]
    out, err = portnet_("infer", *pictures, "--weights", trained, "--backend", "reference", "--json", "--top", 1)
    told = json.loads(out)
    assert not err
    assert [t["picture"] for t in told] == list(map(str, pictures))
    net = portnet.AlexNet.load(trained, "reference")
    for t, picture in zip(told, pictures, strict=True):
        ((name, probability),) = net.classify(picture, top=1)
        assert t["classes"] == [{"class": name, "probability": probability}]


def test_infer_with_an_unreadable_picture(trained, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    good, missing = png(tmp_path / "good.png"), tmp_path / "missing.png"
    options = ["--weights", trained, "--backend", "reference"]
    assert f"cannot read {broken} as a picture" in message("infer", broken, good, *options)
    assert f"cannot read {missing} as a picture" in message("infer", missing, good, *options, "--json")
    out, err = portnet_("infer", broken, good, missing, *options, "--skip-unreadable")
    assert [line.split(":")[0] for line in out.splitlines()] == [str(good)]
    left_out = err.splitlines()
    assert [str(broken) in left_out[0], str(missing) in left_out[1], len(left_out)] == [True, True, 2]
    out, err = portnet_("infer", broken, good, *options, "--skip-unreadable", "--json")
    assert [t["picture"] for t in json.loads(out)] == [str(good)]
    _, err = portnet_("infer", broken, *options, "--skip-unreadable", status=2)
    assert "none of the pictures could be read" in err


def test_mistakes_in_inferring(trained, tmp_path):
    picture = png(tmp_path / "a.png")
    assert "no weights file at" in message("infer", picture, "--weights", tmp_path / "missing")
    assert "no safetensors file" in message("infer", picture, "--weights", picture)
    assert "unknown backend 'cdua'" in message("infer", picture, "--weights", trained, "--backend", "cdua")
    options = ["--weights", trained, "--backend", "onnxruntime-cpu", "--precision", "float16"]
    assert "does not compute in 'float16'" in message("infer", picture, *options, status=1)
    assert "Missing argument 'IMAGES...'" in portnet_("infer", "--weights", trained, status=2)[1]
    assert "Missing option '--weights'" in portnet_("infer", picture, status=2)[1]
    assert "Invalid value for '--top'" in portnet_("infer", picture, "--weights", trained, "--top", 0, status=2)[1]


# export


def test_export(trained, tmp_path):
    path = tmp_path / "net.onnx"
    out, err = portnet_("export", path, "--weights", trained, "--backend", "reference")
    assert out.splitlines()[0] == f"{path}: tiny, 0.0 MB"
    error = re.fullmatch(
        r"on ONNX Runtime its output differs from reference's by (\S+) at most", out.splitlines()[1]
    ).group(1)
    assert 0 <= float(error) < 1e-5
    assert re.fullmatch(r"of all layers \w+ differs most, by \S+", out.splitlines()[2])
    assert not err
    told = portnet_("export", path, "--weights", trained, "--preset", "torchvision", status=2)[1]
    assert "--weights know their preset" in told
    portnet_("export", path, *TINY, "--softmax", "--one-image", "--opset", 18)
    assert "opset must lie between" in portnet_("export", path, *TINY, "--opset", 3, status=2)[1]
    out, _ = portnet_("export", path, *TINY, "--no-verify")
    assert out == f"{path}: tiny, {path.stat().st_size / 1e6:.1f} MB\n"


def test_export_where_there_is_no_onnx_runtime(tmp_path, monkeypatch):
    only = Registry([portnet.backends()["reference"]], [])
    monkeypatch.setattr(plugins, "backends", lambda: only)
    out, _ = portnet_("export", tmp_path / "net.onnx", *TINY)
    assert out.splitlines()[1] == "not run: ONNX Runtime is not installed (pip install 'portnet[cpu]')"


def test_an_export_that_computes_something_else_is_a_failed_run(tmp_path, monkeypatch):
    right = onnx_export.export

    def wrong(graph, weights, path, **how):
        return right(graph, {name: value * 2 for name, value in weights.items()}, path, **how)

    monkeypatch.setattr(onnx_export, "export", wrong)
    assert "differs from the session's" in message("export", tmp_path / "net.onnx", *TINY, status=1)


def test_mistakes_in_exporting(tmp_path):
    assert "no folder" in message("export", tmp_path / "missing" / "net.onnx", *TINY)
    assert "no weights file" in message("export", tmp_path / "net.onnx", "--weights", tmp_path / "missing")
    assert "unknown preset 'cafe'" in message("export", tmp_path / "net.onnx", "--preset", "cafe")


# check


@pytest.fixture
def two_checks(monkeypatch):
    """Two checks, the second of which fails; and what was asked for."""
    asked = []

    def fails():
        raise conformance.ConformanceError("conv1 is off by 3 [where 1 is allowed]")

    def checks(name, **options):
        asked.append((name, options))
        made = [conformance.Check("adds up", lambda: "42 [sums]"), conformance.Check("takes away", fails)]
        return made[: 1 if name == "good" else 2]

    monkeypatch.setattr(conformance, "checks", checks)
    return asked


def test_check(two_checks):
    out, err = portnet_("check", "bad", status=1)
    assert out.splitlines() == [
        "pass adds up: 42 [sums]",
        "FAIL takes away: conv1 is off by 3 [where 1 is allowed]",
        "bad: 1 passed, 1 failed",
    ]
    assert not err
    assert portnet_("check", "good")[0].splitlines()[-1] == "good: 1 passed, 0 failed"
    portnet_("check", "good", "--image-size", 67, "--precision", "tf32", "--precision", "float16")
    assert two_checks == [
        ("bad", {"precisions": ("float32",), "image_size": None}),
        ("good", {"precisions": ("float32",), "image_size": None}),
        ("good", {"precisions": ("tf32", "float16"), "image_size": 67}),
    ]


def test_check_as_json(two_checks):
    out, err = portnet_("check", "bad", "--json", status=1)
    assert json.loads(out) == {
        "backend": "bad",
        "failed": 1,
        "checks": [
            {"check": "adds up", "passed": True, "seen": "42 [sums]"},
            {"check": "takes away", "passed": False, "seen": "conv1 is off by 3 [where 1 is allowed]"},
        ],
    }
    assert not err
    assert json.loads(portnet_("check", "good", "--json")[0])["failed"] == 0


def test_checking_what_is_not_there(three):
    assert "no [bold] device; plug one in" in message("check", "absent", status=1)
    assert "unknown backend 'presnt'; did you mean present?" in message("check", "presnt")
    assert "because of a plug-in" in message("check", "theirs")


# compare


class Everywhere(Present):
    """Two formulations, and it trains."""

    name, formulations = "everywhere", ("portable", "stock")


class Second(Present):
    name = "second"


class Oracle(Present):
    name, oracle, vendor = "reference", True, "any CPU"


class InferOnly(Present):
    name, modes = "inferring", ("infer",)


def made(spec):
    """The record that a measurement of `spec` might leave."""
    made = Record(spec=spec, outcome="works", device={"vendor": "Someone", "note": "", "name": "the device"},
                  environment={"date": "2026-01-01T00:00:00+00:00", "versions": {}}, weights="ab" * 32)  # fmt: skip
    if spec.backend == "absent":
        return replace(made, outcome="not available", reason="no [bold] device", remedy="plug one in")
    timed = {spec.mode: {"batch": 16, "steps": 2, "seconds": [0.5, 0.6, 0.7], "warm_up": []}}
    finding = {"what": "infer() logits", "error": 1e-6, "allowed": 1e-5}
    made = replace(made, samples=timed, gates={"parity": {"passed": True, "oracle": False, "findings": [finding]}})
    if spec.mode != "train":
        return made
    losses = [2.3 - 0.1 * i for i in range(spec.curve_steps)]
    return replace(made, training={"losses": losses, "perturbed": [[x + 1e-4 for x in losses]] * spec.perturbed})


@pytest.fixture
def comparing(monkeypatch):
    """Backends of every sort, with measurements that are made up; what they were asked for, and who is to fail."""
    asked, failing = [], {}

    def series(specs, *, rounds, timeout, say, deadline):
        for number in range(rounds):
            records = []
            for spec in specs:
                asked.append((spec, timeout))
                say(spec, "timing [infer]")
                record = replace(made(spec), round={"series": str(id(specs)), "number": number})
                if spec.stack in failing:
                    record = replace(record, outcome=failing[spec.stack], reason="it broke", samples={})
                records.append(record)
            yield records

    monkeypatch.setattr(launch, "series", series)
    registry = Registry([Everywhere(), Oracle(), InferOnly(), Absent(), Second()], [])
    monkeypatch.setattr(plugins, "backends", lambda: registry)
    # No other process knows of these backends.
    monkeypatch.setattr(launch, "probes", lambda chosen: {b.name: _probed(b) for b in chosen})
    return asked, failing


def _probed(backend):
    try:
        return plugins.probe(backend)
    except Unavailable as error:
        return error


STACKS = ["absent/eager/float32", "everywhere/eager/float32", "everywhere/eager/float32 (stock)",
          "inferring/eager/float32", "reference/eager/float64", "second/eager/float32"]  # fmt: skip
TRAINED = [stack for stack in STACKS[1:] if not stack.startswith("inferring")]
MEASURED = [(stack, "train") for stack in TRAINED]
# Nobody asks how fast the reference is.
MEASURED += [(stack, "infer") for stack in STACKS[1:] if not stack.startswith("reference")]


def test_compare_measures_every_stack_and_leaves_a_record_of_each_and_a_page(comparing, tmp_path):
    asked, _ = comparing
    out, err = portnet_("compare", "--out", tmp_path / "deep" / "out", "--steps", 7, "--batch", 3, "--seed", 5,
                        "--timeout", 33)  # fmt: skip
    # No process is started for what is not there.
    assert sorted((spec.stack, spec.mode) for spec, _ in asked) == sorted(MEASURED)
    assert {timeout for _, timeout in asked} == {33}
    for spec, _ in asked:
        assert (spec.curve_steps, spec.batch, spec.seed, spec.preset) == (7, 3, 5, "caffe")
        assert (spec.image_size, spec.classes, spec.data, spec.quick) == (227, 10, "digits", True)
    records, problems = record.read_all([tmp_path / "deep" / "out"])
    assert sorted({r.spec.stack for r in records}) == STACKS
    assert not problems
    page = (tmp_path / "deep" / "out" / "compare.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html")
    for stack in STACKS:
        assert stack.split("/")[0] in page
    for word in ("everywhere", "reference", "works", "absent", "plug one in"):
        assert word in out, word
    assert out.endswith(f"Records and page: {tmp_path / 'deep' / 'out'} (compare.html)\n")
    # What goes on is said at once, though nothing is done yet.
    assert [line.split("]")[0] for line in err.splitlines()] == [
        f"[{n}/{len(MEASURED)}" for n in range(len(MEASURED) + 1)
    ]
    assert "[8/8] second/eager/float32, infer, batch 3: works" in err


def test_compare_as_json(comparing, tmp_path):
    out, err = portnet_("compare", "--out", tmp_path, "--steps", 3, "--json")
    told = json.loads(out)
    assert len(told) == len(MEASURED) + 1
    assert {t["spec"]["backend"] for t in told} == {s.split("/")[0] for s in STACKS}
    assert {t["schema"] for t in told} == {record.SCHEMA}
    # What goes on is said at once, though nothing is done yet.
    assert [line.split("]")[0] for line in err.splitlines()] == [
        f"[{n}/{len(MEASURED)}" for n in range(len(MEASURED) + 1)
    ]
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text()) in told


def test_comparing_by_name(comparing, tmp_path):
    asked, _ = comparing
    options = ["--out", tmp_path, "--steps", 3, "--json"]
    portnet_("compare", "--backends", "inferring, reference", "--precision", "bfloat16", *options)
    assert [(spec.stack, spec.mode) for spec, _ in asked] == [
        ("reference/eager/float64", "train"),
        ("inferring/eager/bfloat16", "infer"),
    ]
    assert [spec.blocks for spec, _ in asked] == [0, 10]
    # Missing is a failure where it was asked for, and otherwise a line.
    portnet_("compare", "--backends", "inferring,absent", *options, status=1)
    portnet_("compare", *options)


@pytest.mark.parametrize("outcome", ["wrong", "failed", "timeout", "out of memory", "dishonest clock"])
def test_a_measurement_that_fails_does_not_stop_the_others(comparing, tmp_path, outcome):
    asked, failing = comparing
    failing["everywhere/eager/float32"] = outcome
    out, _ = portnet_("compare", "--out", tmp_path, "--steps", 3, "--json", status=1)
    assert len(asked) == len(MEASURED)
    told = {(t["spec"]["backend"], t["spec"]["formulation"]): t for t in json.loads(out)}
    assert told["everywhere", "portable"]["outcome"] == outcome
    assert told["everywhere", "stock"]["outcome"] == "works"


def test_mistakes_in_comparing(comparing, tmp_path):
    asked, _ = comparing
    assert "unknown backend 'evrywhere'; did you mean everywhere?" in message("compare", "--backends", "evrywhere")
    assert "unknown preset 'cafe'" in message("compare", "--preset", "cafe")
    (tmp_path / "file").write_text("")
    assert "is a file" in portnet_("compare", "--out", tmp_path / "file", status=2)[1]
    assert not asked


# Terminals and pipes.


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(console, "open_console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    with console.show_progress(total=3) as (say, advance):
        say("measuring [bold]")
        advance("one [/bold]")
    assert "\x1b" in screen.getvalue()
    assert "1/3" in screen.getvalue()
    assert "[/bold]" in screen.getvalue()
    screen.truncate(0)
    with console.show_progress(total=3, quiet=True) as (say, advance):
        say("measuring")
        advance("one")
    assert not screen.getvalue().strip("\0")


def test_in_a_pipe_standard_output_is_pure_json(tmp_path):
    """The real thing: the network itself, in a process of its own."""
    command = ["train", "--preset", "caffe", "--image-size", "67", "--steps", "2", "--batch", "4", "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "portnet.cli", *command, "--backend", BACKEND],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    told = json.loads(ran.stdout)
    assert told["losses"][0] == pytest.approx(np.log(10), rel=0.05)
    assert told["test"]["count"] == 360
    assert not ran.stderr
    assert not list(tmp_path.iterdir())


# measure and ablate


def test_measuring_by_name(comparing, tmp_path):
    asked, _ = comparing
    out, err = portnet_("measure", "everywhere", "second/float32", "--mode", "infer", "--rounds", 3, "--batch", 4,
                        "--batch", 8, "--out", tmp_path)  # fmt: skip
    assert [(s.stack, s.mode, s.batch, s.quick, s.blocks) for s, _ in asked[:4]] == [
        (stack, "infer", batch, False, 30)
        for batch in (4, 8)
        for stack in ("everywhere/eager/float32", "second/eager/float32")
    ]
    assert len(asked) == 12
    assert len(record.read_all([tmp_path])[0]) == 12
    assert "inconclusive" in out or "equivalent" in out
    assert err.splitlines()[-1].startswith("[12/12] second/eager/float32, infer, batch 8: works")


def test_measuring_everything_begins_with_what_tells_most(comparing, tmp_path):
    asked, _ = comparing
    out, _ = portnet_("measure", "--all", "--quick", "--out", tmp_path)
    assert (asked[0][0].backend, asked[0][0].mode) == ("everywhere", "infer")
    assert {s.mode for s, _ in asked} == {"infer", "train", "serve"}
    assert asked[-1][0].backend == "reference"
    assert "absent: left out. no [bold] device" in out


def test_a_stack_that_came_to_no_figure_is_a_failed_run(comparing, tmp_path):
    """Though nothing went wrong with it; only what there was no time for is as it was asked for."""
    _, failing = comparing
    failing["everywhere/eager/float32"] = "not measured"
    portnet_("measure", "everywhere", "second", "--quick", "--rounds", 2, "--out", tmp_path / "a", status=1)
    portnet_("measure", "second", "--quick", "--rounds", 2, "--out", tmp_path / "b")


def test_no_time_left_is_said(comparing, tmp_path):
    asked, _ = comparing
    _, err = portnet_("measure", "everywhere", "--budget", "0s", "--out", tmp_path)
    assert not asked
    assert "everywhere/eager/float32, infer, batch 16: not measured" in err
    found, _ = record.read_all([tmp_path])
    assert {(r.outcome, r.reason) for r in found} == {("not measured", "no time was left")}
    assert {r.spec.mode for r in found} == {"train", "infer"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "name stacks, or give --all and perhaps --backends"),
        (("everywhere", "--all"), "name stacks, or give --all and perhaps --backends"),
        (("evrywhere",), "did you mean everywhere?"),
        (("everywhere/eager/float33",), "did you mean float32"),
        (("everywhere/float32/bfloat16",), "names its precision twice"),
        (("everywhere", "--budget", "soon"), "--budget must be a time such as 90s"),
        (("everywhere", "--budget", "nan"), "--budget must be a time such as 90s"),
        (("everywhere", "--budget=-5m"), "--budget must be a time such as 90s"),
        (("everywhere", "--timeout=-1"), "Invalid value for '--timeout'"),
        (("everywhere", "--preset", "cafe"), "unknown preset 'cafe'"),
    ],
)
def test_mistakes_in_measuring(comparing, options, said):
    asked, _ = comparing
    assert said in portnet_("measure", *options, status=2)[1]
    assert not asked


class Layered(Present):
    """One layer of software that can be taken away, and one that is not there."""

    name = "layered"

    def library_layers(self, settings):
        return (
            LibraryLayer(name="fast", title="the fast library", replace={"formulation": "stock"}),
            LibraryLayer(name="faster", title="the faster one", missing="this processor has none"),
        )


def test_ablation_measures_the_stack_whole_and_without_each_layer(comparing, monkeypatch, tmp_path):
    asked, _ = comparing
    monkeypatch.setattr(plugins, "backends", lambda: Registry([Layered()], []))
    out, _ = portnet_("ablate", "layered", "--rounds", 2, "--out", tmp_path)
    assert [s.stack for s, _ in asked[:2]] == ["layered/eager/float32", "layered/eager/float32 without fast"]
    assert len(asked) == 4
    assert "the fast library" in out
    assert "faster: left out. this processor has none" in out
    assert "has no layer slow" in portnet_("ablate", "layered", "--layers", "slow", status=2)[1]
