"""Tar shards: the same pictures as the folder they were made of, others' layout, damage, the commands."""

import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import portnet
from portnet import images, loading, shards
from portnet.cli import main
from portnet.contract import Place
from portnet.errors import InputError, PictureError
from portnet.loading import Loader

GRAPH = portnet.graph("caffe", image_size=67, classes=3)


def picture(seed, height=90, width=110):
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 11, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """45 pictures of three classes, one of them damaged, one a PNG."""
    root = tmp_path_factory.mktemp("pictures") / "birds"
    for i in range(45):
        path = root / ("crow", "rook", "jay")[i % 3] / f"{i}.{'png' if i == 7 else 'JPG'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i, 80 + i, 130 - i).save(path)
    (root / "rook" / "10.JPG").write_bytes((root / "rook" / "10.JPG").read_bytes()[:500])
    return root


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("packed") / "shards"
    made = shards.pack(folder, target, shard_bytes=20_000, skip_unreadable=True)
    assert (made.pictures, made.path) == (44, target)
    assert made.shards > 3
    assert made.bytes == sum(path.stat().st_size for path in target.glob("*.tar"))
    assert [Path(name).name for name in made.skipped] == ["10.JPG"]
    return target


def digest(data, batches=20, *, workers=0, batch=6):
    with Loader(data, workers=workers) as loader:
        return loading.digest(loader, GRAPH, seed=3, batch=batch, batches=batches)


def tar(path, members):
    with tarfile.open(path, "w") as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def jpeg(seed):
    out = io.BytesIO()
    picture(seed).save(out, "JPEG")
    return out.getvalue()


# The same pictures.


def test_the_data_set_is_the_folders(folder, packed):
    plain, ours = portnet.load_data(folder, skip_unreadable=True), portnet.load_data(packed)
    assert ours.skipped == plain.skipped
    for one, other in ((plain.train, ours.train), (plain.test, ours.test)):
        assert (one.name, one.class_names, one.mean) == (other.name, other.class_names, other.mean)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_array_equal(one.ids, other.ids)
        for i in range(len(one)):
            np.testing.assert_array_equal(one.read(i), other.read(i))


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_the_same_pixels_from_a_folder_and_from_shards(folder, packed, workers):
    expected = digest(images.load(folder, skip_unreadable=True).train)
    assert expected[1] == 20  # of 5 in an epoch
    for source in (folder, packed):
        assert digest(portnet.load_data(source, skip_unreadable=True).train, workers=workers) == expected


def test_the_same_pixels_split_over_two(folder, packed):
    whole, parts = images.load(folder, skip_unreadable=True).train, portnet.load_data(packed).train
    how = {"seed": 3, "epoch": 2, "batch": 6}
    with Loader(parts, workers=2) as loader:
        halves = [list(loader.training_batches(GRAPH, **how, place=Place(part=i, parts=2))) for i in (0, 1)]
    for batch, *own in zip(images.training_batches(whole, GRAPH, **how), *halves, strict=True):
        for name in ("pixels", "shift", "labels", "ids"):
            np.testing.assert_array_equal(np.concatenate([getattr(p, name) for p in own]), getattr(batch, name))


def test_a_digest_tells_seeds_sizes_and_lengths_apart(packed):
    data = portnet.load_data(packed).train
    with Loader(data) as loader:
        found = [loading.digest(loader, GRAPH, seed=s, batch=b, batches=n)[0] for s, b, n in
                 [(0, 6, 4), (1, 6, 4), (0, 12, 2), (0, 6, 3)]]  # fmt: skip
        other = replace(GRAPH, normalisation=replace(GRAPH.normalisation, mean=(1.0, 2.0, 3.0)))
        found.append(loading.digest(loader, other, seed=0, batch=6, batches=4)[0])
    assert len(set(found)) == 5


def test_the_layout_is_webdatasets(folder, packed):
    """Any tar reads them; classes are numbers beside their pictures; whoever reads in order gets them mixed."""
    labels = []
    for path in sorted(packed.glob("train-*.tar")):
        with tarfile.open(path) as file:
            members = file.getmembers()
            contents = [file.extractfile(m).read() for m in members]
        for (one, a), (two, b) in zip(*[iter(zip(members, contents, strict=True))] * 2, strict=True):
            stem, suffix = one.name.split(".")
            assert two.name == f"{stem}.cls"
            assert suffix in ("jpg", "png")
            found = images.listing(folder).paths[int(stem)]
            assert a == found.read_bytes()
            assert ("crow", "jay", "rook")[int(b)] == found.parent.name
            labels.append(int(b))
    assert sorted(labels) != labels


def test_the_same_folder_gives_the_same_bytes(folder, packed, tmp_path):
    again = tmp_path / "again"
    shards.pack(folder, again, shard_bytes=20_000, skip_unreadable=True)
    files = sorted(path.name for path in packed.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    for name in files:
        if name.endswith(".tar"):
            assert (again / name).read_bytes() == (packed / name).read_bytes()


def test_scaled_pictures(folder, tmp_path):
    made = shards.pack(folder, tmp_path / "small", short_side=32, quality=90, skip_unreadable=True)
    data = portnet.load_data(made.path).train
    shapes = [data.read(i).shape for i in range(len(data))]
    assert {min(shape[:2]) for shape in shapes} == {32}
    assert len(set(shapes)) > 5
    colours = np.mean([data.read(i).mean(axis=(0, 1)) for i in range(len(data))], axis=0)
    np.testing.assert_allclose(data.mean, colours, atol=1e-3)
    assert made.bytes < sum(p.stat().st_size for p in folder.rglob("*.JPG")) + 44 * 2048


def test_train_and_val_folders_keep_their_split(tmp_path):
    for part, count in (("train", 5), ("val", 3)):
        for i in range(count):
            path = tmp_path / "set" / part / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(i).save(path)
    made = shards.pack(tmp_path / "set", tmp_path / "out")
    assert sorted(p.name for p in made.path.glob("*.tar")) == ["train-000000.tar", "val-000000.tar"]
    splits = portnet.load_data(made.path)
    assert (len(splits.train), len(splits.test)) == (5, 3)
    # Others' shards of that name are split so too, and without an index ours are others'.
    (made.path / shards.INDEX).unlink()
    splits = portnet.load_data(made.path)
    assert (len(splits.train), len(splits.test)) == (5, 3)


# Others' shards.


def test_shards_of_others(tmp_path):
    """Folders in names, more files in a sample, no index; every fifth picture is for the test."""
    tar(tmp_path / "a.tar", [(f"x/{i}.{kind}", content) for i in range(6) for kind, content in
                             (("json", b"{}"), ("jpg", jpeg(i)), ("cls", b"%d\n" % (i % 2)))])  # fmt: skip
    tar(tmp_path / "b.tar", [("y/0.cls", b"1"), ("y/0.seg.png", b"no picture of ours"), ("y/0.jpeg", jpeg(9))])
    splits = portnet.load_data(tmp_path)
    assert splits.train.class_names == ("0", "1")
    assert splits.test.ids.tolist() == [0, 5]
    assert splits.train.ids.tolist() == [1, 2, 3, 4, 6]
    assert splits.train.labels.tolist() == [1, 0, 1, 0, 1]
    expected = np.asarray(Image.open(io.BytesIO(jpeg(9))))
    np.testing.assert_array_equal(splits.train.read(4), expected)


def test_an_unreadable_picture_in_a_shard_is_named(tmp_path):
    samples = [(f"{i}.{kind}", content) for i in range(8) for kind, content in
               (("jpg", jpeg(i) if i != 6 else jpeg(i)[:300]), ("cls", b"0"))]  # fmt: skip
    tar(tmp_path / "a.tar", samples)
    with pytest.raises(PictureError, match=r"6\.jpg, the picture at byte \d+ of .*a\.tar"):
        portnet.load_data(tmp_path)
    splits = portnet.load_data(tmp_path, skip_unreadable=True)
    assert len(splits.skipped) == 1
    assert "a.tar" in splits.skipped[0]
    assert splits.train.ids.tolist() == [1, 2, 3, 4, 7]


def linked(path):
    with tarfile.open(path, "w") as file:
        info = tarfile.TarInfo("0.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(info)


CLASS = ("0.cls", b"0")
BROKEN = {
    "no class": (lambda p: tar(p, [("0.jpg", jpeg(0))]), "0 has a picture and no .cls beside it"),
    "a class of letters": (lambda p: tar(p, [("0.jpg", jpeg(0)), ("0.cls", b"crow")]), "must hold the number"),
    "a negative class": (lambda p: tar(p, [("0.jpg", jpeg(0)), ("0.cls", b"-1")]), "must hold the number of a class"),
    "a huge class": (lambda p: tar(p, [("0.jpg", jpeg(0)), ("0.cls", b"9" * 12)]), "must hold the number of a class"),
    "two pictures": (lambda p: tar(p, [("0.jpg", jpeg(0)), ("0.png", b""), CLASS]), "second picture of its sample"),
    "two classes": (lambda p: tar(p, [CLASS, ("0.jpg", jpeg(0)), CLASS]), "is there twice"),
    "a link": (linked, "is a link or a device"),
    "no pictures": (lambda p: tar(p, [("0.txt", b"")]), "hold no pictures"),
    "an empty file": (lambda p: p.write_bytes(b""), "hold no pictures|damaged or no plain tar"),
    "no tar": (lambda p: p.write_bytes(b"GIF89a" * 400), "damaged or no plain tar"),
    "cut off": (
        lambda p: p.write_bytes(tar(p, [CLASS, ("0.jpg", jpeg(0))]).read_bytes()[:1700]), "damaged|ends before 0.jpg"
    ),
    "compressed": (lambda p: tarfile.open(p, "w:gz").close(), "damaged or no plain tar"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_shards_that_are_refused(tmp_path, case):
    make, message = BROKEN[case]
    make(tmp_path / "a.tar")
    with pytest.raises(InputError, match=message):
        portnet.load_data(tmp_path)


def test_classes_without_pictures_are_refused(tmp_path):
    tar(tmp_path / "a.tar", [(f"{i}.{k}", c) for i in range(6) for k, c in (("jpg", jpeg(i)), ("cls", b"3"))])
    with pytest.raises(InputError, match=r"class '0' of .* has no readable picture to train on"):
        portnet.load_data(tmp_path)


# Indexes.


@pytest.fixture
def copy(packed, tmp_path):
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_an_index_of_other_shards(copy):
    last = max(copy.glob("train-*.tar"))
    with last.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match=r"are not those that .*index\.npz was written for"):
        portnet.load_data(copy)
    last.unlink()
    with pytest.raises(InputError, match="are not those"):
        portnet.load_data(copy)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", json.dumps({"format": "x"}).encode()])
def test_a_damaged_index(copy, content):
    (copy / shards.INDEX).write_bytes(content)
    with pytest.raises(InputError, match="damaged or no index"):
        portnet.load_data(copy)


def test_an_index_runs_nothing(copy):
    """Loading it unpickles nothing."""

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(copy / "made"),)

    np.savez(copy / shards.INDEX, about=np.array(Evil(), dtype=object))
    with pytest.raises(InputError, match="damaged or no index"):
        portnet.load_data(copy)
    assert not (copy / "made").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("shards", 99), ("offsets", 2**40), ("sizes", -1), ("labels", 3), ("offsets", -5)]
)
def test_an_index_that_does_not_fit(copy, name, value):
    with np.load(copy / shards.INDEX) as stored:
        arrays = dict(stored)
    arrays[name][5] = value
    np.savez(copy / shards.INDEX, **arrays)
    with pytest.raises(InputError, match="is damaged: it does not fit"):
        portnet.load_data(copy)
    arrays[name] = arrays[name][:5]
    np.savez(copy / shards.INDEX, **arrays)
    with pytest.raises(InputError, match="is damaged: it does not fit"):
        portnet.load_data(copy)


def test_an_index_of_another_format(copy):
    with np.load(copy / shards.INDEX) as stored:
        arrays = dict(stored)
    arrays["about"] = str(arrays["about"]).replace(shards.FORMAT, "portnet.shards/2")
    np.savez(copy / shards.INDEX, **arrays)
    with pytest.raises(InputError, match="are not those that"):
        portnet.load_data(copy)


def test_a_shard_cut_off_after_it_was_opened(copy):
    data = portnet.load_data(copy).train
    for path in copy.glob("train-*.tar"):
        os.truncate(path, 1024)
    with pytest.raises(PictureError, match=r"ends before the picture at byte \d+ does"):
        data.read(0), data.read(30)


# Packing that is refused leaves nothing behind.


@pytest.mark.parametrize("how", [{}, {"shard_bytes": 0}, {"short_side": 0}, {"quality": 101}])
def test_packing_that_is_refused(folder, tmp_path, how):
    expected = (InputError, "must be at least 1") if how else (PictureError, "10.JPG")
    with pytest.raises(expected[0], match=expected[1]):
        shards.pack(folder, tmp_path / "out" / "shards", **how)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_targets_that_are_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(InputError, match="is not an empty folder"):
            shards.pack(folder, target, skip_unreadable=True)
    with pytest.raises(InputError, match="no folder"):
        shards.pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert shards.pack(folder, tmp_path / "empty", skip_unreadable=True).pictures == 44


# Commands.


def run(*arguments, status=0):
    result = CliRunner().invoke(main, ["data", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result


def test_the_commands(folder, tmp_path):
    assert "10.JPG" in run("pack", folder, tmp_path / "s", status=2).stderr
    result = run("pack", folder, tmp_path / "s", "--shard-mb", 1, "--skip-unreadable")
    assert "44 pictures in 2 shards" in result.stdout
    assert "1 left out" in result.stdout
    assert "left out, unreadable" in result.stderr
    told = []
    for source in (folder, tmp_path / "s"):
        result = run("check", source, "--skip-unreadable", "--batches", 7, "--batch", 6, "--image-size", 67)
        assert "35 pictures to train on, 9 to test on, 3 classes, 1 unreadable" in result.stdout
        assert "10.JPG" in result.stderr
        told.append(result.stdout.partition("SHA-256 ")[2])
    assert told[0] == told[1]
    assert len(told[0].strip()) == 64
    broken = run("check", folder, status=1)
    assert "10.JPG" in broken.stderr
    assert "1 unreadable" in broken.stdout
    assert "there is no folder" in run("check", tmp_path / "nothing", status=2).stderr
    assert "cannot be drawn from the 35" in run("check", tmp_path / "s", "--batches", 1, status=2).stderr
