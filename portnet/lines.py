"""Which of PortNet's lines ran on a backend, taken with coverage.py, and joined over machines.

A line that ran is a statement that coverage.py saw run, by the number of its first line. Every module's own statements
(imports, constants, ``def`` lines) run when it is imported, whether its functions are needed or not, and PortNet
imports every backend's file to list the backends. They say nothing of what a backend takes, so they are kept apart
from the statements inside functions, and the figures are those of the latter.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from platform import python_version
from typing import Any

from portnet.errors import InputError, Unavailable
from portnet.portability import Divergence, Line, divergence, divergence_csv

SCHEMA = "portnet-lines-1"
PACKAGES = ("portnet", "portnet_backends")
TAKE = "coverage run --source=portnet,portnet_backends -m portnet.cli check {backend}"


@dataclass(frozen=True, kw_only=True)
class File:
    """The numbers of the lines that ran: inside functions, and outside of them. `digest`: SHA-256 of the content."""

    digest: str
    called: tuple[int, ...]
    imported: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Lines:
    """What ran on a backend. `files` by their names below the package's parent: ``portnet_backends/cuda.py``."""

    backend: str
    portnet: str
    python: str
    files: Mapping[str, File]

    @property
    def called(self) -> frozenset[Line]:
        """The lines inside functions."""
        return frozenset((name, f.digest, n) for name, f in self.files.items() for n in f.called)

    @property
    def imported(self) -> frozenset[Line]:
        """The lines outside of functions, which run on import."""
        return frozenset((name, f.digest, n) for name, f in self.files.items() for n in f.imported)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}) + "\n"


def collect(backend: str, data_file: str | None = None) -> Lines:
    """What coverage.py's data say; they are in `data_file`, in ``COVERAGE_FILE``, or in ``.coverage`` here.

    To be called where the coverage was taken, with the same files in place. `backend` is what it was taken on.

    Raises `Unavailable` without coverage.py, and `InputError` if there are no data, if they hold no line of PortNet, or
    if a file was changed after they were taken.
    """
    try:
        import coverage
    except ImportError as error:
        raise Unavailable(f"collecting lines needs coverage.py ({error})", "pip install 'portnet[coverage]'") from error
    # None would mean no file at all.
    tool = coverage.Coverage(data_file, config_file=False) if data_file else coverage.Coverage(config_file=False)
    # What ran, ran, whether it was marked to be left out or not.
    tool.clear_exclude()
    data = tool.get_data()
    taken = Path(data.data_filename())
    if not taken.is_file():
        raise InputError(f"no coverage data in {taken}; take them: {TAKE.format(backend=backend)}")
    try:
        tool.load()
    except coverage.CoverageException as error:
        raise InputError(f"{taken} cannot be read ({error}); take it again: {TAKE.format(backend=backend)}") from None
    files = {}
    for measured in sorted(data.measured_files()):
        path = Path(measured)
        if not data.lines(measured) or path.suffix != ".py":
            continue
        if not path.is_file() or path.stat().st_mtime > taken.stat().st_mtime:
            raise InputError(f"{path} was changed after {taken} was taken; take it again")
        _, statements, missing, _ = tool.analysis(measured)
        content = path.read_bytes()
        ran, inside = set(statements) - set(missing), _inside_functions(content)
        files[_name(path)] = File(
            digest=hashlib.sha256(content).hexdigest(),
            called=tuple(sorted(ran & inside)),
            imported=tuple(sorted(ran - inside)),
        )
    if not any(name.startswith("portnet") for name in files):
        raise InputError(f"{taken} holds no line of PortNet; take them: {TAKE.format(backend=backend)}")
    return Lines(backend=backend, portnet=version("portnet"), python=python_version(), files=files)


def read(path: Path) -> Lines:
    """A file that ``portnet divergence --collect`` wrote. Raises `InputError` for any other."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            what = "coverage.py's own report" if isinstance(found, dict) and "meta" in found else "something else"
            raise InputError(
                f"{path} is {what}; expected {SCHEMA}, which 'portnet divergence --collect NAME' makes of .coverage"
            )
        files = {
            str(name): File(digest=str(f["digest"]), called=_numbers(f["called"]), imported=_numbers(f["imported"]))
            for name, f in found["files"].items()
        }
        return Lines(
            backend=str(found["backend"]), portnet=str(found["portnet"]), python=str(found["python"]), files=files
        )
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}: {error}); collect it again") from None


def join(collected: Sequence[Lines]) -> tuple[Divergence, Divergence]:
    """Code divergence over lines inside functions, and over all lines that ran.

    Raises `InputError` for a backend that is given twice, and for files of one name that differ in content, since a
    line's number means nothing then.
    """
    if not collected:
        raise InputError("no lines; give the files that 'portnet divergence --collect NAME' wrote")
    first: dict[str, tuple[str, str]] = {}
    for i, lines in enumerate(collected):
        if any(lines.backend == other.backend for other in collected[:i]):
            raise InputError(f"{lines.backend!r} is given twice; collect one of them under another name")
        others = [
            (name, first[name][1])
            for name, file in lines.files.items()
            if first.setdefault(name, (file.digest, lines.backend))[0] != file.digest
        ]
        if others:
            name, backend = others[0]
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            both = f"{backend!r} and {lines.backend!r}"
            raise InputError(f"{name}{more} differs between {both}; collect both with one version of PortNet")
    return (
        divergence({x.backend: x.called for x in collected}),
        divergence({x.backend: x.called | x.imported for x in collected}),
    )


def told(collected: Sequence[Lines]) -> dict[str, Any]:
    """The figures of `join` for programs: what ``portnet divergence --json`` prints.

    `own_files`: in which files the lines are that ran on no other backend. What was not measured is null, and `notes`
    say why.
    """
    inside, every = join(collected)
    notes = []
    if len(collected) == 1:
        notes.append(f"Divergence is between backends, and there is {collected[0].backend!r} alone.")
    pythons = sorted({lines.python.rpartition(".")[0] for lines in collected})
    if len(pythons) > 1:
        notes.append(f"Taken with Python {' and '.join(pythons)}, which may not count the same statements.")
    platforms = {}
    for lines in collected:
        cost = inside.costs[lines.backend]
        others = frozenset[Line]().union(*(x.called for x in collected if x is not lines))
        own: dict[str, int] = {}
        for name, _, _ in sorted(lines.called - others):
            own[name] = own.get(name, 0) + 1
        platforms[lines.backend] = {
            "lines": cost.total,
            "own": cost.own,
            "shared": cost.shared,
            "imported": len(lines.imported),
            "own_files": own if cost.own is not None else None,
            "portnet": lines.portnet,
            "python": lines.python,
        }
    return {
        "platforms": platforms,
        "common": inside.common,
        "any": len(frozenset[Line]().union(*(x.called for x in collected))),
        "distances": [{"a": a, "b": b, "distance": d} for (a, b), d in inside.distances.items()],
        "divergence": inside.divergence,
        "convergence": inside.convergence,
        "with_imported": {"divergence": every.divergence, "convergence": every.convergence, "common": every.common},
        "notes": notes,
    }


def p3(collected: Sequence[Lines]) -> str:
    """The lines inside functions as a CSV that the P3 Analysis Library's ``divergence`` takes."""
    join(collected)
    return divergence_csv("conformance", "PortNet", {lines.backend: lines.called for lines in collected})


def _numbers(found: Iterable[Any]) -> tuple[int, ...]:
    numbers = tuple(found)
    if not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError("a line's number is no whole number above 0")
    return numbers


def _inside_functions(source: bytes) -> set[int]:
    """The numbers of all lines below a ``def``'s own, which is a statement of what stands around the function.

    A body on that line runs with it, as far as can be seen.
    """
    inside: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside.update(range(node.lineno + 1, (node.end_lineno or node.lineno) + 1))
    return inside


def _name(path: Path) -> str:
    """The file's name below its package's parent, which is the same on every machine."""
    path = path.resolve()
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations if spec else None) or ():
            if path.is_relative_to(Path(folder).resolve()):
                return f"{package}/{path.relative_to(Path(folder).resolve()).as_posix()}"
    # Somebody else's plug-in.
    top = path.parent
    while (top / "__init__.py").is_file():
        top = top.parent
    return path.relative_to(top).as_posix()
