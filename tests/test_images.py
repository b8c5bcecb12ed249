import hashlib
import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from portnet import alexnet, images, philox
from portnet.errors import InputError, PictureError, UnknownName
from portnet.graph import Flatten, Graph, Linear, Normalisation
from portnet.images import DataSet, PixelBatch, Splits
from portnet.philox import Stream

RAW = alexnet.graph(classes=10, mean=(0, 0, 0))
RAW_227 = alexnet.graph("caffe", classes=10, mean=(0, 0, 0))


def small(size: int, *, classes: int = 10, normalisation: Normalisation | None = None) -> Graph:
    return Graph(
        preset="small",
        input=(3, size, size),
        layers=(Flatten(name="flatten"), Linear(name="fc", in_features=3 * size**2, out_features=classes)),
        normalisation=normalisation or Normalisation(mean=(0.0, 0.0, 0.0)),
    )


def positions(side: int = 256) -> np.ndarray:
    """A picture whose red is the column and whose green is the row."""
    y, x = np.mgrid[:side, :side]
    return np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8)


def grey(height: int, width: int, level: int = 128) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def data_set(read: Callable[[int], np.ndarray], n: int, *, classes: int = 10, **options: Any) -> DataSet:
    built = DataSet(
        name="made up",
        class_names=tuple(map(str, range(classes))),
        labels=np.arange(n) % classes,
        ids=1000 + 3 * np.arange(n),
        mean=(0.0, 0.0, 0.0),
        read=read,
    )
    return replace(built, **options)


def by_id(batches: Iterable[PixelBatch]) -> dict[int, np.ndarray]:
    return {int(i): image for b in batches for i, image in zip(b.ids, b.images, strict=True)}


def save(
    path: Path, colour: tuple[int, ...] = (200, 100, 50), mode: str = "RGB", size: tuple[int, int] = (12, 10)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


# Data sets


def test_some_of_a_data_set_are_spread_over_it():
    data = images.load("digits").train
    few = data.some(10)
    assert len(few) == 10
    places = [int(np.flatnonzero(data.ids == i)[0]) for i in few.ids]
    assert places[0] == 0
    assert places[-1] == len(data) - 1
    assert np.ptp(np.diff(places)) <= 1, "evenly"
    for i, place in enumerate(places):
        np.testing.assert_array_equal(few.read(i), data.read(place))
        assert few.labels[i] == data.labels[place]
    assert len(data.some(10**6)) == len(data)


def test_import_does_not_load_pillow() -> None:
    code = "import sys, portnet.images; print({'PIL', 'sklearn'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.fixture(scope="module")
def digits() -> Splits:
    return images.load("digits")


def test_digits_are_the_published_ones() -> None:
    folder = resources.files("portnet.data")
    with folder.joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        assert {k: (v.dtype, v.shape) for k, v in stored.items()} == {
            "pictures": (np.uint8, (1797, 8, 8)),
            "labels": (np.uint8, (1797,)),
        }
        digests = {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in stored.items()}
    assert digests["pictures"] == "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
    assert digests["labels"] == "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0"
    text = folder.joinpath("ATTRIBUTION.md").read_text(encoding="utf-8")
    assert all(word in text for word in ("10.24432/C50P49", "CC BY 4.0", "Alpaydin", "Kaynak"))


def test_digits_splits(digits: Splits) -> None:
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert np.bincount(digits.train.labels).tolist() == [136, 154, 151, 135, 143, 143, 151, 153, 138, 133]
    assert np.bincount(digits.test.labels).tolist() == [42, 28, 26, 48, 38, 39, 30, 26, 36, 47]
    assert (digits.test.ids % 5 == 0).all()
    assert (digits.train.ids % 5 != 0).all()
    assert sorted([*digits.train.ids, *digits.test.ids]) == list(range(1797))
    assert digits.train.class_names == tuple("0123456789")
    assert digits.train.whole
    assert not digits.train.flip
    assert not digits.train.colour


def test_digits_pixels_and_mean(digits: Splits) -> None:
    read = np.stack([digits.train.read(i) for i in range(len(digits.train))])
    assert read.dtype == np.uint8
    assert read.shape == (1437, 8, 8, 3)
    # Each of the 17 levels of ink, spread over 0 to 255.
    assert np.unique(read).tolist() == [int(level * 255 / 16 + 0.5) for level in range(17)]
    assert digits.train.mean == digits.test.mean == pytest.approx(read.mean(axis=(0, 1, 2)), abs=5e-4)
    # The first picture of scikit-learn's load_digits, a zero, has id 0; its second row starts 0 0 13 15.
    assert digits.test.labels[0] == 0
    assert digits.test.read(0)[1, :4, 0].tolist() == [0, 0, 207, 239]


def test_synthetic_splits_and_pictures() -> None:
    splits = images.load("synthetic")
    assert np.bincount(splits.train.labels).tolist() == [80] * 10
    assert np.bincount(splits.test.labels).tolist() == [20] * 10
    assert sorted([*splits.train.ids, *splits.test.ids]) == list(range(1000))
    picture = splits.train.read(0)
    assert (picture.shape, picture.dtype) == ((256, 256, 3), np.uint8)
    assert (picture == images.load("synthetic").train.read(0)).all()
    assert (picture != splits.train.read(1)).mean() > 0.9
    # Pinned: records are compared across machines and versions.
    assert hashlib.sha256(picture.tobytes()).hexdigest() == (
        "b899dc93f6dcf8aa4d5d4d47a8dacec05fea9937a202554d57f7202b3d873b05"
    )
    of_each_class = [splits.train.read(int(np.flatnonzero(splits.train.labels == c)[0])) for c in range(10)]
    assert splits.train.mean == pytest.approx(np.mean(of_each_class, axis=(0, 1, 2)), abs=0.1)


def test_synthetic_classes_can_be_told_apart() -> None:
    splits = images.load("synthetic")

    def coarse(data: DataSet, i: int) -> np.ndarray:
        return data.read(i).reshape(8, 32, 8, 32, 3).mean(axis=(1, 3)).ravel()

    first = [int(np.flatnonzero(splits.train.labels == c)[0]) for c in range(10)]
    centres = np.stack([coarse(splits.train, i) for i in first])
    for i in range(0, 200, 7):
        nearest = np.abs(centres - coarse(splits.test, i)).sum(axis=1).argmin()
        assert nearest == splits.test.labels[i]


def test_unknown_data_sets(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean digits"):
        images.load("digit")
    with pytest.raises(UnknownName, match=r"class/name\.jpg.*digits.*synthetic"):
        images.load("zzz")
    with pytest.raises(
        InputError, match=r"there is no folder .*nowhere.*'digits', 'synthetic', a folder .* a folder of tar"
    ):
        images.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a file"):
        images.load(save(tmp_path / "one.png"))


def test_data_set_checks_itself() -> None:
    good = data_set(lambda i: grey(8, 8), 4)
    assert len(good) == 4
    for wrong in (
        {"ids": np.arange(3)},
        {"ids": np.zeros(4, np.int64)},
        {"ids": np.arange(4, dtype=np.int32)},
        {"labels": np.array([0, 1, 2, 10])},
        {"labels": np.array([0, 1, 2, -1])},
        {"labels": np.arange(4.0)},
    ):
        with pytest.raises(InputError):
            replace(good, **wrong)


# Folders


def folder(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for i in range(count):
            save(root / name / f"{i:02}.png", (len(name), i, 7))
    return root


def test_folder_without_splits(tmp_path: Path) -> None:
    # Made out of order, with hidden files and a file that is no picture beside the classes.
    folder(tmp_path, dog=7, Cat=6, ant=4)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "dog" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "LICENSE.txt").write_text("x")
    splits = images.load(tmp_path)
    assert splits.train.name == tmp_path.name
    assert splits.train.class_names == splits.test.class_names == ("Cat", "ant", "dog")
    assert splits.test.ids.tolist() == [0, 5, 10, 15]
    assert splits.test.labels.tolist() == [0, 0, 2, 2]
    assert splits.train.ids.tolist() == [i for i in range(17) if i % 5]
    assert splits.skipped == ()
    assert [splits.test.read(i)[0, 0].tolist() for i in range(4)] == [[3, 0, 7], [3, 5, 7], [3, 0, 7], [3, 5, 7]]
    expected = np.mean([splits.train.read(i).mean(axis=(0, 1)) for i in range(len(splits.train))], axis=0)
    assert splits.train.mean == pytest.approx(expected, abs=5e-4)
    assert not splits.train.whole
    assert splits.train.flip
    assert splits.train.colour


def test_folder_mean_counts_pictures_not_pixels(tmp_path: Path) -> None:
    for i, (level, side) in enumerate([(0, 5), (10, 40), (20, 3), (30, 3), (40, 3)]):
        save(tmp_path / "a" / f"{i}.png", (level, 2 * level, 3 * level), size=(side, side))
    assert images.load(tmp_path).train.mean == (25.0, 50.0, 75.0)


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_folder_with_splits(tmp_path: Path, held_out: str) -> None:
    folder(tmp_path / "train", a=3, b=2)
    folder(tmp_path / held_out, b=4)
    (tmp_path / "list.jpg").write_bytes(b"beside the splits, nothing is looked at")
    splits = images.load(str(tmp_path))
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert splits.train.ids.tolist() == [0, 1, 2, 3, 4]
    # Numbered by the classes of the training folder, though it has only one of them.
    assert splits.test.labels.tolist() == [1, 1, 1, 1]
    assert splits.test.ids.tolist() == [5, 6, 7, 8]
    assert splits.test.read(3)[0, 0].tolist() == [1, 3, 7]


def test_val_is_taken_before_test(tmp_path: Path) -> None:
    folder(tmp_path / "train", a=1)
    folder(tmp_path / "val", a=2)
    folder(tmp_path / "test", a=3)
    assert len(images.load(tmp_path).test) == 2


def test_folders_laid_out_otherwise(tmp_path: Path) -> None:
    def wrong(name: str, match: str, error: type[Exception] = InputError, **options: bool) -> None:
        with pytest.raises(error, match=match):
            images.load(tmp_path / name, **options)

    (tmp_path / "empty").mkdir()
    wrong("empty", "has no class folders; expected a folder of pictures stored as class/name.jpg")
    folder(tmp_path / "hollow", a=6)
    (tmp_path / "hollow" / "b").mkdir()
    wrong("hollow", "class 'b' of .* has no pictures")
    save(folder(tmp_path / "stray", a=6) / "lost.JPG")
    wrong("stray", r"lost\.JPG lies outside any class")
    folder(tmp_path / "deep" / "train", a=6)
    wrong("deep", "is a folder inside a class")
    folder(tmp_path / "strangers" / "train", a=6)
    folder(tmp_path / "strangers" / "val", a=6, c=1)
    wrong("strangers", "val has classes that .*train has not: c")
    folder(tmp_path / "few", a=1, b=5)
    wrong("few", "class 'a' of .* has no readable picture to train on; every fifth")
    (folder(tmp_path / "notes", a=6) / "a" / "notes.txt").write_text("not a picture")
    wrong("notes", r"cannot read .*notes\.txt", PictureError)
    (tmp_path / "broken" / "train" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "train" / "a" / "x.png").write_bytes(b"")
    folder(tmp_path / "broken" / "val", a=1)
    wrong("broken", "class 'a' of .* has no readable picture to train on$", skip_unreadable=True)
    folder(tmp_path / "blind" / "train", a=1)
    (tmp_path / "blind" / "val" / "a").mkdir(parents=True)
    (tmp_path / "blind" / "val" / "a" / "x.png").write_bytes(b"")
    wrong("blind", "no readable picture to test on", skip_unreadable=True)


def truncated_jpeg(path: Path) -> Path:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "JPEG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return path


def test_unreadable_pictures(tmp_path: Path) -> None:
    folder(tmp_path, a=6, b=6)
    whole = images.load(tmp_path)
    short = truncated_jpeg(tmp_path / "a" / "02.png")
    (tmp_path / "b" / "04.png").write_bytes(b"GIF89a nonsense")
    with pytest.raises(PictureError, match=r"cannot read .*0[24]\.png as a picture"):
        images.load(tmp_path)
    splits = images.load(tmp_path, skip_unreadable=True)
    assert splits.skipped == (str(short), str(tmp_path / "b" / "04.png"))
    # The others keep their ids (2 was for training, 10 for testing), labels and pixels.
    assert splits.train.ids.tolist() == [i for i in whole.train.ids if i != 2]
    assert splits.test.ids.tolist() == [0, 5]
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    read = [splits.train.read(k) for k in range(len(splits.train))]
    assert splits.train.mean == pytest.approx(np.mean(read, axis=(0, 1, 2)), abs=5e-4)
    pixels = {int(i): whole.train.read(k) for k, i in enumerate(whole.train.ids) if i != 2}
    for k, i in enumerate(splits.train.ids):
        assert (read[k] == pixels[int(i)]).all()


def test_a_folder_of_more_than_a_thousand(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    good = save(tmp_path / "one.bmp", (40, 50, 60), size=(1, 1)).read_bytes()
    (tmp_path / "one.bmp").unlink()
    for i in range(1030):
        (tmp_path / "a" / f"{i:04}.bmp").write_bytes(good if i < 1029 else b"")
    splits = images.load(tmp_path, skip_unreadable=True)
    assert splits.skipped == (str(tmp_path / "a" / "1029.bmp"),)
    assert len(splits.train) + len(splits.test) == 1029
    assert splits.train.mean == (40.0, 50.0, 60.0)


def test_a_picture_that_breaks_later_is_named_by_the_batches(tmp_path: Path) -> None:
    splits = images.load(folder(tmp_path, a=12))
    (tmp_path / "a" / "07.png").unlink()
    with pytest.raises(PictureError, match=r"07\.png"):
        list(images.training_batches(splits.train, small(7), seed=0, epoch=0, batch=3))


# Files


def test_every_kind_of_picture_becomes_rgb(tmp_path: Path) -> None:
    def read(name: str, image: Image.Image, **options: Any) -> Any:
        image.save(tmp_path / name, **options)
        picture = images.read_picture(tmp_path / name)
        assert (picture.dtype, picture.shape) == (np.uint8, (image.height, image.width, 3))
        return picture[0, 0].tolist()

    size = (6, 5)
    assert read("rgb.png", Image.new("RGB", size, (1, 2, 3))) == [1, 2, 3]
    assert read("grey.png", Image.new("L", size, 77)) == [77, 77, 77]
    assert read("bit.png", Image.new("1", size, 1)) == [255, 255, 255]
    assert read("deep.png", Image.fromarray(np.full((5, 6), 0x8012, np.uint16))) == [127, 127, 127]
    assert read("deep.tiff", Image.fromarray(np.full((5, 6), 65535, np.int32))) == [255, 255, 255]
    assert read("cmyk.tiff", Image.new("CMYK", size, (0, 255, 255, 0))) == [255, 0, 0]
    assert read("cmyk.jpg", Image.new("CMYK", size, (0, 255, 255, 0))) == pytest.approx([255, 0, 0], abs=3)
    assert read("ycbcr.jpg", Image.new("YCbCr", size, (128, 128, 128))) == pytest.approx([128] * 3, abs=1)
    palette = Image.new("P", size, 1)
    palette.putpalette([9, 9, 9, 10, 20, 30])
    assert read("palette.png", palette) == [10, 20, 30]
    assert read("palette.gif", palette) == [10, 20, 30]
    assert read("palette_alpha.png", palette, transparency=bytes([255, 0])) == [255, 255, 255]
    assert read("palette_key.png", palette, transparency=1) == [255, 255, 255]
    assert read("alpha.png", Image.new("RGBA", size, (0, 0, 0, 0))) == [255, 255, 255]
    assert read("opaque.png", Image.new("RGBA", size, (5, 6, 7, 255))) == [5, 6, 7]
    assert read("half.png", Image.new("RGBA", size, (0, 0, 0, 128))) == [127, 127, 127]
    assert read("grey_alpha.png", Image.new("LA", size, (0, 0))) == [255, 255, 255]


def test_pictures_without_rgb_values(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "float.tiff")
    with pytest.raises(PictureError, match=r"float\.tiff.*floating-point"):
        images.read_picture(tmp_path / "float.tiff")
    Image.fromarray(np.full((4, 4), -1, np.int32)).save(tmp_path / "negative.tiff")
    with pytest.raises(PictureError, match="16 bits"):
        images.read_picture(tmp_path / "negative.tiff")
    with pytest.raises(PictureError, match=r"missing\.png"):
        images.read_picture(tmp_path / "missing.png")
    with pytest.raises(PictureError, match=r"short\.jpg.*truncated"):
        images.read_picture(truncated_jpeg(tmp_path / "short.jpg"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    # Four quarters of different grey, stored as the orientation says they were seen: turning them back gives 0 1 / 2 3.
    upright = np.kron(np.array([[0, 1], [2, 3]], np.uint8) * 80, np.ones((16, 24), np.uint8))
    undo = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.T,
        lambda a: np.rot90(a),
        lambda a: a[::-1, ::-1].T,
        lambda a: np.rot90(a, -1),
    ][orientation - 1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(undo(upright))).save(tmp_path / "turned.png", exif=exif)
    assert (images.read_picture(tmp_path / "turned.png") == upright[:, :, None]).all()


# preprocess


@pytest.mark.parametrize(
    ("graph", "corner"), [(RAW, 16), (RAW_227, 14), (alexnet.graph(image_size=256, mean=(0, 0, 0)), 0)]
)
def test_centre_crop(graph: Graph, corner: int) -> None:
    size = graph.input[1]
    out = images.preprocess([positions()], graph)
    assert out.shape == (1, 3, size, size)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    assert (out[0, 0] == np.arange(corner, corner + size)).all()
    assert (out[0, 1] == np.arange(corner, corner + size)[:, None]).all()
    assert (out[0, 2] == 128).all()


def test_the_long_side_is_cut_in_the_middle() -> None:
    wide = np.concatenate([grey(256, 21, 0), positions(), grey(256, 22, 0)], axis=1)
    for picture in (wide, wide.transpose(1, 0, 2)):
        expected = images.preprocess([positions() if picture is wide else positions().transpose(1, 0, 2)], RAW)
        assert (images.preprocess([picture], RAW) == expected).all()


def test_normalisation_is_the_graphs() -> None:
    paper, modern = alexnet.graph("paper2012"), alexnet.graph("torchvision")
    picture = np.broadcast_to(np.array([200, 100, 50], np.uint8), (300, 260, 3))
    out = images.preprocess([picture], paper)[0, :, 0, 0]
    assert out == pytest.approx([200 - 127.305, 100 - 119.715, 50 - 104.913], rel=1e-6)
    out = images.preprocess([picture], modern)[0, :, 5, 7]
    rgb = np.array([200, 100, 50]) / 255
    assert out == pytest.approx((rgb - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225], rel=1e-5)


def test_whole_pictures_are_scaled_straight() -> None:
    # Left half 0, right half 240: cropping would show less of both; scaling keeps the edge columns of both.
    picture = np.concatenate([grey(10, 40, 0), grey(10, 40, 240)], axis=1)
    out = images.preprocess([picture], small(8), whole=True)[0, 0]
    expected = np.asarray(Image.fromarray(picture).resize((8, 8), Image.Resampling.BILINEAR))[:, :, 0]
    assert (out == expected).all()
    assert out[0, 0] == 0
    assert out[0, -1] == 240
    assert out[0].mean() == pytest.approx(120)


def test_shrinking_does_not_alias() -> None:
    # Columns of 0 and 255 in turn become the grey between them.
    stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (512, 256, 3))
    inner = images.preprocess([stripes], RAW)
    assert np.abs(inner - 127.5).max() <= 1


def test_an_array_is_a_sequence() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    graph = small(14)
    out = images.preprocess(pictures, graph)
    assert out.shape == (3, 3, 14, 14)
    assert (out == images.preprocess(list(pictures), graph)).all()
    assert (out[2] == images.preprocess([pictures[2]], graph)[0]).all()
    # Views in another memory order are the same pictures.
    assert (out == images.preprocess(np.asfortranarray(pictures), graph)).all()


@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.integers(1, 40),
    whole=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_odd_sizes(height: int, width: int, size: int, whole: bool, seed: int) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = images.preprocess([picture], small(size), whole=whole)[0]
    image = Image.fromarray(picture)
    if whole:
        view = image.resize((size, size), Image.Resampling.BILINEAR)
    else:
        # The textbook's way: scale all of it, cut out the square, and cut the input out of that.
        square, short = round(size * 8 / 7), min(height, width)
        scaled = image.resize((square * width // short, square * height // short), Image.Resampling.BILINEAR)
        left, top = (scaled.width - square) // 2, (scaled.height - square) // 2
        inner = (square - size) // 2
        view = scaled.crop((left + inner, top + inner, left + inner + size, top + inner + size))
    assert np.abs(out - np.asarray(view, np.float32).transpose(2, 0, 1)).max() <= 1


@given(height=st.integers(1, 2000), width=st.integers(1, 2000), size=st.sampled_from([1, 7, 224, 227, 300]))
@settings(max_examples=40, deadline=None)
def test_a_plain_picture_stays_plain(height: int, width: int, size: int) -> None:
    graph = small(size, normalisation=Normalisation(mean=(1.5, 2.0, 3.0), scale=(2.0, 4.0, 8.0)))
    out = images.preprocess([np.broadcast_to(np.array([11, 18, 27], np.uint8), (height, width, 3))], graph)
    assert out.shape == (1, 3, size, size)
    assert (out == np.array([4.75, 4.0, 3.0], np.float32)[:, None, None]).all()


def test_a_very_long_picture_needs_no_more_memory_than_its_square() -> None:
    assert (images.preprocess([grey(1, 100_000)], RAW) == 128).all()
    assert (images.preprocess([grey(100_000, 1)], RAW) == 128).all()


@pytest.mark.parametrize(
    ("pictures", "match"),
    [
        (grey(8, 8), r"\(n, height, width, 3\) or a sequence.*got one array of shape \(8, 8, 3\)"),
        ([], "no pictures"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no pictures"),
        ([grey(8, 8), grey(8, 8).astype(np.float32)], r"picture 1 must be .*got float32 of shape \(8, 8, 3\)"),
        ([grey(8, 8)[:, :, 0]], r"picture 0 must be a uint8 array of shape \(height, width, 3\).*\(8, 8\)"),
        ([grey(8, 8)[:, :, :1]], r"\(8, 8, 1\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
        (np.zeros((2, 0, 8, 3), np.uint8), "at least one pixel"),
        ([np.zeros((8, 0, 3), np.uint8)], "at least one pixel"),
        (["cat.jpg"], "picture 0 must be .* got str"),
        ("cat.jpg", "got str"),
    ],
)
@pytest.mark.parametrize("function", [images.preprocess, images.ten_views])
def test_what_are_no_pictures(function: Callable[..., np.ndarray], pictures: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        function(pictures, small(7))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 9), (192,)])
def test_a_graph_that_takes_no_pictures(shape: tuple[int, ...]) -> None:
    graph = replace(small(8), input=shape, layers=(Flatten(name="flatten"),))
    for call in (
        lambda: images.preprocess([grey(8, 8)], graph),
        lambda: images.ten_views([grey(8, 8)], graph),
        lambda: images.evaluation_batches(data_set(lambda i: grey(8, 8), 4, classes=1), graph, batch=2),
    ):
        with pytest.raises(InputError, match=r"inputs of shape \(3, S, S\)"):
            call()


# Ten views


@pytest.mark.parametrize(("graph", "far", "middle"), [(RAW, 32, 16), (RAW_227, 29, 14)])
def test_ten_views(graph: Graph, far: int, middle: int) -> None:
    size = graph.input[1]
    views = images.ten_views([grey(256, 256), positions()], graph)
    assert views.shape == (2, 10, 3, size, size)
    assert views.dtype == np.float32
    corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    for k, (top, left) in enumerate(corners):
        assert (views[1, k, 0] == np.arange(left, left + size)).all()
        assert (views[1, k, 1] == np.arange(top, top + size)[:, None]).all()
        assert (views[1, k + 5] == views[1, k, :, :, ::-1]).all()
    assert (views[0] == 128).all()


def test_the_fifth_view_is_preprocess() -> None:
    pictures = [np.random.default_rng(0).integers(0, 256, (311, 402, 3), np.uint8)]
    graph = alexnet.graph("torchvision")
    assert (images.ten_views(pictures, graph)[:, 4] == images.preprocess(pictures, graph)).all()


# Batches


def test_training_order_labels_and_the_rest() -> None:
    data = data_set(lambda i: grey(9, 9, i), 11)
    batches = list(images.training_batches(data, small(7), seed=5, epoch=2, batch=4))
    assert [len(b.ids) for b in batches] == [4, 4]
    places = philox.order(5, 2, 11)[:8]
    assert np.concatenate([b.ids for b in batches]).tolist() == data.ids[places].tolist()
    assert np.concatenate([b.labels for b in batches]).tolist() == data.labels[places].tolist()
    for b in batches:
        assert isinstance(b, PixelBatch)
        assert (b.images.dtype, b.labels.dtype, b.ids.dtype) == (np.float32, np.int64, np.int64)
        assert b.images.shape == (4, 3, 7, 7)
    plain = replace(data, colour=False)
    levels = [b.images[:, 0, 0, 0] for b in images.training_batches(plain, small(7), seed=5, epoch=2, batch=4)]
    assert np.concatenate(levels).tolist() == places.tolist()
    assert len(list(images.training_batches(data, small(7), seed=5, epoch=2, batch=4, steps=1))) == 1
    assert len(list(images.training_batches(data, small(7), seed=5, epoch=2, batch=4, steps=9))) == 2


def test_a_pictures_pixels_depend_on_seed_epoch_and_id_alone() -> None:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (12, 20, 24, 3), np.uint8)
    data, graph = data_set(lambda i: pictures[i], 12), small(14)

    def draw(data: DataSet, batch: int, seed: int = 3, epoch: int = 1) -> dict[int, np.ndarray]:
        return by_id(images.training_batches(data, graph, seed=seed, epoch=epoch, batch=batch))

    alone = draw(data, 1)
    assert set(alone) == set(data.ids)
    chosen = np.array([9, 2, 5, 7])
    subset = replace(data, labels=data.labels[chosen], ids=data.ids[chosen], read=lambda i: pictures[chosen[i]])
    for other in (draw(data, 12), draw(data, 5), draw(subset, 2), draw(data, 4)):
        assert len(other) >= 4
        for i, pixels in other.items():
            assert (pixels == alone[i]).all()
    for other in (draw(data, 1, seed=4), draw(data, 1, epoch=2), draw(data, 1, seed=3 + 2**32)):
        assert not any((other[i] == alone[i]).all() for i in alone)


@pytest.mark.parametrize(("graph", "count"), [(RAW, 33), (RAW_227, 30)])
def test_crops_and_flips(graph: Graph, count: int) -> None:
    size, n, seed, epoch = graph.input[1], 1500, 11, 6
    picture = positions()
    data = data_set(lambda i: picture, n, colour=False)
    seen = []
    for b in images.training_batches(data, graph, seed=seed, epoch=epoch, batch=50):
        rows, columns = b.images[:, 1], b.images[:, 0]
        mirrored = columns[:, 0, 0] > columns[:, 0, -1]
        columns = np.where(mirrored[:, None, None], columns[:, :, ::-1], columns)
        top, left = rows[:, 0, 0], columns[:, 0, 0]
        assert (rows == (top[:, None] + np.arange(size))[:, :, None]).all()
        assert (columns == (left[:, None] + np.arange(size))[:, None, :]).all()
        seen += list(zip(b.ids, top, left, mirrored, strict=True))
    ids, top, left, mirrored = (np.array(column, np.int64) for column in zip(*seen, strict=True))
    words = philox.words(seed, Stream.CROP, ids, epoch, 2)
    assert top.tolist() == [int(w) * count // 2**32 for w in words[:, 0]]
    assert left.tolist() == [int(w) * count // 2**32 for w in words[:, 1]]
    assert mirrored.tolist() == philox.bits(seed, Stream.FLIP, ids, epoch, 1)[:, 0].tolist()
    # Every position is used, evenly: chi squared with `count` - 1 degrees of freedom, far below 2 (count - 1).
    for offsets in (top, left):
        observed = np.bincount(offsets)
        assert len(observed) == count
        assert ((observed - n / count) ** 2 / (n / count)).sum() < 2 * (count - 1)
    # Four standard deviations of a fair coin, and of a correlation.
    assert abs(mirrored.sum() - n / 2) < 4 * np.sqrt(n / 4)
    assert np.abs(np.corrcoef([top, left, mirrored])[np.triu_indices(3, 1)]).max() < 4 / np.sqrt(n)


def test_colour_noise() -> None:
    n = 6000
    picture = grey(8, 8)
    scale = (1.0, 2.0, 4.0)
    graph = small(2, normalisation=Normalisation(mean=(100.0, 110.0, 120.0), scale=scale))
    batches = images.training_batches(data_set(lambda i: picture, n), graph, seed=1, epoch=0, batch=n)
    batch = next(batches)
    assert (batch.images == batch.images[:, :, :1, :1]).all()
    noise = batch.images[:, :, 0, 0] * scale + (100, 110, 120) - 128
    # The values of cuda-convnet2, a component a column.
    vectors = np.array([[0.418, -0.713, -0.564], [-0.817, -0.024, -0.576], [0.397, 0.701, -0.592]])
    deviations = np.array([19.7208, 37.0939, 121.7801])
    covariance = vectors @ np.diag((0.1 * deviations) ** 2) @ vectors.T
    root = np.sqrt(np.diag(covariance))
    assert np.abs(noise.mean(axis=0) / root).max() < 4 / np.sqrt(n)
    assert np.abs((np.cov(noise.T) - covariance) / np.outer(root, root)).max() < 4 * np.sqrt(2 / n)
    alpha = noise @ vectors / deviations
    assert alpha.std(axis=0) == pytest.approx([0.1] * 3, rel=4 / np.sqrt(2 * n))
    drawn = 0.1 * philox.normal(philox.words(1, Stream.COLOUR, batch.ids, 0, 3)) * deviations
    assert noise == pytest.approx(drawn @ vectors.T, abs=1e-4)


def test_flags_turn_augmentation_off() -> None:
    data = data_set(lambda i: positions(), 40)
    plain = replace(data, flip=False, colour=False)
    for b in images.training_batches(plain, RAW, seed=0, epoch=0, batch=8, steps=2):
        assert (np.diff(b.images[:, 0], axis=2) == 1).all()
        assert (b.images[:, 2] == 128).all()
    whole = replace(plain, whole=True)
    expected = images.preprocess([positions()], RAW, whole=True)
    for b in images.training_batches(whole, RAW, seed=0, epoch=0, batch=8, steps=2):
        assert (b.images == expected).all()
    flipped = by_id(images.training_batches(replace(whole, flip=True), RAW, seed=0, epoch=0, batch=40))
    mirrored = [bool((image == expected[0, :, :, ::-1]).all()) for image in flipped.values()]
    assert 0 < sum(mirrored) < 40
    assert all(m or (image == expected[0]).all() for m, image in zip(mirrored, flipped.values(), strict=True))


def test_evaluation_batches(digits: Splits) -> None:
    data = data_set(lambda i: grey(9 + i, 12, i), 11)
    batches = list(images.evaluation_batches(data, small(7), batch=4))
    assert [len(b.ids) for b in batches] == [4, 4, 3]
    assert np.concatenate([b.ids for b in batches]).tolist() == data.ids.tolist()
    assert np.concatenate([b.labels for b in batches]).tolist() == data.labels.tolist()
    assert np.concatenate([b.images for b in batches])[:, 1, 3, 3].tolist() == list(range(11))
    cropped = next(images.evaluation_batches(data_set(lambda i: positions(), 2), RAW, batch=2))
    assert (cropped.images == images.preprocess([positions()], RAW)).all()
    first = next(images.evaluation_batches(digits.test, RAW, batch=3))
    pictures = [digits.test.read(i) for i in range(3)]
    assert (first.images == images.preprocess(pictures, RAW, whole=True)).all()
    assert first.labels.tolist() == digits.test.labels[:3].tolist()


def test_digits_normalised_by_their_mean_are_centred(digits: Splits) -> None:
    graph = small(16, normalisation=Normalisation(mean=digits.train.mean))
    batch = next(images.training_batches(digits.train, graph, seed=0, epoch=0, batch=1437))
    assert abs(batch.images.mean()) < 1


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"batch": 2.0}, "batch must be an integer"),
        ({"batch": True}, "batch must be an integer"),
        ({"batch": 13}, "a batch of 13 cannot be drawn from the 12 pictures of made up"),
        ({"seed": -1}, "seed must be an integer from 0 to"),
        ({"seed": 2**64}, "seed must be an integer from 0 to"),
        ({"epoch": -1}, "epoch must be"),
        ({"epoch": 2**32}, "epoch must be"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(wrong: dict[str, int], match: str) -> None:
    arguments = {"seed": 0, "epoch": 0, "batch": 4} | wrong
    with pytest.raises(InputError, match=match):
        images.training_batches(data_set(lambda i: grey(8, 8), 12), small(7), **arguments)


def test_a_network_with_too_few_outputs() -> None:
    data = data_set(lambda i: grey(8, 8), 12)
    with pytest.raises(InputError, match="10 classes and the network 9 outputs; make the network with classes=10"):
        images.training_batches(data, small(7, classes=9), seed=0, epoch=0, batch=4)
    with pytest.raises(InputError, match="make the network with classes=10"):
        images.evaluation_batches(data, small(7, classes=9), batch=4)
    with pytest.raises(InputError, match="batch must be"):
        images.evaluation_batches(data, small(7), batch=0)


def test_a_data_set_that_reads_something_else() -> None:
    data = data_set(lambda i: grey(8, 8).astype(float), 4)
    with pytest.raises(InputError, match="what made up reads at 0 must be a uint8 array"):
        next(images.evaluation_batches(data, small(7), batch=1))


def test_abandoned_batches_leave_no_threads() -> None:
    before = threading.active_count()
    batches = images.training_batches(data_set(lambda i: grey(8, 8), 12), small(7), seed=0, epoch=0, batch=2)
    next(batches)
    del batches
    assert threading.active_count() == before
