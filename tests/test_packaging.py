"""What an installation holds, each way of installing, in an environment of its own and without the network."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
ENTRY_POINTS = {"reference", "cpu", "cuda", "rocm", "mps", "xpu", "accelerator", "onnxruntime", "openvino"}

# The user's own pip settings could bring an index or a constraint in.
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHONPATH"))} | {
    "PIP_CONFIG_FILE": os.devnull
}


def run(*command, **options) -> str:
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, env=ENV, **options)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


class Environment:
    """A fresh virtual environment without pip; `link` lends it an installed distribution, `fake` invents one."""

    def __init__(self, folder: Path):
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin" / "python"
        self.site = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))").strip())

    def ask(self, script: str) -> str:
        return run(self.python, "-I", "-c", script)

    def pip(self, *arguments) -> str:
        return run(sys.executable, "-m", "pip", "--python", self.python, *arguments)

    def link(self, *names: str) -> None:
        for dist in map(distribution, names):
            for top in {file.parts[0] for file in dist.files or ()} - {"..", "__pycache__"}:
                if not (self.site / top).exists():
                    (self.site / top).symlink_to(dist.locate_file(top))

    def fake(self, name: str, version: str) -> None:
        info = self.site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").touch()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what git would commit: a stale build/ beside it would put deleted files into the wheel."""
    copy = tmp_path_factory.mktemp("tree")
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheels(tree, tmp_path_factory):
    """The wheel built straight from the tree, and the one built from the source distribution."""
    out = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    run(*pip, out / "regular", tree)
    shutil.rmtree(tree / "build")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", out, tree)
    (sdist,) = out.glob("*.tar.gz")
    run(*pip, out / "sdist", sdist)
    return {way: next((out / way).glob("portnet-*.whl")) for way in ("regular", "sdist")}


LOOK = """
import importlib.metadata, importlib.util, json
from importlib.resources import files
from pathlib import Path
import portnet, portnet_backends
entry_points = importlib.metadata.distribution("portnet").entry_points
found = portnet.backends()
print(json.dumps({
    "entry_points": {e.name: bool(importlib.util.find_spec(e.value)) for e in entry_points.select(group="portnet")},
    "script": [bool(importlib.util.find_spec(e.module)) for e in entry_points.select(group="console_scripts")],
    "backends": sorted(found),
    "problems": [str(p) for p in found.problems],
    "versions": [importlib.metadata.version("portnet"), portnet.__version__],
    "typed": [any((Path(p) / "py.typed").is_file() for p in m.__path__) for m in (portnet, portnet_backends)],
    "digits": (files("portnet.data") / "digits.npz").is_file(),
    "stray": bool(importlib.util.find_spec("backends")),
}))
"""


@pytest.mark.parametrize("way", ["regular", "editable", "sdist"])
def test_every_installation_is_whole(way, wheels, tree, tmp_path):
    environment = Environment(tmp_path / "environment")
    environment.link("numpy", "pluggy", "setuptools")
    alone = ("--no-deps", "--no-build-isolation", "--no-index", "--no-compile")
    environment.pip("install", *alone, *(["--editable", tree] if way == "editable" else [wheels[way]]))
    seen = json.loads(environment.ask(LOOK))
    assert seen["entry_points"] == dict.fromkeys(ENTRY_POINTS, True)
    assert {"reference", "cpu", "cuda", "rocm", "mps", "xpu", "accelerator"} <= set(seen["backends"])
    assert seen["problems"] == []
    assert seen["script"] == [True]
    assert seen["versions"] == [VERSION, VERSION]
    assert seen["typed"] == [True, True]
    assert seen["digits"]
    assert not seen["stray"]
    assert not (environment.site / "backends").exists()


@pytest.mark.parametrize("way", ["regular", "sdist"])
def test_a_wheel_holds_every_module_and_nothing_else(way, wheels, tree):
    with zipfile.ZipFile(wheels[way]) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licence = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    modules = {f.relative_to(tree) for folder in ("portnet", "backends") for f in (tree / folder).rglob("*.py")}
    expected = {re.sub("^backends/", "portnet_backends/", m.as_posix()) for m in modules}
    assert {name for name in packed if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in packed} == {"portnet", "portnet_backends"}
    assert licence


def test_a_vendors_torch_is_never_replaced(wheels, tmp_path):
    """pip is shown a newer torch, and keeps the one that is there; too old a one it does replace."""
    requirements = re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", metadata(wheels["regular"]), re.MULTILINE)
    assert "torch" in requirements
    shop = tmp_path / "shop"
    empty_wheel(shop, "torch", "99.0")
    constraint = tmp_path / "constraint.txt"
    constraint.write_text("".join(re.findall(r"^torch.*\n", (ROOT / "constraints.txt").read_text(), re.MULTILINE)))
    assert constraint.read_text()

    def planned(torch: str, *options) -> dict[str, str]:
        environment = Environment(tmp_path / torch / str(len(options)))
        environment.fake("torch", torch)
        for name in set(requirements) - {"torch"}:
            environment.fake(name, "1000")
        look = ("--dry-run", "--quiet", "--report", "-", "--no-index", "--find-links", shop)
        report = json.loads(environment.pip("install", *look, *options, wheels["regular"]))
        return {item["metadata"]["name"]: item["metadata"]["version"] for item in report["install"]}

    ours = {"portnet": VERSION}
    assert planned("2.9.1+rocm6.4") == ours
    assert planned("2.9.1+rocm6.4", "--constraint", constraint) == ours
    assert planned("2.13.0+xpu") == ours
    assert planned("2.7.1+rocm6.3") == ours | {"torch": "99.0"}


def metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as packed:
        return packed.read(next(n for n in packed.namelist() if n.endswith(".dist-info/METADATA"))).decode()


def empty_wheel(folder: Path, name: str, version: str) -> None:
    folder.mkdir()
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as packed:
        packed.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
