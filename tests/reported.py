"""Assessments for the report's tests, of simulated records: nothing here was measured."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import simulated

from portnet.assess import assess
from portnet.assessment import Assessment, Prices
from portnet.record import Record

PLATFORMS = ("cuda", "rocm", "mps", "xpu", "tpu")
PRICES = Prices(currency="EUR", hour={"cuda": 3.5, "rocm": 2.1})
BACKENDS = ("cuda", "rocm", "mps", "xpu")
DIVERGENCE = {
    "platforms": {
        b: {"lines": 1800 + 40 * n, "own": 120 + 13 * n, "shared": 1680 + 27 * n} for n, b in enumerate(BACKENDS)
    },
    "distances": [{"a": "cuda", "b": b, "distance": 0.1 + 0.02 * n} for n, b in enumerate(BACKENDS[1:])],
    "divergence": 0.12,
    "convergence": 0.88,
    "notes": [],
}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'`|*_[x](javascript:alert(3)){{ 7*7 }}"
CONTROL = "\x1b[31m\x00\ud800\N{RIGHT-TO-LEFT OVERRIDE}"


@cache
def four_vendors() -> tuple[Record, ...]:
    """The simulated vendors, with curves of training and layers timed singly."""
    made = []
    for record in simulated.four_vendors():
        if record.spec.mode == "train":
            record = replace(record, weights="ab" * 32, training={"losses": losses(record.spec.backend)})
        reached = simulated.EFFICIENCY[record.spec.backend]
        timed = {
            name: {
                **layer,
                "forward": layer["floor"] / reached * (0.6 if record.spec.mode == "train" else 1),
                "backward": layer["floor"] / reached * 0.4 if record.spec.mode == "train" else None,
            }
            for name, layer in record.layers.items()
            if layer["floor"]
        }
        made.append(replace(record, layers=timed or record.layers))
    first = made[0]
    oracle = replace(
        first,
        spec=replace(first.spec, backend="reference", precision="float64"),
        training={"losses": losses("reference")},
        gates={"parity": {"oracle": True, "findings": []}},
        samples={},
    )
    return (oracle, *made)


def losses(backend: str) -> list[float]:
    seed = sum(map(ord, backend)) % 7
    return [2.3 / (1 + 0.05 * step) + 1e-4 * seed * step * (-1) ** step for step in range(60)]


@cache
def assessed(**more: Any) -> Assessment:
    with simulated.published():
        return assess(four_vendors(), platforms=PLATFORMS, prices=PRICES, divergence=DIVERGENCE, **more)


def without_home() -> Assessment:
    """One chip, three stacks, side by side in one series; nothing of cuda."""
    made: list[Record] = []
    stacks: tuple[tuple[dict[str, str], float], ...] = (
        ({"engine": "eager"}, 1.0),
        ({"engine": "compile"}, 0.7),
        ({"engine": "eager", "formulation": "stock"}, 2.5),
    )
    for stack, slower in stacks:
        for mode in ("train", "infer"):
            of = simulated.spec("mps", mode=mode, **stack)
            timed = simulated.records(of, slower=slower, series=f"chip-{mode}")
            names = {"eager": "Simulated chip, 4 threads", "compile": "Some Runtime on Simulated chip"}
            made += [replace(r, device={**r.device, "name": names[stack["engine"]]}) for r in timed]
    return assess(made)


def many(count: int) -> list[Record]:
    """As many records, each of another stack or problem."""
    made: list[Record] = []
    bases = [simulated.records(simulated.spec(b, mode="train"), rounds=1)[0] for b in BACKENDS[:3]]
    n = 0
    while len(made) < count:
        n += 1
        for base in bases:
            for mode in ("train", "infer"):
                for precision in ("float32", "bfloat16", "float16"):
                    spec = replace(base.spec, mode=mode, precision=precision, batch=n, quick=n % 2 == 0)
                    timed = base.samples["train"]
                    made.append(replace(base, spec=spec, samples={mode: {**timed, "batch": n}}, round={}))
    return made[:count]


def hostile(records: Sequence[Record] | None = None) -> list[Record]:
    """The records with markup, formulas and control characters wherever a record has free text."""
    text = HOSTILE + CONTROL
    made = []
    for record in records if records is not None else four_vendors():
        parity = record.gates.get("parity", {})
        findings = [{**f, "what": text} for f in parity.get("findings", [])]
        made.append(
            replace(
                record,
                spec=replace(record.spec, engine=text, data=text),
                reason=text if record.outcome != "works" else "",
                remedy=text,
                device={
                    **record.device,
                    "name": f"{text} {record.spec.backend}",
                    "vendor": text,
                    "versions": {text: text},
                },
                environment={**record.environment, "host": text, text: text},
                layers={f"{text}{name}": layer for name, layer in record.layers.items()},
                gates={**record.gates, "parity": {**parity, "findings": findings}} if parity else record.gates,
            )
        )
    return made
