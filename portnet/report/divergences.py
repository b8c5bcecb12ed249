"""Code divergence as tables for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from portnet.report.table import NOT_MEASURED, plain

COUNTED = (
    "Lines: statements inside functions that ran, from coverage, not from reading. Own: on no other of these backends. "
    "On import: outside of functions; they run wherever PortNet lists its backends."
)
DISTANCE = (
    "Distance: 1 - lines that ran on both / lines that ran on either (Jaccard). Divergence is its mean over pairs, and "
    "convergence 1 - divergence."
)


def everything(told: Mapping[str, Any]) -> list[RenderableType]:
    """What `portnet.lines.told` says."""
    names = list(told["platforms"])
    costs = _table()
    costs.add_column("Backend", overflow="fold")
    for column in ("Lines", "Own", "Shared", "On import"):
        costs.add_column(column, justify="right")
    for name, cost in told["platforms"].items():
        costs.add_row(plain(name), *(number(cost[k]) for k in ("lines", "own", "shared", "imported")))
    parts: list[RenderableType] = [costs]
    if len(names) > 1:
        found = {(d["a"], d["b"]): d["distance"] for d in told["distances"]}
        matrix = _table()
        matrix.add_column("Distance", overflow="fold")
        for name in names:
            matrix.add_column(plain(name), justify="right", overflow="fold")
        for a in names:
            row = ["0" if a == b else f"{found.get((a, b), found.get((b, a))):.3f}" for b in names]
            matrix.add_row(plain(a), *row)
        parts.append(matrix)
        every = told["with_imported"]
        lines = [
            f"Code divergence {told['divergence']:.3f}, convergence {told['convergence']:.3f}; "
            f"with the lines that ran on import, {every['divergence']:.3f} and {every['convergence']:.3f}.",
            f"Ran on all of them: {told['common']:,} lines of {told['any']:,}.",
        ]
    else:
        lines = [f"Code divergence: {NOT_MEASURED}."]
    for name, cost in told["platforms"].items():
        largest = sorted((cost["own_files"] or {}).items(), key=lambda item: -item[1])
        if largest:
            lines.append(f"Own lines of {name}: {', '.join(f'{file} {count:,}' for file, count in largest)}.")
    lines += told["notes"]
    lines += [COUNTED, DISTANCE] if len(names) > 1 else [COUNTED]
    return [*parts, Text(plain("\n".join(lines)))]


def number(value: int | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,}"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
