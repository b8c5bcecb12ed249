"""Who may import whom: the core no vendor, a vendor no other vendor, and every module only floors below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE, BACKENDS = ROOT / "portnet", ROOT / "backends"

FLOORS = [
    {"errors", "host", "console", "data"},
    {"graph", "philox", "files", "devices", "portability"},
    {"alexnet", "contract", "record", "stats", "lines"},
    {"towers"},
    {"hookspecs", "weights", "images", "checkpoint", "metrics", "watch", "lockin"},
    {"loading", "shards"},
    {"parity", "onnx_export", "training", "clock", "assessment", "projection", "difference"},
    {"plugins", "trainer", "assess", "onnx_file"},
    {"cache", "calibration", "conformance", "report"},
    {"trained"},
    {"workload", "reporting"},
    {"own_model", "serving"},
    {"measurement", "model"},
    {"launch", "module_export", "quantization"},
    {"plan", "scaling"},
    {"__init__"},
    {"cli_data", "cli_report", "cli_scale", "cli_train"},
    {"cli"},
]
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}

# What the core may import besides Python's own library: its dependencies, none of which is a vendor's.
NEUTRAL = {
    *("numpy", "scipy", "pluggy", "onnx", "safetensors", "click", "rich", "jinja2", "markupsafe", "matplotlib", "PIL"),
    *("psutil", "zeus", "platformdirs", "pandas", "coverage", "tensorboardX"),
}

# Files of backends that are nobody's: what every torch device shares.
LOADED_BY_OPEN = {
    "torch_session",
    "torch_layers",
    "torch_modes",
    "torch_norms",
    "torch_rows",
    "torch_parallel",
    "torch_philox",
    "torch_probe",
    "torch_own",
}
SHARED = {"torch_device", "timing", "amx", "onnx_session", "onnx_groups", *LOADED_BY_OPEN}

# What each vendor's file may import besides numpy; all other files of backends, torch.
VENDOR = {
    "reference": set(),
    "onnxruntime_ep": {"onnxruntime", "onnx"},
    "onnxruntime_quantize": {"onnxruntime", "onnx"},
    "openvino_device": {"openvino"},
    "onnx_session": set(),
    "amx": set(),
    "onnx_groups": set(),
    "cuda_telemetry": {"torch", "pynvml"},
    "rocm_telemetry": {"torch", "amdsmi"},
    "cpu_telemetry": set(),
}


class Import:
    """One imported name: its module, and where it stands."""

    def __init__(self, module, node, *, typing, inside):
        self.module, self.line, self.typing, self.inside = module, node.lineno, typing, inside

    def __repr__(self):
        return f"{self.module} (line {self.line})"


def imports(source, package=""):
    """Every import of a source, at the top, in functions, and under TYPE_CHECKING.

    ``from portnet import weights`` counts as portnet.weights where there is such a module, else as portnet itself.
    """
    found = []

    def visit(node, typing, inside):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, True, inside)
            for child in node.orelse:
                visit(child, typing, inside)
            return
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        found.extend(Import(name, node, typing=typing, inside=inside) for name in names)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, typing, inside)

    visit(ast.parse(source), False, False)
    return found


def is_module(name):
    if not name.startswith(("portnet.", "portnet_backends.")):
        return False
    path = ROOT.joinpath(*name.replace("portnet_backends", "backends", 1).split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def core_modules():
    return sorted(CORE.rglob("*.py"))


def backend_files():
    return sorted(BACKENDS.glob("*.py"))


def room(path):
    """The module's name as the table has it; every file of a package is one room."""
    relative = path.relative_to(CORE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def room_of(module):
    """The room that an imported ``portnet...`` name is in."""
    return module.split(".")[1] if "." in module else "__init__"


def package_of(path):
    return ".".join(["portnet", *path.relative_to(CORE).parts[:-1]])


every_core_module = pytest.mark.parametrize(
    "path", core_modules(), ids=lambda path: path.relative_to(CORE).with_suffix("").as_posix()
)
every_backend = pytest.mark.parametrize("path", backend_files(), ids=lambda path: path.stem)


@every_core_module
def test_every_module_has_a_floor(path):
    assert room(path) in FLOOR, f"{path.name} has no floor: put it into the table of {Path(__file__).name}"


def test_a_module_has_one_floor():
    assert len(FLOOR) == sum(map(len, FLOORS))


@every_core_module
def test_imports_come_from_below(path):
    wrong = [
        found
        for found in imports(path.read_text(), package_of(path))
        if found.module.split(".")[0] == "portnet"
        and room_of(found.module) != room(path)
        and FLOOR[room_of(found.module)] >= FLOOR[room(path)]
    ]
    assert not wrong, f"{room(path)} on floor {FLOOR[room(path)]} imports {wrong}"


@every_core_module
def test_the_core_imports_no_vendor(path):
    """Nor anything else that is not its own, Python's, or a neutral dependency; torch's types alone are allowed."""
    wrong = [
        found
        for found in imports(path.read_text(), package_of(path))
        if (top := found.module.split(".")[0]) not in {"portnet", *NEUTRAL, *sys.stdlib_module_names}
        and not (top == "torch" and found.typing)
    ]
    assert not wrong, f"{path.name} imports {wrong}"


@every_backend
def test_a_backend_imports_no_other_vendors_file(path):
    wrong = [
        found
        for found in imports(path.read_text(), "portnet_backends")
        if found.module.split(".")[0] == "portnet_backends"
        # A vendor may have more files than one, of one first word: cuda_telemetry is cuda's.
        and (
            found.module == "portnet_backends"
            or (
                (other := found.module.split(".")[1]) not in {path.stem, *SHARED}
                and other.split("_")[0] != path.stem.split("_")[0]
            )
        )
    ]
    assert not wrong, f"{path.name} imports {wrong}"


@every_backend
def test_a_backend_imports_only_its_vendor(path):
    allowed = {"portnet", "portnet_backends", "numpy", *VENDOR.get(path.stem, {"torch"}), *sys.stdlib_module_names}
    wrong = [
        found
        for found in imports(path.read_text(), "portnet_backends")
        if found.module.split(".")[0] not in allowed or found.module == "portnet"
    ]
    assert not wrong, f"{path.name} imports {wrong}"


@pytest.mark.parametrize(
    "path", [path for path in backend_files() if path.stem not in LOADED_BY_OPEN], ids=lambda path: path.stem
)
def test_a_vendor_is_loaded_by_functions_only(path):
    """Listing backends imports these files, and must not load torch or onnxruntime."""
    wrong = [
        found
        for found in imports(path.read_text(), "portnet_backends")
        if not found.inside
        and not found.typing
        and (
            found.module.split(".")[0] in {"torch", "onnxruntime", "openvino", "pynvml", "amdsmi"}
            or found.module.removeprefix("portnet_backends.") in LOADED_BY_OPEN
        )
    ]
    assert not wrong, f"{path.name} imports {wrong} when it is imported"


def test_importing_everything_loads_no_vendor():
    """The same, seen from a fresh process: every module of the core and every vendor's file."""
    names = [
        ".".join(["portnet", *path.relative_to(CORE).with_suffix("").parts]).removesuffix(".__init__")
        for path in core_modules()
        if path.stem != "__main__"
    ]
    names += [f"portnet_backends.{path.stem}" for path in backend_files() if path.stem not in LOADED_BY_OPEN]
    code = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "print([name for name in ('torch', 'onnxruntime', 'openvino') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# The reader of imports itself.


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch", ["torch"]),
        ("import torch.nn as nn, numpy", ["torch.nn", "numpy"]),
        ("from torch.nn import functional", ["torch.nn"]),
        ("def f():\n    import torch", ["torch"]),
        ("class A:\n    def f(self):\n        from torch import nn", ["torch"]),
        ("try:\n    import torch\nexcept ImportError:\n    pass", ["torch"]),
        ("importlib.import_module('torch')", ["torch"]),
        ("x = __import__('torch')", ["torch"]),
        ("from portnet import graph, weights", ["portnet.graph", "portnet.weights"]),
        ("from portnet import AlexNet", ["portnet"]),
        ("from portnet.graph import Graph", ["portnet.graph"]),
        ("import portnet", ["portnet"]),
        ("from portnet_backends import cuda", ["portnet_backends.cuda"]),
        ("from . import graph", ["portnet.graph"]),
        ("from .graph import Graph", ["portnet.graph"]),
    ],
)
def test_imports_are_found(source, expected):
    assert [found.module for found in imports(source, "portnet")] == expected


def test_imports_of_a_package_within_the_core():
    found = imports("from . import a_name\nfrom ..graph import Graph\nfrom .. import graph", "portnet.report")
    assert [f.module for f in found] == ["portnet.report", "portnet.graph", "portnet.graph"]


def test_imports_for_types_are_told_apart():
    source = "if TYPE_CHECKING:\n    import torch\nelse:\n    import onnx\nimport numpy\ndef f():\n    import click\n"
    source += "if not TYPE_CHECKING:\n    import jinja2"
    assert [(f.module, f.typing, f.inside) for f in imports(source)] == [
        ("torch", True, False),
        ("onnx", False, False),
        ("numpy", False, False),
        ("click", False, True),
        ("jinja2", False, False),
    ]
