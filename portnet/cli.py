"""The command line. Exit status: 0 done, 1 a run or a check failed, 2 the user's mistake."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

import portnet
from portnet import cli_data, cli_report, cli_scale, cli_train, plugins
from portnet.console import open_console, plain, show_progress
from portnet.contract import INT8, PRECISIONS
from portnet.errors import (
    InputError,
    OnnxFileError,
    PictureError,
    PluginError,
    PortNetError,
    RecordError,
    Unavailable,
    WeightsError,
)

if TYPE_CHECKING:
    from portnet.model import OnnxNetwork
    from portnet.plan import Plan
    from portnet.record import Record, Spec

MISTAKES = (InputError, OnnxFileError, PictureError, PluginError, RecordError, WeightsError)
"""Errors that the user can mend on the command line; the others are failed runs."""

FILE = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, file_okay=False)
SILENCE = click.FloatRange(0, min_open=True)


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
            emulated = e["device"]["emulated"]
            precisions = [p + " (emulated)" * (p in emulated) for p in e["device"]["precisions"]]
            row = (e["name"], e["vendor"], ", ".join(e["modes"]), device, ", ".join(precisions))
            table.add_row(*map(plain, row))
    console = open_console()
    console.print(table)
    console.print("Not available:" if not all(e["available"] for e in found) else "")
    for e in found:
        if not e["available"]:
            note = f" ({e['note']})" if e["note"] else ""
            who = f"  [bold]{e['name']}[/], {plain(e['vendor'] + note)}"
            text = f"{who}: {plain(e['reason'])}\n      {plain(e['remedy'])}"
            console.print(text, soft_wrap=True, highlight=False)
    for p in registry.problems:
        console.print(f"[red]Broken plug-in[/] {plain(str(p))}", soft_wrap=True, highlight=False)


@main.command()
@click.argument("preset", default="paper2012")
@click.option("--image-size", type=int)
@click.option("--classes", type=int, default=1000, show_default=True)
def summary(preset: str, image_size: int | None, classes: int) -> None:
    """Print the layers, shapes, parameters and multiply-accumulates of a preset."""
    click.echo(portnet.graph(preset, classes=classes, **_given(image_size=image_size)).summary())


def _measuring_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the records as one JSON list, for programs."),
        click.option("--out", type=FOLDER, default=Path("portnet-records"), show_default=True),
        click.option(
            "--timeout", type=SILENCE, default=600.0, show_default=True, help="Seconds of silence of a process."
        ),
        click.option("--budget", metavar="TIME", help="Such as 9m: no round begins that would not end by then."),
        click.option("--strict", is_flag=True, help="Refuse a stack of which a part would run on another device."),
        click.option("--quick", is_flag=True, help="One round of few blocks: figures that are not to be quoted."),
        click.option("--rounds", type=click.IntRange(1), help="Fresh processes per stack; 10, or 1 with --quick."),
        click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True),
        click.option("--image-size", type=int, help="Pixels a side; the preset's own by default."),
        click.option("--preset", default="caffe", show_default=True),
        click.option("--model", default="", help="package:factory of a model of your own, instead of AlexNet."),
        click.option("--data", default="digits", show_default=True, help="As for train."),
    ):
        command = option(command)
    return command


def _carry_out(
    plan: "Plan", *, quick: bool, rounds: int | None, budget: str | None, timeout: float, out: Path
) -> "list[Record]":
    """Measure a plan with progress on standard error; every record is on disk as soon as it is made."""
    from portnet import plan as planning

    try:
        # Now, not when the first record is made and would be lost.
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"cannot make the folder {out}: {error}") from error
    rounds = rounds or (1 if quick else 10)
    total = rounds * sum(map(len, plan.groups))
    made: list[Record] = []
    began = monotonic()
    with show_progress(total=total) as (progress, advance):

        def say(spec: "Spec", line: str) -> None:
            left = (monotonic() - began) / len(made) * (total - len(made)) if made else None
            about = f", about {_minutes(left)} left" if left is not None else ""
            progress(f"{spec.stack}, {spec.mode}, batch {spec.batch}: {line}{about}")

        found = planning.carry_out(
            plan, rounds=rounds, seconds=_seconds(budget) if budget else inf, timeout=timeout, say=say
        )
        for record in found:
            record.write(out)
            made.append(record)
            advance(f"{record.spec.stack}, {record.spec.mode}, batch {record.spec.batch}: {record.outcome}")
    return made


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _seconds(text: str) -> float:
    """``90``, ``90s``, ``9m`` or ``1h`` in seconds."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < inf:
        raise click.UsageError(f"--budget must be a time such as 90s, 9m or 1h, got {text!r}")
    return seconds


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1 and word != 'series')}"


def _told(made: "list[Record]", plan: "Plan", out: Path, *, as_json: bool) -> None:
    """Print what was measured, and exit with 1 if something that was asked for has no figure."""
    from portnet import lockin
    from portnet.plan import NO_TIME
    from portnet.report import table

    if as_json:
        click.echo(json.dumps([json.loads(r.to_json()) for r in made], indent=1))
    else:
        console = open_console()
        for renderable in table.measured(made):
            console.print(renderable)
        for name, reason in plan.left_out:
            console.print(f"{plain(name)}: left out. {plain(str(reason))}", soft_wrap=True, highlight=False)
        console.print(f"{_counted(len(made), 'record')}: {out}", soft_wrap=True, highlight=False)
    if any(f.outcome not in lockin.COUNTED and f.reason != NO_TIME for f in lockin.figures(made)):
        sys.exit(1)


@main.command()
@click.argument("stacks", nargs=-1, metavar="STACK...")
@click.option("--all", "every", is_flag=True, help="Every stack that is available here, the most telling first.")
@click.option("--backends", "names", help="With --all: only these, comma-separated.")
@click.option("--mode", "modes", multiple=True, type=click.Choice(["train", "infer", "serve"]), help="Repeatable.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), default=[16], show_default=True)
@click.option("--precision", type=click.Choice([*PRECISIONS, INT8]), help="For stacks that name none.")
@click.option("--ablate", metavar="LAYERS", help="Comma-separated library layers to take away, all at once.")
@_measuring_options
def measure(
    stacks: tuple[str, ...],
    every: bool,
    names: str | None,
    modes: tuple[str, ...],
    batches: tuple[int, ...],
    precision: str | None,
    ablate: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure stacks side by side: BACKEND[/ENGINE][/PRECISION][/channels-last], such as cuda/compile/bfloat16.

    Each round starts a fresh process for each stack; they pass the gates one after the other and then take turns block
    by block. Every process leaves one JSON record in --out. Exit status 1 if one of them has no figure.
    """
    from portnet import plan as planning

    if every == bool(stacks) or (names and not every):
        raise click.UsageError("name stacks, or give --all and perhaps --backends")
    ours = {k: options.pop(k) for k in ("rounds", "budget", "timeout", "out")}
    if precision:
        stacks = tuple(s if any(p in (*PRECISIONS, INT8) for p in s.split("/")) else f"{s}/{precision}" for s in stacks)
    if every:
        chosen = [name.strip() for name in names.split(",")] if names else []
        plan = planning.everything(chosen, modes=modes, batches=batches, **options)
    else:
        without = tuple(name.strip() for name in ablate.split(",")) if ablate else ()
        plan = planning.of_stacks(stacks, modes=modes, batches=batches, without=without, **options)
    _told(_carry_out(plan, quick=options["quick"], **ours), plan, ours["out"], as_json=as_json)


@main.command()
@click.argument("stack")
@click.option("--mode", type=click.Choice(["train", "infer"]), default="infer", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--layers", help="Comma-separated; all that the stack has by default.")
@_measuring_options
def ablate(stack: str, mode: str, batch: int, layers: str | None, as_json: bool, **options: Any) -> None:
    """Measure what each layer of a vendor's software is worth: the stack whole, and with one layer taken away.

    All of them side by side, in rounds. Below the libraries stand two rungs of PortNet's own, `unfold` and `direct`.
    """
    from portnet import plan as planning
    from portnet.report import table

    ours = {k: options.pop(k) for k in ("rounds", "budget", "timeout", "out")}
    chosen = [name.strip() for name in layers.split(",")] if layers else []
    plan = planning.ladder(stack, mode=mode, batch=batch, layers=chosen, **options)
    made = _carry_out(plan, quick=options["quick"], **ours)
    if not as_json:
        open_console().print(table.ablation(made, plan.groups[0][0], plugins.backends()[plan.groups[0][0].backend]))
    _told(made, plan, ours["out"], as_json=as_json)


@main.command()
@click.option("--backends", "names", help="Comma-separated; all that are found by default.")
@click.option("--steps", type=click.IntRange(1), default=60, show_default=True, help="Steps of the training curve.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Images a timed step.")
@click.option("--preset", default="caffe", show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="float32", show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@click.option("--model", default="", help="package:factory of a model of your own, instead of AlexNet.")
@click.option("--timeout", type=SILENCE, default=600.0, show_default=True, help="Seconds of silence of a process.")
@click.option("--out", type=FOLDER, default=Path("portnet-compare"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the records as one JSON list, for programs.")
def compare(
    names: str | None,
    steps: int,
    batch: int,
    preset: str,
    precision: str,
    seed: int,
    model: str,
    timeout: float,
    out: Path,
    as_json: bool,
) -> None:
    """Run the same training and inference on every backend, and show the results side by side.

    The quick form of 'portnet measure --all': one round of the plainest stacks. Each process leaves one JSON record in
    --out, beside a page with the loss curves. Exit status 1 if a backend that was asked for by name is not available
    or a measurement failed.
    """
    from portnet import lockin, measurement
    from portnet import plan as planning
    from portnet.record import Record, Spec
    from portnet.report import page, table

    chosen = [n.strip() for n in names.split(",")] if names else []
    plan = planning.quick(
        chosen, precision=precision, preset=preset, batch=batch, curve_steps=steps, seed=seed, model=model
    )
    absent = [
        Record(
            spec=Spec(backend=name, precision=precision, quick=True),
            outcome="not available",
            reason=error.reason,
            remedy=error.remedy,
            environment=measurement.environment(),
        )
        for name, error in plan.left_out
    ]
    for record in absent:
        record.write(out)
    made = absent + _carry_out(plan, quick=True, rounds=1, budget=None, timeout=timeout, out=out)
    merged = lockin.merge(made)
    written = page.write(merged, out / "compare.html")
    if as_json:
        click.echo(json.dumps([json.loads(r.to_json()) for r in made], indent=1))
    else:
        console = open_console()
        for renderable in table.everything(lockin.rows(merged)):
            console.print(renderable)
        console.print(f"Records and page: {written.parent} ({written.name})", soft_wrap=True)
    if any(r.outcome != "works" and not (r.outcome == "not available" and not names) for r in made):
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

    console = open_console()
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
            console.print(f"{mark} {plain(item.name)}: [dim]{plain(seen)}[/]", soft_wrap=True, highlight=False)
    if as_json:
        click.echo(json.dumps({"backend": name, "failed": failed, "checks": results}, indent=1))
    else:
        console.print(f"{name}: {len(results) - failed} passed, {failed} failed", highlight=False)
    if failed:
        sys.exit(1)


@main.command()
@click.argument("images", nargs=-1, required=True, type=FILE)
@click.option("--weights", required=True, type=FILE, help="Of 'portnet train --save', or a file.onnx of 'export'.")
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
    """Classify pictures with trained weights, or with an exported ONNX file as it is."""
    net: portnet.AlexNet | OnnxNetwork
    if weights.suffix == ".onnx":
        if click.get_current_context().get_parameter_source("precision") != ParameterSource.DEFAULT:
            raise click.UsageError("--precision: an ONNX file has its own")
        net = portnet.open_onnx(weights, backend)
    else:
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
@click.option("--preset", help="Without --weights, which know theirs; paper2012 by default.")
@click.option("--backend", default="auto", show_default=True, help="The session that the file is compared with.")
@click.option("--preprocess", is_flag=True, help="Take uint8 pictures, (batch, S, S, 3), and prepare them in the file.")
@click.option("--softmax", is_flag=True, help="Give probabilities instead of logits.")
@click.option("--half", is_flag=True, help="Weights of float16: half the size.")
@click.option("--opset", type=int, default=17, show_default=True)
@click.option("--one-image", is_flag=True, help="Fix the batch to one image; any batch by default.")
@click.option("--no-verify", is_flag=True, help="Do not run the file on ONNX Runtime and compare.")
def export(
    path: Path,
    weights: Path | None,
    preset: str | None,
    backend: str,
    preprocess: bool,
    softmax: bool,
    half: bool,
    opset: int,
    one_image: bool,
    no_verify: bool,
) -> None:
    """Write a network to one ONNX file, and check that it computes the same."""
    if weights and preset:
        raise click.UsageError("--weights know their preset; leave --preset out")
    net = portnet.AlexNet.load(weights, backend) if weights else portnet.AlexNet(backend, preset or "paper2012")
    done = net.export_onnx(
        path, opset=opset, dynamic_batch=not one_image, preprocess=preprocess, softmax=softmax, half=half,
        verify=not no_verify,
    )  # fmt: skip
    size = done.path.stat().st_size / 1e6
    click.echo(f"{done.path}: {net.graph.preset}, {size:.1f} MB")
    if done.error is not None:
        click.echo(f"on ONNX Runtime its output differs from {net.backend.name}'s by {done.error:.1e} at most")
        if done.worst:
            click.echo(f"of all layers {done.worst} differs most, by {done.layers[done.worst]:.1e}")
    elif not no_verify:
        click.echo("not run: ONNX Runtime is not installed (pip install 'portnet[cpu]')")


@main.command()
@click.argument("source", type=FILE)
@click.argument("target", type=FILE)
@click.option(
    "--data", default="digits", show_default=True, help="digits, synthetic, a folder of class/name.jpg, or shards."
)
@click.option(
    "--backend",
    default=plugins.RUNNER,
    show_default=True,
    help="Where both files are run and compared; the result is the same file.",
)
@click.option(
    "--pictures", type=click.IntRange(1), default=128, show_default=True, help="Training pictures to calibrate on."
)
@click.option("--reduce-range", is_flag=True, help="Filters of 7 bits, for x86 processors without VNNI.")
@click.option(
    "--keep", type=click.FloatRange(0, 1), default=0.99, show_default=True, help="Share of float32's accuracy."
)
@click.option("--json", "as_json", is_flag=True)
def quantize(
    source: Path,
    target: Path,
    data: str,
    backend: str,
    pictures: int,
    reduce_range: bool,
    keep: float,
    as_json: bool,
) -> None:
    """Quantise a float32 ONNX file to 8-bit integers, and hold it against that on the test pictures.

    Exit status 1 if less than --keep of float32's accuracy is left.
    """
    from portnet.quantization import quantize as quantise

    done = quantise(
        source, target, data, backend=backend, pictures=pictures, reduce_range=reduce_range, keep=keep,
        say=lambda line: None if as_json else click.echo(f"{line} ...", err=True),
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps({**asdict(done), "size": done.size, "kept": done.kept}, indent=1))
        return
    click.echo(f"{done.path}: {done.bytes / 1e6:.1f} MB, {done.size:.3f} of float32's {done.bytes_before / 1e6:.1f} MB")
    click.echo(
        f"top-1 {done.int8.top1:.1%} of {done.int8.count} test pictures, float32 {done.float32.top1:.1%}; "
        f"{done.agree} have the same first class in both"
    )
    click.echo(
        f"on {done.backend} {done.speedup:.2f} times as fast at batch {done.batch} (quick: {done.slowest:.2f} to "
        f"{done.fastest:.2f} from pair to pair)"
    )


def _given(**options: Any) -> dict[str, Any]:
    return {k: v for k, v in options.items() if v is not None}


@main.command("records")
@click.argument(
    "folders", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path, exists=True, file_okay=False)
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
def list_records(folders: tuple[Path, ...], as_json: bool) -> None:
    """List the records in folders, and verify every one.

    Equal records count once, wherever they lie. Files that are no records, or damaged ones, are named and left out;
    exit status 1 if there are any.
    """
    from portnet import files, record

    found, refused = record.search(folders)
    found.sort(key=lambda f: (f.record.spec.stack, f.record.spec.mode, f.record.spec.batch, _date(f.record)))
    unfinished = [path for folder in dict.fromkeys(folders) for path in files.unfinished(folder)]
    rounds = [f.record.round for f in found if f.record.round]
    told: dict[str, Any] = {
        "records": [{**_listed(f.record), "paths": list(map(str, f.paths))} for f in found],
        "duplicates": sum(len(f.paths) - 1 for f in found),
        "series": len({r.get("series") for r in rounds}),
        "rounds": len({(r.get("series"), r.get("number")) for r in rounds if not r.get("rejected")}),
        "rejected": len({(r.get("series"), r.get("number"), r.get("reruns")) for r in rounds if r.get("rejected")}),
        "refused": [{"path": str(e.path), "kind": e.kind, "message": str(e)} for e in refused],
        "unfinished": list(map(str, unfinished)),
    }
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        _print_records(told)
    if refused:
        sys.exit(1)


def _date(record: "Record") -> str:
    return str(record.environment.get("date", ""))


def _listed(record: "Record") -> dict[str, Any]:
    """What `records` tells of one. `step`: the median over blocks, in seconds; None where a gate voided it."""
    from statistics import median

    from portnet.lockin import COUNTED

    timed = record.samples.get(record.spec.mode) or {"seconds": ()}
    counts = timed["seconds"] and record.outcome in COUNTED
    return {
        "digest": record.digest,
        "stack": record.spec.stack,
        "mode": record.spec.mode,
        "batch": record.spec.batch,
        "outcome": record.outcome,
        "quick": record.spec.quick,
        "device": record.device.get("name"),
        "date": _date(record),
        "round": {k: v for k, v in record.round.items() if k in ("series", "number", "reruns", "rejected")},
        "blocks": len(timed["seconds"]),
        "step": median(timed["seconds"]) / timed["steps"] if counts else None,
    }


def _print_records(told: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from portnet.report.table import NOT_MEASURED, plain

    def shown(value: object, most: int = 100) -> Text:
        """On one line, and not too much of it: a record can come from anyone."""
        text = plain(value).replace("\n", " ")
        return Text(text if len(text) <= most else f"{text[:most]}…")

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, leading=1)
    table.add_column("Record,\ndate", width=12)
    table.add_column("Stack,\ndevice", overflow="fold")
    table.add_column("Mode,\nbatch", width=6, overflow="fold")
    table.add_column("Outcome,\nround", width=13)
    table.add_column("Blocks,\nms a step", justify="right", width=12)
    for r in told["records"]:
        place = f"round {r['round']['number'] + 1}" if "number" in r["round"] else ""
        place = "rejected" if r["round"].get("rejected") else place
        step = NOT_MEASURED if r["step"] is None else f"{1e3 * r['step']:.4g}" + " quick" * r["quick"]
        cells = (
            (r["digest"][:12], r["date"][:10] or "no date"),
            (r["stack"], r["device"] or "no device"),
            (r["mode"], r["batch"]),
            (r["outcome"], place),
            (r["blocks"] or "none", "void" if r["blocks"] and r["step"] is None else step),
        )
        table.add_row(*(Text("\n").join(map(shown, cell)) for cell in cells))
    console = open_console()
    if told["records"]:
        console.print(table)

    line = _counted(len(told["records"]), "record")
    if told["series"]:
        line += f" in {_counted(told['series'], 'series')} of {_counted(told['rounds'], 'round')}"
        line += f" and {told['rejected']} rejected" if told["rejected"] else ""
    line += f", {_counted(told['duplicates'], 'duplicate')}" if told["duplicates"] else ""
    console.print(line, highlight=False)
    for error in told["refused"]:
        why = shown(f"({error['kind']}): {error['message']}", 1000)
        console.print(Text.assemble(("Refused ", "red"), why), soft_wrap=True)
    for path in told["unfinished"]:
        text = f"Unfinished: {path}; its writer is at work, or was killed: then it can be deleted"
        console.print(shown(text, 1000), soft_wrap=True)


cli_data.register(main)
cli_report.register(main)
cli_scale.register(main)
cli_train.register(main)

if __name__ == "__main__":
    main()
