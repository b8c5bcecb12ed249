"""Files that are there whole or not at all."""

import os
import tempfile
from pathlib import Path

from portnet.errors import PortNetError

TEMPORARY = ".tmp"
"""How the names of temporary files end; they begin with a dot."""


def write_atomically(path: str | os.PathLike[str], content: bytes, error: type[PortNetError]) -> Path:
    """Write a file so that after a crash it is there whole or not at all; raises `error` where that cannot be done.

    A process that is killed meanwhile may leave a temporary file behind (`unfinished`), which nobody reads.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise error(f"cannot write {path}: " + ("it is a folder" if path.is_dir() else f"no folder {path.parent}"))
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
            _sync_folder(path.parent)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as failure:
        raise error(f"cannot write {path}: {failure}") from failure
    return path


def unfinished(folder: str | os.PathLike[str]) -> list[Path]:
    """Temporary files in a folder: a writer was killed, or is at work. They are left alone: it cannot be told which."""
    return sorted(path for path in Path(folder).iterdir() if path.name.startswith(".") and path.suffix == TEMPORARY)


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself last; only POSIX systems let a folder be opened for that."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
