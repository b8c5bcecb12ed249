"""The command that times training in several processes beside one."""

import sys
from pathlib import Path
from statistics import median
from typing import get_args

import click

from portnet import measurement
from portnet.console import show_progress
from portnet.contract import Parallel
from portnet.errors import Unavailable, Unsupported
from portnet.record import Record, Spec

FOLDER = click.Path(path_type=Path, file_okay=False)


def register(main: click.Group) -> None:
    """Add it to the command line."""
    main.add_command(scale)


@click.command()
@click.argument("stack")
@click.option("--parallel", type=click.Choice([way for way in get_args(Parallel) if way]), default="data",
              show_default=True, help="Each with a part of every batch, or two with half of every layer.")  # fmt: skip
@click.option("--processes", type=click.IntRange(2), default=2, show_default=True, help="At most; all on this machine.")
@click.option("--preset", default="paper2012", show_default=True)
@click.option("--image-size", type=click.IntRange(1), default=227, show_default=True, help="Pixels a side.")
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True,
              help="Images a step: each process's with data, of both together with towers.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of fresh processes.")
@click.option("--blocks", type=click.IntRange(1), default=10, show_default=True, help="Timed in each.")
@click.option("--timeout", type=click.FloatRange(1), default=1800.0, show_default=True, help="Seconds, for each group.")
@click.option("--out", type=FOLDER, default=Path("portnet-scale"), show_default=True, help="Where the record goes.")
@click.option("--json", "as_json", is_flag=True, help="Print the record, for programs.")
def scale(
    stack: str,
    parallel: str,
    processes: int,
    preset: str,
    image_size: int,
    batch: int,
    rounds: int,
    blocks: int,
    timeout: float,
    out: Path,
    as_json: bool,
) -> None:
    """Time training in 1, 2, 4, ... processes on this machine: BACKEND[/PRECISION][/channels-last].

    Before that, a small network must come out as in one process. Bytes that cross are counted, and the collective
    operations timed alone. Leaves one record in --out, for 'portnet report'. Exit status 1 if there is no figure.
    """
    from portnet import scaling

    spec = Spec(
        **measurement.parse_stack(stack), mode="scale", parallel=parallel, processes=processes, preset=preset,
        image_size=image_size, batch=batch, blocks=blocks, quick=rounds < 3 or blocks < 5,
    )  # fmt: skip
    with show_progress(total=rounds * len(scaling.counts(spec)), quiet=as_json) as (_, advance):
        try:
            record = scaling.measure(spec, rounds=rounds, timeout=timeout, say=advance)
        except (Unavailable, Unsupported) as error:
            reason, remedy = (error.reason, error.remedy) if isinstance(error, Unavailable) else (str(error), "")
            record = Record(spec=spec, outcome="not available", reason=reason, remedy=remedy,
                            environment=measurement.environment())  # fmt: skip
    path = record.write(out)
    click.echo(record.to_json() if as_json else "\n".join([*_lines(record), f"record: {path}"]))
    sys.exit(record.outcome != "works")


def _lines(record: Record) -> list[str]:
    """What the record tells, for people."""
    from portnet.lockin import bus_bandwidth, timed_rate
    from portnet.scaling import TOGETHER

    told, spec = record.scaling, record.spec
    if record.outcome != "works":
        return [f"{spec.stack}, {spec.parallel}: {record.outcome}. {record.reason} {record.remedy}".rstrip()]
    gate = record.gates["agreement"]
    made = [
        f"{spec.stack}, {spec.parallel}, by {told['collectives']}: the same network as one process's; after "
        f"{TOGETHER} steps {gate['what']} differs most, by {gate['error']:.1e} of its change "
        f"({gate['allowed']:g} allowed)"
    ]
    rates = {int(n): [timed_rate(timed) for timed in rounds] for n, rounds in told["rounds"].items()}
    for n, found in sorted(rates.items()):
        shares = [a / b / n for a, b in zip(found, rates[1], strict=True)]
        made.append(
            f"{n} process{'es' * (n > 1)}: {median(found):.4g} images/s"
            + (f"; efficiency {median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})" if n > 1 else "")
        )
    for name, each in told["traffic"].items():
        made.append(f"{name}: {each['calls']} calls and {each['bytes']:,} bytes a step, of all processes together")
    for name, timed in told["operations"].items():
        best = max((bus_bandwidth(name, spec.processes, t), t["bytes"]) for t in timed)
        made.append(f"{name} alone: bus bandwidth {best[0] / 1e9:.3g} GB/s at {best[1]:,} bytes")
    if told["one_device"]:
        made.append("The processes share one device: a functional check, and no figure of an interconnect.")
    return made
