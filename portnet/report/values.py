"""Figures of an assessment in words: the same ones on the page, in Markdown and in the terminal."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from math import floor, isfinite, log10

from portnet.assessment import Value
from portnet.lockin import GATED
from portnet.report.table import error, plain, rate

NOT_MEASURED = "not measured"
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
NAMES = {"cuda": "CUDA", "rocm": "ROCm", "mps": "MPS", "xpu": "XPU", "cpu": "the CPU"}
MODES = {"train": "training", "infer": "inference", "serve": "serving", "scale": "training in a group"}
_VOID = (*GATED, "failed", "timeout", "out of memory")


@dataclass(frozen=True, kw_only=True)
class Told:
    """A figure in words. `text` is it, or why there is none in a word or two, or how its speed was lost.

    `interval` is the 95% interval, or why there is none; `note` all else that must be known beside it.
    """

    text: str
    interval: str
    note: str
    quick: bool
    measured: bool

    @property
    def line(self) -> str:
        """All of it on one line."""
        text = f"{self.text} quick" if self.quick else self.text
        text += f" ({self.interval})" if self.interval else ""
        return f"{text}; {self.note}" if self.note else text


def tell(value: Value, kind: str, *, quick: Collection[str] = (), certain: str = "", currency: str = "") -> Told:
    """The value in words. `kind` is one of `KINDS`; `quick` holds the SHA-256 of quick records.

    `certain` says why a figure of this sort has no interval, unless its own note does; ``-`` where that is told once
    for a whole table.
    """
    if value.figure is None or not isfinite(value.figure):
        why = plain(value.why if value.figure is None else "its figure is not finite")
        void = why.partition(":")[0] in _VOID
        note = "" if why == NOT_MEASURED else why.removeprefix(f"{NOT_MEASURED}: ")
        return Told(text="void" if void else NOT_MEASURED, interval="", note=note, quick=False, measured=False)
    note, hurried = _without("quick", plain(value.note))
    note, alone = _without("one process", note)
    interval = ""
    if value.low is not None and value.high is not None:
        low, high = (number(end, kind, currency) for end in (value.low, value.high))
        # The unit stands once.
        if kind == "money":
            low, high = (end.removeprefix(plain(currency)).strip() for end in (low, high))
        interval = f"{low.rstrip('×%')} to {high}"
    elif alone:
        interval = "no interval: one process"
    elif "no interval" not in note and "unsupported" not in note:
        interval = "" if certain == "-" else f"no interval: {certain}" if certain else "no interval"
    return Told(
        text=number(value.figure, kind, currency),
        interval=interval,
        note=note,
        quick=hurried or any(digest in quick for digest in value.records),
        measured=True,
    )


def number(value: float, kind: str, currency: str = "") -> str:
    """The number with its unit, to about three digits."""
    if not isfinite(value):
        return "not finite"
    if kind == "money":
        return f"{plain(currency)} {_money(value)}".strip()
    return KINDS[kind](value)


def digits(value: float) -> str:
    """Three significant digits, thousands set apart; scientific where that would be long."""
    if not value:
        return "0"
    if abs(value) >= 1e9 or abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:#.3g}".rstrip(".")


def si(value: float, unit: str) -> str:
    """Three digits and an SI prefix, as ``400 TFLOP/s``."""
    # What rounds to 1000 takes the next prefix.
    group = floor(log10(value / 0.9995) / 3) if value > 0 else 0
    if not 0 <= group < len(PREFIXES):
        return f"{value:.2e} {unit}"
    return f"{value / 1000**group:#.3g}".rstrip(".") + f" {PREFIXES[group]}{unit}"


def duration(seconds: float) -> str:
    """Seconds with a fitting unit, to three digits."""
    if not 1e-9 <= seconds < 1e5:
        return f"{seconds:.3g} s"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 0.9995:
            return f"{digits(seconds * scale)} {unit}"
    return f"{digits(seconds * 1e9)} ns"


def size(count: float) -> str:
    """Bytes with a binary prefix."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{digits(count / 1024**power)} {unit}"
    return f"{digits(count)} bytes"


def named(platform: str) -> str:
    """A platform as people write it."""
    return NAMES.get(platform, plain(platform))


def listed(words: Collection[str]) -> str:
    """a, b and c."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def _rate(value: float) -> str:
    return rate(value) if value < 1e9 else digits(value)


def _count(value: float) -> str:
    return f"{round(value):,}" if abs(value) < 1e12 else f"{value:.2e}"


def _money(value: float) -> str:
    return f"{value:,.2f}" if 0.995 <= value < 1e9 else digits(value)


def _joules(value: float) -> str:
    return si(value, "J") if value >= 1 else f"{digits(1000 * value)} mJ" if value >= 1e-6 else f"{value:.2e} J"


KINDS: dict[str, Callable[[float], str]] = {
    "multiple": lambda value: f"{digits(value)}×",
    "share": lambda value: f"{digits(100 * value)}%",
    "rate": _rate,
    "seconds": duration,
    "bytes": size,
    "bytes/s": lambda value: si(value, "B/s"),
    "FLOP/s": lambda value: si(value, "FLOP/s"),
    "joules": _joules,
    "count": _count,
    "lines": _count,
    "error": error,
    "plain": digits,
    "truth": lambda value: "yes" if value else "no",
}
"""How each sort of figure is written; ``money`` needs the currency besides."""


def _without(word: str, note: str) -> tuple[str, bool]:
    """The note without one of its parts, and whether it was there."""
    parts = re.split("(?<=[^,]), ", note)
    kept = [part for part in parts if part != word]
    return ", ".join(kept), len(kept) < len(parts)
