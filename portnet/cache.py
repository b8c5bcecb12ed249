"""What the reference computed once on this machine, kept between processes.

The float64 reference takes longer than most of what it judges. Its results are kept in the user's cache folder, or in
``PORTNET_CACHE``, under a name that is the hash of all that went into them: the code that computes them too. Anything
that is missing or damaged is computed again; the folder can be deleted at any time.
"""

import hashlib
import inspect
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from portnet import graph, parity, philox, plugins, weights
from portnet.errors import PortNetError
from portnet.files import write_atomically
from portnet.host import processor
from portnet.parity import Batched, Case, Expected, Gated

LIMIT = 6 * 2**30
"""Bytes that the folder may hold; the files longest unused go first. Full-size training takes 1 GB."""

_PARTS = ("infer", "train", "gradients", "updates")


def folder() -> Path:
    """Where results are kept."""
    return Path(os.environ.get("PORTNET_CACHE") or platformdirs.user_cache_dir("portnet", appauthor=False))


def expect(case: Case, precision: str, *, train: bool) -> Expected:
    """`parity.expect` by PortNet's reference, from the cache where it is there."""
    reference = plugins.backends()["reference"]
    oracle = parity.oracle(reference)
    path = folder() / f"expected-{_key(reference, case, precision, train)}.npz"
    found: Expected | None = _read(path, lambda: _unpack(path, case, precision))
    if found is None:
        found = parity.expect(case, oracle, precision, train=train)
        # The expectation holds the gradients of 60 million parameters several times over.
        parity.expect.cache_clear()
        _write(path, _pack(found))
    return found


def expect_batch(case: Case, precision: str, *, train: bool) -> Batched:
    """`parity.expect_batch` by PortNet's reference, from the cache where it is there."""
    reference = plugins.backends()["reference"]
    key = _key(reference, case, precision, train)

    def make() -> Any:
        found = parity.expect_batch(case, parity.oracle(reference), precision, train=train)
        return [found.logits.exact.tolist(), found.logits.allowed, found.loss, found.allowed_loss]

    exact, allowed, loss, allowed_loss = text("batch", key, make)
    return Batched(
        case=case, logits=Gated(exact=np.array(exact), allowed=allowed), loss=loss, allowed_loss=allowed_loss
    )


def _key(reference: object, case: Case, precision: str, train: bool) -> str:
    modules = (graph, philox, weights, parity, inspect.getmodule(type(reference)))
    content = [inspect.getsource(m) for m in modules if m is not None]
    content += [repr((case.graph, case.batch, case.seed, precision, train)), np.__version__, processor()]
    return _digest(*content)


def sources(*objects: object) -> str:
    """The hash of all source files beside those of these objects' classes, and of PortNet's own."""
    folders = {Path(inspect.getfile(type(o))).parent for o in objects} | {Path(__file__).parent}
    files = sorted(path for where in folders for path in where.glob("*.py"))
    return _digest(*(path.read_text(errors="replace") for path in files))


def text(name: str, key: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON can hold it; from the cache where something of that name and key is."""
    path = folder() / f"{name}-{_digest(key)}.json"

    def load() -> Any:
        held = json.loads(path.read_text())
        if _digest(json.dumps(held["value"])) != held["sha256"]:
            raise ValueError("damaged")
        return held["value"]

    found = _read(path, load)
    if found is None:
        found = json.loads(json.dumps(make()))
        _write(path, json.dumps({"value": found, "sha256": _digest(json.dumps(found))}).encode())
    return found


def arrays(name: str, key: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The arrays that `make` gives by name; from the cache where some of that name and key are."""
    path = folder() / f"{name}-{_digest(key)}.npz"

    def load() -> dict[str, Any]:
        # The archive's own checksums are what finds damage.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return {key: held[key] for key in held.files}

    found: dict[str, Any] | None = _read(path, load)
    if found is None:
        found, held = dict(make()), io.BytesIO()
        np.savez(held, **found)
        _write(path, held.getvalue())
    return found


def _digest(*content: str) -> str:
    sha = hashlib.sha256()
    for part in content:
        sha.update(f"{len(part)}:{part}".encode())
    return sha.hexdigest()


def _read(path: Path, load: Callable[[], Any]) -> Any:
    try:
        found = load()
        os.utime(path)
    # A damaged file is what zipfile, NumPy and JSON call by these names; it is as good as none.
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return found


def _write(path: Path, content: bytes) -> None:
    """Keep it if that can be done; a full or read-only disk costs time and nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content, PortNetError)
        _evict(path.parent)
    except (OSError, PortNetError):
        return


def _evict(where: Path) -> None:
    files = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in where.iterdir() if p.is_file()), reverse=True)
    total = 0
    for _, size, path in files:
        total += size
        if total > LIMIT:
            path.unlink(missing_ok=True)


def _pack(expected: Expected) -> bytes:
    arrays: dict[str, Any] = {}
    for part in _PARTS:
        gated: Mapping[str, Gated] = getattr(expected, part)
        for name, value in gated.items():
            arrays[f"{part}/{name}"] = value.exact
            arrays[f"allowed/{part}/{name}"] = np.float64(value.allowed)
    arrays["loss"] = np.float64(expected.loss)
    held = io.BytesIO()
    np.savez(held, **arrays)
    return held.getvalue()


def _unpack(path: Path, case: Case, precision: str) -> Expected:
    found: dict[str, dict[str, Gated]] = {part: {} for part in _PARTS}
    # The archive's own checksums are what finds damage.
    with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
        for key in held.files:
            part, _, name = key.partition("/")
            if part in found:
                found[part][name] = Gated(exact=held[key], allowed=float(held[f"allowed/{key}"]))
        expected = Expected(case=case, precision=precision, infer={}, train={}, gradients={}, updates={}, loss=0.0)
        return replace(expected, **found, loss=float(held["loss"]))  # type: ignore[arg-type]
