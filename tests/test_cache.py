"""What the reference computed is kept: the same as computed anew, and computed anew where it is missing or damaged."""

import os
import time

import numpy as np
import pytest

from portnet import alexnet, cache, parity
from portnet.parity import Case

CASE = Case(alexnet.graph("paper2012", image_size=67, classes=10), batch=2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PORTNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def computed(monkeypatch):
    """How often the reference was asked."""
    asked = []
    for name in ("expect", "expect_batch"):
        real = getattr(parity, name)

        def counting(*args, real=real, name=name, **kwargs):
            asked.append(name)
            return real(*args, **kwargs)

        counting.cache_clear = lambda: None
        monkeypatch.setattr(parity, name, counting)
    return asked


def same(one, other):
    for part in ("infer", "train", "gradients", "updates"):
        a, b = getattr(one, part), getattr(other, part)
        assert list(a) == list(b)
        for name in a:
            np.testing.assert_array_equal(a[name].exact, b[name].exact)
            assert a[name].allowed == b[name].allowed
    assert one.loss == other.loss


@pytest.mark.parametrize("train", [False, True])
def test_what_is_kept_is_what_was_computed(computed, train):
    first = cache.expect(CASE, "float32", train=train)
    again = cache.expect(CASE, "float32", train=train)
    assert computed == ["expect"]
    same(first, again)
    assert again.case is CASE


def test_a_batch_too(computed):
    first, again = (cache.expect_batch(CASE, "bfloat16", train=True) for _ in range(2))
    assert computed == ["expect_batch"]
    np.testing.assert_array_equal(first.logits.exact, again.logits.exact)
    assert (first.loss, first.allowed_loss, first.logits.allowed) == (
        again.loss, again.allowed_loss, again.logits.allowed,
    )  # fmt: skip


def test_what_went_in_is_told_apart(computed):
    cache.expect(CASE, "float32", train=False)
    cache.expect(CASE, "bfloat16", train=False)
    cache.expect(Case(CASE.graph, batch=2, seed=1), "float32", train=False)
    cache.expect(Case(CASE.graph, batch=1), "float32", train=False)
    assert len(computed) == 4


def test_other_code_computes_anew(computed, monkeypatch):
    cache.expect(CASE, "float32", train=False)
    real = cache.inspect.getsource
    monkeypatch.setattr(cache.inspect, "getsource", lambda m: real(m) + "# changed")
    cache.expect(CASE, "float32", train=False)
    assert len(computed) == 2


@pytest.mark.parametrize("harm", ["truncated", "flipped", "empty", "other"])
def test_what_is_damaged_is_computed_anew(computed, folder, harm):
    first = cache.expect(CASE, "float32", train=False)
    (path,) = folder.glob("*.npz")
    content = bytearray(path.read_bytes())
    if harm == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(
        {"truncated": content[: len(content) // 2], "empty": b"", "other": b"no archive"}.get(harm, content)
    )
    same(first, cache.expect(CASE, "float32", train=False))
    assert len(computed) == 2


def test_text_that_was_changed_is_made_anew(folder):
    made = []

    def make():
        made.append(1)
        return [1.5, len(made)]

    assert cache.text("name", "key", make) == [1.5, 1]
    assert cache.text("name", "key", make) == [1.5, 1]
    assert cache.text("name", "another", make) == [1.5, 2]
    for path in folder.glob("name-*.json"):
        path.write_text(path.read_text().replace("1.5", "2.5"))
    assert cache.text("name", "key", make)[0] == 1.5
    assert len(made) == 3


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PORTNET_CACHE", str(tmp_path / "file"))
    assert cache.text("name", "key", lambda: [1]) == [1]


def test_the_longest_unused_go_first(folder, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT", 400)
    for i in range(5):
        cache.text("name", str(i), lambda: "x" * 100)
        for age, path in enumerate(sorted(folder.iterdir(), key=lambda p: -p.stat().st_mtime)):
            os.utime(path, (time.time() - 10 * age, time.time() - 10 * age))
    assert 1 <= len(list(folder.iterdir())) < 5
    assert cache.text("name", "4", lambda: "made anew") == "x" * 100
