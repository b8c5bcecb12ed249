"""Pictures in, batches out: data sets, preprocessing, and the paper's augmentation.

Pictures are uint8 RGB arrays, ``(height, width, 3)``; what leaves here for a network is float32, ``(n, 3, S, S)``,
normalised as its graph says. Every random choice is Philox's, keyed by the seed, the epoch and the picture's id, so
that a picture's pixels never depend on the batch it is in. Pillow decodes and scales; it is imported where it is used,
so that importing this module stays cheap.

Sources: [P] Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks",
NIPS 2012; [2] cuda-convnet2.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from portnet import philox
from portnet.contract import Place, normalised
from portnet.errors import InputError, PictureError, UnknownName
from portnet.graph import Graph
from portnet.philox import Stream

if TYPE_CHECKING:
    from PIL import Image

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
Mean = tuple[float, float, float]

# Principal components of ImageNet's RGB values on the 0-255 scale [2]: standard deviations, and one direction a row.
_DEVIATIONS = np.array([19.7208, 37.0939, 121.7801])
_DIRECTIONS = np.array([[0.418, -0.817, 0.397], [-0.713, -0.024, 0.701], [-0.564, -0.576, -0.592]])
_COLOUR_NOISE = 0.1  # the standard deviation of alpha [P]

_LAYOUT = "a folder of pictures stored as class/name.jpg"
_FOLDERS = f"{_LAYOUT}, a folder of tar shards"
# torchvision's ImageFolder counts these as pictures.
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})

WORKERS = min(8, os.cpu_count() or 1)
ALONE = Place()


@dataclass(frozen=True, eq=False)
class Chosen:
    """Reads some of what `read` reads: picture i is its picture ``places[i]``."""

    read: Callable[[int], U8]
    places: I64

    def __call__(self, i: int) -> U8:
        return self.read(int(self.places[i]))

    def source(self, i: int) -> Callable[[], U8] | None:
        return source(self.read, int(self.places[i]))


@dataclass(frozen=True, eq=False)
class Files:
    """Reads pictures that are files of their own."""

    paths: Sequence[str]

    def __call__(self, i: int) -> U8:
        return read_picture(self.paths[i])

    def source(self, i: int) -> Callable[[], U8]:
        return partial(read_picture, self.paths[i])


def source(read: Callable[[int], U8], i: int) -> Callable[[], U8] | None:
    """What reads picture `i` alone and is small enough to be sent about with it, where `read` has such."""
    found: Callable[[int], Callable[[], U8] | None] | None = getattr(read, "source", None)
    return found(i) if found else None


@dataclass(frozen=True, eq=False)
class _Held:
    """Reads pictures that are in memory."""

    pictures: U8

    def __call__(self, i: int) -> U8:
        picture: U8 = self.pictures[i]
        return picture


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """Labelled pictures, read one at a time.

    `labels` and `ids` are int64 ``(n,)``; an id is the picture's number in the whole data set, so that the ids of its
    splits differ. `mean` is the mean of the training pictures, RGB on the 0-255 scale: what to give to the graph as
    ``mean``. `read` takes a place in ``range(n)`` and returns that picture, uint8 ``(height, width, 3)``; it raises
    `PictureError` if it cannot.

    `whole`, `flip` and `colour` say what suits the pictures: scaled to the input as a whole and never cropped,
    mirrored in training, and given colour noise in training.
    """

    name: str
    class_names: tuple[str, ...]
    labels: I64
    ids: I64
    mean: Mean
    read: Callable[[int], U8]
    whole: bool = False
    flip: bool = True
    colour: bool = True

    def __post_init__(self) -> None:
        for name, values in (("labels", self.labels), ("ids", self.ids)):
            if values.dtype != np.int64 or values.shape != (len(self.labels),):
                raise InputError(
                    f"{name} must be int64, one for each picture, got {values.dtype} of shape {values.shape}"
                )
        if len(self) and not (self.labels.min() >= 0 and self.labels.max() < len(self.class_names)):
            raise InputError(f"labels must lie in [0, {len(self.class_names)}), the number of class names")
        if len(np.unique(self.ids)) != len(self):
            raise InputError("ids must differ from one another: they key every random choice")

    def some(self, count: int) -> "DataSet":
        """That many of its pictures, evenly spaced: folders come class by class. All where there are fewer."""
        places = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(np.int64)
        return replace(self, labels=self.labels[places], ids=self.ids[places], read=Chosen(self.read, places))

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """A data set in two parts, and the files of the pictures that could not be read and were left out."""

    train: DataSet
    test: DataSet
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """What a session takes: `images` float32 ``(n, 3, S, S)``, `labels` and `ids` int64 ``(n,)``."""

    images: F32
    labels: I64
    ids: I64


@dataclass(frozen=True, kw_only=True, eq=False)
class PixelBatch:
    """A batch as pictures come: cut, scaled and mirrored, but in a quarter of the bytes of what a network takes.

    `pixels` is uint8 ``(n, S, S, 3)``, `shift` float32 ``(n, 3)`` what to add to each picture's colours (its noise less
    the mean), `scale` float32 ``(3,)`` what to divide by; `labels` and `ids` are int64 ``(n,)``. With `views` pictures
    of each image, `pixels` and `shift` are that many times as long.
    """

    pixels: U8
    shift: F32
    scale: F32
    labels: I64
    ids: I64

    @property
    def images(self) -> F32:
        """The network's input: float32 ``(n, 3, S, S)``; see `portnet.contract.normalised`."""
        return normalised(self.pixels, self.shift, self.scale)


def load(data: str | os.PathLike[str], *, skip_unreadable: bool = False) -> Splits:
    """The data set of that name, or in that folder.

    ``"digits"``: 1,797 handwritten digits of 8x8 pixels (E. Alpaydin, C. Kaynak, doi:10.24432/C50P49, CC BY 4.0),
    1,437 to train on and 360 to test on; a class has 133 to 154 and 26 to 48 of them.

    ``"synthetic"``: 1,000 pictures of 256x256 pixels in 10 classes, 80 of a class to train on and 20 to test on: a
    coarse pattern of its class under noise, computed when read.

    Otherwise a folder with a folder of pictures for each class, laid out as for torchvision's ImageFolder: classes
    are numbered in the order of their names, hidden files are ignored, and every other file in a class folder is
    taken to be a picture. If it has folders ``train`` and ``val`` (or else ``test``), each laid out so, those are the
    splits. Every picture is read once here, so that an unreadable one is found before training starts; the mean
    counts each training picture equally.

    Where the data set has no splits of its own, the pictures whose id is a multiple of 5 are the test split.

    Raises `UnknownName` for a name that is neither, `InputError` for a folder laid out in another way, and
    `PictureError` for a picture that cannot be read; with `skip_unreadable` that picture is left out instead, and
    named in `Splits.skipped`. Pictures keep their ids whether or not others are left out.
    """
    if isinstance(data, str) and data in _BUILT_IN:
        return _BUILT_IN[data]()
    root = Path(data).expanduser()
    if root.is_dir():
        return _folder(root, skip_unreadable=skip_unreadable)
    if root.exists():
        raise InputError(f"{root} is a file; expected {', '.join(map(repr, _BUILT_IN))}, {_FOLDERS}")
    if root.name == str(data):
        raise UnknownName("data set", root.name, [*_BUILT_IN, _FOLDERS])
    raise InputError(f"there is no folder {root}; expected {', '.join(map(repr, _BUILT_IN))}, {_FOLDERS}")


def read_picture(path: str | os.PathLike[str]) -> U8:
    """The picture in that file as it is meant to be seen: uint8 ``(height, width, 3)``, RGB.

    Greyscale, palette and CMYK become RGB (CMYK without a colour profile), 16 bits become 8, transparency becomes
    white, EXIF's orientation is applied, and of several frames the first is taken. Raises `PictureError` naming the
    file if it is missing, truncated, no picture, or of a kind that has no RGB values.
    """
    return decode(path, os.fspath(path))


def decode(file: str | os.PathLike[str] | IO[bytes], name: str) -> U8:
    """The picture in a file that is called `name`, or in an open one; see `read_picture`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)
    # Pillow's decoders raise whatever the damage leads them to, from OSError to struct.error.
    except Exception as error:
        raise PictureError(
            f"cannot read {name} as a picture ({error}); replace or remove it, or skip unreadable pictures"
        ) from error


def preprocess(pictures: U8 | Sequence[U8], graph: Graph, *, whole: bool = False) -> F32:
    """Pictures of any size to the graph's input of SxS pixels: float32 ``(n, 3, S, S)``.

    `pictures` is a uint8 array ``(n, height, width, 3)``, or a sequence of uint8 arrays ``(height, width, 3)`` of any
    sizes; RGB. The short side is scaled to 256 pixels (for S from 224 to 256 [P]; otherwise to ``round(8 S / 7)``),
    the central square cut out of that, and the central SxS out of the square; offsets are rounded down. With `whole`
    the picture is scaled straight to SxS instead, whatever its proportions. Then ``(pixel - mean) / scale`` as in
    ``graph.normalisation``, on the 0-255 scale.

    Scaling is Pillow's bilinear filter, which covers all source pixels when it shrinks (antialiasing), and rounds to
    uint8. Raises `InputError` for no pictures, another dtype, rank or number of channels, a picture without pixels,
    or a graph whose input is not ``(3, S, S)``.
    """
    size = input_size(graph)
    checked = _each(pictures)
    pixels = np.stack([_view(picture, size, whole=whole) for picture in checked])
    return normalised(pixels, *_shift_and_scale(graph, len(pixels)))


def ten_views(pictures: U8 | Sequence[U8], graph: Graph) -> F32:
    """Ten views of each picture, whose outputs the paper averages at test: float32 ``(n, 10, 3, S, S)``.

    Of the square that `preprocess` cuts: top left, top right, bottom left, bottom right and centre, then the mirror
    images of these five in the same order. The fifth is what `preprocess` gives. `pictures`, scaling and errors are
    those of `preprocess`.
    """
    size = input_size(graph)
    square = square_size(size)
    checked = _each(pictures)
    pixels = np.empty((len(checked), 10, size, size, 3), np.uint8)
    for picture, slots in zip(checked, pixels, strict=True):
        _ten(_square(picture, square), slots)
    flat = pixels.reshape(-1, size, size, 3)
    return normalised(flat, *_shift_and_scale(graph, len(flat))).reshape(-1, 10, 3, size, size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Order:
    """A batch that is yet to be read: which pictures, and what to make of each. It is small, and can be sent about.

    `places` are places in the data set. `size` is S; with `whole` a picture is scaled to it as it is. Otherwise the
    ten views are cut out of its square of ``square_size(S)`` pixels where `views` is 10, or what begins at `corners`,
    int64 ``(n, 2)``, top and left; and what is in `mirrored`, bool ``(n,)``, is mirrored. The rest is `PixelBatch`'s.
    """

    places: I64
    corners: I64
    mirrored: npt.NDArray[np.bool_]
    size: int
    whole: bool
    views: int
    shift: F32
    scale: F32
    labels: I64
    ids: I64

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its pixels: ``(n, views, S, S, 3)``."""
        return len(self.places), self.views, self.size, self.size, 3

    def empty(self) -> U8:
        """Room for its pixels."""
        return np.empty(self.shape, np.uint8)

    def part(self, which: range) -> "Order":
        """Some of its pictures, one after the other."""
        some = slice(which.start, which.stop)
        names = ("places", "corners", "mirrored", "labels", "ids")
        return replace(self, **{name: getattr(self, name)[some] for name in names})

    def fill(self, i: int, picture: U8, slot: U8) -> None:
        """Cut picture number `i` of the batch into `slot`, uint8 ``(views, S, S, 3)``."""
        if self.whole:
            pixels = _scale(picture, self.size)
        else:
            square = _square(picture, square_size(self.size))
            if self.views == 10:
                _ten(square, slot)
                return
            top, left = self.corners[i]
            pixels = square[top : top + self.size, left : left + self.size]
        slot[0] = pixels[:, ::-1] if self.mirrored[i] else pixels

    def batch(self, pixels: U8) -> PixelBatch:
        """The batch, once its pixels are there."""
        flat = pixels.reshape(-1, self.size, self.size, 3)
        return PixelBatch(pixels=flat, shift=self.shift, scale=self.scale, labels=self.labels, ids=self.ids)


def training_batches(data: DataSet, graph: Graph, **how: Any) -> Iterator[PixelBatch]:
    """One epoch of augmented batches, read in this process; see `training_orders` for the arguments and errors.

    Raises `PictureError` from the reading.
    """
    return read_batches(data, training_orders(data, graph, **how))


def training_orders(
    data: DataSet,
    graph: Graph,
    *,
    seed: int,
    epoch: int,
    batch: int,
    steps: int | None = None,
    first: int = 0,
    place: Place = ALONE,
) -> Iterator[Order]:
    """The augmented batches of one epoch, of `batch` pictures each: at most `steps` of them, after the `first`.

    Of each batch only the part that is this process's by `place` is ordered. The order is
    ``philox.order(seed, epoch, len(data))``; what remains after the last full batch is left out of this epoch. Each
    picture is cut and scaled to a square as in `preprocess`, of which a random SxS is taken (33x33 positions at 224);
    with probability 0.5 it is mirrored; and each pixel has ``sum_k alpha_k deviation_k direction_k`` added to its RGB
    values, with alpha_k from N(0, 0.1^2), one for each picture and principal component k of ImageNet's colours. That is
    what [2] does; the paper's text multiplies alpha by the eigenvalue, the square of the deviation. The data set's
    `whole`, `flip` and `colour` say which of these apply.

    A picture's pixels depend on nothing but (seed, epoch, id). Raises `InputError` for arguments out of range, more
    classes than the graph has outputs, fewer pictures than one batch takes, or a batch that has no such equal parts.
    """
    _check_batches(data, graph, batch)
    _check_integer("seed", seed, 0, 2**64 - 1)
    _check_integer("epoch", epoch, 0, 2**32 - 1)
    _check_integer("first", first, 0)
    if steps is not None:
        _check_integer("steps", steps, 1)
    if batch > len(data):
        raise InputError(f"a batch of {batch} cannot be drawn from the {len(data)} pictures of {data.name}")
    if batch % place.parts:
        raise InputError(f"a batch of {batch} cannot be cut into {place.parts} equal parts; give a multiple of them")
    size, part = input_size(graph), batch // place.parts
    positions = square_size(size) - size + 1
    mean, scale = graph.normalisation.mean, np.array(graph.normalisation.scale, np.float32)
    available = len(data) // batch
    last = available if steps is None else min(available, first + steps)

    def orders() -> Iterator[Order]:
        shuffled = philox.order(seed, epoch, len(data))
        for number in range(first, last):
            start = number * batch + place.part * part
            places = shuffled[start : start + part]
            ids = data.ids[places]
            noise = _colour_noise(ids, seed, epoch) * data.colour
            yield Order(
                places=places,
                corners=_crop_corners(ids, seed, epoch, positions),
                mirrored=philox.bits(seed, Stream.FLIP, ids, epoch, 1)[:, 0] & data.flip,
                size=size,
                whole=data.whole,
                views=1,
                shift=(noise - mean).astype(np.float32),
                scale=scale,
                labels=data.labels[places],
                ids=ids,
            )

    return orders()


def evaluation_batches(data: DataSet, graph: Graph, **how: Any) -> Iterator[PixelBatch]:
    """Every picture once, read in this process; see `evaluation_orders` for the arguments and errors.

    Raises `PictureError` from the reading.
    """
    return read_batches(data, evaluation_orders(data, graph, **how))


def evaluation_orders(
    data: DataSet, graph: Graph, *, batch: int, views: int = 1, place: Place = ALONE
) -> Iterator[Order]:
    """Every picture once, in order, as `preprocess` makes it; the last batch holds what remains, perhaps fewer.

    With `views` of 10 each picture is there as `ten_views` makes it, one view after the other. Where several processes
    take part by `place`, whole batches go to each by turns. Raises `InputError` for a batch below 1, more classes than
    the graph has outputs, or ten views of pictures that are scaled whole.
    """
    _check_batches(data, graph, batch)
    if views not in (1, 10):
        raise InputError(f"views must be 1 (centre) or 10 (corners, centre and their mirrors), got {views}")
    if views == 10 and data.whole:
        raise InputError("ten views need pictures that suit cropping, not a set scaled whole")
    size = input_size(graph)
    corner = (square_size(size) - size) // 2

    def orders() -> Iterator[Order]:
        for i in range(batch * place.part, len(data), batch * place.parts):
            places = np.arange(i, min(i + batch, len(data)), dtype=np.int64)
            shift, scale = _shift_and_scale(graph, len(places) * views)
            yield Order(
                places=places,
                corners=np.full((len(places), 2), corner),
                mirrored=np.zeros(len(places), bool),
                size=size,
                whole=data.whole,
                views=views,
                shift=shift,
                scale=scale,
                labels=data.labels[places],
                ids=data.ids[places],
            )

    return orders()


def read_batches(data: DataSet, orders: Iterable[Order]) -> Iterator[PixelBatch]:
    """A batch for each order, one after the other, read in this process."""
    # Threads, since decoding and scaling release the interpreter's lock. They work only between two batches, and so
    # take nothing from a step that is being timed.
    with ThreadPoolExecutor(WORKERS) as pool:
        for order in orders:
            pixels = order.empty()
            for _ in pool.map(partial(read_into, data, order), range(len(pixels)), pixels):
                pass
            yield order.batch(pixels)


def read_into(data: DataSet, order: Order, i: int, slot: U8) -> None:
    """Read picture number `i` of an order into `slot`."""
    place = int(order.places[i])
    order.fill(i, check_picture(data.read(place), f"what {data.name} reads at {place}"), slot)


def _crop_corners(ids: I64, seed: int, epoch: int, positions: int) -> I64:
    """Top and left of each picture's crop, evenly from ``range(positions)``: ``(n, 2)``."""
    drawn = philox.words(seed, Stream.CROP, ids, epoch, 2).astype(np.int64)
    return drawn * positions >> 32


def _colour_noise(ids: I64, seed: int, epoch: int) -> F64:
    """What to add to each picture's RGB values: ``(n, 3)``."""
    alpha = _COLOUR_NOISE * philox.normal(philox.words(seed, Stream.COLOUR, ids, epoch, 3))
    # Not a matrix product: libraries differ in its order of summation.
    noise: F64 = ((alpha * _DEVIATIONS)[:, :, None] * _DIRECTIONS).sum(axis=1)
    return noise


def square_size(size: int) -> int:
    """To how many pixels the short side is scaled for a network of `size`: 256 for those of ImageNet [P]."""
    return 256 if 224 <= size <= 256 else round(size * 8 / 7)


def _view(picture: U8, size: int, *, whole: bool) -> U8:
    """What a network is shown of a picture outside training: ``(size, size, 3)``."""
    if whole:
        return _scale(picture, size)
    square = square_size(size)
    corner = (square - size) // 2
    return _square(picture, square)[corner : corner + size, corner : corner + size]


def _square(picture: U8, size: int) -> U8:
    """The central square of a picture whose short side is scaled to `size`: ``(size, size, 3)``."""
    height, width = picture.shape[:2]
    short = min(height, width)
    tall, wide = size * height // short, size * width // short
    top, left = (tall - size) // 2, (wide - size) // 2
    # Only the square is computed: scaled at full length, a picture of 1x100,000 pixels would fill gigabytes.
    return _scale(
        picture,
        size,
        (left * width / wide, top * height / tall, (left + size) * width / wide, (top + size) * height / tall),
    )


def _scale(picture: U8, size: int, box: tuple[float, float, float, float] | None = None) -> U8:
    """The part of a picture in `box` (left, top, right, bottom), or all of it: ``(size, size, 3)``."""
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR, box))


def _ten(square: U8, slots: U8) -> None:
    """The ten views of a square into ``(10, S, S, 3)``; see `ten_views`."""
    size = slots.shape[1]
    far, middle = len(square) - size, (len(square) - size) // 2
    for view, (top, left) in enumerate([(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]):
        slots[view] = square[top : top + size, left : left + size]
        slots[view + 5] = slots[view, :, ::-1]


def _shift_and_scale(graph: Graph, count: int) -> tuple[F32, F32]:
    """What to add to each of `count` pictures' colours outside training, and what to divide them by."""
    shift = np.tile(-np.array(graph.normalisation.mean, np.float32), (count, 1))
    return shift, np.array(graph.normalisation.scale, np.float32)


def input_size(graph: Graph) -> int:
    """S of a graph that takes pictures, ``(3, S, S)``. Raises `InputError` for another input."""
    if len(graph.input) != 3 or graph.input[0] != 3 or graph.input[1] != graph.input[2]:
        raise InputError(f"pictures make inputs of shape (3, S, S), and this graph takes {graph.input}")
    return graph.input[1]


def _each(pictures: U8 | Sequence[U8]) -> list[U8]:
    if isinstance(pictures, np.ndarray) and pictures.ndim != 4:
        raise InputError(
            "pictures must be one array of shape (n, height, width, 3) or a sequence of arrays of shape "
            f"(height, width, 3), got one array of shape {pictures.shape}"
        )
    listed = [check_picture(picture, f"picture {i}") for i, picture in enumerate(pictures)]
    if not listed:
        raise InputError("there are no pictures; expected at least one")
    return listed


def check_picture(picture: object, name: str) -> U8:
    """A picture, which is called `name`, or `InputError` where it is none."""
    if not isinstance(picture, np.ndarray):
        found = type(picture).__name__
    elif picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
        found = f"{picture.dtype} of shape {picture.shape}"
    else:
        return picture
    raise InputError(
        f"{name} must be a uint8 array of shape (height, width, 3) with at least one pixel, RGB from 0 to 255; "
        f"got {found}"
    )


def _check_batches(data: DataSet, graph: Graph, batch: int) -> None:
    _check_integer("batch", batch, 1)
    if len(data.class_names) > graph.classes:
        raise InputError(
            f"{data.name} has {len(data.class_names)} classes and the network {graph.classes} outputs; "
            f"make the network with classes={len(data.class_names)}"
        )


def _check_integer(name: str, value: int, least: int, most: int | None = None) -> None:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be an integer {limits}, got {value!r}")


def _rgb(image: "Image.Image") -> U8:
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("its greys do not fit in 16 bits")
        return np.repeat((deep // 257).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its greys are floating-point numbers of unknown range")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def parts(data: DataSet, for_test: npt.NDArray[np.bool_], skipped: tuple[str, ...] = ()) -> Splits:
    """A data set in its two splits."""

    def part(places: I64) -> DataSet:
        return replace(data, labels=data.labels[places], ids=data.ids[places], read=Chosen(data.read, places))

    return Splits(train=part(np.flatnonzero(~for_test)), test=part(np.flatnonzero(for_test)), skipped=skipped)


def _rounded(mean: F64) -> Mean:
    red, green, blue = (round(float(m), 3) for m in mean)
    return red, green, blue


def _digits() -> Splits:
    with resources.files("portnet.data").joinpath("digits.npz").open("rb") as file:
        stored = np.load(file, allow_pickle=False)
        ink, labels = stored["pictures"], stored["labels"].astype(np.int64)
    grey = ((ink.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    pictures = np.repeat(grey[:, :, :, None], 3, axis=3)
    pictures.setflags(write=False)
    ids = np.arange(len(labels), dtype=np.int64)
    for_test = ids % 5 == 0
    digits = DataSet(
        name="digits",
        class_names=tuple("0123456789"),
        labels=labels,
        ids=ids,
        mean=_rounded(pictures[~for_test].mean(axis=(0, 1, 2))),
        read=_Held(pictures),
        whole=True,
        flip=False,
        colour=False,
    )
    return parts(digits, for_test)


def _synthetic() -> Splits:
    classes, side, cells = 10, 256, 8
    ids = np.arange(1000, dtype=np.int64)
    # By fives, so that taking every fifth picture for the test takes as many of each class.
    labels = ids // 5 % classes
    # Patterns are drawn at step 0 and noise at step 1.
    patterns = 64 + _random_bytes(np.arange(classes), 0, cells * cells * 3).reshape(classes, cells, cells, 3) // 2
    synthetic = DataSet(
        name="synthetic",
        class_names=tuple(f"pattern {c}" for c in range(classes)),
        labels=labels,
        ids=ids,
        mean=_rounded(patterns.mean(axis=(0, 1, 2)) - 0.5),
        read=_Patterns(patterns, labels, side),
    )
    return parts(synthetic, ids % 5 == 0)


@dataclass(frozen=True, eq=False)
class _Patterns:
    """Makes pictures of `side` pixels: the coarse pattern of its class under noise."""

    patterns: U8
    labels: I64
    side: int

    def __call__(self, i: int) -> U8:
        times = self.side // self.patterns.shape[1]
        # A pattern in [64, 192) under noise in [-32, 32) stays within 0 to 255, so that nothing is clipped.
        noise = _random_bytes(i, 1, self.side * self.side * 3).reshape(self.side, self.side, 3) // 4
        pattern = self.patterns[self.labels[i]].repeat(times, axis=0).repeat(times, axis=1)
        picture: U8 = pattern - 32 + noise
        return picture


def _random_bytes(index: npt.ArrayLike, step: int, count: int) -> U8:
    drawn: U8 = philox.words(0, Stream.SYNTHETIC, index, step, count // 4).astype("<u4").view(np.uint8)
    return drawn


_BUILT_IN: dict[str, Callable[[], Splits]] = {"digits": _digits, "synthetic": _synthetic}


@dataclass(frozen=True, kw_only=True, eq=False)
class Listing:
    """Pictures by their ids, 0, 1, ...: `paths`, `labels` and whether each is `for_test`, as every fifth may be."""

    class_names: tuple[str, ...]
    paths: list[Path]
    labels: I64
    for_test: npt.NDArray[np.bool_]
    every_fifth: bool


def listing(root: Path) -> Listing:
    """What a folder of pictures holds, none of which is read. Raises `InputError` for another layout."""
    inside = {path.name for path in _visible(root) if path.is_dir()}
    test = next((name for name in ("val", "test") if name in inside), None) if "train" in inside else None
    if test is None:
        classes = _classes(root)
        parts = [classes]
    else:
        classes = _classes(root / "train")
        parts = [classes, _classes(root / test)]
        if strangers := sorted(parts[1].keys() - classes.keys()):
            raise InputError(f"{root / test} has classes that {root / 'train'} has not: {', '.join(strangers)}")
    number = {name: label for label, name in enumerate(classes)}
    paths = [path for found in parts for files in found.values() for path in files]
    ids = np.arange(len(paths), dtype=np.int64)
    return Listing(
        class_names=tuple(classes),
        paths=paths,
        labels=np.array([number[name] for found in parts for name, files in found.items() for _ in files], np.int64),
        for_test=ids % 5 == 0 if test is None else ids >= sum(map(len, classes.values())),
        every_fifth=test is None,
    )


def _folder(root: Path, *, skip_unreadable: bool) -> Splits:
    found = listing(root)
    names = [str(path) for path in found.paths]
    return readable_splits(root, found, Files(names), names.__getitem__, skip_unreadable=skip_unreadable)


def readable_splits(
    root: Path, found: Listing, read: Callable[[int], U8], name: Callable[[int], str], *, skip_unreadable: bool
) -> Splits:
    """The data set of what a folder holds, once each picture was read: those that cannot be are left out, by name."""
    colours, readable = _means(read, len(found.labels), skip_unreadable=skip_unreadable)
    kept = np.flatnonzero(readable)
    data = DataSet(
        name=root.resolve().name,
        class_names=found.class_names,
        labels=found.labels[kept],
        ids=kept,
        mean=checked_mean(root, found, colours, readable),
        read=Chosen(read, kept),
    )
    return parts(data, found.for_test[kept], tuple(name(i) for i in np.flatnonzero(~readable).tolist()))


def checked_mean(root: Path, found: Listing, colours: F64, readable: npt.NDArray[np.bool_]) -> Mean:
    """The mean of the training pictures. Raises `InputError` where a class has none, or the test split is empty."""
    trained_on = np.bincount(found.labels[readable & ~found.for_test], minlength=len(found.class_names))
    if not trained_on.all():
        raise InputError(
            f"class {found.class_names[trained_on.argmin()]!r} of {root} has no readable picture to train on"
            + ("; every fifth of all pictures is kept for testing" if found.every_fifth else "")
        )
    if not np.any(readable & found.for_test):
        raise InputError(f"{root} has no readable picture to test on")
    return _rounded(colours[readable & ~found.for_test].mean(axis=0))


def _means(read: Callable[[int], U8], count: int, *, skip_unreadable: bool) -> tuple[F64, npt.NDArray[np.bool_]]:
    """The mean colour of each picture, ``(n, 3)``, and which of them can be read."""
    found, readable = np.zeros((count, 3)), np.ones(count, bool)

    def one(i: int) -> None:
        try:
            found[i] = read(i).mean(axis=(0, 1))
        except PictureError:
            if not skip_unreadable:
                raise
            readable[i] = False

    with ThreadPoolExecutor(WORKERS) as pool:
        # In runs, since a million waiting tasks would fill gigabytes.
        for first in range(0, count, 1024):
            for _ in pool.map(one, range(first, min(first + 1024, count))):
                pass
    return found, readable


def _classes(root: Path) -> dict[str, list[Path]]:
    """The files of each class folder, both in the order of their names."""
    entries = _visible(root)
    if stray := [path for path in entries if not path.is_dir() and path.suffix.lower() in _SUFFIXES]:
        raise InputError(f"{stray[0]} lies outside any class; expected {_LAYOUT}")
    classes = {path.name: _visible(path) for path in entries if path.is_dir()}
    if not classes:
        raise InputError(f"{root} has no class folders; expected {_LAYOUT}")
    for name, files in classes.items():
        if not files:
            raise InputError(f"class {name!r} of {root} has no pictures; add some or remove its folder")
        if nested := [path for path in files if path.is_dir()]:
            raise InputError(f"{nested[0]} is a folder inside a class; expected {_LAYOUT}")
    return classes


def _visible(folder: Path) -> list[Path]:
    # By name, since paths themselves sort without regard to case on Windows.
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)
