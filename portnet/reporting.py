"""From files to a report: reads what `portnet report` is given, and says what it left out."""

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from math import isfinite
from pathlib import Path
from typing import Any

from portnet import plugins, portability
from portnet.assess import assess, results
from portnet.assessment import Assessment, Prices
from portnet.errors import InputError
from portnet.record import Record, search
from portnet.report import formats, lockin_page

RESULTS = Path(__file__).parent / "results"
"""Where records that are shipped lie, a folder a device; in a checkout they lie beside the package."""
FORMS = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json", ".csv": "csv"}
_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, kw_only=True)
class Report:
    """An assessment, the SHA-256 of shipped records in it, and how many files were refused."""

    assessment: Assessment
    references: frozenset[str]
    refused: int


def report(
    paths: Sequence[Path],
    *,
    platforms: str | None = None,
    home: str = "cuda",
    prices: Path | None = None,
    latency: str = "100ms",
    divergence: Path | None = None,
    references: Sequence[str] = (),
) -> Report:
    """What those records come to. Raises `InputError` for what cannot be meant, and where there is no record."""
    bound, wanted = seconds(latency), _platforms(platforms)
    money = Prices.read(prices) if prices else None
    lines = _divergence(divergence) if divergence else None
    folders = [_reference(name) for name in references]
    if not (paths or folders):
        raise InputError("no records were named; give files or folders, or --reference with a device's name")
    found, refused = search([*paths, *folders])
    problems = [str(error) for error in refused]
    problems += [
        f"{f.paths[1]} holds the same record as {f.paths[0]}, which counts once" for f in found if len(f.paths) > 1
    ]
    problems += _misspelt([*wanted, home], {f.record.spec.backend for f in found})
    shipped, _ = search(folders)
    records: list[Record] = [f.record for f in found]
    if not records and refused:
        raise InputError("no record could be read: " + "; ".join(str(error) for error in refused[:3]))
    seen = assess(
        records, platforms=wanted, home=home, prices=money, latency=bound, divergence=lines, problems=problems
    )
    return Report(assessment=seen, references=frozenset(f.record.digest for f in shipped), refused=len(refused))


def written(found: Report, form: str) -> str:
    """The report in one of the values of `FORMS`."""
    if form == "html":
        return lockin_page.render(found.assessment, references=found.references)
    if form == "p3":
        return portability.performance_csv(results(found.assessment))
    return {"markdown": formats.markdown, "json": formats.to_json, "csv": formats.csv}[form](found.assessment)


def form_of(path: Path) -> str:
    """The format that a file's name asks for. Raises `InputError` for one that is not known."""
    if path.suffix.lower() not in FORMS:
        raise InputError(f"{path} has no suffix of {', '.join(FORMS)}; give --format")
    return FORMS[path.suffix.lower()]


def seconds(text: str) -> float:
    """``100ms``, ``0.1s`` or ``250us`` in seconds. Raises `InputError`."""
    parts = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(us|ms|s)", text.strip(), re.ASCII)
    value = float(parts[1]) * _UNITS[parts[2]] if parts else 0.0
    if not 0 < value < 1e6:
        raise InputError(f"{text!r:.40} is no time; expected one such as 100ms, 0.1s or 250us")
    return value


def _misspelt(names: Sequence[str], measured: Set[str]) -> list[str]:
    """Names that nothing here has. A backend of somebody else's need not be installed where its records are read."""
    known = {*plugins.backends(), *measured}
    unknown = [name for name in names if name.split(" on ")[0] not in known]
    near = {name: get_close_matches(name, sorted(known), 1) for name in unknown}
    return [
        f"{name!r} was asked for, and no backend and no record has that name"
        + (f"; did you mean {near[name][0]}?" if near[name] else "")
        for name in unknown
    ]


def _platforms(text: str | None) -> list[str]:
    if text is None:
        return []
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"--platforms {text!r:.80} has an empty name; expected one such as cuda,rocm,mps,cpu")
    return list(dict.fromkeys(names))


def _divergence(path: Path) -> dict[str, Any]:
    """What ``portnet divergence --json`` printed, or its platforms alone where convergence has no figure."""
    expected = "expected what 'portnet divergence --json' prints"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); {expected}") from error
    platforms = held.get("platforms") if isinstance(held, dict) else None
    if not isinstance(platforms, dict) or not all(isinstance(x, dict) for x in platforms.values()):
        raise InputError(f"{path} names no platforms; {expected}")
    if not all(_count(x.get("lines")) and (x.get("own") is None or _count(x["own"])) for x in platforms.values()):
        raise InputError(f"{path}: a platform's lines are no counts; {expected}")
    for name in ("divergence", "convergence"):
        if held.get(name) is not None and not _share(held[name]):
            raise InputError(f"{path}: {name} is {held[name]!r:.40}, and must be from 0 to 1; {expected}")
    pairs = held.get("distances", [])
    if not isinstance(pairs, list) or not all(isinstance(x, Mapping) and _share(x.get("distance")) for x in pairs):
        raise InputError(f"{path}: distances are no list of pairs; {expected}")
    notes = [str(x) for x in held["notes"]] if isinstance(held.get("notes"), list) else []
    # Of one platform alone no line is its own.
    known = {name: x for name, x in platforms.items() if x.get("own") is not None}
    return {**held, "platforms": known, "distances": pairs, "notes": notes}


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _share(value: object) -> bool:
    return type(value) in (int, float) and isinstance(value, int | float) and isfinite(value) and 0 <= value <= 1


def _reference(name: str) -> Path:
    """The folder of a device's shipped records, such as ``nvidia-h200``."""
    checkout = RESULTS.parent.parent
    roots = [checkout / RESULTS.name] if (checkout / "pyproject.toml").is_file() else []
    folders = {p.name: p for root in (*roots, RESULTS) if root.is_dir() for p in sorted(root.iterdir()) if p.is_dir()}
    if name in folders:
        return folders[name]
    has = f"there are those of {', '.join(sorted(folders))}" if folders else "there are none so far"
    raise InputError(
        f"no records of {name!r:.80} are shipped: {has}. Name records of that device instead, which 'portnet measure' "
        "makes on a machine that has it"
    )
