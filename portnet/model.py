"""`portnet.AlexNet`: one network on one device, as a user holds it."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from portnet import alexnet, images, onnx_export, onnx_file, parity, plugins, trainer, training, weights
from portnet.calibration import TakesExports
from portnet.contract import INT8, Array, Device, Parallel, Session, Settings
from portnet.errors import ExportError, InputError, OnnxFileError, PortNetError, Unavailable, UnknownName, Unsupported
from portnet.graph import Graph, Normalisation
from portnet.images import Batch, DataSet, PixelBatch, Splits
from portnet.trainer import Result, Watcher
from portnet.training import Data, Evaluation

EXPORT_TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 0.15}
"""The largest relative error, over output channels, between a session's logits and those of its float32 file."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """An ONNX file, and how far what ONNX Runtime makes of it lies from the session it came from.

    `error` is the output's worst relative error over its channels, or None where ONNX Runtime is not installed and the
    file could not be run. `layers` holds the same of every layer that the session shows, by its name.
    """

    path: Path
    error: float | None
    layers: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> str | None:
        """The layer of the largest error; None where no layer was compared."""
        return max(self.layers, key=lambda name: self.layers[name], default=None)


class AlexNet:
    """AlexNet on a device.

    `backend`: a name that ``portnet.backends()`` lists, or ``"auto"`` for the best available. `preset` and `options`
    (`image_size`, `dropout`, `bias`, `mean`) are those of `portnet.graph`. `precision`: ``float32`` (strictly: no
    TF32), ``tf32``, ``bfloat16``, ``float16`` or ``float64``, as far as the device has them. `formulation`:
    ``portable``, or ``stock`` for PyTorch's own operators. `seed` decides the initial weights, the order of images,
    their augmentation and the dropout masks, alike on every backend. `weights`: a file or a dict to start from.
    `engine`, `channels_last`, `accumulate`, `parallel`: see `portnet.contract.Settings`; with `parallel` this process
    is one of a group that torchrun started.

    Raises `UnknownName` for an unknown backend, preset or option, `Unavailable` where the device cannot be used,
    `Unsupported` for a precision or formulation it does not have, `WeightsError` for weights that do not fit.
    """

    def __init__(
        self,
        backend: str = "auto",
        preset: str = "paper2012",
        *,
        classes: int = 1000,
        precision: str = "float32",
        formulation: str = "portable",
        seed: int = 0,
        weights: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        engine: str = "eager",
        channels_last: bool = False,
        accumulate: int = 1,
        parallel: Parallel = "",
        **options: Any,
    ) -> None:
        graph = alexnet.graph(preset, classes=classes, **options)
        training.check_at_least_1("accumulate", accumulate)
        how: dict[str, Any] = {"precision": precision, "formulation": formulation, "seed": _seed(seed)}
        how |= {"engine": engine, "channels_last": channels_last, "accumulate": accumulate, "parallel": parallel}
        self._open(graph, backend, Settings(**how), weights)

    def _open(
        self,
        graph: Graph,
        backend: str,
        settings: Settings,
        values: str | os.PathLike[str] | Mapping[str, Any] | None,
    ) -> None:
        self.graph = graph
        self.settings = settings
        self.backend = plugins.choose(backend)
        self.device: Device = plugins.probe(self.backend)
        if values is None:
            arrays = weights.initial(graph, settings.seed)
        elif isinstance(values, Mapping):
            arrays = weights.check(graph, values)
        else:
            arrays = weights.load_for(graph, values)
        self.session = self.backend.open(graph, arrays, settings)
        self.steps = 0
        """Updates made since the weights were set: the number of the next training step."""
        self.class_names: tuple[str, ...] | None = None
        """Names of the classes, once trained on a data set that has them; saved with the weights."""
        self.whole = False
        """Whether pictures are scaled whole to the input, not cropped; taken from the data set as the names are."""

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        *,
        precision: str = "float32",
        formulation: str = "portable",
        seed: int = 0,
    ) -> "AlexNet":
        """The network saved in a file, of whatever preset, on any backend. Raises `WeightsError`."""
        graph, arrays = weights.load(path)
        net = cls.__new__(cls)
        net._open(graph, backend, Settings(precision=precision, formulation=formulation, seed=_seed(seed)), arrays)
        notes = weights.read_notes(path)
        net.class_names = tuple(notes["class_names"]) if notes.get("class_names") else None
        net.whole = bool(notes.get("whole", False))
        return net

    def __repr__(self) -> str:
        return (
            f"<AlexNet {self.graph.preset}, {self.graph.parameter_count:,} parameters, {self.settings.precision}, "
            f"on {self.backend.name} ({self.device.name})>"
        )

    def __call__(self, batch: Any) -> Any:
        """Logits ``(n, classes)`` for prepared images, float32 ``(n, 3, S, S)``; see `portnet.preprocess`.

        NumPy in gives NumPy back, a torch tensor gives a tensor on its device; float32, or float64 where the session
        computes in it. Raises `InputError` for the wrong shape or dtype, NaN or infinity.
        """
        torch = sys.modules.get("torch")
        tensor = torch is not None and isinstance(batch, torch.Tensor)
        host = batch.detach().cpu() if tensor else batch
        host = training.check_images(self.graph, host, wide=self.settings.precision == "float64")
        logits = self.session.get(self.session.infer(self.session.put(host)))
        return torch.from_numpy(logits).to(batch.device) if torch is not None and tensor else logits

    @property
    def module(self) -> Any:
        """The network as a plain ``torch.nn.Module``, sharing this network's weights; torch backends only."""
        if not hasattr(self.session, "module"):
            raise Unsupported(f"backend {self.backend.name} has no torch module; use one of torch's, such as cpu")
        return self.session.module

    def weights(self) -> dict[str, Array]:
        """Copies of all parameters by name (``conv1.weight``, ..., ``fc8.bias``), in torch's shapes."""
        return self.session.weights()

    def fit(
        self,
        data: Data,
        *,
        epochs: int | None = None,
        steps: int | None = None,
        batch: int = 128,
        learning_rate: float | None = None,
        on_step: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """Train by the preset's recipe and return the loss before each step, in nats.

        `data`: a data set (`portnet.load_data`; its training split), or a pair of prepared images and labels. Give
        `epochs` (1 by default) or `steps`. `learning_rate` is the recipe's unless given; `on_step` is called with the
        number of steps done and the last loss. Raises `Unsupported` on a backend that only infers, `InputError` for
        unfit data, `Diverged` where the loss is no longer finite.
        """
        if "train" not in self.backend.modes:
            raise Unsupported(f"backend {self.backend.name} does not train, it only infers")
        split = data.train if isinstance(data, Splits) else data
        batches = training.training_batches(
            data,
            self.graph,
            seed=self.settings.seed,
            batch=batch,
            epochs=1 if epochs is None and steps is None else epochs,
            steps=steps,
            start=self.steps,
        )

        def counted() -> Iterator[Batch | PixelBatch]:
            # As they are made: after an interruption the next call must not repeat what the weights have seen, and
            # data that cannot be trained on must not change how pictures are read.
            for made in batches:
                if isinstance(split, DataSet):
                    self.class_names, self.whole = split.class_names, split.whole
                self.steps += 1
                yield made

        rate = self.graph.recipe.learning_rate if learning_rate is None else learning_rate
        return training.fit(self.session, counted(), learning_rate=rate, start=self.steps, on_step=on_step)

    def train(
        self,
        data: Splits,
        *,
        steps: int | None = None,
        epochs: int | None = None,
        batch: int | None = None,
        learning_rate: float | None = None,
        schedule: str | None = None,
        watcher: Watcher | None = None,
        **options: Any,
    ) -> Result:
        """Train by the preset's whole recipe: its schedule, validation each epoch, checkpoints to go on from.

        `steps` or `epochs`, `batch` (of all processes together) and `learning_rate` are the recipe's unless given;
        `schedule` is the recipe's, or one of `portnet.alexnet.SCHEDULES`. `options` are those of `portnet.trainer.Run`
        (`workers`, `validate`, `views`, `checkpoints`, `every`, `metrics`, `tensorboard`). A call begins with the
        weights as they are, at step 0, unless there is a checkpoint. Raises what `portnet.trainer.train` does, and
        `Unsupported` on a backend that only infers.
        """
        if "train" not in self.backend.modes:
            raise Unsupported(f"backend {self.backend.name} does not train, it only infers")
        if not isinstance(data, Splits):
            raise InputError(f"data must be what portnet.load_data gives, got {type(data).__name__}")
        given: dict[str, Any] = {"batch": batch, "learning_rate": learning_rate}
        recipe = replace(self.graph.recipe, **{k: v for k, v in given.items() if v is not None})
        if schedule is not None:
            if schedule not in alexnet.SCHEDULES:
                raise UnknownName("schedule", schedule, alexnet.SCHEDULES)
            recipe = replace(recipe, schedule=alexnet.SCHEDULES[schedule])
        run = trainer.Run(recipe=recipe, steps=steps, epochs=epochs, **options)
        where = f"{self.backend.name}, {self.device.name}"
        result = trainer.train(self.session, self.graph, self.settings, data, run, backend=where, watcher=watcher)
        self.class_names, self.whole, self.steps = data.train.class_names, data.train.whole, result.step
        return result

    def evaluate(
        self,
        data: Data,
        *,
        batch: int = 64,
        views: int = 1,
        workers: int = 0,
        on_batch: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Top-1, top-5 and loss on a data set's test split, or on a pair of prepared images and labels.

        `views`: 1 for the centre crop, 10 for the paper's ten views with averaged softmax. `workers` processes decode.
        Raises `InputError`.
        """
        how: dict[str, Any] = {"batch": batch, "views": views, "workers": workers, "on_batch": on_batch}
        return training.evaluate(self.session, self.graph, data, **how)

    def classify(self, picture: str | os.PathLike[str] | Array, *, top: int = 5) -> list[tuple[str, float]]:
        """The likeliest classes of one picture, a file or uint8 ``(height, width, 3)``, with their probabilities.

        Classes are named as in the data set trained on, or by number. Raises `PictureError` for a file that is no
        picture and `InputError` for an array that is none.
        """
        pixels = _pixels(picture, top)
        logits = self(images.preprocess([pixels], self.graph, whole=self.whole))[0]
        return _likeliest(_softmax(logits), self.class_names, top)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights, preset, options and class names to one safetensors file. Raises `WeightsError`.

        Of a group of processes all must call it, and the first writes.
        """
        notes = {"class_names": self.class_names, "whole": self.whole}
        values = self.weights()
        return weights.save(path, self.graph, values, notes) if self.session.place.rank == 0 else Path(path)

    def export_onnx(
        self,
        path: str | os.PathLike[str],
        *,
        opset: int = onnx_export.OPSET,
        dynamic_batch: bool = True,
        preprocess: bool = False,
        softmax: bool = False,
        half: bool = False,
        verify: bool = True,
    ) -> Export:
        """Write the network to one ONNX file, and compare what ONNX Runtime's CPU provider makes of it.

        Its input is ``images``, float32 ``(batch, 3, S, S)`` as `portnet.preprocess` makes them; with `preprocess` it
        is ``pictures``, uint8 ``(batch, S, S, 3)``, which the file prepares itself. Its output is ``logits``, or with
        `softmax` ``probabilities``. Without `dynamic_batch` it takes one image at a time. With `half` its weights are
        float16, and so is what lies between input and output. Class names, seed, the weights' SHA-256 and the
        convention of the input stand in its metadata.

        Raises `InputError` for options that make no sense and where the file cannot be written, and `ExportError` where
        the two differ by more than the session's precision explains (`EXPORT_TOLERANCE`).
        """
        notes = {"class_names": self.class_names, "whole": self.whole, "seed": self.settings.seed}
        how: dict[str, Any] = {"opset": opset, "preprocess": preprocess, "softmax": softmax, "notes": notes}
        how |= {"batch": None if dynamic_batch else 1, "half": half}
        arrays = weights.check(self.graph, self.weights())
        written = onnx_export.export(self.graph, arrays, path, **how)
        if not verify:
            return Export(path=written, error=None)
        return self._verify(written, arrays, **how)

    def _verify(self, path: Path, arrays: Mapping[str, Any], *, batch: int | None, **how: Any) -> Export:
        runner: Any = plugins.backends().get(plugins.RUNNER)
        if runner is None:
            return Export(path=path, error=None)
        case = parity.Case(self.graph, batch=batch or 4)
        given = np.ascontiguousarray(case.pixels.transpose(0, 2, 3, 1)) if how["preprocess"] else case.images
        try:
            (found,) = runner.run_model(path.read_bytes(), given).values()
            every = runner.run_model(
                onnx_export.lower(
                    self.graph, arrays, opset=how["opset"], half=how["half"], every_layer=True
                ).SerializeToString(),
                case.images,
            )
        except Unavailable:
            return Export(path=path, error=None)
        expected = self(case.images).astype(np.float64)
        if how["softmax"]:
            expected = _softmax(expected)
        shown = self.session.trace(case.images).layers
        done = Export(
            path=path,
            error=parity.channel_error(found, expected),
            layers={name: parity.channel_error(every[name], value) for name, value in shown.items()},
        )
        allowed = max(EXPORT_TOLERANCE[p] for p in (self.settings.precision, "float16" if how["half"] else "float32"))
        if done.error is None or not done.error <= allowed:
            where = f"; of all layers {done.worst} most, by {done.layers[done.worst]:.2g}" if done.worst else ""
            raise ExportError(
                f"{path}: its output on {runner.name} differs from the session's by {done.error:.2g}, "
                f"where {self.settings.precision} explains {allowed:.2g}{where}; the file is left for inspection"
            )
        return done

    def summary(self) -> str:
        """Layers, output shapes, parameters and multiply-accumulates, as a table."""
        return self.graph.summary()


class OnnxNetwork:
    """The network in an ONNX file that PortNet wrote, on a backend that runs such files; `open_onnx` makes it.

    `file` is what was read and checked (`portnet.onnx_file.OnnxFile`), `settings` how it is computed: in ``int8`` where
    it is quantised, otherwise in ``float32``, or on a device without that in the first precision that it has.
    """

    def __init__(self, path: str | os.PathLike[str], backend: str = plugins.RUNNER, *, strict: bool = False) -> None:
        self.backend = plugins.choose(plugins.RUNNER if backend == "auto" else backend)
        if not isinstance(self.backend, TakesExports):
            raise Unsupported(
                f"backend {self.backend.name} runs no ONNX files; name one that does, such as {plugins.RUNNER}"
            )
        self.file = onnx_file.read(path)
        self.graph, self.class_names, self.whole = self.file.graph, self.file.class_names, self.file.whole
        self.device: Device = plugins.probe(self.backend)
        has = self.device.precisions
        precision = INT8 if self.file.quantised else "float32" if "float32" in has else has[0]
        self.settings = Settings(precision=precision, strict=strict)
        self.session = self.backend.open_exported(self.file.content, self.file.weights, self.settings)
        self.prepares = self.graph
        """The graph for which to prepare images (`portnet.preprocess`) that `of_prepared` and `run_prepared` take."""
        if self.file.input == onnx_export.PICTURES:  # which takes mean and scale off itself
            self.prepares = replace(self.graph, normalisation=Normalisation(mean=(0.0, 0.0, 0.0)))

    def __repr__(self) -> str:
        return (
            f"<OnnxNetwork {self.file.path}, {self.graph.preset}, {'float16' if self.file.half else 'float32'} weights"
            f"{' quantised to int8' if self.file.quantised else ''}, "
            f"on {self.backend.name} ({self.device.name})>"
        )

    def __call__(self, batch: Any) -> Array:
        """The file's own output for its own input, as NumPy: see `portnet.onnx_file.OnnxFile` for both.

        ``images`` are float32 ``(n, 3, S, S)`` as `portnet.preprocess` makes them; ``pictures`` uint8 ``(n, S, S, 3)``.
        Raises `InputError` for the wrong shape or dtype, or another number than the file takes at a time, and
        `OnnxFileError` where it does not give its output.
        """
        host = self._checked(batch)
        if self.file.batch not in (None, len(host)):
            raise InputError(f"{self.file.path} takes {self.file.batch} at a time, got {len(host)}")
        return self._run(host)

    def evaluate(
        self, data: Data, *, batch: int = 64, views: int = 1, on_batch: Callable[[int], None] | None = None
    ) -> Evaluation:
        """As `AlexNet.evaluate`, whatever the file takes and gives.

        A file that takes pictures is evaluated on data sets only, which have some. The loss of a file that gives
        probabilities is infinite where float32 rounds one to 0.
        """
        if self.file.input == onnx_export.PICTURES and isinstance(data, tuple):
            raise InputError(f"{self.file.path} takes pictures, not prepared images; give a data set")
        return training.evaluate(_Prepared(self), self.prepares, data, batch=batch, views=views, on_batch=on_batch)

    def classify(self, picture: str | os.PathLike[str] | Array, *, top: int = 5) -> list[tuple[str, float]]:
        """As `AlexNet.classify`; classes are named as in the file."""
        pixels = _pixels(picture, top)
        (result,) = self.run_prepared(images.preprocess([pixels], self.prepares, whole=self.whole))
        given = self.file.output == onnx_export.PROBABILITIES
        return _likeliest(result.astype(np.float64) if given else _softmax(result), self.class_names, top)

    def of_prepared(self, prepared: Array) -> Array:
        """The file's own input for images prepared as for the graph `prepares`."""
        if self.file.input == onnx_export.INPUT:
            return prepared
        return np.ascontiguousarray(prepared.transpose(0, 2, 3, 1).astype(np.uint8))

    def run_prepared(self, prepared: Array) -> Array:
        """The file's output for any number of images prepared as for the graph `prepares`."""
        host, size = self.of_prepared(prepared), self.file.batch
        if size is None:
            return self._run(host)
        # Where it takes a fixed number, the last part is filled up with its first image.
        parts = [host[i : i + size] for i in range(0, len(host), size)]
        full = (np.concatenate([part, np.repeat(part[:1], size - len(part), axis=0)]) for part in parts)
        return np.concatenate([self._run(part) for part in full])[: len(host)]

    def _checked(self, batch: Any) -> Array:
        if self.file.input == onnx_export.INPUT:
            return training.check_images(self.graph, batch)
        size = self.graph.input[1]
        try:
            array = np.asarray(batch)
        except (TypeError, ValueError, RuntimeError) as error:  # ragged lists, tensors that NumPy does not know
            raise InputError(f"pictures must be uint8 (n, {size}, {size}, 3), got what is no array ({error})") from None
        if array.dtype != np.uint8 or array.shape[1:] != (size, size, 3) or not len(array):
            raise InputError(
                f"pictures must be uint8 (n, {size}, {size}, 3) with n of at least 1, got {array.dtype} of shape "
                f"{array.shape}"
            )
        return np.ascontiguousarray(array)

    def _run(self, host: Array) -> Array:
        try:
            result = self.session.get(self.session.infer(self.session.put(host)))
        except PortNetError:
            raise
        except Exception as error:  # runtimes' errors have no common base
            told = str(error).strip().partition("\n")[0]
            raise OnnxFileError(self.file.path, "run", f"{self.backend.name} fails to run it: {told}") from error
        if result.dtype != np.float32 or result.shape != (len(host), self.graph.classes):
            told = f"{result.dtype} of shape {result.shape} for {len(host)} images of {self.graph.classes} classes"
            raise OnnxFileError(self.file.path, "run", f"{self.backend.name} makes of it {told}")
        return result


def open_onnx(path: str | os.PathLike[str], backend: str = plugins.RUNNER, *, strict: bool = False) -> OnnxNetwork:
    """The network in an ONNX file that PortNet wrote, ready to run; see `OnnxNetwork`.

    The file is checked first, and need not be trusted: it runs only if its nodes are those that PortNet writes for the
    network that it names, and it brings all its data along. `backend`: one that runs ONNX files, ``auto`` for ONNX
    Runtime on the CPU. With `strict`, nothing is computed elsewhere than on the backend's device.

    Raises `OnnxFileError` for a file that is not opened, `UnknownName` for an unknown backend, `Unavailable` where the
    device cannot be used, and `Unsupported` where the backend runs no such files, or not this one.
    """
    return OnnxNetwork(path, backend, strict=strict)


class _Prepared(Session):
    """A file's network as the evaluation asks for it: logits for images that it prepared."""

    def __init__(self, net: OnnxNetwork) -> None:
        self.net = net

    def put(self, array: Array) -> Any:
        return array

    def get(self, value: Any) -> Array:
        return np.asarray(value)

    def infer(self, images: Any) -> Any:
        result = self.net.run_prepared(images)
        if self.net.file.output == onnx_export.OUTPUT:
            return result
        with np.errstate(divide="ignore"):
            return np.log(result)

    def weights(self) -> dict[str, Array]:
        return dict(self.net.file.weights)

    def synchronize(self) -> None:
        self.net.session.synchronize()


def _pixels(picture: str | os.PathLike[str] | Array, top: int) -> Array:
    if top < 1:
        raise InputError(f"top must be at least 1, got {top}")
    if not isinstance(picture, np.ndarray | str | os.PathLike):
        raise InputError(
            f"a picture is a file, or uint8 (height, width, 3), one at a time; got {type(picture).__name__}"
        )
    return picture if isinstance(picture, np.ndarray) else images.read_picture(picture)


def _softmax(logits: Array) -> Array:
    """In float64, over the last axis."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    result: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def _likeliest(p: Array, class_names: tuple[str, ...] | None, top: int) -> list[tuple[str, float]]:
    # A network may have more classes than the data set had names for.
    names = dict(enumerate(map(str, range(len(p))))) | dict(enumerate(class_names or ()))
    return [(names[i], float(p[i])) for i in np.argsort(-p, kind="stable")[:top]]


def _seed(seed: int) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InputError(f"seed must be an integer in [0, 2^64), got {seed!r}")
    return seed
