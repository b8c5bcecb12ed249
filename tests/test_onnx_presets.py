"""Every preset at its full size, written to ONNX once: that one file, at any batch, is the network."""

import numpy as np
import onnx
import pytest

import portnet
from portnet import alexnet, cache, plugins
from portnet.contract import Settings
from portnet.parity import Case, channel_error
from portnet_backends import torch_own

DIFFERENT = 8
"""Images that differ. A larger batch takes them in turns, shuffled, which spares the float64 reference the most."""


@pytest.mark.parametrize("preset", ["paper2012", "caffe", "torchvision"])
def test_one_file_is_the_network_at_every_batch(preset, tmp_path):
    case = Case(alexnet.graph(preset), batch=DIFFERENT)
    expected = cache.expect_batch(case, "float32", train=False).logits
    net = portnet.AlexNet("cpu", preset, weights=case.weights)
    # Not verified, for what follows is that and more.
    path = net.export_onnx(tmp_path / "net.onnx", verify=False).path
    onnx.checker.check_model(path, full_check=True)
    assert list(tmp_path.iterdir()) == [path]
    # What torch.onnx.export makes of the same module shares nothing with the file but ONNX Runtime.
    traced = torch_own.freeze(net.module, case.images[:2]).export(1, dynamic=True).content

    runtime = plugins.backends()["onnxruntime-cpu"]
    one, other = (runtime.open_exported(content, {}, Settings()) for content in (path.read_bytes(), traced))
    for batch in (1, 7, 32):
        index = np.random.default_rng(batch).permutation(max(batch, DIFFERENT))[:batch] % DIFFERENT
        found, again = (s.get(s.infer(s.put(case.images[index]))) for s in (one, other))
        assert found.shape == (batch, 1000)
        assert channel_error(found, expected.exact[index]) <= expected.allowed
        assert channel_error(found, again) <= expected.allowed
