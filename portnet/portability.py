"""Performance portability and code divergence. Pure functions of efficiencies and of sets of lines.

Sources: S. J. Pennycook, J. D. Sewall and V. W. Lee, "A metric for performance portability", PMBS 2016
(arXiv:1611.07409), for PP; J. D. Sewall et al., "Interpreting and visualizing performance portability metrics", P3HPC
2020, for the cascade; S. L. Harrell and J. Kitson, "Effective performance portability", P3HPC 2018, and S. J. Pennycook
et al., "Navigating performance portability", Computing in Science & Engineering 23 (5), 2021, for code divergence.

The CSV columns are those of Intel's P3 Analysis Library; the figures agree with its own wherever it gives one, and
tests/test_portability.py says where it does not.
"""

import csv
import io
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations
from math import fsum, isfinite
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from portnet.errors import InputError, Unavailable

if TYPE_CHECKING:
    import pandas

UNSUPPORTED: Final = "unsupported"
"""The application does not run there, or runs wrong. It makes PP zero; None, not measured, does not."""

Value = float | Literal["unsupported"]
"""What is known of an application on a platform: a number, or `UNSUPPORTED`. Where it was not measured, None."""

Better = Literal["lower", "higher"]
"""Whether lower values of a figure of merit are better, as with seconds, or higher ones, as with images per second."""

MOST = 1.05
"""Efficiencies are at most 1, but the ceiling and the work below it are both measured, so this much is let pass.

Unclamped: what is above 1 stays to be seen. Beyond it, the denominator was no ceiling.
"""

Line = tuple[str, str, int]
"""A line of source: its file's name, the hash of that file's content, and its number. All three make it the same."""


@dataclass(frozen=True, kw_only=True)
class Portability:
    """PP over the platforms of H, and over those that support the application.

    `pp`: 0 if any platform of H is unsupported, otherwise None if any was not measured. `pp_supported`: over
    `supported` alone, the platforms with a number; None if there are none. It is to be shown with `supported` beside
    it, since it rises when a platform is lost.
    """

    pp: float | None
    pp_supported: float | None
    supported: tuple[str, ...]
    unsupported: tuple[str, ...]
    not_measured: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A platform of a cascade: its efficiency, and PP over it and all platforms before it."""

    platform: str
    efficiency: Value | None
    pp: float | None


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Lines that ran on a platform. `own`: on no other; None if there is no other. `shared`: the rest of `total`."""

    total: int
    own: int | None
    shared: int | None


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far platforms' code is apart; `divergence` and `convergence` are None for a single platform.

    `distances`: the Jaccard distance of each pair, in the platforms' order. `costs`: what each platform takes.
    `common`: lines that ran on all of them.
    """

    divergence: float | None
    distances: Mapping[tuple[str, str], float]
    costs: Mapping[str, Cost]
    common: int

    @property
    def convergence(self) -> float | None:
        """1 - divergence."""
        return None if self.divergence is None else 1 - self.divergence


@dataclass(frozen=True, kw_only=True)
class Result:
    """One application's figure of merit for a problem on a platform, a row of P3's performance data.

    `fom`: positive and finite, in any unit that all results of the problem share. `coverage_key`: where the platform's
    lines are to be found in the coverage data; empty if they were not taken.
    """

    problem: str
    application: str
    platform: str
    fom: Value | None
    coverage_key: str = ""


def pp(efficiencies: Mapping[str, Value | None], platforms: Sequence[str]) -> Portability:
    """Performance portability over the set H of `platforms`, which is to be fixed before anything is measured.

    ``PP = |H| / sum over i in H of 1 / e_i``, the harmonic mean of the efficiencies, and 0 if any platform of H is
    unsupported [Pennycook, Sewall, Lee 2016]. The efficiencies are shares: of what the device can do (architectural),
    or of what the best known application reaches there (`application_efficiency`). A throughput over another device's
    is neither.

    A platform of H without an efficiency was not measured; one outside of H does not count. Raises `InputError` if H
    is empty or names a platform twice, and for an efficiency that is not in (0, 1] or is above it by more than noise
    (`MOST`): what does not run is `UNSUPPORTED`, not 0.
    """
    if not platforms:
        raise InputError("no platforms; performance portability is of a set of platforms")
    for i, platform in enumerate(platforms):
        if platform in platforms[:i]:
            raise InputError(f"platform {platform!r} is given twice; a platform counts once")
    found = {platform: efficiencies.get(platform) for platform in platforms}
    numbers = {platform: _efficiency(e, platform) for platform, e in found.items() if e not in (None, UNSUPPORTED)}
    unsupported = tuple(p for p, e in found.items() if e == UNSUPPORTED)
    not_measured = tuple(p for p, e in found.items() if e is None)
    mean = len(numbers) / fsum(1 / e for e in numbers.values()) if numbers else None
    return Portability(
        pp=0.0 if unsupported else None if not_measured else mean,
        pp_supported=mean,
        supported=tuple(numbers),
        unsupported=unsupported,
        not_measured=not_measured,
    )


def cascade(efficiencies: Mapping[str, Value | None], platforms: Sequence[str]) -> list[Step]:
    """The platforms from the most efficient down, with PP over the first one, two, three [Sewall et al. 2020].

    Those that are unsupported come after all numbers, and those that were not measured last. Raises as `pp` does.
    """
    pp(efficiencies, platforms)

    def place(platform: str) -> tuple[int, float]:
        figure = efficiencies.get(platform)
        if figure is None:
            return 2, 0.0
        return (1, 0.0) if isinstance(figure, str) else (0, -figure)

    order = sorted(platforms, key=place)
    return [
        Step(platform=p, efficiency=efficiencies.get(p), pp=pp(efficiencies, order[: k + 1]).pp)
        for k, p in enumerate(order)
    ]


def application_efficiency(results: Iterable[Result], *, better: Better) -> dict[tuple[str, str], dict[str, Value]]:
    """By (problem, application), each platform's efficiency against the best application for that problem there.

    ``e = best / fom`` where lower is better, ``fom / best`` where higher is [Pennycook, Sewall, Lee 2016]. The best is
    the best of what is given: of a single application, it is 1 everywhere and says nothing. `better` has no default: a
    throughput taken for a time turns the ranking around, and nothing else would show it.

    Raises `InputError` for an unknown `better`, a figure of merit that is not positive and finite, and two results of
    one application for one problem on one platform.
    """
    if better not in get_args(Better):
        raise InputError(f"better is {better!r}; expected 'lower' or 'higher'")
    kept: dict[tuple[str, str, str], Value] = {}
    for r in results:
        where = (r.problem, r.application, r.platform)
        if where in kept:
            raise InputError(f"two results of {_named(r)}; give the one that counts")
        if r.fom is not None:
            kept[where] = r.fom if isinstance(r.fom, str) else _merit(r)
    best: dict[tuple[str, str], float] = {}
    for (problem, _, platform), fom in kept.items():
        if not isinstance(fom, str):
            chosen = min if better == "lower" else max
            best[problem, platform] = chosen(fom, best.get((problem, platform), fom))
    found: dict[tuple[str, str], dict[str, Value]] = {}
    for (problem, application, platform), fom in kept.items():
        of = found.setdefault((problem, application), {})
        if isinstance(fom, str):
            of[platform] = fom
        else:
            top = best[problem, platform]
            of[platform] = top / fom if better == "lower" else fom / top
    return found


def divergence(lines: Mapping[str, Set[Hashable]]) -> Divergence:
    """Code divergence of platforms, given the lines that ran on each.

    The mean over all pairs i, j of the Jaccard distance ``1 - |c_i & c_j| / |c_i | c_j|`` [Harrell and Kitson 2018;
    with this distance, Pennycook et al. 2021]: 0 if all platforms run the same lines, 1 if no two share one.

    Raises `InputError` without platforms, and for one on which no line ran, since nothing runs without one.
    """
    if not lines:
        raise InputError("no platforms; code divergence is of the lines that ran on each")
    for platform, ran in lines.items():
        if not ran:
            raise InputError(f"no line ran on {platform!r}; take its coverage again, or leave it out")
    distances = {(i, j): 1 - len(lines[i] & lines[j]) / len(lines[i] | lines[j]) for i, j in combinations(lines, 2)}
    costs = {}
    for platform, ran in lines.items():
        others = [other for name, other in lines.items() if name != platform]
        own = len(ran - frozenset().union(*others)) if others else None
        costs[platform] = Cost(total=len(ran), own=own, shared=None if own is None else len(ran) - own)
    return Divergence(
        divergence=fsum(distances.values()) / len(distances) if distances else None,
        distances=distances,
        costs=costs,
        common=len(frozenset.intersection(*map(frozenset, lines.values()))),
    )


PERFORMANCE = ("problem", "application", "platform", "fom")
"""The columns that P3's efficiencies take; its divergence takes the first three and ``coverage_key`` besides."""
COVERAGE = ("coverage_key", "coverage")
"""The columns of P3's coverage data, ``coverage`` being JSON: ``[{"file": name, "id": hash, "lines": [1, 2]}]``."""


def performance_csv(results: Iterable[Result]) -> str:
    """Results as the P3 Analysis Library reads them: an empty ``fom`` is what is unsupported.

    What was not measured is left out. The library has no word for it: where another application did run on that
    platform, its ``pp`` takes the missing row for unsupported, and gives 0.
    """
    rows = [r for r in results if r.fom is not None]
    keyed = any(r.coverage_key for r in rows)
    table = [
        (r.problem, r.application, r.platform, "" if isinstance(r.fom, str) else repr(_merit(r)), r.coverage_key)
        for r in rows
    ]
    columns = (*PERFORMANCE, "coverage_key")
    width = len(columns) if keyed else len(PERFORMANCE)
    return _write_csv(columns[:width], (row[:width] for row in table))


def read_performance(text: str, *, columns: Mapping[str, str] | None = None, name: str = "the CSV") -> list[Result]:
    """P3's performance data, of whatever order of columns, with other columns left aside.

    `columns`: what the file calls them where not by their own names, such as ``{"platform": "arch"}``. Case and
    blanks around names do not matter. An empty ``fom`` is unsupported, as in P3.

    Raises `InputError` that names the line for a column that is missing, an empty name, a ``fom`` that is not a
    positive number, and names that differ in case alone: they would be two platforms.
    """
    called = {column: (columns or {}).get(column, column) for column in PERFORMANCE}
    results: list[Result] = []
    spelt: dict[tuple[str, str], str] = {}
    for number, row in _rows(text, called.values(), name):
        names = {}
        for column in ("problem", "application", "platform"):
            value = row[called[column].strip().lower()].strip()
            if not value:
                raise InputError(f"{name}, line {number}: {called[column]} is empty; expected a name")
            known = spelt.setdefault((column, value.casefold()), value)
            if known != value:
                raise InputError(
                    f"{name}, line {number}: {called[column]} {value!r} was {known!r} before; spell them alike"
                )
            names[column] = value
        told = row[called["fom"].strip().lower()].strip()
        try:
            # As pandas writes a missing number, and as it can be made to.
            fom: Value | None = UNSUPPORTED if told.lower() in ("", "nan") else float(told)
        except ValueError:
            raise InputError(f"{name}, line {number}: fom is {told!r}; expected a number, or nothing") from None
        result = Result(**names, fom=fom, coverage_key=row.get("coverage_key", "").strip())
        if not isinstance(fom, str):
            try:
                _merit(result)
            except InputError as error:
                raise InputError(f"{name}, line {number}: {error}") from None
        results.append(result)
    return results


def coverage_csv(coverage: Mapping[str, Set[Line]]) -> str:
    """Lines by key, as the P3 Analysis Library reads them."""
    return _write_csv(COVERAGE, ((key, coverage_json(lines)) for key, lines in coverage.items()))


def coverage_json(lines: Set[Line]) -> str:
    """Lines as the P3 Analysis Library's schema of coverage has them, in order."""
    files: dict[tuple[str, str], list[int]] = {}
    for file, digest, number in sorted(lines):
        files.setdefault((file, digest), []).append(number)
    return json.dumps([{"file": file, "id": digest, "lines": numbers} for (file, digest), numbers in files.items()])


def divergence_csv(problem: str, application: str, lines: Mapping[str, Set[Line]]) -> str:
    """One application's lines by platform, in the one table that the P3 Analysis Library's ``divergence`` takes."""
    columns = ("problem", "application", "platform", "coverage")
    rows = ((problem, application, platform, coverage_json(ran)) for platform, ran in lines.items())
    return _write_csv(columns, rows)


def read_coverage(text: str, *, name: str = "the CSV") -> dict[str, frozenset[Line]]:
    """P3's coverage data: the lines by key. Raises `InputError` for another schema, and for a key that comes twice."""
    found: dict[str, frozenset[Line]] = {}
    for number, row in _rows(text, COVERAGE, name):
        key = row["coverage_key"].strip()
        if key in found:
            raise InputError(f"{name}, line {number}: coverage_key {key!r} comes twice; which lines does it stand for?")
        try:
            entries = json.loads(row["coverage"])
            found[key] = frozenset(line for entry in entries for line in _entry(entry))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{name}, line {number}: coverage is not a list of file, id and lines, all lines whole numbers "
                f"({type(error).__name__}: {error}); P3's schemas before 0.3 had regions, which are not read"
            ) from None
    return found


def frame(results: Iterable[Result]) -> "pandas.DataFrame":
    """Results as a DataFrame with P3's columns, NaN being unsupported; see `performance_csv`.

    Raises `Unavailable` where pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise Unavailable(f"a DataFrame needs pandas ({error})", "pip install 'portnet[pandas]'") from error
    rows = [
        (r.problem, r.application, r.platform, float("nan") if isinstance(r.fom, str) else r.fom, r.coverage_key)
        for r in results
        if r.fom is not None
    ]
    return pandas.DataFrame(rows, columns=[*PERFORMANCE, "coverage_key"])


def _entry(entry: Mapping[str, Any]) -> Iterable[Line]:
    file, digest, numbers = entry["file"], entry["id"], entry["lines"]
    if not isinstance(file, str) or not isinstance(digest, str) or not isinstance(numbers, list):
        raise TypeError(f"{file!r}, {digest!r} and {type(numbers).__name__}")
    for number in numbers:
        # bool is an int to Python, and a pair of lines a range whose end P3 has counted and not counted.
        if type(number) is not int:
            raise TypeError(f"line {number!r} of {file}")
        yield file, digest, number


def _efficiency(value: Value | None, platform: str) -> float:
    if isinstance(value, str) or value is None or not isfinite(value) or not 0 < value <= MOST:
        hint = "; what does not run is 'unsupported'" if value == 0 else ""
        hint = "; percentages must be divided by 100, and a ceiling measured again" if _above(value) else hint
        raise InputError(f"the efficiency on {platform!r} is {value}; expected a share in (0, 1]{hint}")
    return float(value)


def _above(value: Value | None) -> bool:
    return isinstance(value, int | float) and value > MOST


def _merit(result: Result) -> float:
    fom = result.fom
    if isinstance(fom, str) or fom is None or not (isfinite(fom) and fom > 0):
        raise InputError(
            f"the figure of merit of {_named(result)} is {fom}; expected a positive, finite number, "
            f"or {UNSUPPORTED!r} where it does not run"
        )
    return float(fom)


def _named(result: Result) -> str:
    return f"{result.application!r} for {result.problem!r} on {result.platform!r}"


def _rows(text: str, columns: Iterable[str], name: str) -> list[tuple[int, dict[str, str]]]:
    """Each row under its columns' names in lower case, with its number in the file."""
    reader = csv.reader(io.StringIO(text), strict=True)
    rows = []
    # A program's lines are one field, and Python's limit of 128 KiB is for the whole process.
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        # A byte order mark is what spreadsheets begin a CSV with.
        header = [column.removeprefix("\ufeff").strip().lower() for column in next(reader, [])]
        for column in columns:
            if header.count(column.strip().lower()) != 1:
                has = ", ".join(header) or "none"
                raise InputError(f"{name} needs one column {column!r}; its columns: {has}")
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(f"{name}, line {reader.line_num}: {len(row)} fields; expected {len(header)}")
            rows.append((reader.line_num, dict(zip(header, row, strict=True))))
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return rows


def _write_csv(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()
