"""Checkpoints: what training carries from step to step, on disk whole or not at all.

A checkpoint is two files in a folder of one run: ``step-N.safetensors``, the arrays of `Session.state`, and
``step-N.json``, the manifest, which is written after them and holds their SHA-256. The last two are kept. Whatever
moment a process is killed at, the newest manifest whose arrays are as it says is one whole checkpoint.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portnet.contract import Array
from portnet.errors import CheckpointError
from portnet.files import unfinished, write_atomically

FORMAT = "portnet.checkpoint/1"
KEPT = 2
_NAME = re.compile(r"step-(\d{10})\.json")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint as it was read: the `step` (updates made before it), the manifest's `content`, the `arrays`."""

    path: Path
    step: int
    content: Mapping[str, Any]
    arrays: Mapping[str, Array]


def save(folder: str | os.PathLike[str], step: int, arrays: Mapping[str, Array], content: Mapping[str, Any]) -> Path:
    """Write the checkpoint of that step, then remove all but the last `KEPT`; the manifest's path.

    `content` is anything JSON can hold. Raises `CheckpointError` where the folder cannot be written to.
    """
    from safetensors.numpy import save as to_bytes

    folder = _made(folder)
    data = to_bytes(dict(arrays), {"format": FORMAT, "step": str(step)})
    name = f"step-{step:010d}"
    # Before its arrays are replaced: an older run's manifest of this step would not fit them.
    (folder / f"{name}.json").unlink(missing_ok=True)
    write_atomically(folder / f"{name}.safetensors", data, CheckpointError)
    manifest = {"format": FORMAT, "step": step, "sha256": hashlib.sha256(data).hexdigest(), **content}
    path = write_atomically(folder / f"{name}.json", json.dumps(manifest, indent=1).encode(), CheckpointError)
    _prune(folder)
    return path


def latest(folder: str | os.PathLike[str]) -> tuple[Checkpoint | None, list[str]]:
    """The newest whole checkpoint of a folder, or None, and why each newer one was passed over.

    Raises `CheckpointError` where there are checkpoints and none of them is whole.
    """
    damaged: list[str] = []
    for step, path in _manifests(Path(folder)):
        try:
            return _read(path, step), damaged
        except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{path}: {error}")
    if damaged:
        raise CheckpointError(
            f"no checkpoint of {folder} is whole: {'; '.join(damaged)}; remove the folder to begin anew, or restore it"
        )
    return None, []


def clear_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove what killed writers left. Only for the one process that writes here."""
    folder = _made(folder)
    for path in unfinished(folder):
        path.unlink(missing_ok=True)
    _prune(folder)


def _made(folder: str | os.PathLike[str]) -> Path:
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder} for checkpoints: {error}") from error
    return folder


def _manifests(folder: Path) -> Iterator[tuple[int, Path]]:
    """The manifests by step, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*.json") if (match := _NAME.fullmatch(path.name))]
    yield from sorted(found, reverse=True)


def _read(path: Path, step: int) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("step") != step:
        raise CheckpointError(f"it is no manifest of {FORMAT} of step {step}")
    data = path.with_suffix(".safetensors").read_bytes()
    if hashlib.sha256(data).hexdigest() != content["sha256"]:
        raise CheckpointError("its arrays are not those that it was written for")
    try:
        arrays = load(data)
    except SafetensorError as error:
        raise CheckpointError(f"its arrays cannot be read: {error}") from None
    return Checkpoint(path=path, step=step, content=content, arrays=arrays)


def _prune(folder: Path) -> None:
    """Remove all but the newest, each manifest before its arrays, and arrays that no manifest names."""
    kept = [path.with_suffix(".safetensors") for _, path in list(_manifests(folder))[:KEPT]]
    for _, path in list(_manifests(folder))[KEPT:]:
        path.unlink(missing_ok=True)
    for path in folder.glob("step-*.safetensors"):
        if path not in kept:
            path.unlink(missing_ok=True)
