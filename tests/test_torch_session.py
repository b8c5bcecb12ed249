"""A graph on a torch device, here the processor: the module, its session, and what both leave untouched."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from portnet import alexnet
from portnet.contract import Settings, Unsupported
from portnet.graph import (
    LRN,
    AdaptiveAvgPool,
    Conv,
    Dropout,
    Flatten,
    Graph,
    Layer,
    Linear,
    MaxPool,
    Pad,
    Recipe,
    ReLU,
    SpatialLRN,
)
from portnet_backends import torch_layers, torch_modes, torch_norms, torch_session
from portnet_backends.cpu import Cpu
from portnet_backends.reference import Reference
from portnet_backends.torch_layers import BlockConv, MaskedDropout, UnfoldConv
from portnet_backends.torch_modes import fp32_precision
from portnet_backends.torch_norms import LocalResponseNorm, SpatialResponseNorm
from portnet_backends.torch_session import Network

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
GRAPH = Graph(
    preset="tiny",
    input=(3, 14, 14),
    layers=(
        Pad(name="pad", right=1, bottom=2),
        Conv(name="conv1", in_channels=3, out_channels=8, kernel=3, stride=2),
        ReLU(name="relu1"),
        LRN(name="norm1", alpha=0.5, k=2.0, groups=2),
        MaxPool(name="pool1"),
        Conv(name="conv2", in_channels=8, out_channels=6, kernel=3, padding=1, groups=2),
        ReLU(name="relu2"),
        AdaptiveAvgPool(name="avg", size=2),
        Flatten(name="flat"),
        Dropout(name="drop1", p=0.5),
        Linear(name="fc1", in_features=24, out_features=10),
        ReLU(name="relu3"),
        Dropout(name="drop2", p=0.3, inverted=True),
        Linear(name="fc2", in_features=10, out_features=5),
    ),
    recipe=Recipe(bias_rate=2.0, bias_decay=0.5),
)
IDS = np.array([7, 2**32 - 1, 0, 12])


def random_weights(graph=GRAPH, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.standard_normal(shape) * (0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5)).astype(np.float32)
        for name, shape in graph.parameters.items()
    }


def batch(seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((len(IDS), *GRAPH.input), np.float32) * 2, rng.integers(0, 5, len(IDS))


def session(precision="float32", formulation="portable", weights=None, seed=0, graph=GRAPH):
    settings = Settings(precision=precision, formulation=formulation, seed=seed)
    return Cpu().open(graph, weights or random_weights(graph), settings)


def train(s, steps=1, rate=0.1, first=0):
    images, labels = batch()
    put = [s.put(a) for a in (images, labels, IDS)]
    return [float(s.get(s.train_step(*put, step=first + i, learning_rate=rate))) for i in range(steps)]


def same(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


# Local response normalisation.

LRNS = pytest.mark.parametrize(
    "layer",
    [
        LRN(name="n", alpha=2.0, k=2.0),
        LRN(name="n", alpha=2.0, k=2.0, groups=2),
        LRN(name="n", alpha=1.0, k=1.0, size=3, beta=0.5, groups=4),
        LRN(name="n", alpha=1.0, k=1.0, size=4, groups=2),
        LRN(name="n", alpha=1.0, k=1.0, size=1),
    ],
    ids=["merged", "per tower", "four groups of another exponent", "even window", "one channel"],
)


def response(layer, channels=8, *, stock=False):
    return LocalResponseNorm(layer, channels, stock=stock).double()


def random_map(seed=0, shape=(2, 8, 3, 2)):
    x = torch.tensor(np.random.default_rng(seed).standard_normal(shape) * 2)
    return x.requires_grad_()


@LRNS
def test_lrn_gradient(layer):
    assert torch.autograd.gradcheck(response(layer), random_map())


@LRNS
def test_lrn_is_torchs_within_each_tower(layer):
    x = random_map()
    towers = x.chunk(layer.groups, dim=1)
    expected = torch.cat(
        [F.local_response_norm(t, layer.size, layer.alpha, layer.beta, layer.k) for t in towers], dim=1
    )
    g = random_map(seed=1).detach()
    (expected_gradient,) = torch.autograd.grad(expected, x, g, retain_graph=True)
    for stock in (False, True):
        y = response(layer, stock=stock)(x)
        (gradient,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


@LRNS
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("cached", "calls"), [(0, 5), (450, 3), (2**20, 1)])
def test_lrn_takes_some_images_at_a_time_in_either_layout(layer, layout, cached, calls, monkeypatch):
    """Of 5 images with 216 values each."""
    seen = []
    banded = torch_norms._banded
    monkeypatch.setattr(torch_norms, "_banded", lambda x, band: seen.append(len(x)) or banded(x, band))
    monkeypatch.setattr(torch_norms, "CACHED", cached)
    x = random_map(shape=(5, 8, 3, 9)).detach().contiguous(memory_format=layout).requires_grad_()
    g = random_map(seed=1, shape=x.shape).detach()
    y, expected = response(layer)(x), response(layer, stock=True)(x)
    assert y.is_contiguous(memory_format=layout)
    found, wanted = (torch.autograd.grad(z, x, g)[0] for z in (y, expected))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert (len(seen), sum(seen)) == (2 * calls, 10)


def test_lrn_of_no_image():
    assert response(LRN(name="n", alpha=2.0, k=2.0))(random_map(shape=(0, 8, 3, 9))).shape == (0, 8, 3, 9)


WITHIN = pytest.mark.parametrize(
    "layer", [SpatialLRN(name="n", alpha=2.0), SpatialLRN(name="n", alpha=1.0, k=2.0, size=3, beta=0.5)]
)


@WITHIN
def test_lrn_within_maps_and_its_gradient(layer):
    """Against the formula by a convolution with ones, of which autograd makes the gradient."""
    x, g = (random_map(seed, (2, 3, 7, 6)) for seed in (0, 1))
    assert torch.autograd.gradcheck(SpatialResponseNorm(layer, stock=False), x)
    around = F.conv2d(x**2, torch.ones(3, 1, layer.size, layer.size).double(), padding=layer.size // 2, groups=3)
    expected = x / (layer.k + layer.alpha / layer.size**2 * around) ** layer.beta
    (expected_gradient,) = torch.autograd.grad(expected, x, g.detach(), retain_graph=True)
    for how in ({"stock": False}, {"stock": True}, {"stock": False, "traced": True}):
        y = SpatialResponseNorm(layer, **how)(x)
        (gradient,) = torch.autograd.grad(y, x, g.detach())
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lrn_within_maps_squares_in_float32(dtype, traced):
    """300 squared is beyond float16."""
    x = torch.full((1, 1, 5, 5), 300.0, dtype=dtype, requires_grad=True)
    y = SpatialResponseNorm(SpatialLRN(name="n", alpha=1e-3), stock=False, traced=traced)(x)
    assert y.dtype == dtype
    assert y[0, 0, 2, 2].item() == pytest.approx(300 / (1 + 1e-3 * 300**2) ** 0.75, rel=2**-8)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.dtype == dtype
    assert torch.isfinite(gradient).all()


def test_lrn_within_maps_keeps_its_input_and_one_factor():
    x, kept = random_map(shape=(2, 3, 7, 6)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = SpatialResponseNorm(SpatialLRN(name="n", alpha=2.0), stock=False)(x)
    assert [t.numel() for t in kept] == [x.numel()] * 2
    assert x.data_ptr() in {t.data_ptr() for t in kept}
    assert y.data_ptr() not in {t.data_ptr() for t in kept}


def test_lrn_within_maps_refuses_a_second_derivative():
    x = random_map()
    y = SpatialResponseNorm(SpatialLRN(name="n", alpha=2.0), stock=False)(x)
    (gradient,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_towers_are_not_merged():
    """Only within two channels of the seam do the two differ."""
    x = random_map().detach()
    split, merged = (response(LRN(name="n", alpha=2.0, k=2.0, groups=groups))(x) for groups in (2, 1))
    differ = (split != merged).any(dim=3).any(dim=2).any(dim=0)
    assert differ.tolist() == [False, False, True, True, True, True, False, False]


def test_lrn_keeps_its_input_one_factor_and_the_band():
    x, module = random_map(), response(LRN(name="n", alpha=2.0, k=2.0, groups=2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    assert sorted(t.numel() for t in kept) == sorted([x.numel(), x.numel(), module.band.numel()])
    assert {x.data_ptr(), module.band.data_ptr()} < {t.data_ptr() for t in kept}
    assert y.data_ptr() not in {t.data_ptr() for t in kept}


def test_lrn_sums_squares_in_float32():
    """300 squared is beyond float16."""
    layer = LRN(name="n", alpha=1.0, k=1.0, size=1)
    module = LocalResponseNorm(layer, 1, stock=False)
    module.to(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.full((1, 1, 1, 1), 300.0, dtype=dtype, requires_grad=True)
        y = module(x)
        assert y.dtype == dtype
        wide = x.detach().double()
        torch.testing.assert_close(y.detach(), (wide * (1 + wide**2) ** -0.75).to(dtype))
        (gradient,) = torch.autograd.grad(y, x)
        assert gradient.dtype == dtype
        assert torch.isfinite(gradient).all()


def test_lrn_refuses_a_second_derivative():
    """Its backward pass keeps the factor, not how the factor came from the input, and would get it wrong."""
    x = random_map()
    y = response(LRN(name="n", alpha=2.0, k=2.0))(x)
    (gradient,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_lrn_moves_and_casts_with_its_module_but_is_no_state():
    module = LocalResponseNorm(LRN(name="n", alpha=2.0, k=2.0, groups=2), 8, stock=False)
    assert (module.band.dtype, module.double().band.dtype) == (torch.float64, torch.float64)
    assert module.float().band.dtype == torch.float32
    assert (list(module.state_dict()), list(module.parameters())) == ([], [])
    assert module.band.shape == (2, 4, 4)


# Convolution.


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        (11, 4, 0, (27, 27)),
        (11, 4, 2, (24, 25)),
        (3, 2, 0, (6, 7)),
        (2, 3, 1, (8, 9)),
        (4, 2, 1, (9, 4)),
        (1, 2, 0, (5, 6)),
    ],
)
def test_a_convolution_in_blocks_is_the_convolution(kernel, stride, padding, size, layout):
    arguments = (3, 5, kernel, stride, padding)
    plain, blocks = torch.nn.Conv2d(*arguments).double(), BlockConv(*arguments).double()
    blocks.load_state_dict(plain.state_dict())
    x = random_map(shape=(2, 3, *size)).detach().contiguous(memory_format=layout).requires_grad_()
    expected, y = (module.to(memory_format=layout)(x) for module in (plain, blocks))
    assert y.shape == expected.shape
    g = random_map(seed=1, shape=y.shape).detach()
    found, wanted = (
        torch.autograd.grad(z, [x, *module.parameters()], g) for z, module in ((y, blocks), (expected, plain))
    )
    for a, b in zip((y, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for right, bottom in ((stride, 0), (0, 2 * stride + 1)):
        blocks.beyond = (right, bottom)
        torch.testing.assert_close(blocks(x), plain(F.pad(x, (0, right, 0, bottom))), rtol=1e-12, atol=1e-13)


def test_in_regions_layers_do_what_others_leave_to_them():
    assert Network(GRAPH, engine="regions").conv1.beyond == (1, 2)
    for engine, formulation, joined in (
        ("regions", "portable", True),
        ("regions", "stock", False),
        ("eager", "portable", False),
    ):
        assert Network(GRAPH, formulation, engine).takes_pixels == joined


@pytest.mark.parametrize(
    ("formulation", "kind"), [("portable", BlockConv), ("stock", torch.nn.Conv2d), ("unfold", UnfoldConv)]
)
def test_the_portable_formulation_convolves_with_a_stride_in_blocks(formulation, kind):
    network = Network(GRAPH, formulation)
    assert type(network.conv1) is kind
    assert type(network.conv2) is (UnfoldConv if formulation == "unfold" else torch.nn.Conv2d)


CASES = [(11, 2, (0, 0)), (11, 0, (3, 2)), (12, 0, (0, 0)), (4, 1, (0, 1))]


@pytest.mark.parametrize(
    ("dtype", "kernel", "padding", "beyond"),
    [*((torch.bfloat16, *case) for case in CASES), (torch.float32, *CASES[0])],
)
def test_pixels_move_four_at_a_time(dtype, kernel, padding, beyond, monkeypatch):
    if dtype == torch.bfloat16:  # four of float32 are no word
        monkeypatch.setattr(torch_layers, "_compiled_blocks", None)
    torch.manual_seed(0)
    layer = BlockConv(3, 4, kernel, 4, padding).to(dtype, memory_format=torch.channels_last)
    layer.beyond = beyond
    x = torch.randn(2, 3, 26, 30)
    with torch.no_grad():
        expected = layer(x)
        layer.looped = True
        torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@needs_onednn
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("maker", "instructions", "dtype", "enabled", "by_onednn"),
    [
        ("Intel(R) Xeon(R)", "avx2", torch.float32, True, True),
        ("Intel(R) Xeon(R)", "avx2 avx512", torch.float32, True, False),
        ("AMD EPYC", "avx2 avx512", torch.float32, True, True),
        ("AMD EPYC", "", torch.float32, True, False),
        ("AMD EPYC", "avx2", torch.float64, True, False),
        ("AMD EPYC", "avx2", torch.float32, False, False),
    ],
)
def test_products_go_to_onednn_where_onemkl_is_slower(
    maker, instructions, dtype, enabled, by_onednn, training, monkeypatch
):
    monkeypatch.setattr(torch_layers, "processor", lambda: f"{maker} 1")
    monkeypatch.setattr(torch_layers, "_onemkl_is_slower", torch_layers._onemkl_is_slower.__wrapped__)
    for name in ("avx2", "avx512"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions.split())
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    layer = Network(GRAPH, engine="regions").fc1.to(dtype)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, layer.in_features, dtype=dtype, generator=random, requires_grad=training)
    g = torch.randn(3, layer.out_features, dtype=dtype, generator=random)
    operands = (x, layer.weight, layer.bias)
    wide = [t.detach().double().requires_grad_() for t in operands]
    expected = F.linear(*wide)
    with torch.set_grad_enabled(training), torch.profiler.profile() as seen:
        y = layer(x)
        gradients = torch.autograd.grad(y, operands, g) if training else ()
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, wide, g.double()), strict=training):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-5)
    called = [event.name for event in seen.events()].count("mkldnn::_linear_pointwise")
    assert called == by_onednn * (1 + training)


# Precision of float32 products.

# torch 2.8 has no such settings; what it has is tested with a fake.
MODERN = hasattr(torch.backends, "fp32_precision")
modern = pytest.mark.skipif(not MODERN, reason=f"torch {torch.__version__} has no fp32_precision")
HOLDERS = MODERN and {
    "cuda.matmul": torch.backends.cuda.matmul,
    "cudnn.conv": torch.backends.cudnn.conv,
    "mkldnn.matmul": torch.backends.mkldnn.matmul,
    "mkldnn.conv": torch.backends.mkldnn.conv,
}


def precisions():
    return {name: holder.fp32_precision for name, holder in HOLDERS.items()}


@pytest.fixture
def settings_of_torch():
    """Puts back what a test sets in torch for the whole process."""
    matmul = torch.get_float32_matmul_precision()
    before = precisions()
    yield
    torch.set_float32_matmul_precision(matmul)
    for name, holder in HOLDERS.items():
        holder.fp32_precision = before[name]
    assert precisions() == before


@modern
@pytest.mark.usefixtures("settings_of_torch")
@pytest.mark.parametrize("mode", ["ieee", "tf32"])
@pytest.mark.parametrize("outside", ["highest", "high", "medium"])
def test_the_guard_overrides_and_restores(mode, outside):
    torch.set_float32_matmul_precision(outside)
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    before = precisions()
    with fp32_precision(mode):
        assert precisions() == dict.fromkeys(HOLDERS, mode)
        with fp32_precision("ieee"):
            assert precisions() == dict.fromkeys(HOLDERS, "ieee")
        assert precisions() == dict.fromkeys(HOLDERS, mode)
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == outside


@modern
@pytest.mark.usefixtures("settings_of_torch")
def test_the_guard_restores_after_an_error():
    torch.set_float32_matmul_precision("medium")
    before = precisions()
    with pytest.raises(ZeroDivisionError), fp32_precision("ieee"):
        raise ZeroDivisionError
    assert precisions() == before


def test_the_guard_of_torch_2_8(monkeypatch):
    matmul, cudnn = SimpleNamespace(allow_tf32=False), SimpleNamespace(allow_tf32=True)
    fake = SimpleNamespace(backends=SimpleNamespace(cuda=SimpleNamespace(matmul=matmul), cudnn=cudnn))
    monkeypatch.setattr(torch_modes, "torch", fake)
    for mode, allowed in (("ieee", False), ("tf32", True)):
        with fp32_precision(mode):
            assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (False, True)


@modern
@pytest.mark.usefixtures("settings_of_torch")
def test_float32_means_float32_whatever_the_process_asks():
    """Seen from inside the forward and the backward pass of every layer."""
    torch.set_float32_matmul_precision("medium")
    before, seen = precisions(), []
    s = session()

    def spy(_module, _inputs, output):
        seen.append(precisions())
        if output.requires_grad:
            output.register_hook(lambda g: seen.append(precisions()))

    for layer in s.module.children():
        layer.register_forward_hook(spy)
    images, labels = batch()
    s.infer(s.put(images))
    s.trace(images)
    s.trace(images, labels, s.masks(IDS, step=0))
    train(s)
    assert len(seen) > 5 * len(GRAPH.layers)
    assert all(found == dict.fromkeys(HOLDERS, "ieee") for found in seen)
    assert precisions() == before


@modern
@pytest.mark.usefixtures("settings_of_torch")
@pytest.mark.parametrize(
    ("layout", "holder", "name"),
    [(torch.contiguous_format, torch, "matmul"), (torch.channels_last, F, "conv2d")],
)
def test_lrn_sums_in_float32_also_where_products_may_use_tf32(layout, holder, name, monkeypatch):
    x = random_map().detach().contiguous(memory_format=layout).requires_grad_()
    module, seen = response(LRN(name="n", alpha=2.0, k=2.0)), []

    def spied(function):
        def spy(*args, **kwargs):
            seen.append(precisions())
            return function(*args, **kwargs)

        return spy

    monkeypatch.setattr(holder, name, spied(getattr(holder, name)))
    with fp32_precision("tf32"):
        module(x).sum().backward()
    assert seen == 2 * [dict.fromkeys(HOLDERS, "ieee")]


# The session against the reference.


def assert_close(found, expected, rtol=1e-10):
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("formulation", ["portable", "stock"])
def test_float64_is_the_reference(formulation):
    weights, (images, labels) = random_weights(), batch()
    ours = session("float64", formulation, weights, seed=3)
    oracle = Reference().open(GRAPH, weights, Settings(precision="float64", seed=3))
    masks = oracle.masks(IDS, step=2)
    assert same(ours.masks(IDS, step=2), masks)
    plain, expected = ours.trace(images), oracle.trace(images)
    assert_close(plain.layers, expected.layers)
    assert (plain.loss, dict(plain.gradients)) == (None, {})
    np.testing.assert_array_equal(plain.logits, ours.get(ours.infer(ours.put(images))))
    trained, expected = ours.trace(images, labels, masks), oracle.trace(images, labels, masks)
    assert_close(trained.layers, expected.layers)
    assert_close(trained.gradients, expected.gradients)
    assert trained.loss == pytest.approx(expected.loss, rel=1e-12)
    np.testing.assert_array_equal(trained.logits, trained.layers["fc2"])
    for rate in (0.1, 0.01):  # a rate outside the velocity would show only after it has changed
        assert train(ours, 2, rate, first=5) == pytest.approx(train(oracle, 2, rate, first=5), rel=1e-12)
    assert_close(ours.weights(), oracle.weights())


def test_masks_of_another_step_seed_or_image():
    s = session(seed=1)
    first = s.masks(IDS, step=0)
    assert {name: mask.shape for name, mask in first.items()} == {"drop1": (4, 24), "drop2": (4, 10)}
    assert {mask.dtype for mask in first.values()} == {np.dtype(bool)}
    assert not same(first, s.masks(IDS, step=1))
    assert not same(first, session(seed=2).masks(IDS, step=0))
    assert not same(first, s.masks(IDS + 1, step=0))


def test_a_step_trains_with_its_own_masks():
    images, labels = batch()
    s = session("float64", seed=9)
    expected = s.trace(images, labels, s.masks(IDS, step=4)).loss
    other = s.trace(images, labels, s.masks(IDS, step=5)).loss
    assert train(s, first=4) == [pytest.approx(expected, rel=1e-14)]
    assert abs(expected - other) > 1e-6


def test_inference_masks_nothing_even_after_training():
    images, _ = batch()
    s = session()
    first = s.get(s.infer(s.put(images)))
    s.module.train()
    np.testing.assert_array_equal(s.get(s.infer(s.put(images))), first)
    train(s)
    changed = s.get(s.infer(s.put(images)))
    assert (changed != first).any()
    np.testing.assert_array_equal(s.trace(images).logits, changed)
    np.testing.assert_array_equal(s.trace(images, masks=s.masks(IDS, step=0)).logits, changed)


# Narrow precisions.


@pytest.mark.parametrize(
    ("precision", "formulation"),
    [
        ("float32", "portable"),
        ("float32", "stock"),
        ("bfloat16", "portable"),
        ("bfloat16", "stock"),
        ("float16", "portable"),
    ],
)
def test_inference_sees_what_training_changed(precision, formulation):
    """Narrow sessions keep casts of the weights between inferences, which an update must not leave stale."""
    images, _ = batch()
    s = session(precision, formulation)
    before = s.get(s.infer(s.put(images)))
    train(s, 2)
    after = s.get(s.infer(s.put(images)))
    fresh = session(precision, formulation, s.weights())
    np.testing.assert_array_equal(after, fresh.get(fresh.infer(fresh.put(images))))
    assert (after != before).any()
    assert after.dtype == np.float32


@pytest.mark.parametrize("formulation", ["portable", "stock"])
def test_masters_are_float32(formulation):
    s = session("bfloat16", formulation)
    train(s)
    assert {p.dtype for p in s.parameters.values()} == {v.dtype for v in s.velocity.values()} == {torch.float32}
    assert {w.dtype for w in s.weights().values()} == {np.dtype(np.float32)}
    trained = s.weights()["fc1.weight"]
    assert (torch.tensor(trained).bfloat16().float().numpy() != trained).mean() > 0.9


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("changed", [{}, {"momentum": 0.0}, {"frozen": ("conv2",)}], ids=str)
def test_the_update_in_one_pass_is_that_in_four(changed, precision, channels_last):
    """To the rounding of float32, with decay that counts, and with another rate on the way."""
    recipe = Recipe(bias_rate=2.0, bias_decay=0.5, weight_decay=0.1, **changed)
    settings = Settings(precision=precision, channels_last=channels_last)
    one, four = (Cpu().open(replace(GRAPH, recipe=recipe), random_weights(GRAPH), settings) for _ in range(2))
    assert one._at_once
    four._at_once = False
    for first, rate in enumerate((0.1, 0.1, 0.01)):
        # From the same state, for what rounds differently once may round to the other side in bfloat16 later.
        if first:
            one.restore(four.state())
        for s in (one, four):
            train(s, rate=rate, first=first)
        for name, value in four.state().items():
            error = np.linalg.norm(one.state()[name] - value)
            assert error <= 1e-6 * np.linalg.norm(value), name


def test_the_update_in_one_pass_takes_gradients_in_any_layout():
    """torch's fused operators go through memory, and are wrong without a word where layouts differ."""
    s = Cpu().open(GRAPH, random_weights(GRAPH), Settings(channels_last=True))
    s._start_training()
    before = {name: p.detach().clone() for name, p in s.parameters.items()}
    gradients = {name: torch.randn(p.shape) for name, p in before.items()}
    assert gradients["conv1.weight"].stride() != before["conv1.weight"].stride()
    s.use(replace(s.recipe, bias_rate=1.0, weight_decay=0.0))
    with torch.no_grad():
        s._update(s.parameters, s.velocity, {name: g.clone() for name, g in gradients.items()}, torch.tensor(1.0), {})
    for name, p in s.parameters.items():
        torch.testing.assert_close(p.detach(), before[name] - gradients[name])


def test_tiny_updates_in_bfloat16_add_up():
    graph = Graph(
        preset="tiny",
        input=(1,),
        layers=(Linear(name="fc", in_features=1, out_features=2),),
        recipe=Recipe(momentum=0.0, weight_decay=0.0),
    )
    ones = {"fc.weight": np.ones((2, 1), np.float32), "fc.bias": np.zeros(2, np.float32)}
    s = session("bfloat16", weights=ones, graph=graph)
    put = [s.put(a) for a in (np.ones((1, 1), np.float32), np.array([0]), np.array([0]))]
    for step in range(64):
        s.train_step(*put, step=step, learning_rate=2.0**-12)
    # Each moves by 2^-13; bfloat16 knows nothing between 1 and 1 + 2^-7.
    assert s.weights()["fc.weight"][0, 0] == pytest.approx(1 + 2.0**-7, rel=1e-3)


def test_operands_are_narrow_and_layers_are_stored_so():
    s, images = session("bfloat16"), batch()[0]
    assert s.infer(s.put(images)).dtype == torch.bfloat16
    for name, value in s.trace(images).layers.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(torch.tensor(value).bfloat16().float().numpy(), value, err_msg=name)


@pytest.mark.parametrize(
    ("precision", "formulation"), [("bfloat16", "portable"), ("bfloat16", "stock"), ("float16", "portable")]
)
def test_narrow_precisions_err_as_they_should(precision, formulation):
    images, labels = batch()
    masks = session().masks(IDS, step=0)
    exact = session("float64").trace(images, labels, masks)
    narrow = session(precision, formulation).trace(images, labels, masks)
    unit = 2.0**-8 if precision == "bfloat16" else 2.0**-11
    for name, value in [("logits", exact.logits), *exact.gradients.items()]:
        found = narrow.logits if name == "logits" else narrow.gradients[name]
        # Less would mean that it is not narrow at all.
        assert 0.05 * unit < np.linalg.norm(found - value) / np.linalg.norm(value) < 64 * unit, name


def test_float16_and_the_stock_lrn():
    with pytest.raises(Unsupported, match=r"float16.*portable formulation"):
        session("float16", "stock")
    within = Graph(preset="tiny", input=(3, 5, 5), layers=(SpatialLRN(name="n", alpha=1.0),))
    with pytest.raises(Unsupported, match=r"float16.*portable formulation"):
        session("float16", "stock", graph=within)
    plain = Graph(preset="tiny", input=(24,), layers=GRAPH.layers[10:])
    assert session("float16", "stock", graph=plain).infer(torch.ones(1, 24)).shape == (1, 5)


def test_the_scale_of_the_loss_in_float16():
    """It doubles at each step until gradients overflow; that step is none, and halves it; then it stays for long."""
    s = session("float16")
    for scale in (2.0, 4.0, 8.0):
        train(s)
        assert s.loss_scale.tolist() == [scale, 0.0, 1.0]
    before = s.state()
    images, labels = (s.put(a) for a in batch())
    s.train_step(images * 1e4, labels, s.put(IDS), step=3, learning_rate=0.1)
    assert s.loss_scale.tolist() == [4.0, 0.0, torch_session.GROWTH]
    after = s.state()
    assert same({k: v for k, v in before.items() if k != torch_session.LOSS_SCALE}, after)
    train(s, first=4)
    assert s.loss_scale.tolist() == [4.0, 1.0, torch_session.GROWTH]
    assert not same(after, s.weights() | {k: v for k, v in after.items() if k.startswith(torch_session.VELOCITY)})
    s.loss_scale[1] = torch_session.GROWTH - 1
    train(s, first=5)
    assert s.loss_scale.tolist() == [8.0, 0.0, torch_session.GROWTH]


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_do_not_depend_on_the_scale_of_the_loss(scale):
    images, labels = batch()
    s, exact = session("float16"), session("float64")
    s.loss_scale[0] = scale
    found, expected = (one.trace(images, labels, one.masks(IDS, step=0)).gradients for one in (s, exact))
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) <= 2**-7 * np.linalg.norm(value), name


def test_what_the_processor_refuses():
    with pytest.raises(Unsupported, match="'tf32'"):
        session("tf32")
    with pytest.raises(Unsupported, match="formulation 'tuned'; it offers portable, stock"):
        session(formulation="tuned")


# What belongs to whom.


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_nothing_is_shared_with_the_caller(precision):
    weights = random_weights()
    kept = {name: value.copy() for name, value in weights.items()}
    s = session(precision, weights=weights)
    images, labels = batch()
    for array in (images, labels, IDS, np.array([True, False])):
        put = s.put(array)
        assert put.numpy().dtype == array.dtype
        assert tuple(put.shape) == array.shape
        assert not np.shares_memory(put.numpy(), array)
        got = s.get(put)
        np.testing.assert_array_equal(got, array)
        assert not np.shares_memory(got, put.numpy())
    before = s.weights()
    s.weights()["fc1.weight"][:] = 99
    assert same(s.weights(), before)
    train(s)
    assert same(before, kept)
    assert same(weights, kept)
    assert not same(s.weights(), kept)
    # Masks and traces are the caller's own, too.
    s.masks(IDS, step=0)["drop1"][:] = True
    assert not s.masks(IDS, step=0)["drop1"].all()


def test_read_only_arrays_will_do():
    weights, (images, _) = random_weights(), batch()
    for array in (*weights.values(), images):
        array.flags.writeable = False
    s = session(weights=weights)
    s.infer(s.put(images))
    train(s)


def test_sessions_are_independent():
    images, _ = batch()
    weights = random_weights()
    one, other = session(weights=weights), session(weights=weights)
    first = other.get(other.infer(other.put(images)))
    train(one, 3)
    assert same(other.weights(), weights)
    np.testing.assert_array_equal(other.get(other.infer(other.put(images))), first)
    train(other, 3)
    assert same(one.weights(), other.weights())
    alone = session(weights=weights)
    train(alone, 3)
    assert same(alone.weights(), one.weights())


def test_torchs_generator_stays_where_it_was():
    state = torch.get_rng_state()
    s = session()
    train(s, 2)
    s.infer(s.put(batch()[0]))
    s.trace(*batch(), s.masks(IDS, step=0))
    assert torch.equal(torch.get_rng_state(), state)


def test_torchs_defaults_do_not_matter():
    images, _ = batch()
    expected = session("float32").trace(images).logits
    torch.set_default_dtype(torch.float64)
    try:
        found = session("float32").trace(images).logits
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(found, expected)


def test_no_graph_is_kept():
    s, (images, labels) = session(), batch()
    put = [s.put(a) for a in (images, labels, IDS)]
    assert not s.train_step(*put, step=0, learning_rate=0.1).requires_grad
    assert not s.infer(put[0]).requires_grad
    assert all(p.grad is None and p.requires_grad for p in s.parameters.values())


# The module by itself.


def test_the_module_is_a_plain_module():
    images = torch.tensor(batch()[0])
    s = session()
    network = Network(GRAPH)
    assert isinstance(network, torch.nn.Module)
    assert list(network.state_dict()) == list(GRAPH.parameters)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == dict(GRAPH.parameters)
    assert list(s.module.state_dict()) == list(GRAPH.parameters)
    network.load_state_dict(s.module.state_dict())
    network.float().eval()
    with torch.no_grad():
        torch.testing.assert_close(network(images), s.module.eval()(images), rtol=0, atol=0)
    np.testing.assert_array_equal(network(images).detach().numpy(), s.get(s.infer(images)))


def test_the_module_trains_with_torchs_own_tools():
    images, labels = (torch.tensor(a) for a in batch())
    network = Network(GRAPH).float()
    network.load_state_dict({k: torch.tensor(v) for k, v in random_weights().items()})
    network.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(network(images), network(images))  # its dropout draws from torch's generator
        sgd = torch.optim.SGD(network.parameters(), lr=0.1)
        before = F.cross_entropy(network.eval()(images), labels).item()
        network.train()
        for _ in range(30):
            sgd.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            sgd.step()
    network.eval()
    assert F.cross_entropy(network(images), labels).item() < 0.8 * before
    torch.testing.assert_close(network(images), network(images), rtol=0, atol=0)


def test_the_module_takes_masks_and_records():
    images, s = torch.tensor(batch()[0]), session()
    masks = {name: torch.tensor(mask) for name, mask in s.masks(IDS, step=0).items()}
    record = {}
    logits = s.module.train()(images, masks, record)
    assert list(record) == [layer.name for layer in GRAPH.layers]
    assert record["fc2"] is logits
    # Exactly what was masked is zero, and only the inverted dropout scales.
    assert torch.equal(record["drop1"], record["flat"] * masks["drop1"])
    torch.testing.assert_close(record["drop2"], record["relu3"] * masks["drop2"] / 0.7)


@pytest.mark.parametrize("inverted", [False, True])
def test_dropout_alone(inverted):
    drop = MaskedDropout(Dropout(name="d", p=0.2, inverted=inverted))
    x = torch.ones(100_000)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        y = drop.train()(x)
    assert set(y.unique().tolist()) == {0.0, 1.25 if inverted else 1.0}
    assert (y != 0).float().mean().item() == pytest.approx(0.8, abs=0.01)
    torch.testing.assert_close(drop.eval()(x), x if inverted else 0.8 * x)


@pytest.mark.parametrize("preset", sorted(alexnet.PRESETS))
def test_presets_have_the_graphs_names(preset):
    graph = alexnet.graph(preset)
    with torch.device("meta"):
        network = Network(graph)
    assert {k: tuple(v.shape) for k, v in network.state_dict().items()} == dict(graph.parameters)


def test_a_layer_it_does_not_know():
    class Unknown(Layer):
        pass

    graph = Graph(preset="tiny", input=(1,), layers=(Unknown(name="x"),))
    with pytest.raises(TypeError, match="no layer Unknown"):
        Network(graph)


def test_some_of_the_weights_tell_that_an_update_is_done():
    s = session()
    before = s.get(s.latest_weights())
    assert len(before) == len(s.parameters)
    train(s)
    after = s.get(s.latest_weights())
    last = [p.reshape(-1)[-1] for p in s.weights().values()]
    np.testing.assert_array_equal(after, last)
    assert (before != after).any()


def test_a_session_that_infers_holds_no_velocity():
    s = session()
    s.infer(s.put(batch()[0]))
    assert not s.velocity
    train(s)
    assert s.velocity.keys() == s.parameters.keys()
