"""How fast pictures come, against torch's own way, and that they are the same pictures whichever way they come.

    python benchmarks/loader.py            # 10,000 pictures; about a quarter of an hour on two cores
    python benchmarks/loader.py --pictures 400 --batches 20 --steps 2      # the same, reduced

It makes an ImageNet-like folder of JPEGs of 400x350 pixels, drawn and of real handwriting, a hundredth of them broken,
and packs it into shards. Then, by turns, several times:

* images per second of PortNet's loader, from the folder and from the shards, up to float32 images as the network takes
  them; and of what people write with torchvision: a Dataset that opens a file with Pillow, scales its short side to
  256, takes a random crop of 224, mirrors it by chance, and makes a normalised tensor of it, in torch's DataLoader.
  (PortNet's also adds colour noise, and hands the same pixels to every device.) Both have the same number of processes.
* the same with training: images per second of steps on the CPU that are fed by either, and by one batch over and over.

Memory is what this process and its workers hold alone (USS) after each of three epochs. Last come the SHA-256 of the
first batches with 0, 1 and 4 workers, from the folder and from the shards, and of the halves that two processes get.
"""

import argparse
import io
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from hashlib import sha256
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw

import portnet
from portnet import images, loading, plugins, shards, weights
from portnet.contract import Place, Settings
from portnet.images import DataSet, Splits
from portnet.loading import Loader

CLASSES, BATCH, ROUNDS = 20, 64, 5
TORCHS = "torch's DataLoader, folder"


# The pictures.


def draw(i: int, digit: np.ndarray) -> bytes:
    """A JPEG of 400x350: soft colours, shapes, a digit, and grain, about as many bytes as a photograph takes."""
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 8, 3), np.uint8)).resize((400, 350), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(coarse)
    for _ in range(rng.integers(4, 12)):
        x, y, w, h = (int(v) for v in rng.integers(10, 200, 4))
        shape = (pen.ellipse, pen.rectangle, pen.line)[rng.integers(3)]
        shape((x, y, x + w, y + h), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    side = int(rng.integers(60, 200))
    coarse.paste(Image.fromarray(digit).resize((side, side)), tuple(int(v) for v in rng.integers(0, 150, 2)))
    grain = rng.normal(0, 9, (350, 400, 1))
    out = io.BytesIO()
    Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=88)
    return out.getvalue()


def write(root: Path, first: int, count: int) -> None:
    digits = portnet.load_data("digits").train
    for i in range(first, first + count):
        path = root / f"class{i % CLASSES:03d}" / f"{i:06d}.jpg"
        content = draw(i, digits.read(i % len(digits)))
        match i % 400:
            case 37:
                content = content[: len(content) // 2]
            case 111:
                content = b""
            case 222:
                content = b"<html>404 Not Found</html>"
            case 333:
                content = content[:300] + bytes(len(content) - 300)
        path.write_bytes(content)


def make(root: Path, count: int) -> None:
    for i in range(CLASSES):
        (root / f"class{i:03d}").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(partial(write, root, count=50), range(0, count, 50)))


# What people write.


class Torchs(torch.utils.data.Dataset[Any]):
    """As torchvision's ImageFolder with Resize(256), RandomCrop(224), RandomHorizontalFlip, ToTensor and Normalize."""

    def __init__(self, paths: list[str], labels: list[int], mean: tuple[float, ...]) -> None:
        self.paths, self.labels = paths, labels
        self.mean = torch.tensor(mean).div(255)[:, None, None]
        self.deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with open(self.paths[i], "rb") as file:
            picture = Image.open(file).convert("RGB")
        width, height = picture.size
        scale = 256 / min(width, height)
        picture = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BILINEAR)
        left, top = (int(torch.randint(0, side - 224 + 1, (1,))) for side in picture.size)
        picture = picture.crop((left, top, left + 224, top + 224))
        if torch.rand(1) < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        return tensor.sub_(self.mean).div_(self.deviation), self.labels[i]


# What is timed.

SKIPPED = 10
"""Batches before the clock starts: more than either keeps ready, so that none is counted that was made before."""


def speed(batches: Iterator[Any], use: Callable[[Any], Any], count: int, skipped: int) -> float:
    """Images per second of `count` batches, after the first `skipped`."""
    for batch in islice(batches, skipped):
        use(batch)
    began = perf_counter()
    done = 0
    for batch in islice(batches, count):
        use(batch)
        done += BATCH
    return done / (perf_counter() - began)


def torchs_batches(torchs: Torchs, workers: int) -> Iterator[Any]:
    return iter(
        torch.utils.data.DataLoader(torchs, batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True)
    )


def by_turns(title: str, sides: dict[str, Callable[[int], float]]) -> None:
    """Time each side in each of the rounds, and say what came of it."""
    found: dict[str, list[float]] = defaultdict(list)
    for round_ in range(ROUNDS):
        for name in sorted(sides, reverse=bool(round_ % 2)):
            found[name].append(sides[name](round_))
    print(title)
    for name, values in sorted(found.items()):
        line = f"  {name:<28} {median(values):6.0f} images/s ({min(values):.0f} to {max(values):.0f})"
        if name != TORCHS:
            ratios = [a / b for a, b in zip(values, found[TORCHS], strict=True)]
            line += f"; {median(ratios):.2f} times torch's ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line, flush=True)


def alone(folder: DataSet, packed: DataSet, torchs: Torchs, batches: int) -> None:
    graph = portnet.graph("torchvision", classes=CLASSES, mean=folder.mean)
    session = plugins.backends()["cpu"].open(graph, weights.initial(graph), Settings())

    def ours(data: DataSet, workers: int, epoch: int) -> float:
        with Loader(data, workers=workers) as loader:
            made = loader.training_batches(graph, seed=0, epoch=epoch, batch=BATCH)
            return speed(made, lambda b: session.put_pixels(b.pixels, b.shift, b.scale), batches, SKIPPED)

    for workers in (0, 1, 2, 4):
        by_turns(
            f"loading alone, {workers} processes besides this one:",
            {
                "PortNet, folder": partial(ours, folder, workers),
                "PortNet, shards": partial(ours, packed, workers),
                TORCHS: lambda _, n=workers: speed(torchs_batches(torchs, n), lambda _: None, batches, SKIPPED),
            },
        )


def training(folder: DataSet, torchs: Torchs, steps: int) -> None:
    graph = portnet.graph("torchvision", classes=CLASSES, mean=folder.mean)
    session = plugins.backends()["cpu"].open(graph, weights.initial(graph), Settings())
    ids = session.put(np.arange(BATCH))

    def step(pixels: Any, labels: Any) -> None:
        session.get(session.train_step(pixels, labels, ids, step=0, learning_rate=0.0))

    def ours(epoch: int) -> float:
        made = loader.training_batches(graph, seed=0, epoch=epoch, batch=BATCH)
        return speed(
            made, lambda b: step(session.put_pixels(b.pixels, b.shift, b.scale), session.put(b.labels)), steps, 1
        )

    with Loader(folder, workers=1) as loader:
        kept = next(loader.training_batches(graph, seed=0, epoch=0, batch=BATCH))
        held = session.put(kept.images), session.put(kept.labels)
        by_turns(
            "with training steps of torchvision's AlexNet on this CPU, 1 process that decodes:",
            {
                "one batch over and over": lambda _: speed(repeat(held), lambda b: step(*b), steps, 1),
                "PortNet, folder": ours,
                TORCHS: lambda _: speed(torchs_batches(torchs, 1), lambda b: step(*b), steps, 1),
            },
        )


def memory(data: DataSet, epochs: int = 3) -> None:
    graph = portnet.graph("torchvision", classes=CLASSES, mean=data.mean)
    process = psutil.Process()
    held = []
    with Loader(data, workers=2) as loader:
        for epoch in range(epochs):
            for _ in loader.training_batches(graph, seed=0, epoch=epoch, batch=BATCH):
                pass
            together = [process, *process.children(recursive=True)]
            held.append((process.memory_full_info().uss, sum(p.memory_full_info().uss for p in together)))
    parts = [f"epoch {i + 1}: {own / 1e6:.0f} MB, with workers {together / 1e6:.0f} MB"
             for i, (own, together) in enumerate(held)]  # fmt: skip
    print("memory after " + "; ".join(parts), flush=True)


def same(folder: DataSet, packed: DataSet, batches: int) -> bool:
    """Whether all ways give the same first batches of 8, by their SHA-256."""
    graph = portnet.graph("torchvision", classes=CLASSES, mean=folder.mean)
    found = []
    for name, data in (("folder", folder), ("shards", packed)):
        for workers in (0, 1, 4):
            with Loader(data, workers=workers) as loader:
                sha, count = loading.digest(loader, graph, seed=0, batch=8, batches=batches)
            found.append(sha)
            print(f"{count} batches of 8, {name}, {workers} workers: {sha}", flush=True)
    for name, data in (("folder", folder), ("shards", packed)):
        with Loader(data, workers=1) as one, Loader(data, workers=2) as two:
            sha = joined(one, two, graph, batches)
        found.append(sha)
        print(f"{batches} batches of 8, {name}, joined from two processes' halves: {sha}", flush=True)
    return len(set(found)) == 1


def joined(one: Loader, two: Loader, graph: Any, batches: int) -> str:
    def half(loader: Loader, part: int) -> Iterator[images.PixelBatch]:
        how = {"seed": 0, "batch": 8, "place": Place(part=part, parts=2)}
        return chain.from_iterable(loader.training_batches(graph, epoch=epoch, **how) for epoch in range(1000))

    sha = sha256()
    for a, b in islice(zip(half(one, 0), half(two, 1), strict=True), batches):
        np.testing.assert_array_equal(a.scale, b.scale)
        for x, y in ((a.pixels, b.pixels), (a.shift, b.shift)):
            sha.update(np.concatenate([x, y]).data)
        sha.update(np.ascontiguousarray(a.scale).data)
        for x, y in ((a.labels, b.labels), (a.ids, b.ids)):
            sha.update(np.concatenate([x, y]).data)
    return sha.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--batches", type=int, default=15, help="of 64, timed at a time")
    parser.add_argument("--steps", type=int, default=2, help="training steps of 64, timed at a time")
    parser.add_argument("--same", type=int, default=1000, help="batches of 8 whose pixels are compared")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        began = perf_counter()
        make(root / "folder", chosen.pictures)
        size = sum(path.stat().st_size for path in (root / "folder").rglob("*.jpg"))
        print(
            f"{chosen.pictures} JPEGs, {size / chosen.pictures / 1000:.0f} kB each, in {perf_counter() - began:.0f} s"
        )
        began = perf_counter()
        made = shards.pack(root / "folder", root / "shards", shard_bytes=2**26, skip_unreadable=True)
        print(f"{made.pictures} packed in {made.shards} shards in {perf_counter() - began:.0f} s; "
              f"{len(made.skipped)} unreadable")  # fmt: skip
        loaded: list[Splits] = []
        for part in ("folder", "shards"):
            began = perf_counter()
            loaded.append(portnet.load_data(root / part, skip_unreadable=True))
            print(f"{part} opened in {perf_counter() - began:.1f} s, {len(loaded[-1].skipped)} unreadable", flush=True)
        folder, packed = (splits.train for splits in loaded)
        listing = images.listing(root / "folder")
        torchs = Torchs([str(listing.paths[i]) for i in folder.ids], folder.labels.tolist(), folder.mean)
        alone(folder, packed, torchs, chosen.batches)
        training(folder, torchs, chosen.steps)
        for data in (folder, packed):
            memory(data)
        equal = same(folder, packed, chosen.same)
    print("the same pixels every way" if equal else "PIXELS DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
