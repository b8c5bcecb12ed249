"""The public names, and what importing them costs."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import portnet

NAMES = ["AlexNet", "Model", "OnnxFileError", "PortNetError", "__version__", "backends", "export_onnx", "graph"]
NAMES += ["load_data", "measure", "open_onnx", "preprocess", "quantize"]
HEAVY = ["torch", "onnx", "onnxruntime", "click", "rich", "PIL", "matplotlib", "jinja2", "safetensors"]


def loaded(script):
    """Which of `HEAVY` a fresh interpreter has loaded after `script`."""
    script = f"import sys; {script}; print(*[name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()[-1].split()


def test_the_public_names():
    assert portnet.__all__ == NAMES
    assert dir(portnet) == NAMES
    for name in NAMES:
        assert getattr(portnet, name) is not None


def test_a_star_import_gives_them():
    found = {}
    exec("from portnet import *", found)
    assert set(NAMES) <= found.keys()


def test_each_is_what_it_says():
    import portnet.errors
    import portnet.images
    import portnet.model
    import portnet.module_export
    import portnet.own_model
    import portnet.plan
    import portnet.quantization
    import portnet.shards

    assert portnet.AlexNet is portnet.model.AlexNet
    assert portnet.Model is portnet.own_model.Model
    assert portnet.OnnxFileError is portnet.errors.OnnxFileError
    assert portnet.PortNetError is portnet.errors.PortNetError
    assert portnet.export_onnx is portnet.module_export.export_onnx
    assert portnet.load_data is portnet.shards.load
    assert portnet.measure is portnet.plan.measure
    assert portnet.open_onnx is portnet.model.open_onnx
    assert portnet.preprocess is portnet.images.preprocess
    assert portnet.quantize is portnet.quantization.quantize


def test_what_is_not_there():
    with pytest.raises(AttributeError, match="module 'portnet' has no attribute 'ResNet'"):
        portnet.ResNet  # noqa: B018
    assert not hasattr(portnet, "ResNet")


def test_one_version():
    assert portnet.__version__ == metadata.version("portnet")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert portnet.__version__ == project["version"]


def test_every_error_of_portnets_is_one():
    import portnet.conformance
    import portnet.errors
    import portnet.training

    errors = [e for e in vars(portnet.errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert errors
    for error in [*errors, portnet.training.Diverged, portnet.conformance.ConformanceError]:
        assert issubclass(error, portnet.PortNetError)
        assert error.__doc__


@pytest.mark.parametrize(
    "script",
    [
        "import portnet",
        "import portnet; portnet.backends()",
        "import portnet; portnet.graph().summary()",
        "import portnet; portnet.load_data('digits')",
        "from portnet import AlexNet, Model, PortNetError",
    ],
)
def test_what_needs_no_framework_loads_none(script):
    assert loaded(script) == []


def test_help_loads_only_the_command_line():
    assert loaded("import portnet.cli") == ["click"]
    script = "import portnet.cli; portnet.cli.main(['train', '--help'], standalone_mode=False)"
    assert loaded(script) == ["click"]


def test_a_network_without_torch_needs_none():
    script = (
        "import portnet; portnet.AlexNet('reference', 'caffe', image_size=67, weights=__import__('portnet.weights')"
    )
    script += ".weights.parity(portnet.graph('caffe', image_size=67)))"
    assert "torch" not in loaded(script)
