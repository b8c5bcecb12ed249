"""Counter-based random numbers: Philox4x32-10, the same bits on every device.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The key is the seed; the counter
is ``(block, index, step, stream)``: `index` is an image's id in its data set or a parameter's number, `step` the
training step or epoch, `stream` what the numbers are for. So no choice depends on a batch's make-up, on the number of
workers, or on a device's own generator.

`rounds` uses only ``* + ^ & >>`` on 64-bit integers, of which none overflows, so NumPy and torch arrays both pass
through it, and compilers, which may take a signed product not to overflow, leave it as it is.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
F64 = npt.NDArray[np.float64]

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32)
_WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """What a random number is for. Dropout layer number i of a graph has stream DROPOUT + i."""

    WEIGHTS = 0
    ORDER = 1
    CROP = 2
    FLIP = 3
    COLOUR = 4
    SYNTHETIC = 5
    PARITY = 6
    PERTURB = 7
    DROPOUT = 256


def key(seed: int) -> tuple[int, int]:
    """The two 32-bit halves of a seed in [0, 2^64)."""
    return seed & _LOW, seed >> 32 & _LOW


def rounds(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """The ten rounds on 64-bit signed integer arrays that hold 32-bit values; they broadcast against one another."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # With 2^32 less in the multiplier the product stays within 64 bits; its high word then lacks the factor.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) + c2 ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) + c0 ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def words(seed: int, stream: int, index: npt.ArrayLike, step: int, count: int, *, first_block: int = 0) -> U32:
    """`count` random 32-bit words for each index: uint32, shape ``(len(index), count)``."""
    ids = np.atleast_1d(np.asarray(index, np.int64))[:, None]
    block = np.arange(first_block, first_block - (-count // 4), dtype=np.int64)[None, :]
    out = rounds((block, ids, np.full((1, 1), step, np.int64), np.full((1, 1), stream, np.int64)), key(seed))
    stacked = np.stack(np.broadcast_arrays(*out), axis=-1).astype(np.uint32)
    return stacked.reshape(len(ids), 4 * block.size)[:, :count]


def bits(seed: int, stream: int, index: npt.ArrayLike, step: int, count: int) -> npt.NDArray[np.bool_]:
    """`count` fair bits for each index, 128 to a block, lowest bit first: bool, shape ``(len(index), count)``."""
    drawn = words(seed, stream, index, step, -(-count // 32))
    return np.unpackbits(drawn.astype("<u4").view(np.uint8), axis=1, count=count, bitorder="little").astype(bool)


def keep_mask(seed: int, layer: int, index: npt.ArrayLike, step: int, count: int, p: float) -> npt.NDArray[np.bool_]:
    """Which of `count` elements dropout layer number `layer` keeps, for each image id: bool, ``(len(index), count)``.

    At ``p = 0.5`` an element takes one bit (kept where it is set), otherwise one word (kept where it reaches
    ``p 2^32``).
    """
    stream = Stream.DROPOUT + layer
    if p == 0.5:
        return bits(seed, stream, index, step, count)
    return words(seed, stream, index, step, count) >= drop_below(p)


def drop_below(p: float) -> int:
    """The 32-bit word below which an element is dropped with probability `p`."""
    return min(round(p * 2**32), _LOW)


def order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """A permutation of ``range(count)`` for that epoch: indices sorted by a random 64-bit key each."""
    drawn = words(seed, Stream.ORDER, np.arange(count), epoch, 2).astype(np.uint64)
    return np.argsort(drawn[:, 0] << np.uint64(32) | drawn[:, 1], kind="stable")


def uniform(drawn: U32) -> F64:
    """Words to float64 in the open interval (0, 1): ``(word + 1/2) / 2^32``."""
    return (drawn.astype(np.float64) + 0.5) / 2.0**32


def normal(drawn: U32) -> F64:
    """Words to float64 standard normals by the inverse of the distribution function, one word each.

    Wichura, "Algorithm AS 241: The Percentage Points of the Normal Distribution", Applied Statistics 37 (1988),
    PPND16. Only ``+ - * / sqrt`` are used, which IEEE 754 rounds in one way, so that every machine draws the same
    bits; a library's log or cos may differ between instruction sets.
    """
    p = uniform(drawn)
    q = p - 0.5
    out = np.asarray(q * _ratio(0.180625 - q * q, _CENTRE))
    tail = np.abs(q) > 0.425
    far = np.minimum(p[tail], 1 - p[tail])
    r = np.sqrt(-_log(far))
    z = np.where(r <= 5, _ratio(r - 1.6, _TAIL), _ratio(r - 5, _FAR_TAIL))
    out[tail] = np.copysign(z, q[tail])
    return out


def _ratio(r: F64, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> F64:
    above, below = coefficients
    num, den = np.full_like(r, above[-1]), np.full_like(r, below[-1])
    for a, b in zip(above[-2::-1], below[-2::-1], strict=True):
        num *= r
        num += a
        den *= r
        den += b
    return num / den


def _log(x: F64) -> F64:
    """Natural logarithm from IEEE operations alone: log(m 2^e) = e log 2 + 2 atanh((m - 1) / (m + 1))."""
    m, e = np.frexp(x)
    small = m < 0.7071067811865476
    m, e = np.where(small, 2 * m, m), e - small
    s = (m - 1) / (m + 1)
    square, total = s * s, np.zeros_like(s)
    for n in range(21, 0, -2):
        total = total * square + 1 / n
    return np.asarray(e * 0.6931471805599453 + 2 * s * total)


# Coefficients of AS 241's PPND16, from the constant term up: numerator, denominator.
_CENTRE = (
    (
        3.3871328727963666080e0,
        1.3314166789178437745e2,
        1.9715909503065514427e3,
        1.3731693765509461125e4,
        4.5921953931549871457e4,
        6.7265770927008700853e4,
        3.3430575583588128105e4,
        2.5090809287301226727e3,
    ),
    (
        1.0,
        4.2313330701600911252e1,
        6.8718700749205790830e2,
        5.3941960214247511077e3,
        2.1213794301586595867e4,
        3.9307895800092710610e4,
        2.8729085735721942674e4,
        5.2264952788528545610e3,
    ),
)
_TAIL = (
    (
        1.42343711074968357734e0,
        4.63033784615654529590e0,
        5.76949722146069140550e0,
        3.64784832476320460504e0,
        1.27045825245236838258e0,
        2.41780725177450611770e-1,
        2.27238449892691845833e-2,
        7.74545014278341407640e-4,
    ),
    (
        1.0,
        2.05319162663775882187e0,
        1.67638483018380384940e0,
        6.89767334985100004550e-1,
        1.48103976427480074590e-1,
        1.51986665636164571966e-2,
        5.47593808499534494600e-4,
        1.05075007164441684324e-9,
    ),
)
_FAR_TAIL = (
    (
        6.65790464350110377720e0,
        5.46378491116411436990e0,
        1.78482653991729133580e0,
        2.96560571828504891230e-1,
        2.65321895265761230930e-2,
        1.24266094738807843860e-3,
        2.71155556874348757815e-5,
        2.01033439929228813265e-7,
    ),
    (
        1.0,
        5.99832206555887937690e-1,
        1.36929880922735805310e-1,
        1.48753612908506148525e-2,
        7.86869131145613259100e-4,
        1.84631831751005468180e-5,
        1.42151175831644588870e-7,
        2.04426310338993978564e-15,
    ),
)
