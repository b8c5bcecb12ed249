"""AlexNet as a JAX user writes it: `lax` operators under `jit`, on the device that JAX chooses."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from turns import Asked, Opened, serve

Parameters = dict[str, Any]


def convolution(x: Any, w: Any, b: Any, *, stride: int = 1, padding: int = 0, groups: int = 1) -> Any:
    y = lax.conv_general_dilated(x, w, (stride, stride), [(padding, padding)] * 2, feature_group_count=groups)
    return jax.nn.relu(y + b[:, None, None])


def norm(x: Any) -> Any:
    """Local response normalisation within each of the two towers."""
    wide = x.astype(jnp.float32)
    squares = (wide * wide).reshape(x.shape[0], 2, -1, *x.shape[2:])
    sums = lax.reduce_window(squares, 0.0, lax.add, (1, 1, 5, 1, 1), (1,) * 5, [(0, 0), (0, 0), (2, 2), (0, 0), (0, 0)])
    return (wide * (2.0 + 1e-4 * sums.reshape(x.shape)) ** -0.75).astype(x.dtype)


def pool(x: Any) -> Any:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), "VALID")


def dropped(x: Any, key: Any) -> Any:
    return x if key is None else jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0).astype(x.dtype)


def forward(preset: str, p: Parameters, x: Any, key: Any = None) -> Any:
    keys = (None, None) if key is None else jax.random.split(key)

    def conv(name: str, x: Any, **how: int) -> Any:
        return convolution(x, p[f"{name}.weight"], p[f"{name}.bias"], **how)

    def linear(name: str, x: Any) -> Any:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    if preset == "paper2012":
        x = pool(norm(conv("conv1", jnp.pad(x, ((0, 0), (0, 0), (0, 3), (0, 3))), stride=4)))
        x = pool(norm(conv("conv2", x, padding=2, groups=2)))
        x = conv("conv4", conv("conv3", x, padding=1), padding=1, groups=2)
        x = pool(conv("conv5", x, padding=1, groups=2)).reshape(len(x), -1)
        x = dropped(jax.nn.relu(linear("fc6", x)), keys[0])
        return linear("fc8", dropped(jax.nn.relu(linear("fc7", x)), keys[1]))
    x = pool(conv("conv1", x, stride=4, padding=2))
    x = pool(conv("conv2", x, padding=2))
    x = conv("conv4", conv("conv3", x, padding=1), padding=1)
    x = dropped(pool(conv("conv5", x, padding=1)).reshape(len(x), -1), keys[0])
    x = dropped(jax.nn.relu(linear("fc6", x)), keys[1])
    return linear("fc8", jax.nn.relu(linear("fc7", x)))


def loss_of(preset: str, dtype: Any, p: Parameters, x: Any, labels: Any, key: Any) -> Any:
    narrow = {name: value.astype(dtype) for name, value in p.items()}
    logits = forward(preset, narrow, x.astype(dtype), key).astype(jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def step(preset: str, dtype: Any, p: Parameters, v: Parameters, x: Any, labels: Any, key: Any) -> Any:
    key, now = jax.random.split(key)
    gradients = jax.grad(loss_of, argnums=2)(preset, dtype, p, x, labels, now)
    v = jax.tree.map(lambda v, g, p: 0.9 * v + g + 5e-4 * p, v, gradients, p)
    return jax.tree.map(lambda p, v: p - 1e-12 * v, p, v), v, key


def open_(asked: Asked) -> Opened:
    dtype = jnp.dtype(asked.precision)
    p = {name: jnp.asarray(value) for name, value in asked.weights.items()}
    x, labels = jnp.asarray(asked.images), jnp.asarray(asked.labels, jnp.int32)
    narrow = {name: value.astype(dtype) for name, value in p.items()}
    run = jax.jit(partial(forward, asked.preset))
    logits = np.asarray(run(narrow, x.astype(dtype)).astype(jnp.float32))
    if asked.mode == "infer":

        def infer(count: int) -> None:
            for _ in range(count):
                found = run(narrow, x.astype(dtype))
            found.block_until_ready()

        return Opened(logits=logits, steps=infer)
    state = [p, {name: jnp.zeros_like(value) for name, value in p.items()}, jax.random.key(0)]

    def train(count: int) -> None:
        for _ in range(count):
            state[:] = step(asked.preset, asked.precision, *state[:2], x, labels, state[2])
        jax.block_until_ready(state)

    return Opened(logits=logits, steps=train)


if __name__ == "__main__":
    serve(open_)
