"""The loop and the evaluation on data made by hand, and on sessions that are fakes."""

import dataclasses

import numpy as np
import pytest

import portnet
from portnet import images, training
from portnet.contract import Session, Settings
from portnet.errors import InputError, PortNetError
from portnet.graph import Flatten, Graph, Linear, Normalisation
from portnet.images import Batch, DataSet, Splits
from portnet.training import Diverged, evaluate, fit, training_batches

SIZE = 14
GRAPH = Graph(
    preset="small",
    input=(3, SIZE, SIZE),
    layers=(Flatten(name="flatten"), Linear(name="fc", in_features=3 * SIZE**2, out_features=10)),
    normalisation=Normalisation(mean=(0.0, 0.0, 0.0)),
)


class FakeSession(Session):
    """Infers what it is told to, and writes down what it is asked for.

    `answer` turns images into logits. `losses` are what training steps return, each as a value that is only made when
    it is fetched.
    """

    def __init__(self, answer=None, losses=()):
        self.answer, self.losses = answer, losses
        self.log, self.seen, self.rates = [], [], []

    def put(self, array):
        return "on the device", array

    def get(self, value):
        place, kept = value
        assert place == "on the device"
        if callable(kept):
            return np.asarray(kept())
        return np.asarray(kept)

    def infer(self, images):
        self.seen.append(self.get(images))
        return self.put(self.answer(self.seen[-1]))

    def weights(self):
        raise NotImplementedError

    def synchronize(self):
        raise NotImplementedError

    def train_step(self, images, labels, ids, *, step, learning_rate):
        self.log.append(("step", step))
        self.seen.append(Batch(images=self.get(images), labels=self.get(labels), ids=self.get(ids)))
        self.rates.append(learning_rate)
        loss = self.losses[step]

        def fetch():
            self.log.append(("fetched", step))
            return loss

        return self.put(fetch)


def numbered(count):
    """Prepared images that say their own number."""
    return np.arange(count, dtype=np.float32)[:, None, None, None] + np.zeros((1, *GRAPH.input), np.float32)


def table(logits, dtype=np.float32):
    """A session that answers image number i with row i."""
    return FakeSession(lambda x: np.array(logits, dtype)[x[:, 0, 0, 0].astype(int)])


def judged(logits, labels, **options):
    return evaluate(table(logits), GRAPH, (numbered(len(labels)), np.array(labels)), **options)


def pictures(count=10, classes=10, **options):
    random = np.random.default_rng(1).integers(0, 256, (count, 20, 24, 3)).astype(np.uint8)
    made = DataSet(
        name="made up",
        class_names=tuple(map(str, range(classes))),
        labels=np.arange(count) % classes,
        ids=100 + 3 * np.arange(count),
        mean=(0.0, 0.0, 0.0),
        read=lambda i: random[i],
    )
    return dataclasses.replace(made, **options)


def row(*ranked, rest=-50.0):
    """Logits by class: `ranked` gives those of classes 0, 1, ..., the others have `rest`."""
    return [*ranked, *[rest] * (10 - len(ranked))]


# Evaluation: arithmetic.


def test_top1_top5_and_loss_by_hand():
    logits = [np.log([10, 20, 30, 15, 5, 4, 6, 7, 2, 1])] * 5
    result = judged(logits, [2, 0, 7, 6, 9])  # ranked first, fourth, fifth, sixth and last
    assert (result.top1, result.top5, result.count) == (0.2, 0.6, 5)
    assert result.loss == pytest.approx(-np.mean(np.log(np.array([30, 10, 7, 6, 1]) / 100)), rel=1e-6)


@pytest.mark.parametrize("shift", [0, 1000, -1000, 3e38])
def test_only_differences_between_logits_count(shift):
    result = judged([np.array(row(2.0, 1.0)) + shift] * 2, [0, 1])
    if abs(shift) < 1e6:
        assert (result.top1, result.top5) == (0.5, 1.0)
        p = np.exp([2.0, 1.0]) / np.exp(row(2.0, 1.0)).sum()
        assert result.loss == pytest.approx(-np.log(p).mean(), rel=1e-4)
    assert np.isfinite(result.loss)


def test_the_fifth_counts_and_the_sixth_does_not():
    logits = [row(9, 8, 7, 6, 5, 4)] * 10
    assert [judged(logits[:1], [label]).top5 for label in range(6)] == [1, 1, 1, 1, 1, 0]
    assert [judged(logits[:1], [label]).top1 for label in range(3)] == [1, 0, 0]


def test_a_tie_is_no_hit_by_luck():
    assert judged([row(1, 1)] * 2, [0, 1]).top1 == 0
    assert judged([row(1, 1)] * 2, [0, 1]).top5 == 1
    # Places four to six are shared by three: any of them may come sixth.
    tied = row(9, 8, 7, 5, 5, 5)
    assert [judged([tied], [label]).top5 for label in range(6)] == [1, 1, 1, 0, 0, 0]
    # Places four and five are shared by two, so neither can be missed.
    tied = row(9, 8, 7, 5, 5, 4)
    assert [judged([tied], [label]).top5 for label in range(6)] == [1, 1, 1, 1, 1, 0]
    # A network that says the same of every class knows nothing.
    flat = judged([[0.0] * 10] * 10, range(10))
    assert (flat.top1, flat.top5) == (0, 0)
    assert flat.loss == pytest.approx(np.log(10))


def test_ranks_far_below_what_a_probability_can_be():
    """Probabilities below 1e-308 are all the same 0 in float64."""
    logits = row(0, -800, -801, -802, -803, -804, rest=-900)
    assert [judged([logits], [label]).top5 for label in (1, 4, 5, 6)] == [1, 1, 0, 0]
    assert judged([logits], [5]).loss == pytest.approx(804)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_misses(bad):
    logits = [row(1, 2), row(bad, 2), row(1, bad), [bad] * 10, row(3, 2)]
    result = judged(logits, [1, 1, 1, 1, 0])
    assert (result.top1, result.top5, result.count) == (0.4, 0.4, 5)
    assert np.isnan(result.loss)


def test_a_class_that_is_impossible():
    result = judged([row(0, -np.inf)], [1])
    assert (result.top1, result.top5, result.loss) == (0, 0, np.inf)
    assert judged([row(0, -np.inf)], [0]).top1 == 1


def test_the_mean_is_over_pictures_not_over_batches():
    logits = [row(5, 0)] * 7
    labels = [0, 0, 0, 0, 0, 0, 1]
    counted = []
    whole = judged(logits, labels, batch=100)
    parts = judged(logits, labels, batch=3, on_batch=counted.append)
    assert counted == [3, 6, 7]
    assert (parts.top1, parts.count) == (whole.top1, 7) == (6 / 7, 7)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)


def test_fewer_than_five_classes():
    graph = dataclasses.replace(
        GRAPH, layers=(GRAPH.layers[0], Linear(name="fc", in_features=3 * SIZE**2, out_features=3))
    )
    result = evaluate(table([[1, 2, 3]] * 3), graph, (numbered(3), np.arange(3)))
    assert (result.top1, result.top5) == (1 / 3, 1)


def test_evaluate_agrees_with_a_real_session():
    random = np.random.default_rng(0)
    weights = {name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in GRAPH.parameters.items()}
    session = portnet.backends()["reference"].open(GRAPH, weights, Settings(precision="float64"))
    x, y = random.normal(0, 1, (50, *GRAPH.input)).astype(np.float32), random.integers(0, 10, 50)
    result = evaluate(session, GRAPH, (x, y), batch=8)
    logits = x.reshape(50, -1).astype(float) @ weights["fc.weight"].T.astype(float) + weights["fc.bias"]
    assert result.loss == pytest.approx(session.trace(x, y, {}).loss, rel=1e-9)
    assert result.top1 == np.mean(logits.argmax(axis=1) == y)
    assert result.top5 == np.mean([y[i] in np.argsort(logits[i])[-5:] for i in range(50)])
    assert 0 < result.top1 < result.top5 < 1


# Evaluation: what is shown.


def test_a_data_set_is_shown_once_in_order_as_preprocess_makes_it():
    for data in (pictures(), pictures(whole=True)):
        session = FakeSession(lambda x: np.tile(row(1.0), (len(x), 1)))
        result = evaluate(session, GRAPH, data, batch=4)
        assert [len(x) for x in session.seen] == [4, 4, 2]
        shown = images.preprocess([data.read(i) for i in range(10)], GRAPH, whole=data.whole)
        np.testing.assert_array_equal(np.concatenate(session.seen), shown)
        assert (result.top1, result.count) == (0.1, 10)


def test_of_splits_the_test_pictures_are_shown():
    session = FakeSession(lambda x: np.tile(row(1.0), (len(x), 1)))
    assert evaluate(session, GRAPH, Splits(train=pictures(7), test=pictures(3))).count == 3


def corner(x):
    """Logits from one pixel, which is another in each of the ten views."""
    return np.concatenate([x[:, :, 0, 1], x[:, :, 5, 3] - 60, np.full((len(x), 4), -300, np.float32)], axis=1) / 20


def test_ten_views_average_the_softmax():
    data = pictures(9)
    session = FakeSession(corner)
    result = evaluate(session, GRAPH, data, views=10, batch=40)
    assert [len(x) for x in session.seen] == [40, 40, 10]
    views = images.ten_views([data.read(i) for i in range(9)], GRAPH)
    np.testing.assert_array_equal(np.concatenate(session.seen), views.reshape(-1, *GRAPH.input))
    logits = np.stack([corner(v) for v in views]).astype(float)
    p = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    right = p.mean(axis=1)[np.arange(9), data.labels]
    assert result.loss == pytest.approx(-np.log(right).mean(), rel=1e-6)
    ranks = (p.mean(axis=1) >= right[:, None]).sum(axis=1)
    assert (result.top1, result.top5) == (np.mean(ranks == 1), np.mean(ranks <= 5))
    # Neither the mean of the logits nor the mean of the losses.
    averaged = logits.mean(axis=1)
    other = averaged - np.log(np.exp(averaged).sum(axis=1, keepdims=True))
    assert abs(result.loss + other[np.arange(9), data.labels].mean()) > 0.01
    assert abs(result.loss + np.log(p)[np.arange(9), :, data.labels].mean()) > 0.01


def test_ten_views_of_a_picture_are_never_parted():
    session = FakeSession(corner)
    assert evaluate(session, GRAPH, pictures(3), views=10, batch=4).count == 3
    assert [len(x) for x in session.seen] == [10, 10, 10]


@pytest.mark.parametrize("views", [1, 10])
def test_nothing_to_evaluate_on(views):
    says = "there is nothing to evaluate on: the data set is empty"
    with pytest.raises(InputError, match=says):
        evaluate(FakeSession(corner), GRAPH, pictures(0), views=views)
    with pytest.raises(InputError, match="n of at least 1"):
        evaluate(FakeSession(corner), GRAPH, (numbered(0), np.zeros(0, int)))


# Training: batches.


def recorded(batches):
    return [(b.images.tobytes(), b.labels.tolist(), b.ids.tolist()) for b in batches]


DATA = {"data set": pictures(10), "pair": (numbered(10), np.arange(10))}
BOTH = pytest.mark.parametrize("data", DATA.values(), ids=DATA)


@BOTH
def test_batches_resume_where_they_start(data):
    options = {"seed": 5, "batch": 3}
    whole = recorded(training_batches(data, GRAPH, steps=11, **options))
    for start in (1, 3, 4, 8):
        rest = recorded(training_batches(data, GRAPH, steps=11 - start, start=start, **options))
        assert rest == whole[start:]


@BOTH
def test_an_epoch_shows_every_picture_at_most_once_and_each_epoch_in_another_order(data):
    epochs = [
        [i for b in training_batches(data, GRAPH, seed=0, batch=3, steps=3, start=3 * n) for i in b.ids]
        for n in range(4)
    ]
    for shown in epochs:
        assert len(set(shown)) == 9
    assert len({tuple(shown) for shown in epochs}) == 4
    assert len(list(training_batches(data, GRAPH, seed=0, batch=3, epochs=2))) == 6
    assert len(list(training_batches(data, GRAPH, seed=0, batch=3, epochs=2, start=2))) == 6
    assert len(list(training_batches(data, GRAPH, seed=0, batch=10, epochs=2))) == 2


@BOTH
def test_the_order_is_the_seeds(data):
    def order(seed):
        return [b.ids.tolist() for b in training_batches(data, GRAPH, seed=seed, batch=5, epochs=1)]

    assert order(0) == order(0) != order(1)


def test_a_pair_keeps_images_labels_and_numbers_together():
    x, y = numbered(10), (np.arange(10) * 7 % 10).astype(np.uint8)
    for b in training_batches((x, y), GRAPH, seed=0, batch=4, epochs=2):
        np.testing.assert_array_equal(b.images[:, 0, 0, 0], b.ids)
        np.testing.assert_array_equal(b.labels, y[b.ids])
        assert (b.labels.dtype, b.ids.dtype, b.images.dtype) == (np.int64, np.int64, np.float32)


def test_a_data_sets_batches_are_those_of_images():
    data = pictures(10)
    expected = [b for epoch in range(2) for b in images.training_batches(data, GRAPH, seed=4, epoch=epoch, batch=4)]
    assert recorded(training_batches(data, GRAPH, seed=4, batch=4, epochs=2)) == recorded(expected)
    both = Splits(train=data, test=pictures(0))
    assert recorded(training_batches(both, GRAPH, seed=4, batch=4, epochs=2)) == recorded(expected)


WRONG = {
    "neither": ({"batch": 2}, "give either epochs or steps"),
    "both": ({"batch": 2, "epochs": 1, "steps": 1}, "give either epochs or steps"),
    "no steps": ({"batch": 2, "steps": 0}, "steps must be an integer of at least 1, got 0"),
    "no epochs": ({"batch": 2, "epochs": -1}, "epochs must be an integer of at least 1, got -1"),
    "no batch": ({"batch": 0, "steps": 1}, "batch must be an integer of at least 1, got 0"),
    "a yes": ({"batch": True, "steps": 1}, "batch must be an integer of at least 1, got True"),
    "a large batch": ({"batch": 11, "steps": 1}, "a batch of 11 needs at least as many images to train on, got 10"),
}


@BOTH
@pytest.mark.parametrize(("options", "says"), WRONG.values(), ids=WRONG)
def test_wrong_amounts(data, options, says):
    with pytest.raises(InputError, match=says):
        next(training_batches(data, GRAPH, seed=0, **options))


def test_amounts_may_be_numpys():
    made = training_batches(DATA["pair"], GRAPH, seed=0, batch=np.int64(5), steps=np.int32(2))
    assert [len(b.ids) for b in made] == [5, 5]


# Training: the loop.


def batches(count):
    return iter([Batch(images=numbered(2), labels=np.array([i, 0]), ids=np.array([i, i + 1])) for i in range(count)])


def test_losses_come_in_order_and_one_step_late():
    session = FakeSession(losses=[3.0, 2.0, 1.5, 1.25])
    told = []
    assert fit(session, batches(4), learning_rate=0.5, on_step=lambda *a: told.append(a)) == [3.0, 2.0, 1.5, 1.25]
    assert told == [(1, 3.0), (2, 2.0), (3, 1.5), (4, 1.25)]
    steps = [("step", 0), ("step", 1), ("fetched", 0), ("step", 2), ("fetched", 1), ("step", 3), ("fetched", 2)]
    assert session.log == [*steps, ("fetched", 3)]
    assert session.rates == [0.5] * 4
    assert [b.labels[0] for b in session.seen] == [0, 1, 2, 3]
    assert [b.ids.tolist() for b in session.seen] == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert all(
        isinstance(loss, float) for loss in fit(FakeSession(losses=[np.float32(1)]), batches(1), learning_rate=0)
    )


def test_steps_are_numbered_from_the_start():
    session = FakeSession(losses=[None] * 7 + [1.0, 2.0])
    told = []
    assert fit(session, batches(2), learning_rate=0.1, start=7, on_step=lambda *a: told.append(a)) == [1.0, 2.0]
    assert [entry for entry in session.log if entry[0] == "step"] == [("step", 7), ("step", 8)]
    assert told == [(1, 1.0), (2, 2.0)]


def test_no_batches_no_losses():
    assert fit(FakeSession(), iter([]), learning_rate=0.1) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_loss_that_is_not_finite_stops_the_training_and_names_its_step(bad, at):
    losses = [2.0] * 14
    losses[10 + at] = bad
    session, told = FakeSession(losses=losses), []
    says = f"the loss became {bad} at step {10 + at}; try a lower learning rate"
    with pytest.raises(Diverged, match=says) as caught:
        fit(session, batches(4), learning_rate=0.1, start=10, on_step=lambda *a: told.append(a))
    assert isinstance(caught.value, PortNetError)
    assert len(told) == at
    assert len([entry for entry in session.log if entry[0] == "step"]) == min(at + 2, 4)


@pytest.mark.parametrize("rate", [-1e-9, np.nan, np.inf])
def test_a_learning_rate_that_is_none(rate):
    session = FakeSession(losses=[1.0])
    with pytest.raises(InputError, match="learning rate must be a finite number of at least 0"):
        fit(session, batches(1), learning_rate=rate)
    assert not session.log


# What a session takes.


def test_checked_images_and_labels():
    x = numbered(3)
    assert training.check_images(GRAPH, x) is x
    assert training.check_images(GRAPH, x[::-1, :, ::-1]).flags.c_contiguous
    np.testing.assert_array_equal(training.check_images(GRAPH, x[::-1]), x[::-1])
    with pytest.raises(InputError, match="float32"):
        training.check_images(GRAPH, x.astype(float))
    assert training.check_images(GRAPH, x.astype(float), wide=True).dtype == np.float64
    labels = training.check_labels(GRAPH, np.array([0, 9], np.uint8), 2)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 9]
