"""Worker processes: the same batches as none, errors that come up, nothing left behind."""

import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import portnet
from portnet import images, plugins, training, weights
from portnet.contract import Place, Settings, normalised
from portnet.errors import InputError, PictureError, PortNetError
from portnet.graph import Flatten, Graph, Linear, Normalisation
from portnet.images import DataSet
from portnet.loading import Loader

GRAPH = replace(
    portnet.graph("torchvision", classes=4),
    normalisation=Normalisation(mean=(120.0, 110.0, 100.0), scale=(58.0, 57.0, 56.0)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 JPEGs of several sizes, of noise that was smoothed."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for i in range(60):
        height, width = rng.integers(260, 420, 2)
        coarse = rng.integers(0, 256, (height // 20, width // 20, 3)).astype(np.uint8)
        path = root / "abcd"[i % 4] / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


@pytest.fixture(scope="module")
def data(folder):
    return images.load(folder).train


def digest(batches):
    sha, count = hashlib.sha256(), 0
    for batch in batches:
        for value in (batch.pixels, batch.shift, batch.scale, batch.labels, batch.ids):
            sha.update(np.ascontiguousarray(value).tobytes())
        count += 1
    return count, sha.hexdigest()


def epochs(data, **how):
    with Loader(data, **how) as loader:
        return [digest(loader.training_batches(GRAPH, seed=3, epoch=epoch, batch=12)) for epoch in (0, 1, 2)]


def test_every_number_of_workers_makes_the_same_batches(data):
    expected = epochs(data)
    assert [count for count, _ in expected] == [4, 4, 4]
    assert len({sha for _, sha in expected}) == 3
    assert epochs(data, workers=1) == epochs(data, workers=4) == expected
    plain = images.training_batches(data, GRAPH, seed=3, epoch=1, batch=12)
    assert digest(plain) == expected[1]


def test_batches_in_parts_are_the_whole(data):
    how = {"seed": 3, "epoch": 1, "batch": 12}
    whole = list(images.training_batches(data, GRAPH, **how))
    with Loader(data, workers=2) as loader:
        parts = [
            list(loader.training_batches(GRAPH, **how, place=Place(rank=rank, size=3, part=rank, parts=3)))
            for rank in range(3)
        ]
    for batch, *own in zip(whole, *parts, strict=True):
        for name in ("pixels", "shift", "labels", "ids"):
            np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in own]), getattr(batch, name))
    with pytest.raises(InputError, match="a batch of 12 cannot be cut into 5 equal parts; give a multiple of them"):
        next(images.training_batches(data, GRAPH, **how, place=Place(parts=5)))


def test_batches_that_were_trained_on_are_not_even_read(data):
    seen = []

    def read(place):
        seen.append(place)
        return data.read(place)

    watched = replace(data, read=read)
    how = {"seed": 3, "epoch": 1, "batch": 12}
    rest = list(images.training_batches(watched, GRAPH, **how, first=1, steps=2))
    whole = list(images.training_batches(data, GRAPH, **how))
    assert len(seen) == 24
    assert [b.ids.tolist() for b in rest] == [b.ids.tolist() for b in whole[1:3]]
    np.testing.assert_array_equal(rest[0].pixels, whole[1].pixels)


@pytest.mark.parametrize("views", [1, 10])
def test_evaluation_with_workers(data, views):
    plain = list(images.evaluation_batches(data, GRAPH, batch=7, views=views))
    with Loader(data, workers=2) as loader:
        assert digest(loader.evaluation_batches(GRAPH, batch=7, views=views)) == digest(iter(plain))
        # Whole batches go to each of several processes by turns.
        turns = [
            list(loader.evaluation_batches(GRAPH, batch=7, views=views, place=Place(part=part, parts=2)))
            for part in (0, 1)
        ]
    assert [b.ids.tolist() for b in plain[0::2]] == [b.ids.tolist() for b in turns[0]]
    assert [b.ids.tolist() for b in plain[1::2]] == [b.ids.tolist() for b in turns[1]]


def test_a_batchs_images_are_what_was_specified(data):
    """Float32 arithmetic in the order of the documentation, one rounding each, written out slowly."""
    batch = next(images.training_batches(data, GRAPH, seed=1, epoch=0, batch=3))
    assert batch.pixels.shape == (3, 224, 224, 3)
    for image, pixels, shift in zip(batch.images, batch.pixels, batch.shift, strict=True):
        for channel in range(3):
            moved = pixels[:, :, channel].astype(np.float32) + np.float32(shift[channel])
            np.testing.assert_array_equal(image[channel], moved / np.float32(batch.scale[channel]))


def test_the_device_makes_the_same_of_pixels(data):
    batch = next(images.training_batches(data, GRAPH, seed=1, epoch=0, batch=4))
    small = Graph(
        preset="small",
        input=(3, 224, 224),
        layers=(Flatten(name="f"), Linear(name="fc", in_features=3 * 224**2, out_features=4)),
    )
    for name in ("reference", "cpu"):
        session = plugins.backends()[name].open(small, weights.initial(small), Settings())
        made = session.get(session.put_pixels(batch.pixels, batch.shift, batch.scale))
        np.testing.assert_array_equal(made, normalised(batch.pixels, batch.shift, batch.scale))


# Ten views, slowly.


def slow_ten_views(picture, graph):
    """One view after the other, by Pillow alone, as the paper describes them."""
    image = Image.fromarray(picture)
    short, size = min(image.size), graph.input[1]
    wide, tall = 256 * image.width // short, 256 * image.height // short
    left, top = (wide - 256) // 2, (tall - 256) // 2
    box = (left * image.width / wide, top * image.height / tall,
           (left + 256) * image.width / wide, (top + 256) * image.height / tall)  # fmt: skip
    square = image.resize((256, 256), Image.Resampling.BILINEAR, box)
    far, mid = 256 - size, (256 - size) // 2
    crops = [square.crop((x, y, x + size, y + size)) for y, x in [(0, 0), (0, far), (far, 0), (far, far), (mid, mid)]]
    crops += [crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for crop in crops]
    mean, scale = (np.array(v, np.float32) for v in (graph.normalisation.mean, graph.normalisation.scale))
    return [((np.asarray(crop, np.float32) - mean) / scale).transpose(2, 0, 1) for crop in crops]


def test_ten_view_evaluation_is_the_slow_one(data):
    """Exactly: the same images, the same logits, softmax outputs averaged in float64."""
    test = data.some(7)
    net = portnet.AlexNet("cpu", "torchvision", classes=4, mean=(120.0, 110.0, 100.0))
    shown = net.session
    right1, loss = 0, 0.0
    for i in range(len(test)):
        views = np.stack(slow_ten_views(test.read(i), net.graph))
        logits = shown.get(shown.infer(shown.put(views))).astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        p = (np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)).mean(axis=0)
        right1 += int(p.argmax() == test.labels[i])
        loss -= float(np.log(p[test.labels[i]]))
    result = training.evaluate(shown, net.graph, test, batch=10, views=10)
    assert (result.count, result.top1) == (7, right1 / 7)
    assert result.loss == pytest.approx(loss / 7, rel=1e-12)
    with Loader(test) as loader:
        for batch, i in zip(loader.evaluation_batches(net.graph, batch=1, views=10), range(7), strict=True):
            np.testing.assert_array_equal(batch.images, np.stack(slow_ten_views(test.read(i), net.graph)))


# What goes wrong.


def children():
    return multiprocessing.active_children()


def test_an_unreadable_picture_comes_up_by_name_and_the_loader_goes_on(folder, data, tmp_path):
    for source in folder.rglob("*.jpg"):
        path = tmp_path / source.relative_to(folder)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(source.read_bytes())
    broken = images.load(tmp_path).train
    (tmp_path / "b" / "5.jpg").write_bytes(b"no more")
    with Loader(broken, workers=2) as loader:
        with pytest.raises(PictureError, match=r"cannot read .*b/5\.jpg as a picture"):
            list(loader.evaluation_batches(GRAPH, batch=8))
        (tmp_path / "b" / "5.jpg").write_bytes((folder / "b" / "5.jpg").read_bytes())
        assert digest(loader.evaluation_batches(GRAPH, batch=8)) == digest(
            images.evaluation_batches(data, GRAPH, batch=8)
        )
    assert not children()


def test_a_killed_worker_is_an_error_and_no_wait_for_ever(data):
    with Loader(data, workers=2) as loader:
        batches = loader.training_batches(GRAPH, seed=0, epoch=0, batch=12)
        next(batches)
        os.kill(loader._workers[0].process.pid, signal.SIGKILL)
        with pytest.raises(PortNetError, match=r"a worker process that reads pictures has ended \(SIGKILL\)"):
            list(batches)
    assert not children()


def test_an_epoch_that_is_left_does_not_disturb_the_next(data):
    with Loader(data, workers=2) as loader:
        for _ in range(3):
            next(loader.training_batches(GRAPH, seed=0, epoch=7, batch=12))
        assert digest(loader.training_batches(GRAPH, seed=3, epoch=1, batch=12)) == epochs(data)[1]


def test_a_batch_stays_as_it_was_handed_out(data):
    with Loader(data, workers=2) as loader:
        kept = list(loader.training_batches(GRAPH, seed=3, epoch=1, batch=12))
    assert digest(iter(kept)) == epochs(data)[1]


def test_what_cannot_be_sent_to_a_worker():
    unsendable = DataSet(
        name="local", class_names=("a",), labels=np.zeros(4, np.int64), ids=np.arange(4), mean=(0, 0, 0),
        read=lambda i: np.zeros((9, 9, 3), np.uint8),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"how local reads its pictures cannot be sent .*or take no workers"):
        Loader(unsendable, workers=1)
    assert not children()


PROGRAM = """
import sys
import portnet
from portnet.loading import Loader

if __name__ == "__main__":
    data = portnet.load_data("synthetic").train
    loader = Loader(data, workers=2)
    batches = loader.training_batches(portnet.graph("torchvision"), seed=0, epoch=0, batch=8)
    next(batches)
    print(*(worker.process.pid for worker in loader._workers), flush=True)
    print(*(worker.memory.name for worker in loader._workers), flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no names in a folder here")
def test_nothing_is_left_behind_when_the_program_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    program = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    workers = [int(pid) for pid in program.stdout.readline().split()]
    memory = [Path("/dev/shm") / name for name in program.stdout.readline().split()]
    assert len(workers) == 2
    assert all(path.exists() for path in memory)
    program.kill()
    program.wait()
    program.stdout.close()
    program.stdin.close()
    end = time.monotonic() + 20
    while time.monotonic() < end and (any(map(alive, workers)) or any(path.exists() for path in memory)):
        time.sleep(0.1)
    assert not any(map(alive, workers))
    assert not any(path.exists() for path in memory)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_workers_load_no_torch(data):
    with Loader(data, workers=1) as loader:
        next(loader.training_batches(GRAPH, seed=0, epoch=0, batch=8))
        maps = Path(f"/proc/{loader._workers[0].process.pid}/maps")
        if not maps.exists():
            pytest.skip("what a process has loaded is told by Linux alone")
        assert "libtorch" not in maps.read_text()
