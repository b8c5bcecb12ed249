"""How a training run goes on, for programs: JSON lines, and TensorBoard's event files."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from portnet.errors import InputError
from portnet.files import write_atomically


class Metrics:
    """Values by the step they belong to, in whichever of the two places is named."""

    def __init__(self, path: Path | None, tensorboard: Path | None) -> None:
        self._path, self._folder = path, tensorboard
        self._file: IO[str] | None = None
        self._events: Any = None
        # Now, not when the first steps are done.
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InputError(f"cannot write {path}: " + ("it is a folder" if path.is_dir() else "it has no folder"))
        if tensorboard is not None:
            _writer()

    @contextmanager
    def after(self, step: int) -> Iterator[None]:
        """Open both, without what they hold of later steps: those are made again."""
        if self._path is not None:
            if self._path.exists():
                kept = [line for line in self._path.read_text().splitlines() if _belongs(line, step)]
                write_atomically(self._path, "".join(f"{line}\n" for line in kept).encode(), InputError)
            self._file = self._path.open("a")
        if self._folder is not None:
            self._events = _writer()(os.fspath(self._folder), purge_step=step + 1)
        try:
            yield
        finally:
            if self._file is not None:
                self._file.close()
            if self._events is not None:
                self._events.close()

    def write(self, step: int, **values: float | None) -> None:
        """One line. What is None is left out."""
        found = {name: value for name, value in values.items() if value is not None}
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **found}) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in found.items():
                self._events.add_scalar(name, value, step)


def _belongs(line: str, step: int) -> bool:
    """Whether a line is whole, and of a step that is not made again."""
    try:
        return int(json.loads(line)["step"]) <= step
    except (ValueError, KeyError, TypeError):
        return False


def _writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError(
            f"event files need tensorboardX ({error}); pip install 'portnet[tensorboard]', or leave them out"
        ) from None
    return SummaryWriter
