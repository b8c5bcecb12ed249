"""What every command prints with: a console, progress, text that is no markup."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console


def plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def open_console(*, stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)


@contextmanager
def show_progress(total: int, *, quiet: bool = False) -> Iterator[tuple[Callable[[str], None], Callable[..., None]]]:
    """Progress on standard error: a bar on a terminal, otherwise a plain line when the work advances noticeably.

    Gives a function that says what is going on, and one that also counts a unit of work, or a `count`, as done.
    """
    shown = open_console(stderr=True)
    if quiet or not shown.is_terminal:
        done, said = 0, -inf

        def say(text: str) -> None:
            nonlocal said
            # Minutes can pass before a unit is done; a log that is silent looks hung.
            if not quiet and monotonic() - said >= 30:
                said = monotonic()
                click.echo(f"[{done}/{total}] {text}", err=True)

        def advance(text: str, count: int = 1) -> None:
            nonlocal done
            tenth = max(1, total // 10)
            before, done = done // tenth, done + count
            # A tenth at a time: a log of a long run stays short.
            if not quiet and (done // tenth > before or done == total):
                click.echo(f"[{done}/{total}] {text}", err=True)

        yield say, advance
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
        console=shown, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("starting", total=total)
        yield (
            lambda text: bar.update(task, description=plain(text)),
            lambda text, count=1: bar.update(task, description=plain(text), advance=count),
        )
