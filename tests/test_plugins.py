"""Plug-ins are found, kept apart and named: fake distributions on the path, a fake PortNet's own among them."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from portnet.errors import PluginError, Unavailable, UnknownName
from portnet.plugins import DISABLE, Registry, backends, choose, probe, require

_numbers = itertools.count()

PLUGIN = """
from portnet.contract import Backend, Device
from portnet.errors import Unavailable
from portnet.hookspecs import hookimpl

class Fake(Backend):
    name, vendor = {name!r}, "none"

    def probe(self):
        return Device(name="a device", precisions=("float32",))

    def open(self, graph, weights, settings):
        raise NotImplementedError

@hookimpl
def portnet_backends():
    return [Fake()]
"""


class Site:
    """A folder on the path into which distributions are put."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, distribution: str, source: str, *, entry: str = "it", name: str = "it", version: str = "1") -> str:
        """A distribution with one entry point; returns its module's name. `source` may use `PLUGIN`'s {name}."""
        module = f"fake_plugin_{next(_numbers)}"
        (self.folder / f"{module}.py").write_text(source.replace("{name!r}", repr(name)))
        self.info(distribution, f"[portnet]\n{entry} = {module}\n", version)
        return module

    def info(self, distribution: str, entry_points: str, version: str = "1") -> None:
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points)
        importlib.invalidate_caches()
        backends.cache_clear()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A path on which PortNet's own distribution offers one backend, ``ours``."""
    monkeypatch.delenv(DISABLE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    site = Site(tmp_path)
    site.add("portnet", PLUGIN, entry="ours", name="ours")
    yield site
    for module in [m for m in sys.modules if m.startswith("fake_plugin_")]:
        del sys.modules[module]
    backends.cache_clear()


def problem_of(registry: Registry, plugin: str):
    (problem,) = [p for p in registry.problems if p.plugin == plugin]
    return problem


def test_a_plugin_is_listed_without_being_probed(site):
    site.add("theirs", PLUGIN.replace("return Device", "raise SystemError; Device"), name="theirs")
    registry = backends()
    assert list(registry) == ["ours", "theirs"]
    assert not registry.problems
    assert registry["theirs"].vendor == "none"
    assert registry is backends()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("def (", "SyntaxError"),
        ("raise ImportError('libvendor.so.1: cannot open')", "ImportError: libvendor.so.1: cannot open"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_broken_import_is_named_and_hides_no_other(site, source, said):
    site.add("a-broken-one", source, entry="broken")
    site.add("theirs", PLUGIN, name="theirs")
    registry = backends()
    assert list(registry) == ["ours", "theirs"]
    problem = problem_of(registry, "broken")
    assert problem.distribution == "a-broken-one"
    assert problem.message.startswith(said)
    assert "a-broken-one" in problem.remedy
    for name in ("broken", "broken-too"):
        assert name not in registry
        assert registry.get(name) is None
        with pytest.raises(PluginError, match=said.split(":")[0]):
            registry[name]


def test_an_interrupt_is_no_plugins_fault(site):
    site.add("theirs", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        backends()


@pytest.mark.parametrize("body", ["raise RuntimeError('no luck')", "yield Fake(); raise RuntimeError('no luck')"])
def test_a_raising_hook_loses_nobody_elses_backends(site, body):
    site.add("a-raising-one", PLUGIN.replace("return [Fake()]", body), entry="raising", name="raised")
    site.add("theirs", PLUGIN, name="theirs")
    registry = backends()
    assert {"ours", "theirs"} <= set(registry)
    assert problem_of(registry, "raising").message == "RuntimeError: no luck"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("def portnet_backends(", "def portnet_backend(", "unknown hook 'portnet_backend'"),
        ("def portnet_backends(", "def portnet_backends(device", "can not be found in the hookspec"),
        ("@hookimpl\n", "", "implements no hook"),
    ],
)
def test_a_misspelt_hook_is_an_error_of_that_plugin_alone(site, old, new, said):
    site.add("a-misspelt-one", PLUGIN.replace(old, new), entry="misspelt", name="misspelt")
    site.add("theirs", PLUGIN, name="theirs")
    registry = backends()
    assert list(registry) == ["ours", "theirs"]
    problem = problem_of(registry, "misspelt")
    assert said in problem.message
    assert "hooks are portnet_backends" in problem.remedy or "hookimpl" in problem.message


def test_of_two_with_one_name_neither_is_handed_out(site):
    theirs = site.add("theirs", PLUGIN, entry="another", name="ours")
    site.add("a-third", PLUGIN, name="third")
    registry = backends()
    assert list(registry) == ["third"]
    problem = problem_of(registry, "ours")
    assert problem.distribution == "portnet, theirs"
    assert f"{theirs} of theirs" in problem.message
    assert DISABLE in problem.remedy
    with pytest.raises(PluginError, match=f"of portnet and by {theirs} of theirs.*{DISABLE}=1"):
        choose("ours")


def test_one_plugin_cannot_offer_a_name_twice(site):
    site.add("theirs", PLUGIN.replace("[Fake()]", "[Fake(), Fake()]"), name="twice")
    registry = backends()
    assert list(registry) == ["ours"]
    assert problem_of(registry, "twice").distribution == "theirs"


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ("3", "3, which is no Backend"),
        ("Fake", "it must be an instance"),
        ("type('Odd', (Fake,), {'name': 'Not_A-Name'})()", "'Not_A-Name'"),
        ("type('Odd', (Fake,), {'name': ''})()", "''"),
        ("type('Odd', (Fake,), {'name': None})()", "None"),
        ("type('Odd', (Fake,), {'name': 'auto'})()", "'auto'"),
        ("type('Odd', (Fake,), {'name': 'ok', 'vendor': None})()", "vendor"),
        ("type('Odd', (Fake,), {'name': 'ok', 'priority': 'high'})()", "priority 'high'"),
    ],
)
def test_what_is_no_backend_is_refused_and_the_rest_kept(site, item, said):
    site.add("an-odd-one", PLUGIN.replace("[Fake()]", f"[{item}, Fake()]"), entry="odd", name="sound")
    registry = backends()
    assert list(registry) == ["ours", "sound"]
    assert said in problem_of(registry, "odd").message


def test_a_hook_that_gives_nothing_to_iterate_is_named(site):
    site.add("a-forgetful-one", PLUGIN.replace("return [Fake()]", "Fake()"), entry="forgetful")
    assert problem_of(backends(), "forgetful").message.startswith("TypeError")


def test_the_switch_leaves_only_ours(site, monkeypatch):
    theirs = site.add("theirs", PLUGIN, name="theirs")
    monkeypatch.setenv(DISABLE, "1")
    backends.cache_clear()
    assert list(backends()) == ["ours"]
    assert theirs not in sys.modules
    for off in ("0", ""):
        monkeypatch.setenv(DISABLE, off)
        backends.cache_clear()
        assert list(backends()) == ["ours", "theirs"]


def test_an_unknown_name_gets_the_nearest(site):
    with pytest.raises(UnknownName, match=r"unknown backend 'our'; did you mean ours\?"):
        choose("our")
    assert "our" not in backends()


@pytest.mark.parametrize("newer", [True, False], ids=["offers", "offers no more"])
def test_an_old_copy_of_a_distribution_is_not_asked(site, monkeypatch, newer):
    old = Site(site.folder / "old")
    old.folder.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(old.folder)])
    old.add("theirs", PLUGIN, name="theirs")
    if newer:
        site.add("theirs", PLUGIN, name="theirs", version="2")
    else:
        site.info("theirs", "", version="2")
    registry = backends()
    assert list(registry) == ["ours"] + ["theirs"] * newer
    assert not registry.problems


def test_unreadable_metadata_is_named_and_hides_no_other(site):
    site.add("theirs", PLUGIN, name="theirs")
    site.info("nameless", "[portnet]\nit = nothing\n")
    (site.folder / "nameless-1.dist-info/METADATA").write_text("")
    site.info("garbled", "")
    (site.folder / "garbled-1.dist-info/entry_points.txt").write_bytes(b"[portnet]\nit = \xff\n")
    registry = backends()
    assert list(registry) == ["ours", "theirs"]
    assert {p.plugin for p in registry.problems} == {"nameless", "garbled"}


def test_without_an_installation_the_reason_is_said(site):
    (site.folder / "portnet-1.dist-info/entry_points.txt").write_text("[portnet]\n")
    backends.cache_clear()
    with pytest.raises(PluginError, match="without being installed"):
        choose("ours")


def test_a_raising_probe_is_reported_by_name_and_auto_goes_on(site):
    def add(name: str, priority: int, body: str) -> None:
        source = PLUGIN.replace('"none"\n', f'"none"\n    priority = {priority}\n').replace("return Device", body)
        site.add(name, source, name=name)

    add("raising", 9, "raise OSError('driver crashed'); Device")
    add("exiting", 8, "raise SystemExit; Device")
    add("absent", 7, "raise Unavailable('no card', 'buy one'); Device")
    site.add("a-broken-one", "raise ImportError('no libvendor')")
    add("vague", 6, "return None; Device")
    with pytest.raises(Unavailable) as none:
        choose()
    for said in (
        "raising: the probe of raising raised OSError: driver crashed",
        "SystemExit",
        "no card",
        "not a Device",
        "ImportError: no libvendor",
    ):
        assert said in str(none.value)
    assert "ours" not in str(none.value)
    add("sound", 5, "return Device")
    add("slower", 4, "return Device")
    assert choose().name == "sound"
    assert list(backends()) == ["raising", "exiting", "absent", "vague", "sound", "slower", "ours"]
    with pytest.raises(Unavailable, match="the probe of raising raised OSError") as wrapped:
        probe(backends()["raising"])
    assert isinstance(wrapped.value.__cause__, OSError)
    assert "author" in wrapped.value.remedy
    with pytest.raises(Unavailable) as as_it_was:
        probe(backends()["absent"])
    assert as_it_was.value.remedy == "buy one"


def test_a_required_backend_is_there_or_one_line_says_why(site, capsys):
    require("ours")
    assert capsys.readouterr().out == "portnet: ours: a device\n"
    site.add(
        "absent", PLUGIN.replace("return Device", "raise Unavailable('no card', 'buy one'); Device"), name="absent"
    )
    for name, said in (("absent", "no card; buy one"), ("our", "unknown backend")):
        with pytest.raises(SystemExit) as left:
            require(name)
        assert str(left.value).startswith(f"portnet: {name}: ")
        assert said in str(left.value)
        assert "\n" not in str(left.value)


LISTING = """
import time
start = time.perf_counter()
import numpy
loaded = time.perf_counter()
import portnet
names = list(portnet.backends())
import sys
print((time.perf_counter() - loaded) / (loaded - start))
print(*names)
print(*(m for m in sys.modules if m.split(".")[0] in {"torch", "onnx", "onnxruntime", "openvino", "jax", "tensorflow"}))
"""


def test_listing_is_quick_and_loads_no_vendor():
    """By what NumPy's own import takes, some 0.1 s: the machine may be slow."""
    multiples = []
    for _ in range(3):  # the quickest counts: others may use the machine
        run = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True, check=True)
        multiple, names, vendors = run.stdout.split("\n")[:3]
        multiples.append(float(multiple))
        assert not vendors
        assert {"reference", "cpu", "cuda", "rocm", "mps", "xpu", "accelerator"} <= set(names.split())
    assert min(multiples) < 3


def test_our_own_plugins_have_no_problems():
    backends.cache_clear()
    assert not [p for p in backends().problems if p.distribution == "portnet"]
    assert all(isinstance(b.name, str) and b.modes for b in backends().values())
