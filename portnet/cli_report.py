"""The commands that read records and measure nothing: report, diff, project, divergence."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from portnet.contract import PRECISIONS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from portnet.errors import RecordError

FILE = click.Path(path_type=Path, exists=True, dir_okay=False)
FOLDERS = click.Path(path_type=Path, exists=True)


def register(main: click.Group) -> None:
    """Add them to the command line."""
    for command in COMMANDS:
        main.add_command(command)


@click.command()
@click.argument("device", required=False)
@click.option("--all", "every", is_flag=True, help="Every device that is known, in the order of years.")
@click.option("--precision", type=click.Choice(PRECISIONS), help="This one only; every one by default.")
@click.option("--preset", default="paper2012", show_default=True)
@click.option("--batch", type=int, default=128, show_default=True)
@click.option("--epochs", type=int, default=90, show_default=True)
@click.option("--devices", "count", type=int, default=1, show_default=True, help="As many, at perfect scaling.")
@click.option("--efficiency", type=click.FloatRange(0, 1, min_open=True), help="Assumed share of the peaks, as 0.5.")
@click.option("--records", "folders", multiple=True, type=FOLDERS, help="Take efficiencies measured on it from here.")
@click.option("--took", multiple=True, metavar="TIME", help="Such as 5.5d or 120h: which efficiency that time implies.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def project(
    device: str | None,
    every: bool,
    precision: str | None,
    preset: str,
    batch: int,
    epochs: int,
    count: int,
    efficiency: float | None,
    folders: tuple[Path, ...],
    took: tuple[str, ...],
    as_json: bool,
) -> None:
    """The least time that training on ImageNet takes a DEVICE, by what its vendor publishes; nothing is measured.

    With an efficiency, assumed or from records, also an estimate. Exit status 1 if no floor of DEVICE is known, or a
    record was refused.
    """
    from portnet import projection
    from portnet.record import read_all
    from portnet.report import projections

    if every == bool(device):
        raise click.UsageError("name a DEVICE, or give --all")
    if took and every:
        raise click.UsageError("--took is of one DEVICE")
    if efficiency is not None and folders:
        raise click.UsageError("give --efficiency or --records, not both")
    times = [projection.seconds(t) for t in took]
    work = projection.Work(preset=preset, batch=batch, epochs=epochs)
    if device:
        chosen = [projection.project(device, work, precision=precision, count=count)]
    else:
        chosen = projection.over_time(work, precision=precision, count=count)
    records, refused = read_all(folders)
    _name_refused(refused)
    if as_json:
        click.echo(json.dumps(projection.told(chosen, records, efficiency=efficiency, took=times), indent=1))
    elif device:
        held = records if folders else None
        _print(projections.one(chosen[0], held, efficiency=efficiency, took=times))
    else:
        _print(projections.every(chosen, records, efficiency=efficiency))
    if refused or (device and all(p.floor is None for p in chosen[0])):
        sys.exit(1)


@click.command()
@click.argument("old", type=FOLDERS)
@click.argument("new", type=FOLDERS)
@click.option(
    "--margin",
    type=click.FloatRange(0),
    default=0.02,
    show_default=True,
    help="What is worse by no more than this share, as 0.02, or not certainly by more, does not count.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def diff(old: Path, new: Path, margin: float, as_json: bool) -> None:
    """Which figures moved between two sets of records, folders or files, such as before and after a new driver.

    Exit status 0 if nothing moved for the worse, 1 if something did, 2 if not everything could be compared: a record
    was refused, the sets have nothing in common, or it is not clear which of several to take.
    """
    from portnet import difference
    from portnet.record import read_all
    from portnet.report import differences

    sides, refused = zip(*(read_all([path]) for path in (old, new)), strict=True)
    problems = [error for side in refused for error in side]
    _name_refused(problems)
    found = difference.difference(*sides)
    if as_json:
        told = difference.told(found, margin)
        click.echo(json.dumps({**told, "refused": [str(error) for error in problems]}, indent=1))
    else:
        _print(differences.everything(found, margin))
    if found.worse(margin):
        sys.exit(1)
    if problems or found.mixed:
        sys.exit(2)


@click.command()
@click.argument("paths", nargs=-1, metavar="FILE...", type=click.Path(path_type=Path))
@click.option("--collect", metavar="NAME", help="Make such a file from coverage.py's data, which were taken on NAME.")
@click.option("--out", type=click.Path(path_type=Path), help="With --collect: instead of coverage-NAME.json.")
@click.option("--p3", type=click.Path(path_type=Path), help="Also write a CSV for P3 Analysis Library's divergence.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def divergence(paths: tuple[Path, ...], collect: str | None, out: Path | None, p3: Path | None, as_json: bool) -> None:
    """How far the code that runs on different backends is apart, from FILEs of the lines that ran on each.

    A FILE is made where its backend is: coverage run --source=portnet,portnet_backends -m portnet.cli check NAME, then
    portnet divergence --collect NAME. Of one FILE alone, divergence is not measured.
    """
    from portnet import lines
    from portnet.errors import InputError
    from portnet.files import write_atomically
    from portnet.report import divergences

    if collect is not None:
        if paths or p3 or as_json:
            raise click.UsageError("--collect makes a file; join files in a second call")
        if not out and (not collect or Path(collect).name != collect):
            raise click.UsageError(f"--collect {collect!r} is no file's name; give --out FILE besides")
        found = lines.collect(collect)
        written = write_atomically(out or Path(f"coverage-{collect}.json"), found.to_json().encode(), InputError)
        click.echo(f"{written}: {len(found.called)} lines inside functions, {len(found.imported)} on import")
        return
    if out:
        raise click.UsageError("--out goes with --collect")
    if not paths:
        raise click.UsageError("give the files that --collect made, one for each backend")
    collected = [lines.read(path) for path in paths]
    told = lines.told(collected)
    if p3:
        write_atomically(p3, lines.p3(collected).encode(), InputError)
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        _print(divergences.everything(told))


def _name_refused(errors: "Iterable[RecordError]") -> None:
    from portnet.report.table import plain

    for error in errors:
        click.echo(f"portnet: refused: {plain(error)}".replace("\n", " "), err=True)


@click.command()
@click.argument("records", nargs=-1, type=FOLDERS)
@click.option("--platforms", metavar="A,B,...", help="The set to be judged, such as cuda,rocm,mps,cpu; all by default.")
@click.option("--home", default="cuda", show_default=True, help="The platform that would be left.")
@click.option(
    "--prices", type=FILE, help="TOML: currency, and below [hour] the price of an hour by device or platform."
)
@click.option(
    "--latency", metavar="TIME", default="100ms", show_default=True, help="Bound on answers that costs count."
)
@click.option("--divergence", "lines", type=FILE, help="What 'portnet divergence --json' printed.")
@click.option("--reference", multiple=True, metavar="NAME", help="Also take the shipped records of a device.")
@click.option(
    "--format", "form", type=click.Choice(("html", "markdown", "json", "csv", "p3")), help="By --out's suffix."
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="Where to; without it, the terminal."
)
def report(
    records: tuple[Path, ...],
    platforms: str | None,
    home: str,
    prices: Path | None,
    latency: str,
    lines: Path | None,
    reference: tuple[str, ...],
    form: str | None,
    out: Path | None,
) -> None:
    """What would leaving CUDA cost? From RECORDS, files and folders of one or many machines, to the answer.

    The page that -o report.html writes needs no network. Without --out, a summary goes to the terminal, or what
    --format asks for. Exit status 1 if a record was refused.
    """
    from portnet import reporting
    from portnet.errors import RecordError
    from portnet.files import write_atomically
    from portnet.report import formats
    from portnet.report.table import plain

    if out is not None and not out.parent.is_dir():
        raise click.UsageError(f"--out {out}: there is no folder {out.parent}")
    if out is not None and form is None:
        form = reporting.form_of(out)
    seen = reporting.report(
        records,
        platforms=platforms,
        home=home,
        prices=prices,
        latency=latency,
        divergence=lines,
        references=reference,
    )
    text = reporting.written(seen, form) if form else ""
    if out is not None:
        write_atomically(out, text.encode(), RecordError)
    if form and out is None:
        click.echo(text, nl=False)
    else:
        _print(formats.summary(seen.assessment))
    if out is not None:
        click.echo(f"{out}: {len(text.encode()):,} bytes")
    for problem in seen.assessment.problems:
        click.echo(f"portnet: left out: {plain(problem)}".replace("\n", " "), err=True)
    if seen.refused:
        sys.exit(1)


def _print(told: "Iterable[RenderableType]") -> None:
    """Print what a report's room made; strings are lines that are not to be wrapped."""
    from rich.console import Console

    console = Console()
    for one in told:
        console.print(one, highlight=False, markup=False, soft_wrap=isinstance(one, str))


COMMANDS: list[click.Command] = [report, project, diff, divergence]
