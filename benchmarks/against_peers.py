"""PortNet beside what people would write without it, in turns: ratios with intervals, and shares of the ceiling.

    python benchmarks/against_peers.py train paper2012 --batch 128 --stacks cpu/eager/float32 cpu/eager/bfloat16
    python benchmarks/against_peers.py infer paper2012 --batch 32 --stacks cpu/compile/bfloat16 openvino/eager/bfloat16

The peers are the scripts in `benchmarks/peers`: PyTorch eager and compiled, in float32 and under bfloat16 autocast;
JAX; for inference ONNX Runtime and OpenVINO. Each stack and each peer is a process; they are alive at once and take
turns, block by block, forwards and backwards, in rounds of fresh processes. PortNet's pass the gates of a quick
measurement first. A peer's logits, from the same weights (those of the parity gate) and images, must be those of
PortNet's float32 to 1e-3 of the largest (bfloat16: 5e-2), or it is no peer and there is no figure.

PortNet sets how glibc allocates for its own processes (`portnet.launch.TUNABLES`); a peer runs as its user would start
it, without that, except for `torch-tuned` and `torch-regions`, which are what PortNet does written directly against
torch. With `GLIBC_TUNABLES` in this program's environment all run with that.

There are two shares. That of the ceiling is the layers' FLOPs over the time and over the ceiling that the PortNet
process of the same precision measured when it began. That of the product has in the denominator a matrix product that
takes turns with the others, and so meets the same neighbours and clocks. A machine that works at half of its rate for
minutes shows half of the first share, and about the second. Neither is for another precision.

Ratios and the share of the product are medians by turns, with an interval over rounds. Images/s of the first stack is
the median of all its blocks, that of any other what follows from it by the ratio.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np

from portnet import launch, measurement, onnx_export, plugins, stats, weights, workload
from portnet.contract import Settings
from portnet.errors import PortNetError
from portnet.graph import Dropout, Graph, Linear
from portnet.record import Spec

HERE = Path(__file__).parent / "peers"
ALLOWED = {"float32": 1e-3, "bfloat16": 5e-2}
SPINNING = 0.2
"""Seconds before a block where ONNX Runtime is among the peers, whose threads spin longer than others' do."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A script of `benchmarks/peers`, what it is told, and the module without which it cannot run."""

    script: str
    precision: str
    needs: str = "torch"
    modes: tuple[str, ...] = ("train", "infer")
    options: dict[str, Any] = field(default_factory=dict)
    tunables: bool = False


PRODUCTS = {
    f"product-{precision}": Peer(script="torch_product", precision=precision, tunables=True)
    for precision in ("float32", "bfloat16")
}
"""No peers: what stacks and peers of the precision are held against."""
FILE = "onnx_runtimes"
PEERS = {
    "torch": Peer(script="torch_plain", precision="float32"),
    "torch-autocast": Peer(script="torch_plain", precision="bfloat16"),
    "torch-compile": Peer(script="torch_plain", precision="float32", options={"compile": True}),
    "torch-compile-autocast": Peer(script="torch_plain", precision="bfloat16", options={"compile": True}),
    "torch-tuned": Peer(script="torch_tuned", precision="float32", modes=("train",), tunables=True),
    "torch-tuned-bfloat16": Peer(script="torch_tuned", precision="bfloat16", modes=("train",), tunables=True),
    "torch-regions-bfloat16": Peer(
        script="torch_tuned", precision="bfloat16", modes=("train",), options={"regions": True}, tunables=True
    ),
    "jax": Peer(script="jax_plain", precision="float32", needs="jax"),
    "jax-bfloat16": Peer(script="jax_plain", precision="bfloat16", needs="jax"),
    "onnxruntime": Peer(script=FILE, precision="float32", needs="onnxruntime", modes=("infer",)),
    "openvino": Peer(script=FILE, precision="float32", needs="openvino", modes=("infer",)),
    "openvino-bfloat16": Peer(script=FILE, precision="bfloat16", needs="openvino", modes=("infer",)),
}


class Running:
    """A peer's process."""

    def __init__(self, name: str, asked: dict[str, Any]) -> None:
        self.name, self.peer, self._asked = name, (PEERS | PRODUCTS)[name], asked
        options = asked["options"] | {"runtime": self.peer.needs} | self.peer.options
        told = asked | {"precision": self.peer.precision, "options": options}
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / f"{self.peer.script}.py"), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**({"GLIBC_TUNABLES": launch.TUNABLES} if self.peer.tunables else {}), **os.environ},
        )
        self._steps = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}")
        return json.loads(line)

    def prepare(self, expected: np.ndarray) -> None:
        """Wait until it is open, hold its logits against those expected, and see how many steps fill a block."""
        self._answer()
        if self.name in PEERS:
            logits = np.load(self._asked["logits"])
            error = float(np.abs(logits - expected).max() / np.abs(expected).max())
            if not error <= ALLOWED[self.peer.precision]:
                raise SystemExit(f"{self.name} computes something else: its logits are off by {error:.1e}")
        once = min(self._block() for _ in range(3))
        self._steps = max(1, int(np.ceil(measurement.BLOCK / once)))

    def _block(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{self._steps}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def block(self) -> float:
        """Seconds a step."""
        return self._block() / self._steps

    def again(self) -> None:
        """One block that is not counted."""
        self._block()


def inverted(graph: Graph, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of the same function for dropout that scales in training: what is scaled in the test goes into them."""
    found, scale = dict(values), 1.0
    for layer in graph.layers:
        if isinstance(layer, Dropout):
            scale *= layer.test_scale
        elif isinstance(layer, Linear):
            found[f"{layer.name}.weight"] = found[f"{layer.name}.weight"] * np.float32(scale)
            scale = 1.0
    return found


def spec_of(stack: str, args: argparse.Namespace) -> Spec:
    return Spec(
        **measurement.parse_stack(stack),
        mode=args.mode,
        preset=args.preset,
        batch=args.batch,
        image_size=args.image_size,
        classes=1000,
        data="synthetic",
        blocks=args.blocks,
        quick=True,
        perturbed=0,
    )


def one_round(
    args: argparse.Namespace, folder: Path, names: list[str], expected: np.ndarray, number: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds a step of each by turns, and the matrix product's FLOP/s by precision."""
    asked = {"preset": args.preset, "mode": args.mode, "arrays": str(folder / "work.npz")}
    asked["options"] = {"file": str(folder / "net.onnx"), "device": args.device, "size": product_size(args.device)}
    order = [*args.stacks, *names] if number % 2 == 0 else [*names, *args.stacks]
    with ExitStack() as stack:
        open_: dict[str, Any] = {}
        for name in order:
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            if name in args.stacks:
                worker = launch.Worker(spec_of(name, args), detail=False, timeout=1200.0, say=lambda _: None)
                open_[name] = stack.enter_context(worker)
                if not worker.prepare():
                    record = worker.finish({})
                    raise SystemExit(f"{name}: {record.outcome}. {record.reason}")
            else:
                peer = Running(name, asked | {"logits": str(folder / f"{name}.npy")})
                open_[name] = stack.enter_context(peer)
                peer.prepare(expected)
        seconds: dict[str, list[float]] = defaultdict(list)
        settle = SPINNING if "onnxruntime" in names else launch.SETTLE
        for name in order:
            open_[name].again()
        for turn in range(args.blocks):
            for name in reversed(order) if launch.backwards(turn) else order:
                time.sleep(settle)
                seconds[name].append(open_[name].block())
        ceilings = {}
        for name in args.stacks:
            record = open_[name].finish({})
            if record.outcome not in ("works", "unsteady"):
                raise SystemExit(f"{name}: {record.outcome}. {record.reason}")
            if record.outcome == "unsteady":
                print(f"{name} was unsteady in round {number + 1}", file=sys.stderr)
            steps = record.samples[args.mode]["steps"]
            seconds[name] = [s / steps for s in seconds[name]]
            ceilings[record.spec.precision] = max(ceilings.get(record.spec.precision, 0), record.ceilings["flops"] or 0)
    return seconds, ceilings


def product_size(device: str) -> int:
    """Rows of a square product that is at its best: half a second's block has many of them on a processor too."""
    return 2048 if device == "cpu" else 8192


def peers_of(args: argparse.Namespace) -> Iterator[str]:
    """Those that were asked for, or all that are here. Ends the program for one that was asked for and cannot run."""
    for name in args.peers or PEERS:
        missing = ""
        if args.mode not in PEERS[name].modes:
            missing = f"it does not {args.mode}"
        elif not find_spec(PEERS[name].needs):
            missing = f"not here; pip install {PEERS[name].needs}"
        if not missing:
            yield name
        elif args.peers:
            raise SystemExit(f"{name}: {missing}")
        else:
            print(f"{name}: {missing}", file=sys.stderr)


def by_turns(first: list[list[float]], second: list[list[float]]) -> stats.Comparison:
    """How many times longer the second takes: the median of each round's ratios by turns, and an interval over rounds.

    What takes turns is seconds apart. Medians of either alone could fall on minutes of a different speed.
    """
    ratios = [np.median(np.divide(b, a)) for a, b in zip(first, second, strict=True)]
    return stats.compare([[1.0]] * len(ratios), [[float(ratio)] for ratio in ratios])


def beside_product(
    product: list[list[float]], seconds: list[list[float]], flops: float, args: argparse.Namespace
) -> str:
    """The rate of the layers' FLOPs as a share of the product's, with a 95% interval over rounds."""
    found = by_turns(seconds, product)
    scale = flops / (2 * product_size(args.device) ** 3)
    between = f" ({found.low * scale:.0%} to {found.high * scale:.0%})" if found.low is not None else ""
    return f"{found.ratio * scale:.0%}{between}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["train", "infer"])
    parser.add_argument("preset", choices=["paper2012", "torchvision"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--stacks", nargs="+", default=["cpu/eager/float32"])
    parser.add_argument("--peers", nargs="*", choices=sorted(PEERS), help="these alone; all that are here by default")
    parser.add_argument("--device", default="cpu", help="of torch and torch-compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=6)
    args = parser.parse_args()
    if args.rounds < 1 or args.blocks < 1:
        parser.error("rounds and blocks must be at least 1")
    names = list(peers_of(args))
    try:
        compare(args, names)
    except PortNetError as error:
        parser.exit(2, f"{error}\n")


def compare(args: argparse.Namespace, names: list[str]) -> None:
    spec = spec_of(args.stacks[0], args)
    work = workload.AlexNet(spec)
    images, labels, _ = next(work.batches(args.batch))
    # At the paper's initial ones, a mistake in LRN would hardly be seen in the logits.
    start = weights.parity(work.graph, spec.seed)
    with closing(plugins.backends()["cpu"].open(work.graph, start, Settings())) as session:
        expected = session.get(session.infer(session.put(images)))
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        np.savez(folder / "work.npz", **inverted(work.graph, start), **{".images": images, ".labels": labels})
        if any(PEERS[name].script == FILE for name in names):
            onnx_export.export(work.graph, start, folder / "net.onnx")
        precisions = dict.fromkeys(spec_of(stack, args).precision for stack in args.stacks)
        products = [name for name in PRODUCTS if PRODUCTS[name].precision in precisions]
        first, rounds = args.stacks[0], []
        for number in range(args.rounds):
            rounds.append(one_round(args, folder, [*names, *products], expected, number))
            seconds = rounds[-1][0]
            told = (f"{n} {by_turns([seconds[first]], [s]).ratio:.3g}" for n, s in seconds.items() if n != first)
            print(f"round {number + 1}, multiples of {first}'s time: {', '.join(told)}", file=sys.stderr)

    flops = work.graph.cost(args.batch, training=args.mode == "train").flops
    rate = args.batch / np.median(np.concatenate([s[first] for s, _ in rounds]))
    print(f"{args.mode} {args.preset}, batch {args.batch}, {args.rounds} rounds of {args.blocks} blocks, quick")
    print(
        f"{'':<34}{'images/s':>10}{'of the ceiling':>16}{'of the product, by turns':>28}"
        f"   time as a multiple of {first}'s, 95% interval"
    )
    for name in [*args.stacks, *names]:
        precision = PEERS[name].precision if name in PEERS else spec_of(name, args).precision
        seconds = [s[name] for s, _ in rounds]
        shares = [flops / np.median(s[name]) / c[precision] for s, c in rounds if c.get(precision)]
        found = by_turns([s[first] for s, _ in rounds], seconds)
        between = f" ({found.low:.3g} to {found.high:.3g})" if found.low is not None else ""
        share = f"{np.median(shares):.0%}" if shares else ""
        product = f"product-{precision}"
        beside = beside_product([s[product] for s, _ in rounds], seconds, flops, args) if product in products else ""
        print(
            f"{name:<34}{rate / found.ratio:>10.3g}{share:>16}{beside:>28}   {found.ratio:.3g}{between} {found.verdict}"
        )


if __name__ == "__main__":
    main()
