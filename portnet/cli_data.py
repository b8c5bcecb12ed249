"""The commands that look at data sets and pack them."""

import sys
from pathlib import Path
from time import perf_counter

import click

import portnet
from portnet.console import show_progress
from portnet.errors import PictureError

FOLDER = click.Path(path_type=Path, file_okay=False)
COUNT = click.IntRange(1)


def register(main: click.Group) -> None:
    """Add them to the command line."""
    main.add_command(data)


@click.group()
def data() -> None:
    """Look at a data set before training on it, or pack a folder of pictures into shards."""


@data.command()
@click.argument("name", metavar="DATA")
@click.option("--skip-unreadable", is_flag=True, help="Exit with 0 all the same where pictures cannot be read.")
@click.option("--batches", type=COUNT, help="Read that many training batches, for their SHA-256 and the speed.")
@click.option("--preset", default="paper2012", show_default=True, help="Which network's pictures those are.")
@click.option("--image-size", type=COUNT, help="Pixels a side; the preset's own by default.")
@click.option("--batch", type=COUNT, default=128, show_default=True, help="Pictures in each.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that decode.")
def check(
    name: str,
    skip_unreadable: bool,
    batches: int | None,
    preset: str,
    image_size: int | None,
    batch: int,
    seed: int,
    workers: int,
) -> None:
    """Read every picture of DATA: digits, synthetic, a folder of class/name.jpg, or one of shards.

    Says how many there are and which cannot be read; for those the exit status is 1. Two machines that print the same
    SHA-256 train on the same pixels.
    """
    from portnet import loading

    began, refused = perf_counter(), False
    try:
        splits = portnet.load_data(name, skip_unreadable=skip_unreadable)
    except PictureError:  # what training stops for; what was left out of shards when they were packed, it does not
        began, refused = perf_counter(), True
        splits = portnet.load_data(name, skip_unreadable=True)
    seconds = perf_counter() - began
    for path in splits.skipped:
        click.echo(f"portnet: unreadable: {path}", err=True)
    train, test = splits.train, splits.test
    red, green, blue = train.mean
    click.echo(f"{train.name}: {len(train)} pictures to train on, {len(test)} to test on, {len(train.class_names)} "
               f"classes, {len(splits.skipped)} unreadable")  # fmt: skip
    click.echo(f"mean colour {red:.3f}, {green:.3f}, {blue:.3f}; opened in {seconds:.1f} s")
    if batches:
        graph = portnet.graph(preset, classes=len(train.class_names), mean=train.mean,
                              **({"image_size": image_size} if image_size else {}))  # fmt: skip
        with loading.Loader(train, workers=workers) as loader, show_progress(total=batches) as (_, advance):
            began = perf_counter()
            sha, done = loading.digest(
                loader, graph, seed=seed, batch=batch, batches=batches, on_batch=lambda: advance("batches")
            )
            seconds = perf_counter() - began
        click.echo(f"{done} batches of {batch}: {done * batch / seconds:.0f} images/s; SHA-256 {sha}")
    sys.exit(refused)


@data.command()
@click.argument("source", type=FOLDER)
@click.argument("target", type=FOLDER)
@click.option("--shard-mb", type=COUNT, default=256, show_default=True, help="About how large each shard is.")
@click.option("--short-side", type=COUNT, help="Scale pictures to that and write JPEG anew: quicker, other pixels.")
@click.option("--quality", type=click.IntRange(1, 100), default=95, show_default=True, help="Of that JPEG.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out pictures that cannot be read, and name them.")
def pack(
    source: Path, target: Path, shard_mb: int, short_side: int | None, quality: int, skip_unreadable: bool
) -> None:
    """Write the pictures of the folder SOURCE as tar shards to the new folder TARGET, in WebDataset's layout."""
    from portnet import images, shards

    with show_progress(total=len(images.listing(source).paths) if source.is_dir() else 1) as (_, advance):
        made = shards.pack(source, target, shard_bytes=shard_mb * 10**6, short_side=short_side, quality=quality,
                           skip_unreadable=skip_unreadable, on_picture=lambda: advance("pictures"))  # fmt: skip
    for path in made.skipped:
        click.echo(f"portnet: left out, unreadable: {path}", err=True)
    click.echo(f"{made.pictures} pictures in {made.shards} shards, {made.bytes / 1e6:.1f} MB: {made.path}"
               + (f"; {len(made.skipped)} left out" if made.skipped else ""))  # fmt: skip
