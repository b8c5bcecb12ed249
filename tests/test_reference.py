"""The oracle: its gradients against finite differences, its outputs against torch in float64, its updates by hand."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from portnet import clock
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
from portnet.parity import Resolve
from portnet_backends.cpu import Cpu
from portnet_backends.reference import Reference, round_bfloat16, round_float16, truncate_tf32

CLASSES = 3


def network(*middle, shape=(2, 6, 6), channels=4, kernel=2, recipe=None):
    """A convolution, so that what follows owes its input's gradient; `middle`; and a product into three classes."""
    layers = [Conv(name="conv", in_channels=shape[0], out_channels=channels, kernel=kernel), *middle]
    after = shape
    for layer in layers:
        after = layer.output(after)
    if len(after) == 3:
        layers.append(Flatten(name="flat"))
        after = layers[-1].output(after)
    layers.append(Linear(name="fc", in_features=after[0], out_features=CLASSES))
    return Graph(preset="tiny", input=shape, layers=tuple(layers), recipe=recipe or Recipe())


def random_weights(graph, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in graph.parameters.items()}


def batch(graph, count=2, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, *graph.input), np.float32), rng.integers(0, CLASSES, count)


def session(graph, weights=None, precision="float64", seed=0):
    return Reference().open(graph, weights or random_weights(graph), Settings(precision=precision, seed=seed))


def chain(*layers, shape):
    return Graph(preset="tiny", input=shape, layers=layers)


MIDDLES = {
    "convolution": [Conv(name="x", in_channels=4, out_channels=2, kernel=3)],
    "convolution 1x1": [Conv(name="x", in_channels=4, out_channels=2, kernel=1)],
    "padded": [Conv(name="x", in_channels=4, out_channels=2, kernel=3, padding=2)],
    "strided, one row left over": [Conv(name="x", in_channels=4, out_channels=2, kernel=2, stride=2)],
    "strided past its kernel": [Conv(name="x", in_channels=4, out_channels=2, kernel=1, stride=2)],
    "grouped": [Conv(name="x", in_channels=4, out_channels=6, kernel=2, groups=2)],
    "strided, padded and grouped": [
        Conv(name="x", in_channels=4, out_channels=2, kernel=3, stride=2, padding=1, groups=2)
    ],
    "relu": [ReLU(name="x")],
    "lrn over all channels": [LRN(name="x", alpha=2.0, k=1.0)],
    "lrn per tower": [LRN(name="x", alpha=2.0, k=2.0, groups=2)],
    "lrn of another exponent and window": [LRN(name="x", alpha=1.0, k=1.0, size=3, beta=0.5)],
    "lrn of one channel": [LRN(name="x", alpha=1.0, k=1.0, size=1)],
    "lrn over an even window": [LRN(name="x", alpha=2.0, k=1.0, size=4)],
    "lrn over an even window per tower": [LRN(name="x", alpha=2.0, k=1.0, size=2, groups=2)],
    "lrn within maps": [SpatialLRN(name="x", alpha=2.0)],
    "lrn within maps of another exponent and window": [SpatialLRN(name="x", alpha=1.0, k=2.0, size=3, beta=0.5)],
    "lrn of one position": [SpatialLRN(name="x", alpha=1.0, size=1)],
    "lrn within maps smaller than its neighbourhood": [SpatialLRN(name="x", alpha=2.0, size=13)],
    "pool, overlapping and exact": [MaxPool(name="x", kernel=3, stride=2)],
    "pool, one row left over": [MaxPool(name="x", kernel=2, stride=2)],
    "pool, dense": [MaxPool(name="x", kernel=2, stride=1)],
    "pool, strided past its kernel": [MaxPool(name="x", kernel=1, stride=3)],
    "adaptive pool down": [AdaptiveAvgPool(name="x", size=3)],
    "adaptive pool evenly": [AdaptiveAvgPool(name="x", size=5)],
    "adaptive pool up": [AdaptiveAvgPool(name="x", size=7)],
    "pad": [Pad(name="x", right=2, bottom=1), Conv(name="y", in_channels=4, out_channels=2, kernel=3, padding=1)],
    "product": [Flatten(name="x"), Linear(name="y", in_features=100, out_features=3)],
    "dropout": [Flatten(name="x"), Dropout(name="drop", p=0.4)],
    "inverted dropout": [Flatten(name="x"), Dropout(name="drop", p=0.4, inverted=True)],
    "two dropouts": [
        Flatten(name="x"),
        Dropout(name="drop"),
        Linear(name="y", in_features=100, out_features=4),
        ReLU(name="z"),
        Dropout(name="drop2", p=0.25, inverted=True),
    ],
    "as AlexNet starts": [
        ReLU(name="x"),
        LRN(name="norm", alpha=0.5, k=2.0, groups=2),
        MaxPool(name="pool"),
        Conv(name="y", in_channels=4, out_channels=4, kernel=3, padding=1, groups=2),
        ReLU(name="z"),
    ],
    "as the released code ends a layer": [
        LRN(name="norm", alpha=0.5, k=2.0, groups=2),
        SpatialLRN(name="mapnorm", alpha=1.0),
        MaxPool(name="pool"),
        ReLU(name="z"),
    ],
}


@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
def test_gradients_by_finite_differences(middle):
    graph = network(*middle)
    images, labels = batch(graph)
    s = session(graph)
    masks = s.masks(np.array([5, 9]), step=3)
    gradients = s.trace(images, labels, masks).gradients
    assert list(gradients) == list(graph.parameters)
    rng, h = np.random.default_rng(7), 1e-5
    for name, value in s.parameters.items():
        assert gradients[name].shape == value.shape
        flat, gradient = value.reshape(-1), gradients[name].reshape(-1)
        # All of a small parameter and a sample of a large one.
        for i in rng.permutation(flat.size)[:40]:
            was = flat[i]
            flat[i] = was + h
            above = s.trace(images, labels, masks).loss
            flat[i] = was - h
            below = s.trace(images, labels, masks).loss
            flat[i] = was
            assert gradient[i] == pytest.approx((above - below) / (2 * h), rel=1e-6, abs=1e-9), (name, i)


def by_torch(layer: Layer, x, parameters):
    match layer:
        case Pad():
            return F.pad(x, (0, layer.right, 0, layer.bottom))
        case Conv():
            return F.conv2d(x, *parameters, stride=layer.stride, padding=layer.padding, groups=layer.groups)
        case Linear():
            return F.linear(x, *parameters)
        case ReLU():
            return F.relu(x)
        case LRN():
            towers = x.chunk(layer.groups, dim=1)
            return torch.cat(
                [F.local_response_norm(t, layer.size, layer.alpha, layer.beta, layer.k) for t in towers], 1
            )
        case SpatialLRN():
            # As a convolution of every map with ones.
            ones = torch.ones(x.shape[1], 1, layer.size, layer.size, dtype=x.dtype)
            around = F.conv2d(x**2, ones, padding=layer.size // 2, groups=x.shape[1])
            return x / (layer.k + layer.alpha / layer.size**2 * around) ** layer.beta
        case MaxPool():
            return F.max_pool2d(x, layer.kernel, layer.stride)
        case AdaptiveAvgPool():
            return F.adaptive_avg_pool2d(x, layer.size)
        case Flatten():
            return x.flatten(1)
        case Dropout():
            return x if layer.inverted else x * (1 - layer.p)


@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
@pytest.mark.parametrize("shape", [(2, 6, 6), (2, 9, 7)])
def test_every_layer_against_torch(middle, shape):
    if any(isinstance(layer, Linear) for layer in middle) and shape != (2, 6, 6):
        middle = middle[:1]
    graph = network(*middle, shape=shape)
    images, _ = batch(graph)
    s = session(graph)
    x = torch.tensor(images, dtype=torch.float64)
    trace = s.trace(images)
    assert list(trace.layers) == [layer.name for layer in graph.layers]
    for layer in graph.layers:
        x = by_torch(layer, x, [torch.tensor(s.parameters[f"{layer.name}.{k}"]) for k in layer.parameters()])
        np.testing.assert_allclose(trace.layers[layer.name], x.numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(trace.logits, trace.layers["fc"])
    np.testing.assert_array_equal(s.infer(images), trace.logits)


@pytest.mark.parametrize("size", [1, 3, 5])
def test_normalisation_within_maps_by_its_definition(size):
    layer = SpatialLRN(name="norm", alpha=0.7, size=size, beta=0.6, k=1.5)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 6)) * 3
    n, c, h, w = x.shape
    expected = np.empty_like(x)
    for i, j, a, b in np.ndindex(n, c, h, w):
        total = 0.0
        for row in range(a - size // 2, a + size // 2 + 1):
            for column in range(b - size // 2, b + size // 2 + 1):
                if 0 <= row < h and 0 <= column < w:
                    total += x[i, j, row, column] ** 2
        expected[i, j, a, b] = x[i, j, a, b] / (1.5 + 0.7 / size**2 * total) ** 0.6
    found = session(chain(layer, shape=(c, h, w))).infer(x)
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_loss_and_gradient_of_the_logits():
    graph = network()
    images, labels = batch(graph, count=5)
    trace = session(graph).trace(images, labels, {})
    logits = torch.tensor(trace.logits, requires_grad=True)
    loss = F.cross_entropy(logits, torch.tensor(labels))
    assert trace.loss == pytest.approx(loss.item(), rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(trace.gradients["fc.bias"], gradient.sum(0).numpy(), rtol=1e-12, atol=1e-15)


def test_loss_of_huge_logits_is_finite():
    graph = chain(Linear(name="fc", in_features=1, out_features=2), shape=(1,))
    s = session(graph, {"fc.weight": np.array([[1.0], [-1.0]]), "fc.bias": np.zeros(2)})
    trace = s.trace(np.array([[1e4]]), np.array([1]), {})
    assert trace.loss == 2e4
    assert trace.gradients["fc.bias"].tolist() == [1, -1]


# Dropout.


def test_masks_are_those_of_the_seed_ids_and_step():
    graph = network(Flatten(name="x"), Dropout(name="one"), Dropout(name="two", p=0.25))
    ids = np.array([4, 2**32 - 1])

    def masks(seed=0, ids=ids, step=0):
        return session(graph, seed=seed).masks(ids, step=step)

    first = masks()
    assert {name: mask.shape for name, mask in first.items()} == {"one": (2, 100), "two": (2, 100)}
    for other in (masks(seed=1), masks(ids=ids - 1), masks(step=1)):
        assert not (first["one"] == other["one"]).all(axis=1).any()
    np.testing.assert_array_equal(masks(ids=ids[::-1])["two"], first["two"][::-1])
    # Each layer draws from a stream of its own.
    twins = session(network(Flatten(name="x"), Dropout(name="one"), Dropout(name="two"))).masks(ids, step=0)
    np.testing.assert_array_equal(twins["one"], first["one"])
    assert not (twins["one"] == twins["two"]).all(axis=1).any()


def test_without_labels_no_mask_is_used():
    graph = network(Flatten(name="x"), Dropout(name="drop"))
    images, _ = batch(graph)
    s = session(graph)
    np.testing.assert_array_equal(s.trace(images, masks=s.masks(np.arange(2), step=0)).logits, s.trace(images).logits)


@pytest.mark.parametrize("inverted", [False, True])
def test_dropout_masks_in_training_only(inverted):
    graph = chain(
        Dropout(name="drop", p=0.2, inverted=inverted), Linear(name="fc", in_features=4, out_features=2), shape=(4,)
    )
    s = session(graph)
    images, mask = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[True, False, True, False]])
    trained = s.trace(images, np.array([0]), {"drop": mask}).layers["drop"]
    np.testing.assert_allclose(trained, [[1.25, 0, 3.75, 0] if inverted else [1, 0, 3, 0]])
    tested = s.trace(images).layers["drop"]
    np.testing.assert_allclose(tested, images if inverted else 0.8 * images)


def test_a_step_trains_with_its_own_masks():
    graph = network(Flatten(name="x"), Dropout(name="drop"))
    images, labels = batch(graph)
    ids = np.array([11, 3])
    for step in (0, 5):
        s = session(graph)
        expected = s.trace(images, labels, s.masks(ids, step=step)).loss
        assert float(s.train_step(images, labels, ids, step=step, learning_rate=0.1)) == expected


# Pooling.


def codes(layer, shape=(1, 5, 5)):
    """Which input position each window of a constant map takes, told by the gradient.

    Channel 0 is constant and has weight 1; channel 1 holds the position's number and has weight 0, so every window is
    a tie and the gradient of the weight on channel 1 sums the winners' numbers.
    """
    conv = Conv(name="conv", in_channels=2, out_channels=1, kernel=1)
    after = layer.output(shape)
    graph = chain(
        conv,
        layer,
        Flatten(name="flat"),
        Linear(name="fc", in_features=math.prod(after), out_features=2),
        shape=(2, *shape[1:]),
    )
    numbers = np.arange(math.prod(shape[1:]), dtype=np.float64).reshape(shape[1:])
    images = np.stack([np.ones(shape[1:]), numbers])[None]
    found = []
    for window in range(math.prod(after)):
        weight = np.zeros((2, math.prod(after)))
        weight[0, window] = 1  # only this window reaches the loss
        s = session(
            graph,
            {
                "conv.weight": np.array([1.0, 0.0]).reshape(1, 2, 1, 1),
                "conv.bias": np.zeros(1),
                "fc.weight": weight,
                "fc.bias": np.zeros(2),
            },
        )
        gradient = s.trace(images, np.array([0]), {}).gradients["conv.weight"][0, :, 0, 0]
        found.append(round(gradient[1] / gradient[0]))
    return found


def test_ties_go_to_the_first_position():
    assert codes(MaxPool(name="pool", kernel=3, stride=2)) == [0, 2, 10, 12]
    assert codes(MaxPool(name="pool", kernel=2, stride=2)) == [0, 2, 10, 12]
    assert codes(MaxPool(name="pool", kernel=2, stride=3)) == [0, 3, 15, 18]


def test_ties_as_torch_breaks_them():
    """Small integers tie often, and differently in every window."""
    graph = network(MaxPool(name="pool"), shape=(2, 7, 7), kernel=1)
    images, labels = batch(graph)
    images = np.random.default_rng(0).integers(0, 2, images.shape).astype(np.float32)
    weights = random_weights(graph)
    # Whole weights keep ties exact in both.
    weights["conv.weight"], weights["conv.bias"] = np.sign(weights["conv.weight"]), weights["conv.bias"] * 0
    ours = session(graph, weights).trace(images, labels, {}).gradients
    tensors = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in weights.items()}
    x = F.conv2d(torch.tensor(images, dtype=torch.float64), tensors["conv.weight"], tensors["conv.bias"])
    logits = F.linear(F.max_pool2d(x, 3, 2).flatten(1), tensors["fc.weight"], tensors["fc.bias"])
    F.cross_entropy(logits, torch.tensor(labels)).backward()
    for name, value in ours.items():
        np.testing.assert_allclose(value, tensors[name].grad.numpy(), rtol=1e-12, atol=1e-15)


# Contests too close to call.


def relu_gradient(x, resolve):
    """The gradient at a ReLU of each of `x`, where its outputs' gradients are all alike."""
    n = len(x)
    graph = chain(
        Linear(name="before", in_features=1, out_features=n),
        ReLU(name="relu"),
        Linear(name="fc", in_features=n, out_features=2),
        shape=(1,),
    )
    weights = {
        "before.weight": np.zeros((n, 1)),
        "before.bias": np.array(x),
        "fc.weight": np.stack([np.ones(n), np.zeros(n)]),
        "fc.bias": np.zeros(2),
    }
    s = session(graph, weights)
    s.resolve = resolve
    gradient = s.trace(np.ones((1, 1)), np.array([0]), {}).gradients["before.bias"]
    return (gradient != 0).tolist()


def test_relus_within_rounding_open_or_close():
    rms = math.sqrt((1 + 1) / 6)
    close = 16 * 1e-3 * rms
    x = [0.9 * close, -0.9 * close, 1.1 * close, -1.1 * close, 1.0, -1.0]
    rms = math.sqrt(sum(v * v for v in x) / 6)
    assert abs(16 * 1e-3 * rms / close - 1) < 1e-2
    assert relu_gradient(x, None) == [True, False, True, False, True, False]
    # Side 0 closes what is close, side 1 opens it.
    assert relu_gradient(x, Resolve(errors={"before": 1e-3}, side=0)) == [False, False, True, False, True, False]
    assert relu_gradient(x, Resolve(errors={"before": 1e-3}, side=1)) == [True, True, True, False, True, False]
    # Only the error of the layer before the ReLU counts.
    for side in (0, 1):
        assert relu_gradient(x, Resolve(errors={"relu": 1.0, "fc": 1.0}, side=side)) == relu_gradient(x, None)


def pool_gradient(x, resolve):
    """Which of the window's positions takes the gradient."""
    graph = chain(
        Conv(name="before", in_channels=4, out_channels=1, kernel=1),
        MaxPool(name="pool", kernel=2, stride=2),
        Flatten(name="flat"),
        Linear(name="fc", in_features=1, out_features=2),
        shape=(4, 2, 2),
    )
    weights = {
        "before.weight": np.array(x).reshape(1, 4, 1, 1),
        "before.bias": np.zeros(1),
        "fc.weight": np.array([[1.0], [0.0]]),
        "fc.bias": np.zeros(2),
    }
    s = session(graph, weights)
    s.resolve = resolve
    images = np.eye(4).reshape(1, 4, 2, 2)  # channel c is lit at position c, so that its weight is the value there
    gradient = s.trace(images, np.array([0]), {}).gradients["before.weight"]
    return np.flatnonzero(gradient).tolist()


def test_pooling_contests_within_rounding_go_to_the_runner_up():
    rms = math.sqrt((1 + 1 + 4) / 4)
    close = 16 * 1e-4 * rms
    near, far = Resolve(errors={"before": 1e-4}, side=1), Resolve(errors={"before": 1e-4}, side=0)
    within = [1.0, 0.0, 1 - 0.9 * close, -2.0]
    assert pool_gradient(within, None) == [0]
    assert pool_gradient(within, far) == [0]
    assert pool_gradient(within, near) == [2]
    beyond = [1.0, 0.0, 1 - 1.1 * close, -2.0]
    assert pool_gradient(beyond, near) == [0]
    assert pool_gradient([1.0, 1.0, 0.0, -2.0], near) == [1]  # a tie: the second of the two
    assert pool_gradient([-2.0, -1.0, -9.0, -1 - 0.9 * close], near) == [3]  # all below zero
    assert pool_gradient(within, Resolve(errors={"pool": 1.0}, side=1)) == [0]


def test_sides_agree_where_nothing_is_close():
    graph = network(ReLU(name="relu"), MaxPool(name="pool"))
    images, labels = batch(graph)
    s = session(graph)
    plain = s.trace(images, labels, {}).gradients
    for side in (0, 1):
        s.resolve = Resolve(errors={"conv": 1e-12, "relu": 1e-12}, side=side)
        resolved = s.trace(images, labels, {})
        for name, gradient in plain.items():
            np.testing.assert_array_equal(resolved.gradients[name], gradient)
    s.resolve = Resolve(errors={"conv": 0.1, "relu": 0.1}, side=1)
    assert any((s.trace(images, labels, {}).gradients[name] != gradient).any() for name, gradient in plain.items())


def test_resolving_leaves_the_forward_pass_alone():
    graph = network(ReLU(name="relu"), MaxPool(name="pool"))
    images, labels = batch(graph)
    s = session(graph)
    plain = s.trace(images, labels, {})
    s.resolve = Resolve(errors={"conv": 0.1, "relu": 0.1}, side=1)
    resolved = s.trace(images, labels, {})
    assert resolved.loss == plain.loss
    for name, value in plain.layers.items():
        np.testing.assert_array_equal(resolved.layers[name], value)


# The update.

BACKENDS = pytest.mark.parametrize("backend", [Reference(), Cpu()], ids=["reference", "cpu"])


@BACKENDS
def test_the_update_by_hand(backend):
    """One weight in and two out, from zero, so that the softmax is known: v = 0.9 v - decay lr w - lr g; w = w + v."""
    recipe = Recipe(momentum=0.9, weight_decay=0.5, bias_rate=2.0, bias_decay=0.1)
    graph = Graph(preset="tiny", input=(1,), layers=(Linear(name="fc", in_features=1, out_features=2),), recipe=recipe)
    zero = {"fc.weight": np.zeros((2, 1), np.float32), "fc.bias": np.zeros(2, np.float32)}
    s = backend.open(graph, zero, Settings(precision="float64"))
    image, label, ids = s.put(np.ones((1, 1), np.float32)), s.put(np.array([0])), s.put(np.array([0]))

    def step(number, rate):
        return float(s.get(s.train_step(image, label, ids, step=number, learning_rate=rate)))

    # Step 1, rate 0.1: both classes at 1/2, so g = (-1/2, 1/2); weights move by 0.05, biases at twice the rate by 0.1.
    assert step(0, 0.1) == pytest.approx(math.log(2))
    np.testing.assert_allclose(s.weights()["fc.weight"][:, 0], [0.05, -0.05], rtol=1e-12)
    np.testing.assert_allclose(s.weights()["fc.bias"], [0.1, -0.1], rtol=1e-12)
    # Step 2, rate 0.01: the logits differ by 2 (0.05 + 0.1) = 0.3.
    g = 1 / (1 + math.exp(0.3))
    v = 0.9 * 0.05 - 0.5 * 0.01 * 0.05 + 0.01 * g
    vb = 0.9 * 0.1 - 0.05 * 0.02 * 0.1 + 0.02 * g
    assert step(1, 0.01) == pytest.approx(math.log(1 + math.exp(-0.3)))
    w, b = 0.05 + v, 0.1 + vb
    np.testing.assert_allclose(s.weights()["fc.weight"][:, 0], [w, -w], rtol=1e-12)
    np.testing.assert_allclose(s.weights()["fc.bias"], [b, -b], rtol=1e-12)
    # Step 3, rate 0: only the velocity, which already holds the rates of its day.
    step(2, 0.0)
    np.testing.assert_allclose(s.weights()["fc.weight"][:, 0], [w + 0.9 * v, -w - 0.9 * v], rtol=1e-12)
    np.testing.assert_allclose(s.weights()["fc.bias"], [b + 0.9 * vb, -b - 0.9 * vb], rtol=1e-12)


@BACKENDS
def test_the_rate_is_inside_the_velocity(backend):
    """At a constant rate the update is torch's SGD; after the rate has changed it is not."""
    graph = network(recipe=Recipe(momentum=0.9, weight_decay=0.01, bias_decay=1.0))
    weights, (images, labels) = random_weights(graph), batch(graph)

    def ours(rates):
        s = backend.open(graph, weights, Settings(precision="float64"))
        put = [s.put(a) for a in (images, labels, np.arange(2))]
        for step, rate in enumerate(rates):
            s.train_step(*put, step=step, learning_rate=rate)
        return s.weights()

    def theirs(rates):
        tensors = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in weights.items()}
        sgd = torch.optim.SGD(tensors.values(), lr=1, momentum=0.9, weight_decay=0.01)
        for rate in rates:
            sgd.param_groups[0]["lr"] = rate
            sgd.zero_grad()
            x = F.conv2d(torch.tensor(images, dtype=torch.float64), tensors["conv.weight"], tensors["conv.bias"])
            logits = F.linear(x.flatten(1), tensors["fc.weight"], tensors["fc.bias"])
            F.cross_entropy(logits, torch.tensor(labels)).backward()
            sgd.step()
        return {k: v.detach().numpy() for k, v in tensors.items()}

    for (name, value), other in zip(ours([0.1] * 4).items(), theirs([0.1] * 4).values(), strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-10, atol=1e-13, err_msg=name)
    changed, other = ours([0.1, 0.1, 0.01]), theirs([0.1, 0.1, 0.01])
    assert all(np.abs(changed[name] - other[name]).max() > 1e-4 for name in changed)


@BACKENDS
def test_weights_in_any_memory_order_are_trained(backend):
    graph = network()
    images, labels = batch(graph)
    trained = []
    for order in (np.ascontiguousarray, np.asfortranarray):
        weights = {name: order(value) for name, value in random_weights(graph).items()}
        s = backend.open(graph, weights, Settings(precision="float64"))
        put = [s.put(a) for a in (images, labels, np.arange(2))]
        for step in range(2):
            s.train_step(*put, step=step, learning_rate=0.1)
        trained.append(s.weights())
    for name, start in random_weights(graph).items():
        np.testing.assert_allclose(trained[1][name], trained[0][name], rtol=1e-12)
        assert np.abs(trained[0][name] - start).max() > 1e-3


def test_large_parameters_are_updated_whole():
    """They are updated in pieces of 2^16."""
    graph = chain(
        Linear(name="fc", in_features=70_000, out_features=2),
        shape=(70_000,),
    )
    weights = {"fc.weight": np.zeros((2, 70_000), np.float32), "fc.bias": np.zeros(2, np.float32)}
    s = session(graph, weights)
    s.train_step(np.ones((1, 70_000)), np.array([0]), np.array([0]), step=0, learning_rate=1.0)
    np.testing.assert_array_equal(s.weights()["fc.weight"], [[0.5] * 70_000, [-0.5] * 70_000])


@BACKENDS
def test_the_latest_weights_tell_an_update(backend):
    """Even of the smallest rate at which the clock looks for one."""
    graph = network()
    images, labels = batch(graph)
    s = backend.open(graph, random_weights(graph), Settings(precision="float32"))
    put = [s.put(a) for a in (images, labels, np.arange(2))]
    before = s.get(s.latest_weights())
    s.train_step(*put, step=0, learning_rate=clock.MOVING)
    after = s.get(s.latest_weights())
    assert len(after) == len(graph.parameters)
    assert (before != after).any()
    np.testing.assert_array_equal(after, [value.flat[-1] for value in s.weights().values()])


# Copies.


def test_nothing_is_shared_with_the_caller():
    graph = network()
    weights, (images, labels) = random_weights(graph), batch(graph)
    kept = {name: value.copy() for name, value in weights.items()}
    s = session(graph, weights)
    put = s.put(images)
    assert put.dtype == images.dtype
    put[:] = 0
    assert images.any()
    logits = s.infer(images)
    s.get(logits)[:] = 0
    assert logits.any()
    before = s.weights()
    s.weights()["fc.bias"][:] = 99
    np.testing.assert_array_equal(s.weights()["fc.bias"], before["fc.bias"])
    s.train_step(images, labels, np.arange(2), step=0, learning_rate=0.1)
    for name, value in weights.items():
        np.testing.assert_array_equal(value, kept[name])
        np.testing.assert_array_equal(before[name], kept[name])


# Rounding.


def awkward():
    """Every sign and exponent of float32 with fractions around each place where rounding turns, and random bits."""
    high = np.arange(2**9, dtype=np.uint32) << np.uint32(23)
    places = [1 << i for i in range(23)]
    edges = [0, *places, *(place - 1 for place in places), *(3 * place for place in places[:-1]), 2**23 - 1]
    # Halfway between two bfloat16 (bit 15) and two float16 (bit 12), to an even and an odd neighbour; their next.
    ties = [half * odd + near for half in (0x8000, 0x1000) for odd in (1, 3) for near in (-1, 0, 1)]
    patterns = high[:, None] | np.array([*edges, *ties], np.uint32)
    rng = np.random.default_rng(0).integers(0, 2**32, 200_000, np.uint32)
    return np.concatenate([patterns.ravel(), rng]).view(np.float32)


@pytest.mark.parametrize(
    ("rounded", "dtype"), [(round_bfloat16, torch.bfloat16), (round_float16, torch.float16)], ids=["bf16", "fp16"]
)
def test_rounding_as_torch_casts(rounded, dtype):
    x = awkward()
    expected = torch.tensor(x).to(dtype).float().numpy()
    found = rounded(x)
    assert found.dtype == np.float32
    number = ~np.isnan(x)
    np.testing.assert_array_equal(found[number].view(np.uint32), expected[number].view(np.uint32))
    assert np.isnan(found[~number]).all()
    np.testing.assert_array_equal(rounded(found)[number], found[number])


def test_tf32_truncates_to_ten_bits_of_fraction():
    x = awkward()
    x = x[np.isfinite(x)].astype(np.float64)
    found = truncate_tf32(x.astype(np.float32))
    assert found.dtype == np.float32
    # In units of the last place kept: 2^-10 of the power of two, and of the smallest normal one below it.
    _, exponent = np.frexp(x)
    unit = np.ldexp(1.0, np.maximum(exponent - 1, -126) - 10)
    np.testing.assert_array_equal(found, np.trunc(x / unit) * unit)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(x))
    assert truncate_tf32(np.array([np.inf, -np.inf], np.float32)).tolist() == [np.inf, -np.inf]


def test_rounding_takes_any_layout():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7
    for rounded in (round_bfloat16, round_float16, truncate_tf32):
        np.testing.assert_array_equal(rounded(x.transpose(2, 0, 1)), rounded(x).transpose(2, 0, 1))


# Baselines.


@pytest.mark.parametrize(
    ("precision", "rounded"), [("bfloat16", round_bfloat16), ("float16", round_float16)], ids=["bf16", "fp16"]
)
def test_narrow_precisions_round_operands_and_what_is_stored(precision, rounded):
    graph = network(
        ReLU(name="relu"),
        LRN(name="norm", alpha=0.5, k=2.0),
        MaxPool(name="pool"),
        AdaptiveAvgPool(name="avg", size=3),
        Flatten(name="flat"),
        Dropout(name="drop", p=0.3),
    )
    images, _ = batch(graph)
    s = session(graph, precision=precision)
    trace = s.trace(images)
    for name, value in trace.layers.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(rounded(value), value, err_msg=name)
    w, b = (rounded(s.parameters[f"conv.{k}"]) for k in ("weight", "bias"))
    x = torch.tensor(rounded(images), dtype=torch.float64)
    expected = F.conv2d(x, torch.tensor(w, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    # Float32 sums may fall on the other side of a rounding tie: at most a unit in the last place.
    unit = 2.0**-7 if precision == "bfloat16" else 2.0**-10
    np.testing.assert_allclose(trace.layers["conv"], expected.numpy(), rtol=unit, atol=1e-6)
    near = rounded(expected.numpy().astype(np.float32)) == trace.layers["conv"]
    assert near.mean() > 0.99
    # Masters keep their precision.
    assert any((rounded(value) != value).any() for value in s.weights().values())


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_baselines_err_as_their_precision_does(precision):
    # No ReLU and no pool, which rounding may decide the other way.
    graph = network(LRN(name="norm", alpha=0.5, k=2.0), AdaptiveAvgPool(name="avg", size=3))
    images, labels = batch(graph)
    exact, rounded = (session(graph, precision=p).trace(images, labels, {}) for p in ("float64", precision))
    unit = {"float32": 2.0**-24, "tf32": 2.0**-10, "bfloat16": 2.0**-8, "float16": 2.0**-11}[precision]
    error = np.linalg.norm(rounded.logits - exact.logits) / np.linalg.norm(exact.logits)
    assert 0.05 * unit < error < 10 * unit
    for name, gradient in exact.gradients.items():
        error = np.linalg.norm(rounded.gradients[name] - gradient) / np.linalg.norm(gradient)
        assert 0.05 * unit < error < 50 * unit, name


def test_tf32_truncates_operands_and_not_what_is_stored():
    graph = network(ReLU(name="relu"))
    images, _ = batch(graph)
    trace = session(graph, precision="tf32").trace(images)
    plain = session(graph, precision="float32").trace(images)
    assert (truncate_tf32(trace.layers["conv"]) != trace.layers["conv"]).any()
    assert (trace.layers["conv"] != plain.layers["conv"]).any()
    np.testing.assert_array_equal(trace.layers["relu"], np.maximum(trace.layers["conv"], 0))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_narrow_gradients_are_rounded_too(precision):
    """The gradient of the last bias is a sum of the logits' gradients, each of them rounded."""
    graph = network()
    images, labels = batch(graph, count=1)
    gradient = session(graph, precision=precision).trace(images, labels, {}).gradients["fc.bias"]
    rounded = round_bfloat16 if precision == "bfloat16" else round_float16
    np.testing.assert_array_equal(rounded(gradient), gradient)


@pytest.mark.parametrize(
    ("precision", "rounded"), [("bfloat16", round_bfloat16), ("float16", round_float16)], ids=["bf16", "fp16"]
)
def test_narrow_values_are_rounded_between_layers(precision, rounded):
    """On the way in and on the way back: here a dropout, which scales by 1 / 0.7, lies between."""
    graph = chain(
        Linear(name="one", in_features=30, out_features=200),
        Dropout(name="drop", p=0.3, inverted=True),
        Linear(name="fc", in_features=200, out_features=CLASSES),
        shape=(30,),
    )
    images, labels = batch(graph, count=1)
    s = session(graph, precision=precision)
    mask = np.ones((1, 200), bool)
    gradients = s.trace(images, labels, {"drop": mask}).gradients
    back = rounded(gradients["fc.bias"] @ rounded(s.parameters["fc.weight"]))
    np.testing.assert_array_equal(gradients["one.bias"], rounded(back * np.float32(1 / 0.7)))
    # The input is stored like any other layer's.
    ahead = chain(Dropout(name="drop", p=0.3), Linear(name="fc", in_features=30, out_features=2), shape=(30,))
    found = session(ahead, precision=precision).trace(images).layers["drop"]
    np.testing.assert_array_equal(found, rounded(rounded(images) * np.float32(0.7)))


# The backend.


def test_what_the_reference_offers():
    device = Reference().probe()
    assert device.precisions == ("float64", "float32", "tf32", "bfloat16", "float16")
    assert device.versions == {"numpy": np.__version__}
    assert (Reference().modes, Reference().priority) == (("infer", "train"), 0)


def test_what_the_reference_refuses():
    with pytest.raises(Unsupported, match=r"'float8'.*float64, float32"):
        session(network(), precision="float8")
    with pytest.raises(Unsupported, match="no formulation 'stock'; it offers portable"):
        Reference().open(network(), random_weights(network()), Settings(precision="float64", formulation="stock"))


def test_a_layer_it_does_not_know():
    class Unknown(Layer):
        pass

    graph = chain(Unknown(name="x"), Linear(name="fc", in_features=1, out_features=2), shape=(1,))
    with pytest.raises(TypeError, match="no layer Unknown"):
        session(graph).infer(np.ones((1, 1)))
