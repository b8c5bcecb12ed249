"""`portnet.philox`'s dropout masks drawn on a torch device: the same bits."""

import torch
from torch import Tensor

from portnet import philox


def words(seed: int, stream: int, index: Tensor, step: int | Tensor, count: int) -> Tensor:
    """`count` random 32-bit words for each index: int64, shape ``(len(index), count)``.

    `step` may be an int64 tensor of one element on the device, which captured and compiled work reads anew.
    """
    block = torch.arange(-(-count // 4), device=index.device)[None, :]
    at = step.reshape(1, 1) if isinstance(step, Tensor) else torch.full_like(block, step)
    counter = (block, index.long()[:, None], at, torch.full_like(block, stream))
    drawn = torch.broadcast_tensors(*philox.rounds(counter, philox.key(seed)))
    return torch.stack(drawn, dim=-1).flatten(1)[:, :count]


def keep_mask(seed: int, layer: int, index: Tensor, step: int | Tensor, count: int, p: float) -> Tensor:
    """`portnet.philox.keep_mask` as a bool tensor on the device of `index`."""
    stream = philox.Stream.DROPOUT + layer
    if p == 0.5:
        drawn = words(seed, stream, index, step, -(-count // 32))
        bits = drawn[:, :, None] >> torch.arange(32, device=index.device) & 1
        return bits.flatten(1)[:, :count].bool()
    return words(seed, stream, index, step, count) >= philox.drop_below(p)
