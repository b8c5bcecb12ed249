"""Random numbers: the published vectors, and the same bits from NumPy, torch and plain integers."""

import hashlib
import math
from collections import Counter
from statistics import NormalDist

import numpy as np
import pytest
import torch

from portnet import philox, weights
from portnet.graph import Constant, Conv, Flatten, Graph, Linear, Normal, Uniform
from portnet.philox import Stream
from portnet_backends import torch_philox

LAST = 2**32 - 1

# Random123 1.09, tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

SEEDS = [0, 1, 2**32, 2**63, 0x0123456789ABCDEF, 2**64 - 1]
IDS = [0, 1, 49_999, 2**31 - 1, 2**31, LAST]
STEPS = [0, 7, 2**31, LAST]


def by_integers(counter, key):
    """The algorithm as the paper writes it, in Python's integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (q >> 32) ^ b ^ k, q & LAST, (p >> 32) ^ d ^ m, p & LAST
        k, m = (k + 0x9E3779B9) & LAST, (m + 0xBB67AE85) & LAST
    return a, b, c, d


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    assert by_integers(counter, key) == result
    assert philox.rounds(tuple(np.full(1, c, np.int64) for c in counter), key) == result
    drawn = philox.rounds(tuple(torch.tensor(c) for c in counter), key)
    assert tuple(int(word) for word in drawn) == result


class Signed(int):
    """An integer whose product and sum fit in 64 bits with their sign, or fail: C++ leaves it open what they are else.

    g++ took it that such a product is never negative, and left out a mask.
    """

    def __mul__(self, other):
        return Signed.fitting(int(self) * other)

    def __add__(self, other):
        return Signed.fitting(int(self) + other)

    def __rshift__(self, other):
        return Signed(int(self) >> other)

    def __and__(self, other):
        return Signed(int(self) & other)

    def __xor__(self, other):
        return Signed(int(self) ^ other)

    @staticmethod
    def fitting(value):
        assert -(2**63) <= value < 2**63
        return Signed(value)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_nothing_overflows(counter, key, result):
    assert philox.rounds(tuple(Signed(c) for c in counter), tuple(Signed(k) for k in key)) == result


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers_by_seed_id_step_and_stream(counter, key, result):
    """The counter is (block, index, step, stream); the key's first half is the seed's lower one."""
    block, index, step, stream = counter
    drawn = philox.words(key[1] << 32 | key[0], stream, index, step, 4, first_block=block)
    assert drawn.dtype == np.uint32
    assert drawn.tolist() == [list(result)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("step", STEPS)
def test_words_by_integers(seed, step):
    count = 11
    expected = [
        [
            word
            for block in range(3)
            for word in by_integers((block, index, step, Stream.DROPOUT + 1), (seed & LAST, seed >> 32))
        ][:count]
        for index in IDS
    ]
    assert philox.words(seed, Stream.DROPOUT + 1, IDS, step, count).tolist() == expected
    assert torch_philox.words(seed, Stream.DROPOUT + 1, torch.tensor(IDS), step, count).tolist() == expected


@pytest.mark.parametrize("p", [0.5, 0.0, 2.0**-32, 0.1, 0.25, 0.75, 1 - 2.0**-32, math.nextafter(1, 0)])
def test_masks_of_numpy_and_torch_are_the_same_bits(p):
    for seed in SEEDS:
        for step in STEPS:
            for count in (1, 31, 32, 33, 129):
                ours = philox.keep_mask(seed, 1, IDS, step, count, p)
                theirs = torch_philox.keep_mask(seed, 1, torch.tensor(IDS), step, count, p)
                assert ours.shape == (len(IDS), count)
                assert (ours.dtype, theirs.dtype) == (bool, torch.bool)
                np.testing.assert_array_equal(ours, theirs.numpy())


def test_masks_at_alexnets_width():
    ids = np.arange(100, 104)
    for layer in (0, 1):
        ours = philox.keep_mask(3, layer, ids, 12, 4096, 0.5)
        np.testing.assert_array_equal(ours, torch_philox.keep_mask(3, layer, torch.tensor(ids), 12, 4096, 0.5).numpy())


def test_ids_of_any_integer_type():
    expected = philox.words(5, 0, [3, 9], 0, 8)
    for kind in (np.int32, np.int64, np.uint32):
        np.testing.assert_array_equal(philox.words(5, 0, np.array([3, 9], kind), 0, 8), expected)
    small = torch.tensor([3, 9], dtype=torch.int32)
    np.testing.assert_array_equal(torch_philox.words(5, 0, small, 0, 8).numpy(), expected)
    assert philox.words(5, 0, 9, 0, 8).tolist() == expected[1:].tolist()


def test_no_ids_and_no_words():
    assert philox.words(0, 0, [], 0, 5).shape == torch_philox.words(0, 0, torch.tensor([]), 0, 5).shape == (0, 5)
    assert philox.keep_mask(0, 0, [], 0, 5, 0.5).shape == (0, 5)
    assert philox.words(0, 0, [1, 2], 0, 0).shape == (2, 0)


def test_a_mask_at_one_half_is_bits_from_the_lowest():
    words = philox.words(8, Stream.DROPOUT + 2, [4], 6, 4)[0]
    expected = [bool(int(word) >> bit & 1) for word in words for bit in range(32)][:100]
    assert philox.keep_mask(8, 2, [4], 6, 100, 0.5)[0].tolist() == expected
    assert philox.bits(8, Stream.DROPOUT + 2, [4], 6, 100)[0].tolist() == expected


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_any_other_mask_compares_words(p):
    words = philox.words(8, Stream.DROPOUT, [4], 6, 100)[0]
    assert philox.keep_mask(8, 0, [4], 6, 100, p)[0].tolist() == [int(word) / 2**32 >= p for word in words]


def test_a_word_at_the_bound_is_kept():
    word = int(philox.words(8, Stream.DROPOUT, [4], 6, 1)[0, 0])
    for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
        assert philox.drop_below(p) == word + (not kept)
        assert philox.keep_mask(8, 0, [4], 6, 1, p).tolist() == [[kept]]
        assert torch_philox.keep_mask(8, 0, torch.tensor([4]), 6, 1, p).tolist() == [[kept]]


def test_dropping_nothing_keeps_all():
    assert philox.drop_below(0.0) == 0
    assert philox.keep_mask(1, 0, range(50), 0, 1000, 0.0).all()
    assert torch_philox.keep_mask(1, 0, torch.arange(50), 0, 1000, 0.0).all()


def test_the_bound_is_a_word():
    """At the largest probability below 1 the bound still fits in 32 bits, so that one word in 2^32 is kept."""
    assert philox.drop_below(math.nextafter(1, 0)) == LAST
    assert philox.drop_below(0.25) == 2**30


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_share_of_what_is_kept(p):
    n = 400 * 1000
    kept = philox.keep_mask(11, 0, np.arange(400), 3, 1000, p)
    assert abs(kept.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / n)
    # Neither an image nor an element stands out: each is a binomial share.
    for axis, draws in ((1, 1000), (0, 400)):
        deviation = (kept.mean(axis=axis) - (1 - p)) / math.sqrt(p * (1 - p) / draws)
        assert abs(deviation.std() - 1) < 0.15
        assert np.abs(deviation).max() < 5


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_a_mask_does_not_depend_on_the_batch(p):
    ids = [17, 3, 2**31, 3]
    together = philox.keep_mask(1, 0, ids, 5, 70, p)
    for row, index in zip(together, ids, strict=True):
        np.testing.assert_array_equal(philox.keep_mask(1, 0, [index], 5, 70, p)[0], row)
    np.testing.assert_array_equal(together[1], together[3])
    np.testing.assert_array_equal(philox.keep_mask(1, 0, ids, 5, 33, p), together[:, :33])


@pytest.mark.parametrize("first", [1, 2, 13, 2**31, LAST - 3])
def test_words_from_the_middle(first):
    drawn = philox.words(3, 0, [5], 0, 14, first_block=first)
    expected = [by_integers((first + i, 5, 0, 0), (3, 0)) for i in range(4)]
    assert drawn[0].tolist() == [word for block in expected for word in block][:14]
    if first < 20:
        whole = philox.words(3, 0, [5], 0, 4 * first + 14)
        np.testing.assert_array_equal(drawn, whole[:, 4 * first :])


def test_everything_that_names_a_number_changes_it():
    def draw(seed=1, stream=2, index=3, step=4):
        return philox.words(seed, stream, [index], step, 4).tobytes()

    changed = [draw(seed=2), draw(seed=1 + 2**32), draw(stream=3), draw(index=4), draw(step=5)]
    assert len({draw(), *changed}) == 6
    # The fields are not interchangeable either.
    assert draw(index=4, step=3) != draw()


def test_streams_are_apart():
    assert len(set(Stream)) == len(Stream.__members__)
    assert max(stream for stream in Stream if stream is not Stream.DROPOUT) < Stream.DROPOUT
    np.testing.assert_array_equal(
        philox.keep_mask(1, 3, [0], 0, 64, 0.5), philox.bits(1, Stream.DROPOUT + 3, [0], 0, 64)
    )


@pytest.mark.parametrize("count", [0, 1, 2, 1000, 60_000])
def test_order_is_a_permutation(count):
    order = philox.order(3, 1, count)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(count))


def test_order_changes_with_seed_and_epoch_only():
    assert philox.order(0, 0, 10).tolist() == philox.order(0, 0, 10).tolist()
    orders = {philox.order(seed, epoch, 100).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25
    expected = sorted(range(50), key=lambda i: by_integers((0, i, 7, Stream.ORDER), (9, 0))[:2])
    assert philox.order(9, 7, 50).tolist() == expected


def test_all_orders_are_as_likely():
    n = 2400
    seen = Counter(tuple(philox.order(0, epoch, 4).tolist()) for epoch in range(n))
    chi2 = sum((count - n / 24) ** 2 / (n / 24) for count in seen.values())
    assert len(seen) == 24
    assert chi2 < 49.7  # 99.9% of the distribution with 23 degrees of freedom


def test_uniform_is_open_and_exact():
    drawn = np.array([0, 1, 2**31, LAST - 1, LAST], np.uint32)
    assert philox.uniform(drawn).tolist() == [2.0**-33, 3 * 2.0**-33, 0.5 + 2.0**-33, 1 - 3 * 2.0**-33, 1 - 2.0**-33]


def test_uniform_moments():
    u = philox.uniform(philox.words(1, 0, [0], 0, 200_000)[0])
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(u))
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt(1 / 180 / len(u))
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(len(u))
    shares, _ = np.histogram(u, bins=100, range=(0, 1))
    assert ((shares - 2000) ** 2 / 2000).sum() < 149  # 99.9% with 99 degrees of freedom


def borders():
    """Words where `normal` changes formula, and the outermost."""
    low, high = (round(p * 2**32) for p in (0.075, 0.925))
    near = [edge + i for edge in (low, high, 2**31) for i in range(-3, 4)]
    powers = [2**i + j for i in range(2, 32) for j in (-1, 0, 1)]
    return np.array([0, 1, 2, LAST - 2, LAST - 1, LAST, *near, *powers, *(LAST - p for p in powers)], np.uint32)


def test_normal_inverts_the_distribution_function():
    drawn = np.concatenate([borders(), philox.words(2, 0, [0], 0, 20_000)[0]])
    inverse = NormalDist().inv_cdf
    expected = np.array([inverse((int(word) + 0.5) / 2**32) for word in drawn])
    np.testing.assert_allclose(philox.normal(drawn), expected, rtol=1e-14, atol=1e-16)


def test_normal_by_the_error_function():
    """Apart from the algorithm that Python's own inverse shares: the tail beyond each value is the word's share."""
    for word in [*borders().tolist(), *philox.words(3, 0, [0], 0, 500)[0].tolist()]:
        word = min(word, LAST - word)  # the lower half: in the upper one 1 - p loses digits
        z = float(philox.normal(np.array([word], np.uint32))[0])
        assert math.erfc(-z / math.sqrt(2)) / 2 == pytest.approx((word + 0.5) / 2**32, rel=1e-13)


def test_normal_is_odd_and_increasing():
    words = np.unique(borders())
    values = philox.normal(words)
    assert (np.diff(values) > 0).all()
    np.testing.assert_allclose(philox.normal(LAST - words), -values, rtol=1e-15)
    assert values[0] == pytest.approx(-6.338, abs=1e-3)


def test_normal_moments():
    z = philox.normal(philox.words(4, 0, [0], 0, 200_000)[0])
    n = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)


def test_the_bits_of_normals():
    """In float64, before rounding to float32 can hide a difference."""
    values = philox.normal(np.concatenate([borders(), philox.words(2012, 0, [0], 0, 50_000)[0]]))
    assert (
        hashlib.sha256(values.astype("<f8").tobytes()).hexdigest()
        == "af29343a3d3d8aa2c5dbdf3d1feebb5c0925d999342f5760e710674a43e6ff61"
    )


def test_the_bits_of_initial_weights():
    """Pinned, so that a machine, a NumPy or a torch that draws others is found out."""
    layers = (
        Conv(name="conv", in_channels=3, out_channels=8, kernel=3, bias_init=Constant(value=1.0)),
        Flatten(name="flat"),
        Linear(
            name="fc",
            in_features=288,
            out_features=300,
            weight_init=Normal(std=0.005),
            bias_init=Uniform(bound=0.0625),
        ),
    )
    graph = Graph(preset="pinned", input=(3, 8, 8), layers=layers)
    drawn = weights.initial(graph, seed=2012)
    plain = hashlib.sha256(b"".join(drawn[name].astype("<f4").tobytes() for name in graph.parameters)).hexdigest()
    assert (plain, weights.digest(drawn)) == (
        "23c585348f54b2231ee435cba35324d6c8406f43b83a7af2ec07c45c8f937084",
        "4cc7bd6efddde2ac6bc879f62c432401cac77953fdfbde297b79d0598bee3cf1",
    )
