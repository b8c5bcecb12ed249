"""A fake device, registered with torch as a vendor's package would, with operators missing; run as a script.

Its memory is the host's and its kernels are torch's own, but torch sees a device ``fakedevice`` through every step. A
missing operator does what `at::native::cpu_fallback` does: moves its operands by ``aten::_to_cpu`` and works there.
Registration lasts as long as the process.
"""

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from portnet.contract import Settings
from portnet.graph import Conv, Dropout, Flatten, Graph, Linear, MaxPool, ReLU
from portnet_backends.accelerator import Accelerator
from portnet_backends.cpu import Cpu

NAME = "fakedevice"
MEMORY: dict[int, torch.Tensor] = {}
MISSING: set[str] = set()

GRAPH = Graph(
    preset="tiny",
    input=(3, 9, 9),
    layers=(
        Conv(name="conv1", in_channels=3, out_channels=4, kernel=3),
        ReLU(name="relu1"),
        MaxPool(name="pool1"),
        Flatten(name="flat"),
        Dropout(name="drop1", p=0.5),
        Linear(name="fc1", in_features=36, out_features=5),
    ),
)


class FakeAccelerator(Accelerator):
    def synchronize(self):
        """Its kernels return when their work is done; torch lets no device made in Python wait."""


class FakeTensor(torch.Tensor):
    @staticmethod
    def __new__(cls, host):
        with torch.inference_mode(False):  # torch counts the versions of views of parameters even there
            made = torch._C._acc.create_empty_tensor(host.shape, host.dtype)
        made.__class__ = cls
        # By storage, for torch makes further tensors of it in C++.
        MEMORY[made.untyped_storage()._cdata] = host
        return made


def is_fake(t):
    return t.device.type == NAME


def memory(t):
    return MEMORY[t.untyped_storage()._cdata] if is_fake(t) else t


def kernel(operator, *args, **kwargs):
    name = operator._schema.name.removeprefix("aten::")
    # torch makes tensors of plain numbers, and gives them to Python as numbers again.
    args = [
        torch.tensor(value) if isinstance(value, int | float) and str(wanted.type) == "Tensor" else value
        for value, wanted in zip(args, operator._schema.arguments, strict=False)
    ]
    back = []
    if name in MISSING:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        moved = dict(zip(map(id, given), torch.ops.aten._to_cpu(given), strict=True))
        # What the operator fills, as out=, goes back.
        back = [(memory(t), moved[id(t)]) for t in kwargs.values() if isinstance(t, torch.Tensor)]
        args, kwargs = tree_map_only(torch.Tensor, lambda t: moved[id(t)], (args, kwargs))
    else:
        args, kwargs = tree_map_only(torch.Tensor, memory, (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    result = tree_map_only(torch.Tensor, FakeTensor, operator(*args, **kwargs))
    for home, filled in back:
        home.copy_(filled)
    return result


def copy_from(source, target, non_blocking=False):
    memory(target).copy_(memory(source))
    return target


def convolution(*args):
    return kernel(torch.ops.aten.convolution.default, *args)


def convolution_backward(g, x, w, *args):
    return kernel(torch.ops.aten.convolution_backward.default, g, x, w, [w.shape[0]], *args)


def arange(*args, **kwargs):
    # torch's own grows an empty tensor, which a fake one cannot.
    return kernel(torch.ops.aten.arange.default, *args, **kwargs)


def main():
    _setup_privateuseone_for_python_backend(NAME)
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(kernel, "PrivateUse1")
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    aten.impl("arange", arange, "PrivateUse1")
    aten.impl("convolution_overrideable", convolution, "PrivateUse1")
    aten.impl("convolution_backward_overrideable", convolution_backward, "PrivateUse1")

    backend = FakeAccelerator()
    print(f"device: {backend.probe().name}")
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in GRAPH.parameters.items()}
    images = rng.standard_normal((4, *GRAPH.input), np.float32)
    labels = ids = np.arange(4)
    session = backend.open(GRAPH, weights, Settings())
    x, y, i = (session.put(array) for array in (images, labels, ids))
    expected = Cpu().open(GRAPH, weights, Settings()).trace(images).logits
    before = session.get(session.infer(x))
    print(f"all there: {session.fallbacks(lambda: session.infer(x))}")
    MISSING.update(("relu", "max_pool2d_with_indices", "convolution_backward"))
    print(f"inference: {session.fallbacks(lambda: session.infer(x))}")
    print(f"right: {all(np.allclose(logits, expected) for logits in (before, session.get(session.infer(x))))}")
    train = session.fallbacks(lambda: session.train_step(x, y, i, step=0, learning_rate=0.01))
    print(f"training: {train}")


if __name__ == "__main__":
    main()
