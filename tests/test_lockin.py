"""Figures, worked out by hand."""

from dataclasses import replace

import pytest

from portnet import lockin
from portnet.record import Record, Spec

TRAINED = Record(spec=Spec(backend="cpu"), outcome="works", weights="ab" * 32, training={"losses": [2.5, 1.75, 1.0]})
ORACLE = Record(
    spec=Spec(backend="reference", precision="float64"),
    outcome="works",
    weights="ab" * 32,
    training={"losses": [2.5, 2.0, 0.875]},
)


def timed(outcome: str) -> Record:
    # 3 steps of 8 images: 24 images in 0.5, 0.25 and 1 second.
    samples = {"infer": {"batch": 8, "steps": 3, "seconds": [0.5, 0.25, 1.0]}}
    return Record(spec=Spec(backend="cpu"), outcome=outcome, samples=samples)


def gated(*findings: tuple[str, float, float]) -> lockin.Row:
    found = [{"what": what, "error": error, "allowed": allowed} for what, error, allowed in findings]
    record = Record(spec=Spec(backend="cpu"), outcome="works", gates={"parity": {"findings": found}})
    return lockin.rows([record])[0]


@pytest.mark.parametrize("outcome", ["works", "partial"])
def test_throughput(outcome: str) -> None:
    assert lockin.throughput(timed(outcome), "infer") == (48.0, 24.0, 96.0)
    assert lockin.throughput(timed(outcome), "train") is None
    assert not lockin.void(timed(outcome), "infer")
    assert not lockin.void(timed(outcome), "train")


@pytest.mark.parametrize("outcome", ["wrong", "dishonest clock", "unsteady", "failed", "timeout"])
def test_no_throughput_behind_a_gate_that_was_not_passed(outcome: str) -> None:
    (row,) = lockin.rows([timed(outcome)])
    assert (row.train, row.infer) == (None, None)
    assert lockin.void(timed(outcome), "infer")


def test_void_is_not_the_same_as_not_measured() -> None:
    nothing = Record(spec=Spec(backend="cpu"), outcome="failed")
    assert not lockin.void(nothing, "infer")
    assert lockin.void(replace(nothing, outcome="wrong"), "infer"), "a gate took away what would have been timed"
    assert lockin.void(timed("failed"), "infer")
    assert not lockin.void(timed("failed"), "train")
    assert not lockin.void(replace(nothing, outcome="not available"), "infer")


def test_share_of_the_gate_and_logits() -> None:
    row = gated(("infer() fc8", 2e-7, 8e-7), ("trace conv1", 3e-6, 4e-6), ("trace fc8", 1e-6, 8e-6))
    assert row.parity == pytest.approx(0.75)
    assert row.logits == 2e-7


def test_nothing_allowed() -> None:
    assert gated(("x", 0.0, 0.0)).parity == 0
    assert gated(("x", 0.0, 0.0), ("y", 1e-30, 0.0)).parity == float("inf")


def test_not_measured_is_none() -> None:
    (row,) = lockin.rows([Record(spec=Spec(backend="cpu"), outcome="not measured")])
    assert (row.train, row.infer, row.parity, row.logits) == (None, None, None, None)
    assert (row.first_loss, row.last_loss, row.loss_distance) == (None, None, None)
    assert lockin.rows([]) == []


def test_loss_distance() -> None:
    oracle, row = lockin.rows([ORACLE, TRAINED])
    assert (row.first_loss, row.last_loss) == (2.5, 1.0)
    assert row.reference is ORACLE
    assert list(row.distances) == [0.0, 0.25, 0.125]
    assert row.loss_distance == 0.25
    assert oracle.reference is ORACLE
    assert oracle.loss_distance == 0


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(replace(TRAINED, weights="cd" * 32), id="other weights"),
        pytest.param(replace(TRAINED, training={"losses": [2.5, 1.75]}), id="stopped early"),
        *(
            pytest.param(replace(TRAINED, spec=replace(TRAINED.spec, **{key: value})), id=f"other {key}")
            for key, value in {
                "preset": "paper2012",
                "classes": 11,
                "data": "synthetic",
                "curve_size": 67,
                "curve_batch": 8,
                "curve_steps": 7,
                "seed": 1,
            }.items()
        ),
    ],
)
def test_no_loss_distance_between_different_trainings(other: Record) -> None:
    assert lockin.rows([ORACLE, TRAINED, other])[2].reference is None
    assert lockin.rows([ORACLE, TRAINED, other])[2].loss_distance is None
    assert lockin.rows([ORACLE, TRAINED, other])[1].loss_distance == 0.25


def test_unknown_weights_are_not_the_same_weights() -> None:
    rows = lockin.rows([replace(ORACLE, weights=""), replace(TRAINED, weights="")])
    assert [row.loss_distance for row in rows] == [None, None]


def test_only_float64_of_the_reference_is_the_reference() -> None:
    rounded = replace(ORACLE, spec=replace(ORACLE.spec, precision="float32"))
    elsewhere = replace(ORACLE, spec=replace(ORACLE.spec, backend="cpu"))
    assert lockin.rows([rounded, elsewhere, TRAINED])[2].reference is None
    assert lockin.rows([rounded, elsewhere, TRAINED, ORACLE])[2].reference is ORACLE


def test_speeds_at_another_size_and_batch_do_not_keep_losses_apart() -> None:
    other = replace(TRAINED, spec=replace(TRAINED.spec, image_size=67, batch=2))
    assert lockin.rows([ORACLE, other])[1].loss_distance == 0.25


def test_drift() -> None:
    runs = {"perturbed": [[2.5, 1.5, 1.0], [2.25, 1.75, 1.5]]}
    record = replace(TRAINED, training={**TRAINED.training, **runs})
    assert lockin.drift([ORACLE, record]) == [0.25, 0.25, 0.5]
    assert lockin.spread([ORACLE, record]) == 0.5
    assert lockin.spread([ORACLE, TRAINED]) is None
    assert lockin.spread([replace(record, outcome="wrong")]) is None, "a stack that is wrong is no yardstick"
    longer = replace(TRAINED, training={"losses": [1.0] * 4, "perturbed": [[1.0, 3.0, 1.0, 1.125]]})
    assert lockin.drift([record, longer]) == [0.25, 2.0, 0.5, 0.125]


def test_same_work() -> None:
    bigger = replace(TRAINED, spec=replace(TRAINED.spec, batch=64))
    stock = replace(TRAINED, spec=replace(TRAINED.spec, formulation="stock", precision="tf32", perturbed=3))
    assert lockin.same_work([TRAINED, bigger, ORACLE, stock]) == [[TRAINED, ORACLE, stock], [bigger]]
    assert lockin.same_work([]) == []


# Several processes of one stack.


def process(number, outcome="works", *, seconds=1.0, device=True, trend=0.0, rejected=False, fallen=(), stack="cpu"):
    """What one process of a series left."""
    timed = outcome in ("works", "partial", "unsteady")
    return Record(
        spec=Spec(backend=stack),
        outcome=outcome,
        reason="" if outcome == "works" else f"it was {outcome}",
        device={"name": "the device", "versions": {"driver": "7"}} if device else {},
        round={"series": "s", "number": number, "rejected": rejected},
        gates={
            "trend": {"change": trend, "low": trend - 0.005, "high": trend + 0.005},
            "fallbacks": {"known": True, "operations": dict.fromkeys(fallen, 1)},
        },
        samples={"infer": {"batch": 16, "steps": 1, "seconds": [seconds] * 3}} if timed else {},
    )


def test_a_process_that_was_lost_counts_against_its_stack():
    records = [process(0), process(1), process(2, "timeout", device=False)]
    (figure,) = lockin.figures(records)
    assert (figure.outcome, figure.rate, len(figure.records)) == ("timeout", None, 3)


def test_a_failure_in_a_rejected_round_is_not_forgotten():
    (figure,) = lockin.figures([process(0), process(0, "wrong", rejected=True)])
    assert figure.outcome == "wrong"


def test_rejected_rounds_are_no_figure():
    (figure,) = lockin.figures([process(0, seconds=2.0, rejected=True), process(0), process(1)])
    assert (figure.rejected, figure.rate.count, figure.rate.figure) == (1, 2, pytest.approx(16))
    (figure,) = lockin.figures([process(0, rejected=True)])
    assert (figure.outcome, figure.rate) == ("not measured", None)


@pytest.mark.parametrize(
    ("trends", "outcome"),
    [
        ([0.0, 0.001, -0.002], "works"),
        ([0.05, 0.06, 0.055], "unsteady"),
        ([0.10, 0.20, 0.30], "unsteady"),  # each is, though they agree on no size
        ([0.05, 0.0, 0.0], "works"),
    ],
)
def test_that_a_stack_is_unsteady_is_told_by_all_of_its_processes(trends, outcome):
    records = [process(i, "unsteady" if t > 0.02 else "works", trend=t) for i, t in enumerate(trends)]
    assert lockin.figures(records)[0].outcome == outcome


def test_fallbacks_are_not_forgotten_for_a_trend():
    records = [process(0, "unsteady", trend=0.05, fallen=["aten::lrn"]), process(1), process(2)]
    (figure,) = lockin.figures(records)
    assert (figure.outcome, figure.reason) == ("partial", "operations ran elsewhere than on the device: aten::lrn")


def test_other_drivers_and_machines_are_other_figures():
    one = process(0)
    for other in (
        replace(one, device={**one.device, "versions": {"driver": "8"}}),
        replace(one, environment={"host": "another"}),
        replace(one, environment={"versions": {"torch": "3"}}),
    ):
        assert len(lockin.figures([one, other])) == 2


def test_stacks_are_compared_by_the_rounds_they_share():
    ours = [process(n, seconds=1.0 + 0.01 * n) for n in range(5)]
    theirs = [process(n, seconds=2 * (1.0 + 0.01 * n), stack="cuda") for n in (1, 2, 3, 4, 7)]
    a, b = lockin.figures([*ours, *theirs])
    seen = lockin.compare(a, b)
    assert (seen.ratio, seen.rounds, seen.verdict) == (pytest.approx(2), 4, "different")
    apart = replace(b, records=tuple(replace(r, round={**r.round, "series": "t"}) for r in b.records))
    assert lockin.compare(a, apart) is None


def test_the_floor_is_by_the_best_rates_seen_in_the_process():
    layers = {"conv": {"flops": 100, "bytes": 10}, "pool": {"flops": 0, "bytes": 40}}
    assert lockin.floor(layers, {"flops": 50.0, "bandwidth": 20.0}) == pytest.approx(2 + 2)
    assert lockin.floor(layers, {"flops": None, "bandwidth": 20.0}) is None
    held_up = {"flops": 50.0, "bandwidth": 20.0, "after": {"flops": 100.0, "bandwidth": 10.0}}
    assert lockin.best(held_up) == {"flops": 100.0, "bandwidth": 20.0}
    record = replace(process(0, seconds=6.0), layers=layers, ceilings=held_up)
    (figure,) = lockin.figures([record])
    assert (figure.floor, figure.efficiency.figure) == (pytest.approx(3), pytest.approx(0.5))


def test_modes_and_rounds_of_a_stack_are_one_row():
    trained = replace(process(0), spec=Spec(backend="cpu", mode="train"), training={"losses": [2.0], "perturbed": []})
    trained = replace(trained, samples={"train": trained.samples["infer"]})
    (merged,) = lockin.merge([trained, process(0), process(1)])
    assert (merged.outcome, sorted(merged.samples)) == ("works", ["infer", "train"])
    assert len(merged.samples["infer"]["seconds"]) == 6
    (merged,) = lockin.merge([replace(trained, outcome="wrong", samples={}), process(0)])
    assert merged.outcome == "wrong"
