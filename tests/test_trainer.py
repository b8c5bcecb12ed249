"""A whole run: what it does at which step, and that one which goes on from a checkpoint ends in the same bits."""

import json
from dataclasses import replace

import numpy as np
import pytest

from portnet import checkpoint, trainer, training, weights
from portnet.contract import Settings
from portnet.errors import CheckpointError, InputError
from portnet.graph import Dropout, Flatten, Graph, Linear, Milestones, Normalisation, Plateau, Recipe, ReLU
from portnet.images import DataSet, Splits
from portnet.plugins import backends
from portnet.trainer import Progress, Run

RECIPE = Recipe(learning_rate=0.01, batch=8, schedule=Plateau(patience=1, times=2))
GRAPH = Graph(
    preset="small",
    input=(3, 8, 8),
    layers=(
        Flatten(name="flatten"),
        Linear(name="fc6", in_features=192, out_features=16),
        ReLU(name="relu6"),
        Dropout(name="drop6"),
        Linear(name="fc7", in_features=16, out_features=4),
    ),
    recipe=RECIPE,
    normalisation=Normalisation(mean=(100.0, 100.0, 100.0), scale=(50.0, 50.0, 50.0)),
)
PICTURES = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3)).astype(np.uint8)


def part(ids):
    ids = np.asarray(ids)
    names = ("a", "b", "c", "d")
    return DataSet(name="made up", class_names=names, labels=ids % 4, ids=ids, mean=(0.0, 0.0, 0.0), read=Read(ids))


class Read:
    def __init__(self, ids):
        self.ids = ids

    def __call__(self, i):
        return PICTURES[self.ids[i]]


DATA = Splits(train=part(range(36)), test=part(range(36, 40)))  # 4 steps an epoch, and 4 pictures left over


def session(backend="reference", **settings):
    settings = Settings(**settings)
    return backends()[backend].open(GRAPH, weights.initial(GRAPH), settings), settings


def carry_out(run, *, backend="reference", where="here", watcher=None, data=DATA, **settings):
    opened, given = session(backend, **settings)
    result = trainer.train(opened, GRAPH, given, data, run, backend=where, watcher=watcher)
    return result, opened.state()


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


class Stopped(Exception):
    pass


class Stop:
    """A watcher that ends the run when a step is told of, and keeps what it heard before."""

    def __init__(self, at=None):
        self.at, self.steps, self.resumed_at, self.notes, self.validations = at, [], None, [], []

    def resumed(self, step, notes):
        self.resumed_at, self.notes = step, notes

    def step(self, step):
        self.steps.append(step)
        if step.number == self.at:
            raise Stopped

    def validated(self, epoch, result):
        self.validations.append((epoch, result.top1))


# The schedule.


def test_the_rate_of_each_step():
    def rates(schedule, steps, progress=None):
        recipe = Recipe(learning_rate=1.0, schedule=schedule)
        return [round((progress or Progress()).rate(recipe, step, 10), 9) for step in steps]

    assert rates(None, [0, 1000]) == [1, 1]
    # Epochs are counted from 1, and have 10 steps each.
    logged = Milestones(at=(25, 51, 67))
    assert rates(logged, [0, 239, 240, 499, 500, 659, 660]) == [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001]
    assert rates(Milestones(at=(100, 200), unit="step"), [99, 100, 199, 200]) == [1, 0.1, 0.1, 0.01]
    assert rates(Plateau(), [0, 10**6], Progress(reductions=2)) == [0.01, 0.01]


def test_a_plateau_is_a_number_of_epochs_without_improvement():
    schedule, progress, seen = Plateau(patience=2, times=2), Progress(), []
    for error in (0.9, 0.8, 0.8, 0.85, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7):
        progress = progress.observed(error, schedule)
        seen.append(progress.reductions)
    # An equal error is no improvement; after the last reduction the rate stays.
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_what_is_frozen_from_an_epoch_on():
    recipe = Recipe(freeze=("conv1",), freeze_from=3, bias_rate=2.0)
    assert recipe.in_epoch(1).frozen == ()
    frozen = recipe.in_epoch(2)
    assert frozen.frozen == ("conv1",)
    assert [frozen.coefficients(name, 1.0)[0] for name in ("conv1.weight", "conv1.bias", "conv2.bias")] == [0, 0, 2]
    assert frozen.in_epoch(5) == frozen


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_frozen_layer_stays_as_it_is(backend):
    start = weights.initial(GRAPH)
    recipe = replace(RECIPE, schedule=None, freeze=("fc6",), freeze_from=1)
    _, state = carry_out(Run(recipe=recipe, steps=3, validate=0), backend=backend)
    np.testing.assert_array_equal(state["fc6.weight"], start["fc6.weight"])
    assert not np.array_equal(state["fc7.weight"], start["fc7.weight"])


# The run.


def test_a_run_is_its_epochs_and_the_validation_after_each(tmp_path):
    heard = Stop()
    run = Run(recipe=replace(RECIPE, epochs=3), metrics=tmp_path / "m.jsonl")
    result, _ = carry_out(run, watcher=heard)
    assert (result.step, len(result.losses)) == (12, 12)
    assert [s.number for s in heard.steps] == [*range(1, 13)]
    assert [s.loss for s in heard.steps] == result.losses
    assert {(s.total, s.batch) for s in heard.steps} == {(12, 8)}
    assert [epoch for epoch, _ in heard.validations] == [1, 2, 3]
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(x["step"], x["epoch"]) for x in lines if "top1" in x] == [(4, 1), (8, 2), (12, 3)]
    (tenth, last) = (x for x in lines if "loss" in x)
    assert (tenth["step"], tenth["loss"]) == (10, np.mean(result.losses[:10]))
    assert (last["step"], last["loss"]) == (12, np.mean(result.losses[10:]))
    assert all(x["images_per_second"] > 0 for x in (tenth, last))


def test_validation_as_often_as_asked():
    heard = Stop()
    carry_out(Run(recipe=replace(RECIPE, schedule=None), steps=12, validate=2), watcher=heard)
    assert [epoch for epoch, _ in heard.validations] == [2]


def test_it_is_the_loop_that_fit_runs():
    """A whole run does what the plain loop does with the same batches."""
    result, state = carry_out(Run(recipe=replace(RECIPE, schedule=None), steps=6, validate=0))
    plain, _ = session()
    batches = training.training_batches(DATA, GRAPH, seed=0, batch=8, steps=6)
    assert training.fit(plain, batches, learning_rate=0.01) == result.losses
    assert equal(plain.state(), state)


# Going on.


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("at", [1, 3, 4, 5, 8, 11])
def test_a_run_that_was_stopped_anywhere_ends_in_the_same_bits(tmp_path, backend, at):
    run = Run(recipe=RECIPE, steps=12, checkpoints=tmp_path / "a", every=2, metrics=tmp_path / "a.jsonl")
    whole, state = carry_out(run, backend=backend)
    other = replace(run, checkpoints=tmp_path / "b", metrics=tmp_path / "b.jsonl")
    with pytest.raises(Stopped):
        carry_out(other, backend=backend, watcher=Stop(at))
    heard = Stop()
    rest, resumed = carry_out(other, backend=backend, watcher=heard)
    # All losses before a checkpoint are told of before it is written.
    assert heard.resumed_at == ((at - 1) // 2 * 2 or None)
    assert heard.notes == []
    assert rest.losses == whole.losses[heard.resumed_at or 0 :]
    assert equal(resumed, state)

    def lines(name):
        told = (json.loads(line) for line in (tmp_path / name).read_text().splitlines())
        return [{k: v for k, v in line.items() if k != "images_per_second"} for line in told if "top1" in line]

    assert lines("b.jsonl") == lines("a.jsonl")


def test_the_schedule_goes_on_where_it_was(tmp_path):
    """The rate of a plateau is part of the checkpoint."""
    recipe = replace(RECIPE, learning_rate=0.0, schedule=Plateau(patience=1, times=2))  # so nothing improves
    first, second = Stop(), Stop()
    carry_out(Run(recipe=recipe, steps=8, checkpoints=tmp_path), watcher=first)
    found, _ = checkpoint.latest(tmp_path)
    assert found.content["progress"] == {"step": 8, "best": 1 - first.validations[0][1], "waited": 0, "reductions": 1}
    carry_out(Run(recipe=recipe, steps=12, checkpoints=tmp_path), watcher=second)
    assert checkpoint.latest(tmp_path)[0].content["progress"]["reductions"] == 2


def test_a_run_that_has_ended_is_left_alone(tmp_path):
    run = Run(recipe=RECIPE, steps=4, checkpoints=tmp_path)
    _, state = carry_out(run)
    result, again = carry_out(run)
    assert (result.losses, result.step) == ([], 4)
    assert equal(again, state)
    with pytest.raises(InputError, match=r"is of step 4, past the 2 asked for"):
        carry_out(replace(run, steps=2))


def test_going_on_elsewhere_is_possible_and_said(tmp_path):
    run = Run(recipe=RECIPE, steps=4, checkpoints=tmp_path)
    carry_out(run, backend="cpu", where="cpu, chip A")
    heard = Stop()
    result, _ = carry_out(replace(run, steps=6), backend="reference", where="reference", watcher=heard)
    assert (result.step, heard.resumed_at) == (6, 4)
    assert heard.notes == ["backend was 'cpu, chip A', now 'reference': not bit for bit from here on"]


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path):
    run = Run(recipe=RECIPE, steps=4, checkpoints=tmp_path, every=3)
    _, state = carry_out(run)
    (tmp_path / "step-0000000004.safetensors").write_bytes(b"")
    heard = Stop()
    _, again = carry_out(run, watcher=heard)
    assert heard.resumed_at == 3
    assert "step-0000000004.json: its arrays are not those" in heard.notes[0]
    assert equal(again, state)


OTHERS = {
    "recipe": (lambda run: replace(run, recipe=replace(RECIPE, momentum=0.8)), {}, "recipe: momentum 0.9 there, 0.8 h"),
    "batch": (lambda run: replace(run, recipe=replace(RECIPE, batch=4)), {}, "recipe: batch 8 there, 4 here"),
    "schedule": (lambda run: replace(run, recipe=replace(RECIPE, schedule=None)), {}, "recipe: schedule {.*} there"),
    "seed": (lambda run: run, {"seed": 1}, "seed: 0 there, 1 here"),
    "precision": (lambda run: run, {"precision": "float64"}, "precision: 'float32' there, 'float64' here"),
    "data": (lambda run: run, {"data": Splits(train=part(range(32)), test=DATA.test)}, "data: pictures 36 there, 32 h"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "how", "says"), OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, how, says):
    run = Run(recipe=RECIPE, steps=2, checkpoints=tmp_path)
    carry_out(run)
    with pytest.raises(CheckpointError, match=rf"belongs to another run \({says}"):
        carry_out(change(run), **how)


WRONG = {
    "both": ({"steps": 1, "epochs": 1}, "give either epochs or steps"),
    "steps": ({"steps": 0}, "steps must be an integer of at least 1"),
    "every": ({"steps": 1, "every": 0}, "every must be an integer of at least 1"),
    "batch": ({"recipe": replace(RECIPE, batch=37)}, "a batch of 37 needs at least as many images to train on, got 36"),
    "plateau": ({"validate": 0}, "a schedule that waits for a plateau needs validation"),
    "no folder": ({"metrics": DATA}, "it has no folder"),
}


@pytest.mark.parametrize(("how", "says"), WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_refused_before_training(tmp_path, how, says):
    how = {name: tmp_path / "missing" / "m" if value is DATA else value for name, value in how.items()}
    with pytest.raises(InputError, match=says):
        carry_out(Run(**{"recipe": RECIPE, **how}), watcher=Stop(1))


def test_a_batch_in_parts_is_the_same_step():
    run = Run(recipe=RECIPE, steps=6)
    losses, state = carry_out(run, backend="cpu", precision="float64")
    parts, accumulated = carry_out(run, backend="cpu", precision="float64", accumulate=4)
    np.testing.assert_allclose(parts.losses, losses.losses, rtol=1e-12)
    for name, value in state.items():
        np.testing.assert_allclose(accumulated[name], value, rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match="a batch of 8 cannot be split evenly over 3 parts one after the other"):
        carry_out(run, backend="cpu", accumulate=3)


def test_event_files(tmp_path):
    from tensorboardX.proto import event_pb2

    carry_out(Run(recipe=RECIPE, steps=10, tensorboard=tmp_path / "tb"))
    (path,) = (tmp_path / "tb").iterdir()
    data, tags = path.read_bytes(), {}
    while data:
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        tags.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
    assert 0 < tags[("learning_rate", 10)] <= 0.01
    assert {name for name, _ in tags} >= {"loss", "learning_rate", "images_per_second", "top1", "top5"}
    assert ("top1", 4) in tags
