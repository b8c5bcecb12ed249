"""The floor of a training run, worked out by hand; and that nothing which is not published is made up.

Records are simulated, and say so in their device's environment; no device made them.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from portnet import alexnet, cli, devices, lockin, projection
from portnet.errors import InputError, UnknownName
from portnet.projection import Work, estimates, fastest, measured, named, project, seconds
from portnet.record import Record, Spec

DAY = 86400
WORK = Work()
GTX580 = "GeForce GTX 580"


def ran(*arguments: object, status: int = 0) -> str:
    """What the command prints: on standard output, or on standard error where it is the user's mistake."""
    environment = {"COLUMNS": "100", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    done = CliRunner().invoke(cli.main, ["project", *map(str, arguments)], env=environment)
    assert done.exit_code == status, (done.stdout, done.stderr, done.exception)
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return " ".join((done.stdout if status < 2 else done.stderr).split())


def one(name: str, precision: str = "float32", **more: int) -> projection.Projection:
    (found,) = project(name, WORK, precision=precision, **more)
    return found


# The floor.


def test_the_floor_by_hand():
    """conv1 of paper2012 on a GTX 580, and the sum."""
    # Forward and the gradient of the weights: the first layer owes no gradient of its input.
    flops = 2 * 128 * 2 * 105_415_200
    x, y, w = 128 * 3 * 227 * 227, 128 * 96 * 55 * 55, 34_944
    moved = 4 * ((x + y + w) + (y + x + w) + 5 * w)
    cost = WORK.costs("float32")
    conv1 = next(c for c in cost if c.flops)
    assert (conv1.flops, conv1.bytes) == (flops, moved)
    floor = one(GTX580)
    expected = sum(max(c.flops / 1.581e12, c.bytes / 192.4e9) for c in cost)
    assert floor.step == pytest.approx(expected, rel=1e-12)
    assert floor.floor == pytest.approx(expected * 90 * 10_009)
    assert floor.floor > floor.arithmetic > 0.9 * floor.floor


def test_the_floor_is_of_layers_and_not_of_their_sum():
    """LRN and pooling have no FLOPs: their bytes come on top of the convolutions'."""
    floor = one(GTX580)
    costs = WORK.costs("float32")
    total = max(sum(c.flops for c in costs) / 1.581e12, sum(c.bytes for c in costs) / 192.4e9)
    assert floor.step > 1.02 * total
    bound = sum(c.bytes / 192.4e9 for c in costs if c.bytes / 192.4e9 > c.flops / 1.581e12)
    assert floor.moving == pytest.approx(bound / floor.step)
    assert 0.02 < floor.moving < 0.06


def test_two_gtx_580_took_five_to_six_days():
    """The paper's run: 29 to 35% of the FLOPs alone, and 30 to 36% of the floor, in which bytes count as well."""
    floor = one(GTX580, count=2)
    assert floor.floor / DAY == pytest.approx(1.8036, abs=1e-4)
    assert [round(floor.utilisation(days * DAY), 3) for days in (5, 6)] == [0.349, 0.291]
    assert [round(floor.implied(days * DAY), 3) for days in (5, 6)] == [0.361, 0.301]
    assert floor.rate.units == "vector"


def test_steps_are_full_batches():
    assert (WORK.steps, Work(batch=projection.IMAGES).steps) == (90 * 10_009, 90)
    assert Work(batch=projection.IMAGES // 2 + 1, epochs=3).steps == 3


def test_devices_share_evenly():
    alone, four = one(GTX580), one(GTX580, count=4)
    assert (four.floor, four.arithmetic) == (pytest.approx(alone.floor / 4), pytest.approx(alone.arithmetic / 4))
    assert four.moving == pytest.approx(alone.moving)


def test_a_precision_has_its_own_rate_and_width():
    wide, narrow = one("Tesla V100 SXM2"), one("Tesla V100 SXM2", "float16")
    assert (wide.rate.units, narrow.rate.units) == ("vector", "matrix")
    assert narrow.arithmetic == pytest.approx(wide.arithmetic * 15.7 / 125)
    assert narrow.moving > 5 * wide.moving, "bytes do not shrink as the rate grows"


def test_presets():
    caffe, own = (sum(c.flops for c in Work(preset=p).costs("float32")) for p in ("caffe", "torchvision"))
    first = 2 * 2 * 128
    assert caffe == 3 * 2 * 128 * 724_406_816 - first * 105_415_200 // 2
    graph = alexnet.graph("torchvision")
    conv1 = next(s.macs for s in graph.steps if s.macs)
    assert own == 3 * 2 * 128 * 714_188_480 - 2 * 128 * conv1


# What is not published.


@pytest.mark.parametrize("name", [d.name for d in devices.devices()])
def test_no_device_has_a_figure_that_is_not_published(name):
    device = named(name)
    for found in project(name, WORK):
        known = found.precision in device.rates and device.bandwidth is not None
        assert (found.floor is None, found.arithmetic is None, found.moving is None) == (not known,) * 3
        assert (found.implied(1.0) is None, found.utilisation(1.0) is None) == (not known,) * 2
        assert (found.estimate(0.5) is None) == (not known)
        assert estimates(found, efficiency=0.5) == [] or known


def test_a_processors_rate_for_each_core_is_no_peak():
    assert one("Xeon Scalable, 4th generation", "bfloat16").floor is None


def test_the_fastest():
    assert fastest(project("Tesla V100 SXM2", WORK)).precision == "float16"
    assert fastest(project("Tesla K40", WORK)).precision == "float32"
    assert fastest(project("Apple M1", WORK)) is None


def test_over_time():
    table = projection.over_time(WORK, precision="float32")
    years = [own[0].device.year for own in table]
    assert years == sorted(years)
    assert len(table) == len(devices.devices()) == len({own[0].device.name for own in table})


# Names.


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("GeForce GTX 580", GTX580),
        ("geforce gtx 580", GTX580),
        ("NVIDIA GeForce GTX 580", GTX580),
        ("GTX 580", GTX580),
        ("K40", "Tesla K40"),
        ("NVIDIA H200", "H200 SXM"),
        ("MI250X", "Instinct MI250X, one die"),
        ("M1", "M1"),
        ("M3 Max", "M3 Max"),
        ("Tesla T4", "T4"),
    ],
)
def test_names(name, device):
    assert named(name).name == device


def test_a_name_of_several_is_nobodys():
    with pytest.raises(InputError, match="'H200': more than one device has that name; did you mean H200 SXM or H200 N"):
        named("H200")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("GTX 590", "GeForce GTX 580"),
        ("MI300", "Instinct MI300X"),
        ("A100", "A100 SXM 40GB"),
        ("RTX 4090 D", "GeForce RTX 4090"),
        ("GB200", "B200"),
    ],
)
def test_a_variant_is_no_device_but_its_near_names_are_told(name, near):
    with pytest.raises(InputError, match=rf"device '{name}': .*did you mean .*{near}"):
        named(name)


@pytest.mark.parametrize("name", ["", " ", ",", "Voodoo 2"])
def test_what_is_near_nothing(name):
    with pytest.raises(InputError, match="not known; 'portnet project --all' lists"):
        named(name)


# What is refused.


@pytest.mark.parametrize("text", ["5d", " 5.0d", "120h", "7200m", "432000s", "5.d"])
def test_times(text):
    assert seconds(text) == 5 * DAY


@pytest.mark.parametrize(
    "text", ["", "5", "d", "0d", "-5d", "5 days", "nand", "infd", "1e3d", "5d6h", "9" * 20 + "d", "٥d"]
)
def test_what_is_no_time(text):
    with pytest.raises(InputError, match="is no time; expected one such as 5d"):
        seconds(text)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"batch": -1}, {"batch": 1_281_168}, {"epochs": 0}, {"epochs": 10**7}])
def test_what_is_no_work(wrong):
    with pytest.raises(InputError, match="expected 1 to"):
        Work(**wrong)


def test_other_mistakes():
    with pytest.raises(UnknownName, match="did you mean caffe"):
        Work(preset="cafe")
    for count in (0, -2, 10**7):
        with pytest.raises(InputError, match="devices; expected 1 to"):
            project(GTX580, WORK, count=count)
    for efficiency in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="expected a share"):
            one(GTX580).estimate(efficiency)


# Estimates.


def simulated(*shares: float, device: str = "NVIDIA H200", outcome: str = "works", **spec: object) -> list[Record]:
    """Simulated processes that train at these shares of the published peaks, with ceilings of half of those."""
    of = Spec(**{"backend": "cuda", "precision": "bfloat16", "mode": "train", "preset": "paper2012", "batch": 128,
                 "classes": 1000, "image_size": 224, **spec})  # fmt: skip
    work = Work(preset=of.preset, batch=of.batch)
    names = [step.layer.name for step in alexnet.graph(of.preset).steps]
    layers = {
        name: {"flops": c.flops, "bytes": c.bytes, "floor": None, "forward": None, "backward": None}
        for name, c in zip(names, work.costs(of.precision), strict=True)
    }
    least = lockin.floor(layers, {"flops": 1979e12 / 2, "bandwidth": 4.8e12})
    return [
        Record(
            spec=of,
            outcome=outcome,
            device={"name": device, "memory": 143_771 << 20, "versions": {"torch": "simulated"}},
            environment={"host": "simulated"},
            round={"series": "simulated", "number": i, "rejected": False},
            samples={of.mode: {"batch": of.batch, "steps": 1, "seconds": [least / share] * 3}},
            layers=layers,
            ceilings={"flops": 1979e12 / 4, "bandwidth": 2.4e12},
        )
        for i, share in enumerate(shares)
    ]


def test_an_assumed_efficiency():
    (found,) = estimates(one(GTX580), efficiency=0.25)
    assert (found.measured, found.seconds) == (None, pytest.approx(4 * one(GTX580).floor))


def test_a_measured_efficiency_is_by_the_published_peaks():
    h200 = one("H200 SXM", "bfloat16")
    (found,) = estimates(h200, simulated(0.20, 0.20))
    assert found.efficiency == pytest.approx(0.2)
    assert found.seconds == pytest.approx(h200.floor / 0.2)
    assert found.measured.ceiling.figure == pytest.approx(0.4), "twice as much of ceilings half as high"
    assert found.measured.like


def test_the_interval_turns_round():
    h200 = one("H200 SXM", "bfloat16")
    (found,) = estimates(h200, simulated(0.19, 0.20, 0.21))
    share = found.measured.published
    assert (found.low, found.high) == (pytest.approx(h200.floor / share.high), pytest.approx(h200.floor / share.low))
    assert found.low < found.seconds < found.high
    (alone,) = estimates(h200, simulated(0.2))
    assert (alone.low, alone.high) == (None, None)


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([], id="none"),
        pytest.param(simulated(0.2, outcome="wrong"), id="void"),
        pytest.param(simulated(0.2, mode="infer"), id="another mode"),
        pytest.param(simulated(0.2, precision="float16"), id="another precision"),
        pytest.param(simulated(0.2, without=("cudnn",)), id="something taken away"),
        pytest.param(simulated(0.2, model="a:b"), id="another model"),
        pytest.param(simulated(0.2, device="NVIDIA H200 NVL"), id="another device"),
        pytest.param(simulated(0.2, device="NVIDIA H200 MIG 1g.18gb"), id="a part of the device"),
        pytest.param([replace(r, effective={"precision": "tf32"}) for r in simulated(0.2)], id="other in effect"),
        pytest.param([replace(r, layers={}) for r in simulated(0.2)], id="no layers"),
    ],
)
def test_efficiencies_that_are_not_taken(records):
    assert measured(records, named("H200 SXM"), WORK, "bfloat16") == []


def test_an_efficiency_of_other_work_is_carried_over_and_says_so(tmp_path):
    records = simulated(0.2, batch=16, preset="caffe")
    (found,) = measured(records, named("H200 SXM"), WORK, "bfloat16")
    assert not found.like
    for record in records:
        record.write(tmp_path)
    told = ran("H200 SXM", "--records", tmp_path)
    assert "with caffe at batch 16 in 1 process: carried over to other work" in told


# The command.


def test_the_papers_run():
    told = ran("GTX 580", "--devices", 2, "--took", "5d", "--took", "144h")
    assert told.startswith("2 x GeForce GTX 580 (NVIDIA, 2010): 90 epochs of ImageNet's 1,281,167 images, paper2012,")
    assert "float32 1.581 vector 173 ms 1.80 d 3%" in told
    assert "Not known: no float64, tf32, bfloat16, float16 peak published." in told
    assert "Implied by 5.00 d in float32: efficiency 36.1%, MFU 34.9%." in told
    assert "Implied by 6.00 d in float32: efficiency 30.1%, MFU 29.1%." in told
    assert "2 devices: perfect scaling is assumed." in told
    assert "https://www.geforce.com/hardware/desktop-gpus/geforce-gtx-580/specifications" in told
    assert "perfect scaling" not in ran("GTX 580")
    assert "Estimate" not in told


def test_a_time_that_the_peaks_do_not_allow():
    assert "Above 100%" in ran("GTX 580", "--took", "1d")
    assert "Above 100%" not in ran("GTX 580", "--took", "10d")


def test_estimates_are_told_from_floors():
    told = ran("V100 SXM2", "--precision", "float16", "--efficiency", "0.5")
    assert "float16 125 matrix 6.78 ms 1.70 h 43%" in told
    assert "Estimate in float16: 3.39 h, at an assumed efficiency of 50% of the published peaks." in told
    assert "no measurement" in told


def test_estimates_from_records(tmp_path):
    for record in simulated(0.19, 0.20, 0.21):
        record.write(tmp_path)
    told = ran("H200 SXM", "--precision", "bfloat16", "--records", tmp_path)
    assert (
        "at the 20% of the published peaks that cuda/eager/bfloat16 reached on H200 SXM (40% of the ceilings measured "
        "there), with paper2012 at batch 128 in 3 processes." in told
    )
    assert "95% interval" in told
    told = json.loads(ran("H200 SXM", "--precision", "bfloat16", "--records", tmp_path, "--json"))
    (found,) = told["devices"][0]["projections"][0]["estimates"]
    assert (found["efficiency_is"], found["of"], found["carried_over"]) == ("measured", "published peaks", False)
    assert (found["efficiency_of_ceilings"], found["processes"]) == (pytest.approx(0.4, abs=0.01), 3)
    assert sorted(found["records"]) == sorted(p.stem for p in tmp_path.iterdir())
    assert "(bfloat16)" not in ran("--all", "--records", tmp_path), "it is that device's fastest"
    assert "cuda/eager/bfloat16 reached on H200 SXM" in ran("--all", "--records", tmp_path)
    assert "The records hold no training of AlexNet on GeForce GTX 580" in ran("GTX 580", "--records", tmp_path)


def test_a_quick_efficiency_says_so(tmp_path):
    for record in simulated(0.2, quick=True):
        record.write(tmp_path)
    assert ", quick with paper2012" in ran("H200 SXM", "--records", tmp_path)


def test_records_that_are_refused_are_named(tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    environment = {"COLUMNS": "100"}
    done = CliRunner().invoke(cli.main, ["project", "GTX 580", "--records", str(tmp_path)], env=environment)
    assert (done.exit_code, "refused: " in done.stderr, "GTX 580" in done.stdout) == (1, True, True)


def test_no_rate_is_made_up():
    told = ran("M1", status=1)
    assert "Not known: no peak and no bandwidth published." in told
    assert "Floor" not in told
    told = ran("GTX 580", "--precision", "float16", "--efficiency", "0.5", "--took", "5d", status=1)
    assert "float16 not known not known not known not known" in told
    assert "Not known: no float16 peak published." in told
    assert "Implied by" not in told
    assert "Estimate" not in told


def test_every_device():
    told = ran("--all")
    assert told.index("2010 GeForce GTX 580 3.61 d 3.61 d float32, vector") < told.index("2013 Tesla K40")
    assert "Tesla V100 SXM2 9.03 h 1.70 h float16, matrix" in told
    assert "2020 M1 not known not known no peak and no bandwidth" in told
    assert "TPU v5e not known 1.42 h bfloat16, matrix" in told
    single = ran("--all", "--precision", "float16", "--devices", 8)
    assert single.startswith("8 of each device: 90 epochs")
    assert "GeForce GTX 580 not known no float16 peak published" in single
    assert "Estimate" in ran("--all", "--efficiency", "0.4")


def test_as_json():
    told = json.loads(ran("GTX 580", "--devices", 2, "--took", "5d", "--efficiency", "0.5", "--json"))
    assert told["work"] == {
        "preset": "paper2012", "batch": 128, "epochs": 90, "images": 1_281_167, "steps": 900_810,
    }  # fmt: skip
    assert (told["count"], "perfect scaling" in told["scaling"]) == (2, True)
    (device,) = told["devices"]
    assert (device["name"], device["year"], device["bandwidth"]["value"]) == (GTX580, 2010, 192.4e9)
    assert [p["precision"] for p in device["projections"]] == list(devices.PRECISIONS)
    known = device["projections"][1]
    assert (known["peak"]["value"], known["peak"]["units"]) == (1.581e12, "vector")
    assert known["peak"]["source"]["url"].startswith("https://www.geforce.com/")
    assert known["implied"] == [
        {
            "took": 432000.0,
            "efficiency": pytest.approx(0.3607, abs=1e-4),
            "utilisation": pytest.approx(0.3491, abs=1e-4),
        }
    ]
    assert known["estimates"][0]["efficiency_is"] == "assumed"
    assert known["estimates"][0]["seconds"] == pytest.approx(2 * known["floor"])
    unknown = device["projections"][0]
    assert (unknown["peak"], unknown["floor"], unknown["step"], unknown["estimates"]) == (None, None, None, [])
    assert unknown["implied"] == [{"took": 432000.0, "efficiency": None, "utilisation": None}]
    assert json.loads(ran("GTX 580", "--json"))["scaling"] is None
    assert len(json.loads(ran("--all", "--json"))["devices"]) == len(devices.devices())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "name a DEVICE, or give --all"),
        (("GTX 580", "--all"), "name a DEVICE, or give --all"),
        (("--all", "--took", "5d"), "--took is of one DEVICE"),
        (("GTX 580", "--efficiency", "0.5", "--records", "."), "not both"),
        (("GTX 580", "--efficiency", "50"), "not in the range"),
        (("GTX 580", "--efficiency", "0"), "not in the range"),
        (("GTX 580", "--efficiency", "nan"), "nan"),
        (("GTX 580", "--took", "5"), "is no time"),
        (("GTX 580", "--precision", "int8"), "int8"),
        (("GTX 580", "--preset", "alexnet"), "unknown preset 'alexnet'"),
        (("GTX 580", "--batch", "0"), "a batch of 0"),
        (("GTX 580", "--epochs", "0"), "0 epochs"),
        (("GTX 580", "--devices", "0"), "0 devices"),
        (("GTX 590",), "not known; did you mean"),
        (("GTX 580", "--records", "nowhere"), "does not exist"),
    ],
)
def test_mistakes(arguments, told):
    assert told in ran(*arguments, status=2)


def test_no_record_speaks_to_the_terminal(tmp_path: Path):
    hostile = "cuda\x1b[2J\u202e[red]"
    for record in simulated(0.2, backend=hostile):
        record.write(tmp_path)
    (tmp_path / "a\x1b[2J.json").touch()
    done = CliRunner().invoke(cli.main, ["project", "H200 SXM", "--records", str(tmp_path)], env={"COLUMNS": "100"})
    assert "\x1b" not in done.output
    assert "\u202e" not in done.output
    assert "[red]" in done.output
