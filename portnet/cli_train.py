"""The command that trains, in one process or in several."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

import portnet
from portnet import host, plugins
from portnet.console import show_progress
from portnet.contract import PRECISIONS, Parallel, Settings
from portnet.errors import InputError
from portnet.graph import Graph

if TYPE_CHECKING:
    from collections.abc import Callable

    from portnet.trainer import Step
    from portnet.training import Evaluation

FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)
COUNT = click.IntRange(1)
BUILT_IN, BATCH = ("digits", "synthetic"), 64

INSIDE = ("RANK", "WORLD_SIZE", "MASTER_ADDR")
"""What torchrun sets in the environment of each process that it starts."""


def register(main: click.Group) -> None:
    """Add it to the command line."""
    main.add_command(train)


@click.command()
@click.option("--backend", default="auto", show_default=True, help="A name that 'portnet backends' lists.")
@click.option("--formulation", type=click.Choice(["portable", "stock"]), default="portable", show_default=True,
              help="PortNet's own, or PyTorch's operators as people write them.")  # fmt: skip
@click.option("--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True)
@click.option(
    "--engine",
    default="eager",
    show_default=True,
    help="eager, compile, graph, compile-graph or regions, as the backend has them.",
)
@click.option("--channels-last", is_flag=True, help="Activations and filters in NHWC order on the device.")
@click.option("--preset", help="paper2012, chm145, caffe or torchvision.")
@click.option("--image-size", type=int, help="Pixels a side; the preset's own by default.")
@click.option("--bias", type=float, help="Where the preset starts biases at 1 (paper2012, chm145) or 0.1 (caffe).")
@click.option("--dropout", type=float, help="Probability; 0.5 by default.")
@click.option("--data", default="digits", show_default=True,
              help="digits, synthetic, a folder of class/name.jpg, or one of tar shards.")  # fmt: skip
@click.option("--skip-unreadable", is_flag=True, help="Leave out pictures that cannot be read, and name them.")
@click.option("--workers", type=click.IntRange(0), help="Processes that decode; as the cores allow for a folder.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@click.option("--steps", type=COUNT, help="Training steps; 210 for digits and synthetic by default.")
@click.option("--epochs", type=COUNT, help="Instead of --steps; the preset's own for a folder by default.")
@click.option("--batch", type=COUNT, help="Images a step, of all processes; 64 for digits, else the preset's own.")
@click.option("--accumulate", type=COUNT, default=1, show_default=True,
              help="Take each batch in so many parts, before its one update: less memory.")  # fmt: skip
@click.option("--learning-rate", type=float, help="At the start; the preset's own by default.")
@click.option("--schedule", type=click.Choice(["plateau", "logged", "constant"]),
              help="Of the learning rate: a tenth when validation stops improving, as logged in 2012, or as it is. "
              "constant for digits and synthetic, else the preset's own.")  # fmt: skip
@click.option("--validate", type=click.IntRange(0), metavar="EPOCHS",
              help="Classify the test split that often, 0 for never; every epoch of a folder by default.")  # fmt: skip
@click.option("--views", type=click.Choice(["1", "10"]), default="1", show_default=True,
              help="Of each test picture: the centre, or the paper's ten.")  # fmt: skip
@click.option("--checkpoints", type=FOLDER, help="Keep checkpoints in this folder, and go on from the last in it.")
@click.option("--checkpoint-every", type=COUNT, metavar="STEPS", help="Besides the end of each epoch.")
@click.option("--metrics", type=FILE, help="Write loss, rate, speed and validation to this file, as JSON lines.")
@click.option("--tensorboard", type=FOLDER, help="And to this folder, as TensorBoard's event files.")
@click.option("--parallel", type=click.Choice([way for way in get_args(Parallel) if way]),
              help="Several processes: each with a part of every batch, or two with half of every layer.")  # fmt: skip
@click.option("--processes", type=COUNT, help="That many on this machine, outside torchrun; 2 for towers.")
@click.option("--restarts", type=click.IntRange(0), default=3, show_default=True,
              help="How often to start all anew when one is lost; they go on from the last checkpoint.")  # fmt: skip
@click.option("--save", "path", type=FILE, help="Write the trained weights to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print losses and accuracy as one JSON object.")
def train(
    data: str,
    backend: str,
    preset: str | None,
    image_size: int | None,
    bias: float | None,
    dropout: float | None,
    skip_unreadable: bool,
    workers: int | None,
    steps: int | None,
    epochs: int | None,
    batch: int | None,
    learning_rate: float | None,
    schedule: str | None,
    validate: int | None,
    views: str,
    checkpoints: Path | None,
    checkpoint_every: int | None,
    metrics: Path | None,
    tensorboard: Path | None,
    parallel: Parallel | None,
    processes: int | None,
    restarts: int,
    path: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train on a data set and report the accuracy on its test split.

    With --parallel it starts its own processes through torchrun; started by torchrun, it is one of them.
    """
    host.keep_freed_memory()
    if steps and epochs:
        raise click.UsageError("give --steps or --epochs, not both")
    if checkpoint_every and checkpoints is None:
        raise click.UsageError("--checkpoint-every needs --checkpoints, the folder to keep them in")
    if path and (path.is_dir() or not path.parent.is_dir()):
        # Now, not when the training is done and would be lost.
        raise click.UsageError(f"--save {path}: " + ("it is a folder" if path.is_dir() else f"no folder {path.parent}"))
    built_in = data in BUILT_IN
    if not (steps or epochs) and built_in:
        steps = 210
    # With paper2012's bias of 1 the loss on ten digits stays flat for hundreds of steps; caffe's 0.1 lets it move.
    preset = preset or ("caffe" if built_in else "paper2012")
    options = _given(image_size=image_size, bias=bias, dropout=dropout)
    settings["parallel"] = parallel or ""
    inside = all(name in os.environ for name in INSIDE)
    if parallel and not inside:
        graph = portnet.graph(preset, **options)
        size = batch or (BATCH if built_in else graph.recipe.batch)
        sys.exit(_start(backend, Settings(**settings), graph, size, processes, restarts))
    group = int(os.environ["WORLD_SIZE"]) if inside else 1
    if group > 1 and not parallel:
        raise click.UsageError(f"torchrun started {group} processes; give --parallel data or --parallel towers")
    if processes not in (None, group):
        raise click.UsageError(
            f"--processes {processes}, but " + (f"torchrun started {group}" if inside else "no --parallel")
        )
    splits = portnet.load_data(data, skip_unreadable=skip_unreadable)
    batch = batch or min(BATCH if built_in else portnet.graph(preset).recipe.batch, len(splits.train))
    net = portnet.AlexNet(
        backend, preset, classes=len(splits.train.class_names), mean=splits.train.mean, **settings, **options
    )
    alone = net.session.place.rank == 0
    quiet = as_json or not alone
    if alone:
        for name in splits.skipped:
            click.echo(f"portnet: left out, unreadable: {name}", err=True)
        if splits.skipped:
            count = len(splits.skipped)
            click.echo(f"portnet: {count} picture{'s' * (count > 1)} left out", err=True)
    if not quiet:
        click.echo(f"{net!r}")
    if workers is None:
        workers = 0 if built_in else max(1, min(16, (os.cpu_count() or 1) // net.session.place.size))
    if validate is None:
        validate = 0 if built_in else 1
    per_epoch = len(splits.train) // batch
    total = steps or per_epoch * (epochs or net.graph.recipe.epochs)
    with show_progress(total=total, quiet=quiet) as (say, advance):
        result = net.train(
            splits, steps=steps, epochs=epochs, batch=batch, learning_rate=learning_rate,
            schedule=schedule or ("constant" if built_in else None), workers=workers, validate=validate,
            views=int(views), checkpoints=checkpoints, every=checkpoint_every, metrics=metrics,
            tensorboard=tensorboard, watcher=_Told(say, advance, quiet=quiet),
        )  # fmt: skip
    final = net.evaluate(splits, views=int(views), workers=workers)
    if not isfinite(final.loss):
        from portnet.training import Diverged

        raise Diverged(f"the loss on the test split is {final.loss} after training; try a lower learning rate")
    if path:
        net.save(path)
    if not alone:
        return
    if as_json:
        told = {"losses": result.losses, "test": asdict(final), "weights": str(path) if path else None}
        click.echo(json.dumps({**told, "step": result.step, "skipped": splits.skipped}))
        return
    if result.losses:
        first, last = result.losses[0], result.losses[-1]
        click.echo(f"loss {first:.3f} -> {last:.3f} in {len(result.losses)} steps of {batch}")
    else:
        click.echo(f"nothing left to do after step {result.step}")
    click.echo(f"test: top-1 {final.top1:.1%}, top-5 {final.top5:.1%} of {final.count} pictures")
    if path:
        click.echo(f"weights: {path}")


class _Told:
    """Tells of a run on the console."""

    def __init__(self, say: "Callable[[str], None]", advance: "Callable[..., None]", *, quiet: bool) -> None:
        self.say, self.advance, self.quiet = say, advance, quiet

    def resumed(self, step: int, notes: list[str]) -> None:
        self.advance(f"step {step}, from the checkpoint", step)
        for note in notes:
            click.echo(f"portnet: {note}", err=True)
        if not self.quiet:
            click.echo(f"goes on after step {step}")

    def step(self, step: "Step") -> None:
        speed = ""
        if step.images_per_second:
            left = (step.total - step.number) * step.batch / step.images_per_second
            speed = f", {step.images_per_second:.3g} images/s, about {_duration(left)} left"
        self.advance(f"step {step.number}, loss {step.loss:.3f}{speed}")

    def validated(self, epoch: int, result: "Evaluation") -> None:
        if not self.quiet:
            click.echo(f"epoch {epoch}: top-1 {result.top1:.1%}, top-5 {result.top5:.1%}, loss {result.loss:.3f}")


def _start(backend: str, settings: Settings, graph: Graph, batch: int, processes: int | None, restarts: int) -> int:
    """Start this very command in several processes; their exit status.

    What can be refused is refused here, once, and not by each of them.
    """
    from portnet import towers, trainer

    if settings.parallel == "towers":
        towers.split(graph)
        if processes not in (None, 2):
            raise InputError(f"two towers take 2 processes, not {processes}")
        processes = 2
    if processes is None:
        raise click.UsageError("say how many processes are to share each batch: --parallel data --processes N")
    trainer.check_split(batch, 1 if settings.parallel == "towers" else processes, settings.accumulate)
    chosen = plugins.choose(backend)
    chosen.check(settings, plugins.probe(chosen))
    command = [*chosen.launcher(processes, restarts), "-m", "portnet.cli", *sys.argv[1:]]
    # Without it, torchrun gives each process one thread; a processor has some for each.
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    return subprocess.call(command, env={"OMP_NUM_THREADS": threads, **os.environ})


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _given(**options: Any) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}
