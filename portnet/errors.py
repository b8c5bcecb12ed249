"""Every error PortNet raises on purpose. Each says what was wrong, what was expected, and what to do next."""

import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class PortNetError(Exception):
    """Base of all PortNet errors."""


class InputError(PortNetError, ValueError):
    """An argument has the wrong shape, dtype, range or content."""


class UnknownName(InputError):
    """A backend, preset, layer or data set of that name does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        near = get_close_matches(name, known, n=3)
        hint = f"known: {', '.join(known) or 'none'}"
        if near:
            hint = f"did you mean {' or '.join(near)}? ({hint})"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class WeightsError(PortNetError):
    """A weights file is missing, damaged, or belongs to another network."""


class CheckpointError(PortNetError):
    """A checkpoint is damaged, cannot be written, or belongs to another run."""


class ExportError(PortNetError):
    """An exported file does not compute what the session that it came from does."""


class OnnxFileError(PortNetError):
    """An ONNX file is not opened: its `path`, and the `kind` of trouble.

    ``missing``, ``unreadable``, ``too large``, ``not ONNX``, ``damaged`` (it is not what was sealed), ``foreign`` (it
    was never sealed), ``external data`` (it would have other files read), ``opset``, ``operators`` (its nodes are not
    the network's), ``interface`` (input or output), ``metadata``, ``weights``, ``invalid`` (ONNX's checker refuses it)
    or ``run`` (opened, it does not give its output).
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, reason: str):
        super().__init__(f"{os.fspath(path)}: {reason}")
        self.path, self.kind = Path(path), kind


class PictureError(PortNetError):
    """A picture cannot be read."""


class Unavailable(PortNetError):
    """A backend's device cannot be used here: why, and what would change that."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class Unsupported(PortNetError):
    """The device is there, but not what was asked of it: a precision, an engine, training. Nothing replaces it."""


class PluginError(PortNetError):
    """A plug-in is broken, or two of them claim one name."""


class RecordError(PortNetError):
    """A record is damaged or of an unknown schema."""


def out_of_memory(error: BaseException) -> bool:
    """Frameworks have their own names for it: torch.OutOfMemoryError, XPU's, ONNX Runtime's, and torch's on a CPU."""
    name, text = type(error).__name__.lower(), str(error).lower()
    known = "out of memory", "can't allocate", "failed to allocate"
    return isinstance(error, MemoryError) or "outofmemory" in name or any(words in text for words in known)
