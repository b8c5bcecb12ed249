"""Pictures in tar shards, in the layout of WebDataset, read in place.

A sample is the files of a shard whose names are alike up to the first dot: a picture (``00000012.jpg``) and its class
(``00000012.cls``, a number as text). Other readers take shards one after the other; here each picture is found by its
offset, so that the order is the one that every device shares. Nothing is unpacked.

`pack` writes an index beside the shards; others' shards are indexed when they are loaded, by their headers.
"""

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from portnet import images, philox
from portnet.errors import InputError, PictureError
from portnet.files import write_atomically
from portnet.images import I64, U8, DataSet, Splits

INDEX, FORMAT = "index.npz", "portnet.shards/1"
COLUMNS = ("shards", "offsets", "sizes", "labels", "ids", "for_test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".tif", ".tiff", ".webp")
TESTS = ("val-", "test-")


@dataclass(frozen=True, eq=False)
class Members:
    """Reads pictures that are members of tars: number i is `sizes[i]` bytes at `offsets[i]` of ``paths[shards[i]]``."""

    paths: list[str]
    shards: npt.NDArray[np.int32]
    offsets: I64
    sizes: I64

    def __call__(self, i: int) -> U8:
        return self.source(i)()

    def source(self, i: int) -> Callable[[], U8]:
        return partial(read_member, self.paths[self.shards[i]], int(self.offsets[i]), int(self.sizes[i]))


def read_member(path: str, offset: int, size: int) -> U8:
    """The picture in a part of a tar: uint8 ``(height, width, 3)``. Raises `PictureError`."""
    with open(path, "rb") as file:
        file.seek(offset - tarfile.BLOCKSIZE)
        header, content = file.read(tarfile.BLOCKSIZE), file.read(size)
    if len(content) < size:
        raise PictureError(f"{path} ends before the picture at byte {offset} does; it was cut off, or has changed")
    return images.decode(io.BytesIO(content), f"{_name(header)}, the picture at byte {offset} of {path}")


def _name(header: bytes) -> str:
    """The name of a member, for people."""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
    except tarfile.TarError:
        return "a member"


def tars(root: Path) -> list[Path]:
    """The shards of a folder, by their names; none where it holds something else."""
    return sorted(
        (p for p in root.iterdir() if p.suffix == ".tar" and not p.name.startswith(".")), key=lambda p: p.name
    )


def load(data: str | os.PathLike[str], *, skip_unreadable: bool = False) -> Splits:
    """The data set of that name, in that folder of pictures (see `portnet.images.load`), or in that folder of shards.

    Shards are tars in WebDataset's layout: a picture and a ``.cls`` with the number of its class, of one name up to the
    first dot. Those whose names begin with ``val-`` or ``test-`` are the test split, or else every fifth picture is.
    Shards that `pack` wrote have an index, and the data set is the folder's that they were made of; others are read
    once here, as a folder is.

    Raises `InputError` for shards or an index that do not fit, besides what `portnet.images.load` does.
    """
    root = Path(data).expanduser()
    if not root.is_dir() or not tars(root):
        return images.load(data, skip_unreadable=skip_unreadable)
    path = root / INDEX
    return _indexed(root, path) if path.exists() else _scanned(root, skip_unreadable=skip_unreadable)


def _indexed(root: Path, path: Path) -> Splits:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            about: dict[str, Any] = json.loads(str(stored["about"]))
            shards, offsets, sizes, labels, ids, for_test = (stored[name] for name in COLUMNS)
        expected = about["shards"] if about["format"] == FORMAT else None
    # NumPy's and zipfile's readers raise whatever the damage leads them to.
    except Exception as error:
        raise InputError(f"{path} is damaged or no index of PortNet's ({error}); remove it, or pack again") from None
    found = {p.name: p.stat().st_size for p in tars(root)}
    if found != expected:
        raise InputError(f"the shards of {root} are not those that {path} was written for; remove it, or pack again")
    columns = (shards, offsets, sizes, labels, ids, for_test)
    lengths, least = np.array(list(found.values())), min(int(c.min()) for c in columns)
    if (
        len({c.shape for c in columns}) > 1
        or least < 0
        or offsets.min() < tarfile.BLOCKSIZE  # of its header
        or shards.max() >= len(found)
        or not (np.all(offsets + sizes <= lengths[shards]) and labels.max() < len(about["class_names"]))
    ):
        raise InputError(f"{path} is damaged: it does not fit the shards beside it; remove it, or pack again")
    data = DataSet(
        name=about["name"],
        class_names=tuple(about["class_names"]),
        labels=labels,
        ids=ids,
        mean=tuple(about["mean"]),
        read=Members([str(root / name) for name in found], shards, offsets, sizes),
    )
    return images.parts(data, for_test, tuple(about["skipped"]))


def _scanned(root: Path, *, skip_unreadable: bool) -> Splits:
    paths = tars(root)
    split = any(path.name.startswith(TESTS) for path in paths)
    rows: list[tuple[int, int, int, int, bool]] = []  # shard, offset, size, label, whether for test
    for number, path in enumerate(paths):
        for offset, size, label in _samples(path):
            rows.append((number, offset, size, label, path.name.startswith(TESTS)))
    if not rows:
        raise InputError(f"the shards of {root} hold no pictures")
    shards, offsets, sizes, labels, tests = (np.array(column) for column in zip(*rows, strict=True))
    found = images.Listing(
        class_names=tuple(map(str, range(int(labels.max()) + 1))),
        paths=[],
        labels=labels.astype(np.int64),
        for_test=tests if split else np.arange(len(rows)) % 5 == 0,
        every_fifth=not split,
    )
    read = Members([str(path) for path in paths], shards.astype(np.int32), offsets, sizes)
    return images.readable_splits(
        root, found, read, lambda i: f"{read.paths[shards[i]]} at byte {offsets[i]}", skip_unreadable=skip_unreadable
    )


def _samples(path: Path) -> Iterator[tuple[int, int, int]]:
    """Offset and size of each picture of a shard, and its class."""
    length = path.stat().st_size
    picture: dict[str, tuple[int, int]] = {}
    label: dict[str, int] = {}
    order: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isreg():
                    raise InputError(f"{path}: {member.name} is a link or a device; shards hold files alone")
                if member.offset_data + member.size > length:
                    raise InputError(f"{path} ends before {member.name} does; it was cut off")
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                key, kind = f"{folder}/{stem}", f".{kind.lower()}"
                if kind == ".cls":
                    file.seek(member.offset_data)
                    text = file.read(min(member.size, 20)).strip()
                    if not text.isdigit() or int(text) >= 2**31:
                        raise InputError(f"{path}: {member.name} must hold the number of a class, got {text!r}")
                    if key in label:
                        raise InputError(f"{path}: {member.name} is there twice")
                    label[key] = int(text)
                elif kind in SUFFIXES:
                    if key in picture:
                        raise InputError(f"{path}: {member.name} is the second picture of its sample")
                    picture[key] = member.offset_data, member.size
                    order.append(key)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path} is damaged or no plain tar ({error}); compressed shards must be unpacked") from None
    for key in order:
        if key not in label:
            raise InputError(f"{path}: {key.lstrip('/')} has a picture and no .cls beside it")
        yield *picture[key], label[key]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What `pack` wrote: pictures and bytes in how many shards, and the files of those that were left out."""

    path: Path
    pictures: int
    shards: int
    bytes: int
    skipped: tuple[str, ...]


def pack(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    shard_bytes: int = 2**28,
    short_side: int | None = None,
    quality: int = 95,
    skip_unreadable: bool = False,
    on_picture: Callable[[], None] = lambda: None,
) -> Packed:
    """Write a folder of pictures, laid out as for `portnet.load_data`, as shards of about `shard_bytes`.

    Files are taken as they are, so that what is read from the shards is what is read from the folder: the same ids,
    pixels and mean. With `short_side` they are scaled to that many pixels and written anew as JPEG of that `quality`:
    smaller and quicker to read, and other pixels. Every picture is read: one that cannot be is a `PictureError`, or
    with `skip_unreadable` left out, and named. `on_picture` is called after each. The same folder gives the same bytes.

    Raises `InputError` for another layout, and where `target` is not an empty or a new folder.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not source.is_dir():
        raise InputError(f"there is no folder {source}; expected one of class/name.jpg")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is not an empty folder; name a new one")
    if shard_bytes < 1 or (short_side is not None and short_side < 1) or not 1 <= quality <= 100:
        raise InputError("shard_bytes and short_side must be at least 1, quality from 1 to 100")
    found = images.listing(source)
    means, readable = np.zeros((len(found.paths), 3)), np.ones(len(found.paths), bool)

    def prepared(i: int) -> tuple[str, bytes] | None:
        """The suffix and content of picture `i`, or None where it is left out."""
        path = found.paths[i]
        try:
            picture = images.read_picture(path)
            suffix, content = path.suffix.lower(), path.read_bytes()
        except PictureError:
            if not skip_unreadable:
                raise
            readable[i] = False
            return None
        if short_side is not None:
            suffix, content = ".jpg", _scaled(picture, short_side, quality)
            picture = images.decode(io.BytesIO(content), str(path))
        means[i] = picture.mean(axis=(0, 1))
        return suffix, content

    target.parent.mkdir(parents=True, exist_ok=True)
    # Under another name until all is there: part of a data set must not pass for one.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        shards = _Shards(Path(folder) / "shards", shard_bytes)
        with ThreadPoolExecutor(images.WORKERS) as pool:
            for test, prefix in ((False, "train-"), (True, "val-")):
                ids = np.flatnonzero(found.for_test == test)
                # Mixed, for readers that take shards one after the other.
                ids = ids if test else ids[philox.order(0, 0, len(ids))]
                # In runs, so that few pictures wait in memory.
                for run in (ids[start : start + 64].tolist() for start in range(0, len(ids), 64)):
                    for i, content in zip(run, pool.map(prepared, run), strict=True):
                        if content is not None:
                            shards.add(prefix, i, int(found.labels[i]), *content)
                        on_picture()
                shards.end()
        mean = images.checked_mean(source, found, means, readable)
        skipped = tuple(str(found.paths[i]) for i in np.flatnonzero(~readable))
        shards.write_index(name=source.resolve().name, mean=mean, class_names=found.class_names, skipped=skipped)
        if target.exists():
            target.rmdir()
        shards.folder.rename(target)
    made = shards.made
    return Packed(path=target, pictures=len(shards.rows), shards=len(made), bytes=sum(made.values()), skipped=skipped)


class _Shards:
    """Shards that are being written to a new folder: `made` names and sizes, `rows` what of `COLUMNS` is in them."""

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir()
        self.folder, self.size = folder, size
        self.made: dict[str, int] = {}
        self.rows: list[tuple[int, int, int, int, int, bool]] = []
        self._shard, self._prefix, self._number = io.BytesIO(), "", 0

    def add(self, prefix: str, i: int, label: int, suffix: str, content: bytes) -> None:
        if prefix != self._prefix:
            self._prefix, self._number = prefix, 0
        key = f"{i:08d}"
        offset = self._append(key + suffix, content)
        self.rows.append((len(self.made), offset, len(content), label, i, prefix in TESTS))
        self._append(f"{key}.cls", str(label).encode())
        if self._shard.tell() >= self.size:
            self.end()

    def end(self) -> None:
        """Write the shard that has begun, if one has."""
        if not self._shard.tell():
            return
        self._shard.write(bytes(2 * tarfile.BLOCKSIZE))  # which ends a tar
        name = f"{self._prefix}{self._number:06d}.tar"
        write_atomically(self.folder / name, self._shard.getvalue(), InputError)
        self.made[name] = self._shard.tell()
        self._shard, self._number = io.BytesIO(), self._number + 1

    def write_index(self, **about: Any) -> None:
        kinds = (np.int32, np.int64, np.int64, np.int64, np.int64, np.bool_)
        # By id, as a folder's pictures are.
        columns = zip(*sorted(self.rows, key=lambda row: row[4]), strict=True)
        arrays: dict[str, Any] = {n: np.array(c, k) for n, c, k in zip(COLUMNS, columns, kinds, strict=True)}
        index = io.BytesIO()
        np.savez(index, about=json.dumps({"format": FORMAT, "shards": self.made, **about}), **arrays)
        write_atomically(self.folder / INDEX, index.getvalue(), InputError)

    def _append(self, name: str, content: bytes) -> int:
        """Add a member; where its content begins."""
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(content), 0o644
        self._shard.write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._shard.tell()
        self._shard.write(content)
        self._shard.write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset


def _scaled(picture: U8, short_side: int, quality: int) -> bytes:
    from PIL import Image

    height, width = picture.shape[:2]
    short = min(height, width)
    size = (max(1, round(width * short_side / short)), max(1, round(height * short_side / short)))
    out = io.BytesIO()
    Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR).save(out, "JPEG", quality=quality)
    return out.getvalue()
