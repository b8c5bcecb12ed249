"""Two images side by side in a row: nothing but the order of sums may differ."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from portnet import alexnet, weights
from portnet.contract import Settings
from portnet.graph import LRN, Conv, Flatten, Graph, Linear, MaxPool, ReLU
from portnet_backends import torch_session
from portnet_backends.cpu import Cpu
from portnet_backends.torch_rows import Row, rows
from portnet_backends.torch_session import Network

GRAPH = Graph(
    preset="rows",
    input=(4, 13, 13),
    layers=(
        Conv(name="conv1", in_channels=4, out_channels=6, kernel=3, padding=1),
        ReLU(name="relu1"),
        Conv(name="conv2", in_channels=6, out_channels=8, kernel=5, padding=2, groups=2),
        ReLU(name="relu2"),
        MaxPool(name="pool"),
        Flatten(name="flatten"),
        Linear(name="fc", in_features=8 * 36, out_features=5),
    ),
)


def test_which_convolutions_share_rows():
    assert dict(rows(GRAPH)) == {"conv1": Row(last="relu2", width=13, gap=2)}
    for preset in ("paper2012", "caffe", "torchvision"):
        assert dict(rows(alexnet.graph(preset))) == {"conv3": Row(last="relu5", width=13, gap=1)}
    # Rows of 27 fill a tile by themselves.
    assert not dict(rows(alexnet.graph("torchvision", image_size=448)))


def results(*, in_rows, batch, layout=torch.contiguous_format, engine="regions"):
    torch.manual_seed(0)
    network = Network(GRAPH, engine=engine, in_rows=in_rows).double().to(memory_format=layout)
    x = torch.randn(batch, *GRAPH.input, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    record = {}
    y = network(x)
    found = torch.autograd.grad((y * torch.arange(1.0, 6.0)).sum(), [x, *network.parameters()])
    with torch.no_grad():
        network(x, record=record)
    return {"logits": y, **record} | {f"gradient {i}": g for i, g in enumerate(found)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [6, 3])
def test_rows_of_two_are_the_same_convolutions(batch, layout):
    shared, alone = (results(in_rows=in_rows, batch=batch, layout=layout) for in_rows in (True, False))
    assert shared.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_relu_behind_the_maxima_is_the_same(layout):
    behind, before = (results(in_rows=False, batch=3, layout=layout, engine=e) for e in ("regions", "eager"))
    for name, value in before.items():
        torch.testing.assert_close(behind[name], value, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_end_before_a_relu_that_is_left_to_the_next_layer():
    layers = [*GRAPH.layers[:4], LRN(name="norm", alpha=1e-4, k=2.0), *GRAPH.layers[4:]]
    network = Network(replace(GRAPH, layers=tuple(layers)), engine="regions", in_rows=True).double()
    network.norm = nn.Identity()
    shapes = []
    network.norm.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    network(torch.zeros(6, *GRAPH.input, dtype=torch.float64))
    assert shapes == [(6, 8, 13, 13)]


def test_two_images_lie_in_a_row_where_it_is_used():
    widths = []
    network = Network(GRAPH, engine="regions", in_rows=True).double()
    network.conv2.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[3]))
    for batch in (6, 3):
        network(torch.zeros(batch, *GRAPH.input, dtype=torch.float64))
    assert widths == [28, 13]


@pytest.mark.parametrize(
    ("precision", "sets", "in_rows"),
    [
        ("bfloat16", {"amx_tile", "amx_bf16"}, True),
        ("bfloat16", {"avx512_bf16"}, False),
        ("float16", {"amx_tile", "amx_bf16"}, False),
        ("float32", {"amx_tile", "amx_bf16"}, False),
    ],
)
def test_rows_are_for_tiles(precision, sets, in_rows, monkeypatch):
    monkeypatch.setattr(torch_session, "instruction_sets", lambda: sets)
    session = Cpu().open(GRAPH, weights.initial(GRAPH), Settings(precision=precision, engine="regions"))
    assert bool(session.module._rows) == in_rows
