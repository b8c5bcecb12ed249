"""An ONNX file in 8-bit integers, told beside the float32 file that it was made from.

Static quantisation by ONNX Runtime's own tools, calibrated on training pictures: filters to int8 by output channel,
activations to uint8 by tensor, as QuantizeLinear and DequantizeLinear around operators (QDQ). LRN stays in float32.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

from portnet import calibration, images, onnx_export, plugins, shards
from portnet.contract import INT8, Array, Settings
from portnet.errors import ExportError, InputError
from portnet.files import write_atomically
from portnet.images import DataSet, Splits
from portnet.model import OnnxNetwork
from portnet.training import Evaluation

KEPT = 0.99
"""The share of float32's accuracy that is kept at least."""
BATCH = 16
"""Images of which the speed is told."""
_TURNS = 15


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A quantised file beside the float32 file: `bytes` of each, accuracy on the test split, and speed.

    `agree`: pictures of the `int8.count` that both rank alike. `speedup`: times as fast, the median over pairs that
    were timed one after the other, between the least and the most (`slowest`, `fastest`): of one process, of `batch`
    images, and quick.
    """

    path: str
    backend: str
    bytes: int
    bytes_before: int
    int8: Evaluation
    float32: Evaluation
    agree: int
    batch: int
    speedup: float
    slowest: float
    fastest: float

    @property
    def size(self) -> float:
        """The file's size as a share of float32's."""
        return self.bytes / self.bytes_before

    @property
    def kept(self) -> float:
        """The share of float32's accuracy that is left."""
        return self.int8.top1 / self.float32.top1 if self.float32.top1 else 1.0


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    data: str | Splits = "digits",
    *,
    backend: str = plugins.RUNNER,
    pictures: int = 128,
    reduce_range: bool = False,
    keep: float = KEPT,
    say: Callable[[str], None] = lambda _: None,
) -> Quantised:
    """Quantise a float32 file that ``export_onnx`` wrote, and hold the result against it on the test split.

    `data`: as `portnet.load_data` takes it, with as many classes as the network; `pictures` of its training split set
    the ranges. `backend`: where both files are run, side by side in this process. `reduce_range`: filters of 7 bits,
    for x86 processors without VNNI, whose 16-bit sums saturate. What prepares pictures, or makes probabilities, in the
    file stays as it is.

    Nothing is written before that is done. Raises `OnnxFileError` for a file that is not opened, `InputError` for one
    that is quantised or narrow already or ranks no better than chance, for a target that is the source, and for unfit
    data, `Unavailable` without ONNX Runtime, `Unsupported` for a backend that has no int8, and `ExportError` where less
    than `keep` of float32's accuracy is left.
    """
    if pictures < 1:
        raise InputError(f"at least one picture must set the ranges, got {pictures}")
    if not 0 <= keep <= 1:
        raise InputError(f"keep is a share of float32's accuracy, from 0 to 1, got {keep}")
    if Path(target).is_dir() or not Path(target).parent.is_dir():
        raise InputError(f"cannot write {target}: " + ("it is a folder" if Path(target).is_dir() else "no such folder"))
    wide = OnnxNetwork(source, backend)
    if Path(target).exists() and Path(target).samefile(source):
        raise InputError(f"{target} is the float32 file itself; name another for the result")
    if wide.file.quantised or wide.file.half:
        raise InputError(f"{wide.file.path} is not float32; quantise the float32 file that it was made from")
    wide.backend.check(Settings(precision=INT8), wide.device)
    splits = data if isinstance(data, Splits) else shards.load(data)
    _check_classes(wide, splits.train)
    seen = splits.train.some(pictures)
    say(f"calibrating on {len(seen)} training pictures")
    model = calibration.quantiser().quantise(wide.file.content, _batches(wide, seen), reduce_range=reduce_range)
    notes = {"data": splits.train.name, "pictures": len(seen), "reduce_range": reduce_range}
    own = [(entry.key, entry.value) for entry in model.metadata_props if entry.key != "onnx.infer"]
    del model.metadata_props[:]
    for key, value in [*own, ("quantisation", json.dumps(notes))]:
        model.metadata_props.add(key=key, value=value)
    model.producer_name = "portnet"
    content = onnx_export.seal(model.SerializeToString(deterministic=True))
    with TemporaryDirectory() as folder:
        narrow = OnnxNetwork(write_atomically(Path(folder, "quantised.onnx"), content, InputError), backend)
    say("accuracy of both")
    before, after = (net.evaluate(splits) for net in (wide, narrow))
    agree = sum(
        int((wide.run_prepared(b.images).argmax(axis=1) == narrow.run_prepared(b.images).argmax(axis=1)).sum())
        for b in images.evaluation_batches(splits.test, wide.prepares, batch=64)
    )
    say("speed of both, by turns")
    batch = next(_batches(wide, splits.test))
    ratios = _ratios(wide, narrow, batch)
    done = Quantised(
        path=os.fspath(target),
        backend=wide.backend.name,
        bytes=len(content),
        bytes_before=len(wide.file.content),
        int8=after,
        float32=before,
        agree=agree,
        batch=len(batch),
        speedup=median(ratios),
        slowest=min(ratios),
        fastest=max(ratios),
    )
    if keep and before.top1 < 2 / wide.graph.classes:
        raise InputError(
            f"{wide.file.path} ranks {before.top1:.1%} of the test pictures right, which is chance: train it first, or "
            "set keep to 0"
        )
    if done.kept < keep:
        raise ExportError(
            f"{target} is not written: in int8 it ranks {after.top1:.1%} of {after.count} test pictures right, where "
            f"float32 ranks {before.top1:.1%}: less than {keep:.0%} of it is left; calibrate on more pictures, or "
            "set reduce_range on a processor without VNNI"
        )
    write_atomically(target, content, InputError)
    return done


def _check_classes(net: OnnxNetwork, data: DataSet) -> None:
    """Accuracy on other classes than the network's would say nothing, and their pictures set other ranges."""
    if len(data.class_names) != net.graph.classes:
        raise InputError(
            f"{net.file.path} has {net.graph.classes} classes, and {data.name} has {len(data.class_names)}; give the "
            "data set that it was trained on"
        )
    if net.class_names and net.class_names != data.class_names:
        raise InputError(
            f"{net.file.path} was trained on other classes ({', '.join(net.class_names[:3])}, ...) than {data.name} "
            f"has ({', '.join(data.class_names[:3])}, ...)"
        )


def _batches(net: OnnxNetwork, data: DataSet) -> Iterator[Array]:
    """A split as the file takes it; where it takes a fixed number, whole batches only."""
    size = net.file.batch or BATCH
    for batch in images.evaluation_batches(data, net.prepares, batch=size):
        if net.file.batch in (None, len(batch.images)):
            yield net.of_prepared(batch.images)


def _ratios(wide: OnnxNetwork, narrow: OnnxNetwork, batch: Array) -> list[float]:
    """How many times as long float32 takes, in pairs of which each side begins in turn."""

    def timed(net: OnnxNetwork) -> float:
        given = net.session.put(batch)
        began = perf_counter()
        net.session.get(net.session.infer(given))
        return perf_counter() - began

    for net in (wide, narrow) * 2:
        timed(net)
    ratios = []
    for turn in range(_TURNS):
        order = (wide, narrow) if turn % 2 == 0 else (narrow, wide)
        seconds = {id(net): timed(net) for net in order}
        ratios.append(seconds[id(wide)] / seconds[id(narrow)])
    return ratios
