"""A whole training run: epochs, schedule, validation, checkpoints, metrics.

Every random choice is counted and not drawn, so that a run is a function of its recipe, its seed and the number of
the step: one that was stopped anywhere and goes on from a checkpoint ends in the same bits, on a device that repeats
itself.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import numpy as np

from portnet import checkpoint, training
from portnet.contract import Session, Settings
from portnet.errors import CheckpointError, InputError
from portnet.graph import Graph, Milestones, Plateau, Recipe
from portnet.images import DataSet, Splits
from portnet.loading import Loader
from portnet.metrics import Metrics
from portnet.training import Evaluation

WINDOW = 10
"""Steps over which the loss and the speed of one line of the metrics are averaged."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is asked of a training run.

    `recipe`: how to train, the size of the global batch among it. It ends after `steps` updates, or else after
    `epochs` epochs (the recipe's where neither is given); what does not fill a batch is left out of an epoch.
    `workers` processes decode. Every `validate` epochs (0: never) the test split is classified, by `views` views (1 or
    10). `checkpoints` is a folder of this run's own: where it holds some, the run goes on from the last. One is written
    each `every` steps, at the end of each epoch, and at the end. `metrics` is a file of JSON lines, `tensorboard` a
    folder of event files.
    """

    recipe: Recipe
    steps: int | None = None
    epochs: int | None = None
    workers: int = 0
    validate: int = 1
    views: int = 1
    checkpoints: Path | None = None
    every: int | None = None
    metrics: Path | None = None
    tensorboard: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come: updates made, and what the schedule has seen of validation.

    `best` is the least top-1 error, `waited` the epochs since it, `reductions` how often a plateau cut the rate.
    """

    step: int = 0
    best: float | None = None
    waited: int = 0
    reductions: int = 0

    def observed(self, error: float, schedule: Plateau) -> "Progress":
        """After one more validation."""
        if self.best is None or error < self.best:
            return replace(self, best=error, waited=0)
        if self.waited + 1 >= schedule.patience and self.reductions < schedule.times:
            return replace(self, waited=0, reductions=self.reductions + 1)
        return replace(self, waited=self.waited + 1)

    def rate(self, recipe: Recipe, step: int, per_epoch: int) -> float:
        """The learning rate of that step, counted from 0."""
        match recipe.schedule:
            case Plateau(factor=factor):
                return recipe.learning_rate * factor**self.reductions
            case Milestones(at=at, factor=factor, unit=unit):
                now = step if unit == "step" else step // per_epoch + 1
                return float(recipe.learning_rate * factor ** sum(now >= place for place in at))
        return recipe.learning_rate


@dataclass(frozen=True, kw_only=True)
class Step:
    """One update as it is told of: its number from 1, of how many, of how many images, the loss before it (nats), the
    learning rate, and images per second over the last steps, with loading (None in the first)."""

    number: int
    total: int
    batch: int
    loss: float
    learning_rate: float
    images_per_second: float | None


class Watcher(Protocol):
    """Who is told how a run goes on; only in the process of rank 0."""

    def resumed(self, step: int, notes: list[str]) -> None:
        """It goes on after that step; `notes` say what is not as it was, or was passed over."""

    def step(self, step: Step) -> None:
        """One more update is done."""

    def validated(self, epoch: int, result: Evaluation) -> None:
        """The test split was classified after that epoch, counted from 1."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to: the losses before the steps that this call made, and the last evaluation by its epoch."""

    losses: list[float]
    step: int
    validation: Evaluation | None = None


def train(
    session: Session,
    graph: Graph,
    settings: Settings,
    data: Splits,
    run: Run,
    *,
    backend: str,
    watcher: Watcher | None = None,
) -> Result:
    """Carry out a run, or the rest of it, on a session that holds the initial weights; all its processes call this.

    Raises `InputError` for what makes no sense together, `CheckpointError` for a checkpoint of another run or where
    none can be written, `Diverged` where the loss is no longer finite, and `PictureError` from the reading.
    """
    return _Training(session, graph, settings, data, run, backend, watcher).carry_out()


@dataclass
class _Training:
    session: Session
    graph: Graph
    settings: Settings
    data: Splits
    run: Run
    backend: str
    watcher: Watcher | None
    progress: Progress = field(default_factory=Progress)
    losses: list[float] = field(default_factory=list)
    validation: Evaluation | None = None

    def __post_init__(self) -> None:
        run, recipe = self.run, self.run.recipe
        self.per_epoch = check(run, self.data.train, self.session.place.parts, self.settings.accumulate)
        self.total = run.steps if run.steps is not None else (run.epochs or recipe.epochs) * self.per_epoch
        self.first = self.session.place.rank == 0
        self.metrics = Metrics(run.metrics if self.first else None, run.tensorboard if self.first else None)
        # The losses of the line to come; when the first loss that its speed counts from came, and how many since.
        self.window: list[float] = []
        self.since: float | None = None
        self.counted = 0
        self.speed: float | None = None
        self.began, self.stop = monotonic(), 0

    def carry_out(self) -> Result:
        with ExitStack() as stack:
            self.resume()
            stack.enter_context(self.metrics.after(self.progress.step))
            loader = stack.enter_context(Loader(self.data.train, workers=self.run.workers))
            while self.progress.step < self.total:
                self.epoch(loader)
        return Result(losses=self.losses, step=self.progress.step, validation=self.validation)

    def resume(self) -> None:
        folder = self.run.checkpoints
        if folder is None:
            return
        if self.first:
            checkpoint.clear_unfinished(folder)
        found, notes = checkpoint.latest(folder)
        if found is None:
            return
        if found.step > self.total:
            raise InputError(
                f"{found.path} is of step {found.step}, past the {self.total} asked for; ask for more steps"
            )
        notes = [f"passed over, damaged: {note}" for note in notes] + self.compare(found)
        self.session.restore(found.arrays)
        self.progress = Progress(**found.content["progress"])
        if self.watcher and self.first:
            self.watcher.resumed(self.progress.step, notes)

    def compare(self, found: checkpoint.Checkpoint) -> list[str]:
        """What is not as it was but may be; raises `CheckpointError` for what may not."""
        ours = json.loads(json.dumps(self.identity()))
        theirs = found.content.get("run", {})
        if other := [name for name in ours if ours[name] != theirs.get(name)]:
            told = "; ".join(f"{name}: {_differing(theirs.get(name), ours[name])}" for name in other)
            raise CheckpointError(
                f"{found.path} belongs to another run ({told}); ask for what it was made with, or take another folder"
            )
        where = self.where()
        return [
            f"{name} was {found.content['where'].get(name)!r}, now {value!r}: not bit for bit from here on"
            for name, value in where.items()
            if found.content["where"].get(name) != value
        ]

    def identity(self) -> dict[str, Any]:
        """What a run is, wherever it is carried out."""
        split, settings = self.data.train, self.settings
        pictures = hashlib.sha256(split.ids.tobytes() + split.labels.tobytes()).hexdigest()
        return {
            "preset": self.graph.preset,
            "options": dict(self.graph.options),
            "recipe": asdict(self.run.recipe),
            "seed": settings.seed,
            "precision": settings.precision,
            "formulation": settings.formulation,
            "data": {"name": split.name, "pictures": len(split), "sha256": pictures},
        }

    def where(self) -> dict[str, Any]:
        """On what it is carried out, which decides the last bits."""
        place, settings = self.session.place, self.settings
        return {
            "backend": self.backend,
            "engine": settings.engine,
            "channels_last": settings.channels_last,
            "accumulate": settings.accumulate,
            "parallel": settings.parallel,
            "processes": place.size,
        }

    def epoch(self, loader: Loader) -> None:
        """To the end of the epoch, or of the run."""
        number, done = divmod(self.progress.step, self.per_epoch)
        recipe = self.run.recipe.in_epoch(number)
        self.session.use(recipe)
        end = min((number + 1) * self.per_epoch, self.total)
        batches = loader.training_batches(
            self.graph,
            seed=self.settings.seed,
            epoch=number,
            batch=recipe.batch,
            steps=end - self.progress.step,
            first=done,
            place=self.session.place,
        )
        for stop in self.stops(end):
            self.advance(batches, stop)
            if stop == (number + 1) * self.per_epoch:
                self.validate(number + 1)
            if self.run.checkpoints is not None:
                self.save(self.run.checkpoints)

    def stops(self, end: int) -> Iterator[int]:
        """Where steps are interrupted for a checkpoint, the last at `end`."""
        if self.run.checkpoints is not None and self.run.every:
            step = self.progress.step
            yield from range(step - step % self.run.every + self.run.every, end, self.run.every)
        yield end

    def advance(self, batches: Iterator[Any], stop: int) -> None:
        start, recipe = self.progress.step, self.run.recipe
        self.since, self.counted, self.began, self.stop = None, 0, monotonic(), stop

        def rate(step: int) -> float:
            return self.progress.rate(recipe, step, self.per_epoch)

        def told(count: int, loss: float) -> None:
            self.tell(start + count, loss, rate(start + count - 1))

        self.losses += training.fit(
            self.session, islice(batches, stop - start), learning_rate=rate, start=start, on_step=told
        )
        self.progress = replace(self.progress, step=stop)

    def tell(self, number: int, loss: float, rate: float) -> None:
        """One more loss has come; the speed is that of the steps since a loss came before."""
        now, batch = monotonic(), self.run.recipe.batch
        self.window.append(loss)
        self.counted += 1
        if number == self.stop:
            # Losses are fetched one step late, but for the last: it comes at once where work is done when it is issued.
            if self.speed is None:
                self.speed = (number - self.progress.step) * batch / (now - self.began)
        elif self.since is None:
            self.since, self.counted = now, 0
        else:
            self.speed = self.counted * batch / (now - self.since)
        if number % WINDOW == 0 or number == self.total:
            self.metrics.write(
                number,
                epoch=(number - 1) // self.per_epoch + 1,
                loss=float(np.mean(self.window)),
                learning_rate=rate,
                images_per_second=self.speed,
            )
            self.window, self.since, self.counted = [], now, 0
        if self.watcher and self.first:
            step = Step(
                number=number,
                total=self.total,
                batch=batch,
                loss=loss,
                learning_rate=rate,
                images_per_second=self.speed,
            )
            self.watcher.step(step)

    def validate(self, epoch: int) -> None:
        if not self.run.validate or epoch % self.run.validate:
            return
        result = training.evaluate(self.session, self.graph, self.data, views=self.run.views, workers=self.run.workers)
        self.validation = result
        if isinstance(self.run.recipe.schedule, Plateau):
            self.progress = self.progress.observed(1 - result.top1, self.run.recipe.schedule)
        self.metrics.write(
            self.progress.step, epoch=epoch, top1=result.top1, top5=result.top5, validation_loss=result.loss
        )
        if self.watcher and self.first:
            self.watcher.validated(epoch, result)

    def save(self, folder: Path) -> None:
        arrays = self.session.state()
        if self.first:
            content = {"progress": asdict(self.progress), "run": self.identity(), "where": self.where()}
            checkpoint.save(folder, self.progress.step, arrays, content)


def check(run: Run, split: DataSet, parts: int, accumulate: int) -> int:
    """The steps in an epoch. Raises `InputError` where the run cannot be carried out."""
    batch = run.recipe.batch
    for name, value in (("steps", run.steps), ("epochs", run.epochs), ("batch", batch), ("every", run.every)):
        if value is not None:
            training.check_at_least_1(name, value)
    if run.steps is not None and run.epochs is not None:
        raise InputError("give either epochs or steps")
    if len(split) < batch:
        raise InputError(f"a batch of {batch} needs at least as many images to train on, got {len(split)}")
    check_split(batch, parts, accumulate)
    if isinstance(run.recipe.schedule, Plateau) and not run.validate:
        raise InputError("a schedule that waits for a plateau needs validation; leave --validate at 1, or name another")
    return len(split) // batch


def check_split(batch: int, parts: int, accumulate: int) -> None:
    """Raises `InputError` unless a batch can be cut into equal parts, and each of them again."""
    if batch % (parts * accumulate):
        ways = [f"{parts} processes"] * (parts > 1) + [f"{accumulate} parts one after the other"] * (accumulate > 1)
        fit = f"give a multiple of {parts * accumulate}"
        raise InputError(f"a batch of {batch} cannot be split evenly over {' of '.join(ways)}; {fit}")


def _differing(theirs: Any, ours: Any) -> str:
    """The two values, or of two tables the entries that differ."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = [name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name)]
        return ", ".join(f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} here" for name in names)
    return f"{theirs!r} there, {ours!r} here"
