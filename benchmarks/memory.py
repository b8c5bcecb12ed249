"""Where the memory of a training step is, and whether it grows.

    python benchmarks/memory.py paper2012 --batch 128 --precision float32 --steps 200

As in PortNet's own measurements, freed memory stays with the process (`portnet.launch.TUNABLES`); with GLIBC_TUNABLES=
in the environment glibc does as it does by default.

Prints, layer by layer, the bytes that autograd keeps from the forward pass for the backward one (each storage once,
with the layer that kept it first; weights and what is made of them apart), then the highest resident memory over all
steps, and what was resident after the tenth step and after the last. Exit status 1 if that grew by more than 2%.
On a device with memory of its own the peak is the device's.
"""

import argparse
import os
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from portnet import launch, plugins, weights, workload
from portnet.contract import Settings
from portnet.errors import PortNetError
from portnet.record import Spec
from portnet.watch import peak_memory

GROWTH = 0.02


def kept(session, inputs) -> Counter[str]:
    """Bytes kept for the backward pass, by layer; of weights' casts under ``(weights)``."""
    found: Counter[str] = Counter()
    seen: dict[int, torch.Tensor] = {}  # kept alive, so that no storage's address comes twice
    layer = "(loss)"

    def enter(module, _):
        nonlocal layer
        layer = names[module]

    def leave(module, *_):
        nonlocal layer
        layer = "(loss)"

    def pack(value):
        address = value.untyped_storage().data_ptr()
        if address not in own and address not in seen:
            seen[address] = value
            shape = tuple(value.shape)
            whole = value.untyped_storage().nbytes()
            found["(weights)" if shape in shapes or shape[::-1] in shapes else layer] += whole
        return value

    names = {module: name for name, module in session.module.named_children()}
    own = {p.untyped_storage().data_ptr() for p in session.parameters.values()}
    own |= {b.untyped_storage().data_ptr() for b in session.module.buffers()}
    shapes = {tuple(p.shape) for p in session.parameters.values()}
    hooks = [m.register_forward_pre_hook(enter) for m in names] + [m.register_forward_hook(leave) for m in names]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        session.train_step(*inputs, step=0, learning_rate=1e-12)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset")
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--engine", default="eager")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ:  # glibc reads it when a process begins
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "GLIBC_TUNABLES": launch.TUNABLES})
    try:
        measure(args)
    except PortNetError as error:
        parser.exit(2, f"{error}\n")


def measure(args: argparse.Namespace) -> None:
    spec = Spec(backend=args.backend, preset=args.preset, image_size=args.image_size, classes=1000, data="synthetic")
    work = workload.AlexNet(spec)
    settings = Settings(precision=args.precision, engine=args.engine, channels_last=args.channels_last)
    session = plugins.backends()[args.backend].open(work.graph, weights.initial(work.graph, 0), settings)
    inputs = [session.put(value) for value in next(work.batches(args.batch))]

    found = kept(session, inputs)
    print(f"GLIBC_TUNABLES: {os.environ['GLIBC_TUNABLES'] or 'none'}")
    layout = ", channels-last" if args.channels_last else ""
    print(f"kept for the backward pass, {args.preset}, {args.engine}, {args.precision}{layout}, batch {args.batch}:")
    for name, size in [*found.items(), ("all", sum(found.values()))]:
        print(f"  {name:<12}{size / 1e6:>10.1f} MB")

    process, early = psutil.Process(), 0
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the highest mark anew
    for step in range(1, args.steps + 1):
        session.get(session.train_step(*inputs, step=step, learning_rate=1e-12))
        if step == min(10, args.steps):
            early = process.memory_info().rss
    late = process.memory_info().rss
    peak = session.peak_memory() or peak_memory()
    print(f"highest in {args.steps} steps: {f'{peak / 1e6:.0f} MB' if peak else 'not known'}")
    print(
        f"resident after step {min(10, args.steps)}: {early / 1e6:.0f} MB, after step {args.steps}: {late / 1e6:.0f} MB"
    )
    session.close()
    sys.exit(late > early * (1 + GROWTH))


if __name__ == "__main__":
    main()
