"""Opens ONNX files that were broken at random: does any do more than be refused, or give the right answer?

    python benchmarks/fuzz_onnx.py [COUNT] [--seed 0] [--only NUMBER] [--keep FOLDER]

Four files of a small network (float32; pictures to probabilities; float16; quantised to 8 bits) are changed in their
bytes or in the fields of their messages; every second mutant is sealed again, so that what lies behind the seal is
tried too, ONNX Runtime included. A child opens each with `portnet.open_onnx` on onnxruntime-cpu and runs it on one
image, with little memory and processor time. Exit status 1 if any child

- raises anything but a `PortNetError`, dies of a signal, or takes longer than it may,
- opens, creates, moves or removes any other file (told by Python's audit events, and by inotify in the folders of the
  mutant and of a file that mutants name as their external data), starts a process or a connection,
- gives an output of another shape; or, of a mutant that is not sealed again, or whose weights are float32 and
  therefore held to their SHA-256, another output than the file that it was made from.

A float16 or quantised file that is sealed again may give another output: nothing tells which weights it should hold.
Linux only.
"""

import argparse
import ctypes
import hashlib
import json
import os
import random
import resource
import select
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # noqa: F401 (loaded once, before the children are made)

from portnet import alexnet, model, onnx_export, onnx_file, plugins, weights
from portnet.contract import Device
from portnet.errors import OnnxFileError, PortNetError
from portnet.graph import (
    LRN,
    AdaptiveAvgPool,
    Conv,
    Dropout,
    Flatten,
    Graph,
    Linear,
    MaxPool,
    Normal,
    Pad,
    Recipe,
    ReLU,
)

SIZE, CLASSES = 20, 5
SECONDS, WALL, MEMORY = 10, 30.0, 2**31
"""What a child may take: processor time, time, and bytes of address space besides what it was born with."""
TOLERANCE = 1e-5
EXACT = ("float32", "pictures")
"""Files whose weights are held to a SHA-256."""
TEXTS = (
    *("If", "Loop", "Scan", "Constant", "ConstantOfShape", "Tile", "Expand", "Range", "NonZero", "Resize", "Identity"),
    *("QuantizeLinear", "ai.onnx.ml", "com.microsoft", "1e999", "A" * 10_000, "[" * 5000, "é\u202e\n"),
)
NUMBERS = (0, 1, -1, 2, 3, 7, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, -(2**31), -(2**63))
FLOATS = (0.0, -0.0, -1.0, 0.5, 1e-45, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan"))
LOCATIONS = ("../secret", "secret", "secret", "../../secret", "/proc/self/environ", "*/_ORT_MEM_ADDR_/*", "")
WATCHED = ("os.", "socket.", "subprocess.", "shutil.", "tempfile.", "ctypes.dlopen")
"""Audit events, besides ``open``, of what opening a file does not do."""


def small(*, image_size: int = SIZE, classes: int = CLASSES, dropout: float = 0.5) -> Graph:
    """A network that has every layer, and opens in no time."""
    return alexnet._graph(
        "small",
        image_size,
        [
            Pad(name="pad", right=1, bottom=1),
            Conv(name="conv1", in_channels=3, out_channels=8, kernel=3, stride=2),
            ReLU(name="relu1"),
            LRN(name="norm1", alpha=5e-2, k=2.0, groups=2),
            MaxPool(name="pool1"),
            Conv(name="conv2", in_channels=8, out_channels=6, kernel=3, padding=1, groups=2),
            LRN(name="norm2", alpha=5e-2, k=1.0),
            AdaptiveAvgPool(name="avgpool", size=3),
            Flatten(name="flatten"),
        ],
        lambda features: [
            Linear(name="fc3", in_features=features, out_features=12, weight_init=Normal(std=0.2)),
            ReLU(name="relu3"),
            Dropout(name="drop3", p=dropout),
            Linear(name="fc4", in_features=12, out_features=classes, weight_init=Normal(std=0.2)),
        ],
        Recipe(),
        alexnet.graph().normalisation,
    )


# What is broken.


def image(name: str) -> np.ndarray:
    """One image, as the file of that name takes it."""
    pixels = np.random.default_rng(1).integers(0, 256, (1, SIZE, SIZE, 3), np.uint8)
    if name == "pictures":
        return pixels
    return np.ascontiguousarray((pixels.astype(np.float32) - 100).transpose(0, 3, 1, 2))


def originals(folder: Path) -> dict[str, bytes]:
    """The files, by name."""
    graph = alexnet.graph("small")
    values, notes = weights.parity(graph), {"class_names": ["a", "b"], "whole": False, "seed": 0}
    how: dict[str, dict[str, Any]] = {
        "float32": {},
        "pictures": {"preprocess": True, "softmax": True, "batch": 1},
        "float16": {"half": True},
    }
    found = {
        name: onnx_export.export(graph, values, folder / name, notes=notes, **options).read_bytes()
        for name, options in how.items()
    }

    def quantised() -> bytes:
        from portnet_backends.onnxruntime_quantize import quantise

        made = quantise(found["float32"], [image("float32")], reduce_range=False)
        return onnx_export.seal(made.SerializeToString())

    return found | {"int8": in_child(quantised)}


def in_child(work: Callable[[], bytes]) -> bytes:
    """What `work` gives, computed in a child: no session of ONNX Runtime's is ever made in this process."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(work())
            pipe.flush()
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


# How.


def broken(chance: random.Random, content: bytes, others: list[bytes], *, seal: bool) -> tuple[bytes, str]:
    """A mutant, and what was done to it."""
    end = len(content) - len(_seal(b""))
    body, tail = content[:end], content[end:]
    done = []
    if chance.random() < 0.5:
        body = body if seal else content
        tail = b""
        for _ in range(chance.choice((1, 1, 1, 2, 5))):
            body, how = _bytes(chance, body, chance.choice(others))
            done.append(how)
    else:
        made = onnx.ModelProto.FromString(body)
        done = [_field(chance, made) for _ in range(chance.choice((1, 1, 1, 2, 5)))]
        body = made.SerializeToString()
    how = ", ".join(dict.fromkeys(done))
    return body + (_seal(body) if seal else tail), how


def _seal(body: bytes) -> bytes:
    """As `onnx_export.seal` makes it, of bytes that need be no model."""
    entry = onnx.StringStringEntryProto(key=onnx_export.SEAL, value=hashlib.sha256(body).hexdigest())
    return bytes(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def _place(chance: random.Random, size: int) -> int:
    """Mostly near an end, where the structure is; the weights lie between."""
    near = min(size - 1, 4000)
    return chance.choice((chance.randint(0, near), size - 1 - chance.randint(0, near), chance.randrange(size)))


def _bytes(chance: random.Random, content: bytes, other: bytes) -> tuple[bytes, str]:
    if not content:
        return chance.randbytes(10), "bytes inserted"
    at, length = _place(chance, len(content)), chance.choice((1, 2, 4, 16, 100, 1000))
    piece = content[at : at + length]
    match chance.randrange(7):
        case 0:
            flipped = bytearray(content)
            for _ in range(chance.choice((1, 1, 2, 8))):
                flipped[_place(chance, len(content))] ^= 1 << chance.randrange(8)
            return bytes(flipped), "bits flipped"
        case 1:
            return content[:at], "cut off"
        case 2:
            return content[:at] + content[at + length :], "bytes deleted"
        case 3:
            return content[:at] + chance.randbytes(length) + content[at:], "bytes inserted"
        case 4:
            to = _place(chance, len(content))
            return content[:to] + piece + content[to:], "bytes doubled"
        case 5:
            source = other if chance.random() < 0.5 else content
            start = _place(chance, len(source))
            return content[:at] + source[start : start + length] + content[at + length :], "bytes spliced"
    filling = bytes([chance.choice((0, 1, 127, 128, 255))]) * length
    return content[:at] + filling + content[at + length :], "bytes filled"


def _field(chance: random.Random, made: onnx.ModelProto) -> str:
    """Change a field of some message in place."""
    found: dict[str, list[Any]] = {}
    names = []
    waiting: list[Any] = [made]
    for message in waiting:
        found.setdefault(message.DESCRIPTOR.name, []).append(message)
        for known, value in message.ListFields():
            if known.message_type is not None:
                waiting.extend([value] if hasattr(value, "ListFields") else value)
            elif known.name in ("name", "input", "output", "key"):
                names.extend([value] if isinstance(value, str) else value)
    if chance.random() < 0.06 and "TensorProto" in found:
        tensor = chance.choice(found["TensorProto"])
        _outside(chance, tensor)
        return "TensorProto external"
    kind = chance.choice(sorted(found))
    message = chance.choice(found[kind])
    known = chance.choice(message.DESCRIPTOR.fields)
    told = f"{kind}.{known.name}"
    value = getattr(message, known.name)
    if hasattr(value, "add"):
        _messages(chance, value, list(found.get(known.message_type.name, [])))
    elif known.message_type is not None:
        donors = found.get(known.message_type.name, [])
        if donors and chance.random() < 0.6:
            value.CopyFrom(type(value).FromString(chance.choice(donors).SerializeToString()))
        elif message.HasField(known.name):
            message.ClearField(known.name)
        else:
            value.SetInParent()
    elif hasattr(value, "append"):
        _scalars(chance, known, value, names)
    elif chance.random() < 0.2:
        message.ClearField(known.name)
    else:
        setattr(message, known.name, _scalar(chance, known, value, names))
    return told


def _outside(chance: random.Random, tensor: Any) -> None:
    length = chance.choice((len(tensor.raw_data), len(tensor.raw_data), 4, 2**40))
    where = {"location": chance.choice(LOCATIONS), "offset": "0", "length": str(length)}
    for key, value in where.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    if chance.random() < 0.7:
        tensor.data_location = onnx.TensorProto.EXTERNAL
    if chance.random() < 0.5:
        tensor.ClearField("raw_data")


def _messages(chance: random.Random, values: Any, donors: list[Any]) -> None:
    match chance.randrange(5):
        case 0 if len(values):
            del values[chance.randrange(len(values))]
        case 1 if len(values):
            values.add().CopyFrom(chance.choice(values))
        case 2 if len(values) > 1:
            kept = [type(v).FromString(v.SerializeToString()) for v in values]
            chance.shuffle(kept)
            del values[:]
            values.extend(kept)
        case 3 if donors:
            values.add().CopyFrom(type(donors[0]).FromString(chance.choice(donors).SerializeToString()))
        case _:
            for _ in range(chance.choice((1, 1, 1000))):
                values.add()


def _scalars(chance: random.Random, known: Any, values: Any, names: list[str]) -> None:
    if len(values) and chance.random() < 0.7:
        at = chance.randrange(len(values))
        if chance.random() < 0.2:
            del values[at]
        else:
            values[at] = _scalar(chance, known, values[at], names)
    else:
        for _ in range(chance.choice((1, 1, 8, 1000))):
            values.append(_scalar(chance, known, 0, names))


def _scalar(chance: random.Random, known: Any, old: Any, names: list[str]) -> Any:
    """Some value of the field's type."""
    if known.type in (known.TYPE_FLOAT, known.TYPE_DOUBLE):
        return chance.choice((*FLOATS, float(old) * 1.5))
    if known.type == known.TYPE_ENUM:
        return chance.choice([value.number for value in known.enum_type.values])
    if known.type == known.TYPE_STRING:
        return chance.choice((f"{old}x", *chance.sample((*names, *TEXTS, *LOCATIONS), 5)))
    if known.type == known.TYPE_BYTES:
        old = old or b""
        at = chance.randrange(len(old)) if old else 0
        return chance.choice(
            (b"", old[:-1], old + b"\0\0\0\0", old[:at] + chance.randbytes(4) + old[at + 4 :], b"../secret")
        )
    low, high = {
        known.TYPE_INT32: (-(2**31), 2**31),
        known.TYPE_UINT64: (0, 2**64),
        known.TYPE_INT64: (-(2**63), 2**63),
    }[known.type]
    return chance.choice([n for n in (*NUMBERS, old + 1, old - 1, old * 2, -old) if low <= n < high])


# Whether it does more.


class Watch:
    """Who touched files of some folders, by inotify(7)."""

    EVENTS = 0x1 | 0x2 | 0x4 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200
    """IN_ACCESS, MODIFY, ATTRIB, OPEN, MOVED_FROM, MOVED_TO, CREATE, DELETE."""

    def __init__(self, *folders: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.handle < 0 or any(libc.inotify_add_watch(self.handle, bytes(f), self.EVENTS) < 0 for f in folders):
            raise OSError(ctypes.get_errno(), "inotify cannot watch")

    def touched(self) -> set[str]:
        """Names of files, or empty for a folder itself, since the last call."""
        found = set()
        while True:
            try:
                told = os.read(self.handle, 65536)
            except BlockingIOError:
                return found
            at = 0
            while at < len(told):
                _, _, _, length = struct.unpack_from("iIII", told, at)
                found.add(told[at + 16 : at + 16 + length].rstrip(b"\0").decode())
                at += 16 + length


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What became of a mutant: ``refused`` with the kind, ``opened``, or what is ``wrong``."""

    result: str
    told: str
    output: tuple[float, ...] = ()


def opened(path: Path, given: np.ndarray) -> Seen:
    """In the child, with its limits and ears set: open the file and run it."""
    for limit, amount in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, _size() + MEMORY),
    ):
        resource.setrlimit(limit, (amount, amount))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    elsewhere: list[str] = []

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        other = event == "open" and not isinstance(arguments[0], int) and Path(os.fsdecode(arguments[0])) != path
        if other or event.startswith(WATCHED):
            elsewhere.append(f"{event} {arguments[:1]!r:.200}")

    sys.addaudithook(heard)
    try:
        output = model.open_onnx(path)(given)
        seen = Seen(result="opened", told="", output=tuple(map(float, output[0])))
        if output.shape != (1, CLASSES):
            seen = Seen(result="wrong", told=f"an output of shape {output.shape}")
    except OnnxFileError as error:
        seen = Seen(result="refused", told=error.kind)
    except PortNetError as error:
        seen = Seen(result="refused", told=f"{type(error).__name__}: {str(error).partition(':')[0]:.60}")
    except BaseException as error:
        seen = Seen(result="wrong", told=f"{type(error).__name__}: {error!s:.200}")
    if elsewhere:
        return Seen(result="wrong", told=f"it did {elsewhere[0]}")
    return seen


def _size() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def tried(path: Path, given: np.ndarray) -> Seen:
    """What becomes of the file in a child of its own."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            seen = opened(path, given)
            os.write(writer, json.dumps(vars(seen)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], WALL)
    if not ready:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    if not ready:
        return Seen(result="wrong", told=f"it took more than {WALL:.0f} s")
    if os.WIFSIGNALED(status):
        return Seen(result="wrong", told=f"it died of {signal.Signals(os.WTERMSIG(status)).name}")
    if not told:
        return Seen(result="wrong", told="the child ended without a word")
    return Seen(**json.loads(told))


def judged(seen: Seen, right: Seen, *, exact: bool) -> Seen:
    """The same, an output held against that of the file from which the mutant was made."""
    if seen.result != "opened":
        return seen
    scale = max(map(abs, right.output))
    same = np.allclose(seen.output, right.output, rtol=0, atol=TOLERANCE * scale)
    if same:
        return Seen(result="opened", told="the same output")
    if exact:
        return Seen(result="wrong", told=f"another output, {seen.output} for {right.output}")
    return Seen(result="opened", told="another output" if np.isfinite(seen.output).all() else "an output not finite")


def prepared(work: Path) -> dict[str, bytes]:
    """The files to break, by name, in this process, which is made ready for its children."""
    alexnet.PRESETS["small"] = small
    files = originals(work)
    onnx_file.read(work / "float32")  # whatever is imported late must not be heard later
    backend = plugins.backends()["onnxruntime-cpu"]
    device = Device(**json.loads(in_child(lambda: json.dumps(asdict(backend.probe())).encode())))
    backend.probe = lambda: device  # type: ignore[method-assign] # it asks the machine, not the file
    return files


def run(numbers: range, seed: int, keep: Path | None, work: Path) -> bool:
    """Try those mutants, print what was seen; whether all was well."""
    began = time.monotonic()
    inner = work / "inner"
    inner.mkdir()
    for folder in (work, inner):
        (folder / "secret").write_bytes(b"\0" * 4096)
    files = prepared(work)
    os.chdir(inner)
    path = inner / "mutant.onnx"
    right = {}
    for name, content in files.items():
        path.write_bytes(content)
        right[name] = tried(path, image(name))
        if right[name].result != "opened":
            raise SystemExit(f"the {name} file itself: {right[name].told}")
    watch = Watch(work, inner)
    (inner / "secret").read_bytes()
    if "secret" not in watch.touched():
        raise SystemExit("inotify does not hear of a file that is read")
    table: Counter[tuple[str, str, bool]] = Counter()
    others: Counter[str] = Counter()
    wrong = []
    for number in numbers:
        chance = random.Random(f"{seed}/{number}")
        name, again = chance.choice(list(files)), bool(number % 2)
        mutant, how = broken(chance, files[name], list(files.values()), seal=again)
        path.write_bytes(mutant)
        watch.touched()
        seen = tried(path, image(name))
        touched = watch.touched() - {path.name, ""}
        exact = name in EXACT or not again
        seen = Seen(result="wrong", told=f"it touched {touched}") if touched else judged(seen, right[name], exact=exact)
        table[seen.result, seen.told if seen.result != "wrong" else "", again] += 1
        told = f"mutant {number}, {name}{', sealed again' * again}, {how}: {seen.result}, {seen.told}"
        if seen.result == "wrong":
            wrong.append(told)
            print(told, flush=True)
            if keep:
                (keep / f"{number}.onnx").write_bytes(mutant)
        elif len(numbers) == 1:
            print(told)
        if seen.result == "opened" and "same" not in seen.told:
            others[f"{name}: {how}" if "," not in how else f"{name}: several"] += 1
        if (number + 1) % 1000 == 0:
            print(f"{number + 1} mutants, {len(wrong)} wrong", flush=True)
    print(f"{len(numbers)} mutants in {time.monotonic() - began:.0f} s (seed {seed})")
    print(f"{'':44}{'as broken':>12}{'sealed again':>14}")
    for result, told in sorted({key[:2] for key in table}):
        counts = (table[result, told, False], table[result, told, True])
        print(f"{f'{result}: {told}' if told else result:44}{counts[0]:12}{counts[1]:14}")
    for how, count in others.most_common():
        print(f"  another output by {how:60}{count:8}")
    print("FAILED" if wrong else "passed")
    return not wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Open ONNX files that were broken at random.")
    parser.add_argument("count", nargs="?", type=int, default=5000, help="mutants (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="only that mutant")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for mutants that do what they must not")
    chosen = parser.parse_args(arguments)
    if chosen.count < 1:
        parser.error(f"count is {chosen.count}; expected 1 or more")
    numbers = range(chosen.count) if chosen.only is None else range(chosen.only, chosen.only + 1)
    with tempfile.TemporaryDirectory(prefix="portnet-") as temporary:
        keep = chosen.keep.resolve() if chosen.keep else None
        return 0 if run(numbers, chosen.seed, keep, Path(temporary).resolve()) else 1


if __name__ == "__main__":
    sys.exit(main())
