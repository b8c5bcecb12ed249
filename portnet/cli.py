"""The command line. Exit status: 0 done, 1 a run or a check failed, 2 the user's mistake."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import portnet
from portnet import host, plugins
from portnet.contract import PRECISIONS
from portnet.errors import InputError, PictureError, PluginError, PortNetError, RecordError, Unavailable, WeightsError

if TYPE_CHECKING:
    from rich.console import Console

    from portnet.record import Record, Spec

MISTAKES = (InputError, PictureError, PluginError, RecordError, WeightsError)
"""Errors that the user can mend on the command line; the others are failed runs."""

FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PortNetError as error:
            click.echo(f"portnet: {error}", err=True)
            sys.exit(2 if isinstance(error, MISTAKES) else 1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(portnet.__version__, prog_name="portnet")
def main() -> None:
    """What would leaving CUDA cost? One network, measured identically on every vendor's hardware."""


def _network_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--image-size", type=int, help="Pixels a side; the preset's own by default."),
        click.option("--preset", help="paper2012, caffe or torchvision."),
        click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True),
        click.option("--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True),
        click.option(
            "--formulation",
            type=click.Choice(["portable", "stock"]),
            default="portable",
            show_default=True,
            help="PortNet's own, or PyTorch's operators as people write them.",
        ),
        click.option("--backend", default="auto", show_default=True, help="A name that 'portnet backends' lists."),
    ):
        command = option(command)
    return command


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def backends(as_json: bool) -> None:
    """List backends: name, vendor, device, and why one is not available and what to do about it."""
    registry = plugins.backends()
    found = []
    for backend in registry.values():
        entry: dict[str, Any] = {"name": backend.name, "vendor": backend.vendor, "modes": list(backend.modes)}
        entry |= {"available": False, "device": None, "reason": None, "remedy": None, "note": backend.note}
        try:
            entry |= {"available": True, "device": asdict(plugins.probe(backend))}
        except Unavailable as error:
            entry |= {"reason": error.reason, "remedy": error.remedy}
        found.append(entry)
    problems = [asdict(p) for p in registry.problems]
    if as_json:
        click.echo(json.dumps({"backends": found, "problems": problems}, indent=1))
        return
    from rich.table import Table

    table = Table(title="Available", title_justify="left")
    for column in ("backend", "vendor", "does", "device", "precisions"):
        table.add_column(column, overflow="fold")
    for e in found:
        if e["available"]:
            device = f"{e['device']['name']} ({e['note']})" if e["note"] else e["device"]["name"]
            row = (e["name"], e["vendor"], ", ".join(e["modes"]), device, ", ".join(e["device"]["precisions"]))
            table.add_row(*map(_plain, row))
    console = _console()
    console.print(table)
    console.print("Not available:" if not all(e["available"] for e in found) else "")
    for e in found:
        if not e["available"]:
            note = f" ({e['note']})" if e["note"] else ""
            who = f"  [bold]{e['name']}[/], {_plain(e['vendor'] + note)}"
            text = f"{who}: {_plain(e['reason'])}\n      {_plain(e['remedy'])}"
            console.print(text, soft_wrap=True, highlight=False)
    for p in registry.problems:
        console.print(f"[red]Broken plug-in[/] {_plain(str(p))}", soft_wrap=True, highlight=False)


@main.command()
@click.argument("preset", default="paper2012")
@click.option("--image-size", type=int)
@click.option("--classes", type=int, default=1000, show_default=True)
def summary(preset: str, image_size: int | None, classes: int) -> None:
    """Print the layers, shapes, parameters and multiply-accumulates of a preset."""
    click.echo(portnet.graph(preset, classes=classes, **_given(image_size=image_size)).summary())


@main.command()
@click.option("--backends", "names", help="Comma-separated; all that are found by default.")
@click.option("--steps", type=click.IntRange(1), default=60, show_default=True, help="Steps of the training curve.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Images a timed step.")
@click.option("--preset", default="caffe", show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds for one measurement.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("portnet-compare"), show_default=True
)
@click.option("--json", "as_json", is_flag=True, help="Print the records as one JSON list, for programs.")
def compare(
    names: str | None,
    steps: int,
    batch: int,
    preset: str,
    precision: str,
    seed: int,
    timeout: float,
    out: Path,
    as_json: bool,
) -> None:
    """Run the same training and inference on every backend, and show the results side by side.

    Each stack is measured in a process of its own, behind the parity gate and the honest clock, and leaves one JSON
    record in --out, beside a page with the loss curves. Exit status 1 if a backend that was asked for by name is not
    available or a measurement failed.
    """
    from portnet import alexnet, launch, lockin, measure, parity, record
    from portnet.report import page, table

    graph = alexnet.graph(preset, classes=10)
    spec = record.Spec(
        backend="", preset=preset, precision=precision, seed=seed, curve_steps=steps, batch=batch,
        image_size=graph.input[1],
    )  # fmt: skip
    registry = plugins.backends()
    chosen = [registry[n.strip()] for n in names.split(",")] if names else list(registry.values())
    todo: list[Spec] = []
    made: list[Record] = []
    for backend in chosen:
        ours = [replace(spec, backend=backend.name)]
        if not _available(backend):
            made.append(measure.measure(ours[0]))
            continue
        ours = measure.specs(backend, spec)
        # Whichever stack trains first shows how far runs of equals drift.
        if "train" in backend.modes and not parity.is_oracle(backend) and not any(s.perturbed for s in todo):
            ours[0] = replace(ours[0], perturbed=3)
        todo += ours
    for missing in made:
        missing.write(out)
    with _progress(total=len(todo)) as (progress, advance):
        for s in todo:
            made.append(launch.run(s, timeout=timeout, say=lambda line, s=s: progress(f"{s.stack}: {line}")))  # type: ignore[misc]
            made[-1].write(out)
            advance(f"{s.stack}: {made[-1].outcome}")
    rows = lockin.rows(made)
    written = page.write(made, out / "compare.html")
    if as_json:
        click.echo(json.dumps([json.loads(r.to_json()) for r in made], indent=1))
    else:
        console = _console()
        for renderable in table.everything(rows):
            console.print(renderable)
        console.print(f"Records and page: {written.parent} ({written.name})", soft_wrap=True)
    bad = [r for r in made if r.outcome != "works" and not (r.outcome == "not available" and not names)]
    if bad:
        sys.exit(1)


@main.command()
@click.argument("name")
@click.option("--image-size", type=int, help="Presets at this size instead of their own: quicker, and says less.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    type=click.Choice(PRECISIONS),
    default=["float32"],
    show_default=True,
    help="Precisions of whole presets; repeat it for several.",
)
@click.option("--json", "as_json", is_flag=True)
def check(name: str, image_size: int | None, precisions: tuple[str, ...], as_json: bool) -> None:
    """Run the conformance suite on a backend. Exit status 1 if it fails a check or is not available."""
    from portnet import conformance

    console = _console()
    results, failed = [], 0
    for item in conformance.checks(name, precisions=precisions, image_size=image_size):
        try:
            seen, passed = item(), True
        except conformance.ConformanceError as error:
            seen, passed = str(error), False
            failed += 1
        results.append({"check": item.name, "passed": passed, "seen": seen})
        if not as_json:
            mark = "[green]pass[/]" if passed else "[red]FAIL[/]"
            console.print(f"{mark} {_plain(item.name)}: [dim]{_plain(seen)}[/]", soft_wrap=True, highlight=False)
    if as_json:
        click.echo(json.dumps({"backend": name, "failed": failed, "checks": results}, indent=1))
    else:
        console.print(f"{name}: {len(results) - failed} passed, {failed} failed", highlight=False)
    if failed:
        sys.exit(1)


@main.command()
@_network_options
@click.option("--data", default="digits", show_default=True, help="digits, synthetic, or a folder of class/name.jpg.")
@click.option("--steps", type=click.IntRange(1), help="Training steps; 210 for digits and synthetic by default.")
@click.option("--epochs", type=click.IntRange(1), help="Instead of --steps; 90 for a folder by default.")
@click.option("--batch", type=click.IntRange(1), help="Images a step; 64 for digits, otherwise 128, by default.")
@click.option("--learning-rate", type=float, help="The preset's own by default.")
@click.option("--skip-unreadable", is_flag=True, help="Leave out pictures that cannot be read, and name them.")
@click.option("--save", "path", type=FILE, help="Write the trained weights to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print losses and accuracy as one JSON object.")
def train(
    data: str,
    backend: str,
    preset: str | None,
    image_size: int | None,
    precision: str,
    formulation: str,
    seed: int,
    steps: int | None,
    epochs: int | None,
    batch: int | None,
    learning_rate: float | None,
    skip_unreadable: bool,
    path: Path | None,
    as_json: bool,
) -> None:
    """Train on a data set and report the accuracy on its test split."""
    from portnet.training import Diverged

    host.keep_freed_memory()
    if steps and epochs:
        raise click.UsageError("give --steps or --epochs, not both")
    if path and (path.is_dir() or not path.parent.is_dir()):
        # Now, not when the training is done and would be lost.
        raise click.UsageError(f"--save {path}: " + ("it is a folder" if path.is_dir() else f"no folder {path.parent}"))
    built_in = data in ("digits", "synthetic")
    if not (steps or epochs):
        steps, epochs = (210, None) if built_in else (None, 90)
    splits = portnet.load_data(data, skip_unreadable=skip_unreadable)
    for name in splits.skipped:
        click.echo(f"portnet: left out, unreadable: {name}", err=True)
    # With paper2012's bias of 1 the loss on ten digits stays flat for hundreds of steps; caffe's 0.1 lets it move.
    preset = preset or ("caffe" if built_in else "paper2012")
    batch = batch or min(64 if built_in else 128, len(splits.train))
    net = portnet.AlexNet(
        backend, preset, classes=len(splits.train.class_names), precision=precision, formulation=formulation,
        seed=seed, mean=splits.train.mean, **_given(image_size=image_size),
    )  # fmt: skip
    if not as_json:
        click.echo(f"{net!r}")
    total = steps or len(splits.train) // batch * (epochs or 0)
    with _progress(total=total, quiet=as_json) as (_, advance):
        losses = net.fit(
            splits, steps=steps, epochs=epochs, batch=batch, learning_rate=learning_rate,
            on_step=lambda step, loss: advance(f"step {step}, loss {loss:.3f}"),
        )  # fmt: skip
    result = net.evaluate(splits)
    if not isfinite(result.loss):
        raise Diverged(f"the loss on the test split is {result.loss} after training; try a lower learning rate")
    if path:
        net.save(path)
    if as_json:
        click.echo(json.dumps({"losses": losses, "test": asdict(result), "weights": str(path) if path else None}))
        return
    click.echo(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps of {batch}")
    click.echo(f"test: top-1 {result.top1:.1%}, top-5 {result.top5:.1%} of {result.count} pictures")
    if path:
        click.echo(f"weights: {path}")


@main.command()
@click.argument("images", nargs=-1, required=True, type=FILE)
@click.option("--weights", required=True, type=FILE, help="A file that 'portnet train --save' wrote.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True)
@click.option("--top", type=click.IntRange(1), default=3, show_default=True, help="Classes to name for each picture.")
@click.option("--skip-unreadable", is_flag=True, help="Name pictures that cannot be read, and go on.")
@click.option("--json", "as_json", is_flag=True)
def infer(
    images: tuple[Path, ...],
    weights: Path,
    backend: str,
    precision: str,
    top: int,
    skip_unreadable: bool,
    as_json: bool,
) -> None:
    """Classify pictures with trained weights."""
    net = portnet.AlexNet.load(weights, backend, precision=precision)
    found, missing = [], False
    for path in images:
        try:
            ranked = net.classify(path, top=top)
        except PictureError as error:
            if not skip_unreadable:
                raise
            click.echo(f"portnet: left out: {error}", err=True)
            missing = True
            continue
        found.append({"picture": str(path), "classes": [{"class": c, "probability": p} for c, p in ranked]})
        if not as_json:
            click.echo(f"{path}: " + ", ".join(f"{c} {p:.1%}" for c, p in ranked))
    if as_json:
        click.echo(json.dumps(found, indent=1))
    if missing and not found:
        raise PictureError("none of the pictures could be read")


@main.command()
@click.argument("path", type=FILE)
@click.option("--weights", type=FILE, help="Trained weights; the preset's initial ones by default.")
@click.option("--preset", default="paper2012", show_default=True, help="Without --weights.")
@click.option("--backend", default="auto", show_default=True, help="The session that the file is compared with.")
@click.option("--no-verify", is_flag=True, help="Do not run the file on ONNX Runtime and compare.")
def export(path: Path, weights: Path | None, preset: str, backend: str, no_verify: bool) -> None:
    """Write a network to one ONNX file, and check that it computes the same."""
    net = portnet.AlexNet.load(weights, backend) if weights else portnet.AlexNet(backend, preset)
    done = net.export_onnx(path, verify=not no_verify)
    size = done.path.stat().st_size / 1e6
    click.echo(f"{done.path}: {net.graph.preset}, {size:.1f} MB")
    if done.error is not None:
        click.echo(f"on ONNX Runtime its logits differ from {net.backend.name}'s by {done.error:.1e} at most")
    elif not no_verify:
        click.echo("not run: ONNX Runtime is not installed (pip install 'portnet[cpu]')")


def _given(**options: Any) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}


def _available(backend: Any) -> bool:
    try:
        plugins.probe(backend)
    except Unavailable:
        return False
    return True


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


@contextmanager
def _progress(total: int, *, quiet: bool = False) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Progress on standard error: a bar on a terminal, otherwise a plain line when the work advances noticeably.

    Gives a function that says what is going on, and one that also counts a unit of work as done.
    """
    console = _console(stderr=True)
    if quiet or not console.is_terminal:
        done = 0

        def advance(text: str) -> None:
            nonlocal done
            done += 1
            # A tenth at a time: a log of a long run stays short.
            if not quiet and (done % max(1, total // 10) == 0 or done == total):
                click.echo(f"[{done}/{total}] {text}", err=True)

        yield lambda text: None, advance
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("starting", total=total)
        yield (
            lambda text: bar.update(task, description=_plain(text)),
            lambda text: bar.update(task, description=_plain(text), advance=1),
        )


if __name__ == "__main__":
    main()
