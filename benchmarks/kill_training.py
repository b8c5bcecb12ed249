"""Kill training again and again, anywhere, and see that what it comes to is what it comes to undisturbed.

    python benchmarks/kill_training.py 200                      # one process
    python benchmarks/kill_training.py 10 --parallel towers     # two processes under torchrun, one of them is killed
    python benchmarks/kill_training.py 10 --parallel data

A small network with towers trains on the digits, with validation, a schedule that depends on it, and a checkpoint after
every step. SIGKILL comes at a moment drawn evenly from the time that a whole run takes, so that many fall into the
writing of a checkpoint. After each, the newest checkpoint is read. When a run has ended, the SHA-256 of its weights and
velocities must be that of the undisturbed run, bit for bit; then the next begins, until so many kills were made.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import portnet
from portnet import checkpoint, files, images, plugins, trainer, weights
from portnet.contract import Settings
from portnet.graph import LRN, Conv, Dropout, Flatten, Graph, Linear, MaxPool, Normalisation, Plateau, Recipe, ReLU

STEPS = 30
"""Three epochs of a part of the digits."""


def network() -> Graph:
    """The kinds of layers of paper2012, a thousandth of its work; large enough that a checkpoint takes a while."""
    return Graph(
        preset="small",
        input=(3, 24, 24),
        layers=(
            Conv(name="conv1", in_channels=3, out_channels=16, kernel=5, stride=1),
            ReLU(name="relu1"),
            LRN(name="norm1", alpha=5e-4, k=2.0, groups=2),
            MaxPool(name="pool1"),
            Conv(name="conv2", in_channels=16, out_channels=32, kernel=3, padding=1, groups=2),
            ReLU(name="relu2"),
            MaxPool(name="pool2"),
            Conv(name="conv3", in_channels=32, out_channels=32, kernel=3, padding=1),
            ReLU(name="relu3"),
            Flatten(name="flatten"),
            Linear(name="fc6", in_features=512, out_features=1024),
            ReLU(name="relu6"),
            Dropout(name="drop6"),
            Linear(name="fc7", in_features=1024, out_features=1024),
            ReLU(name="relu7"),
            Dropout(name="drop7"),
            Linear(name="fc8", in_features=1024, out_features=10),
        ),
        recipe=Recipe(learning_rate=0.01, batch=16, schedule=Plateau(patience=1)),
        normalisation=Normalisation(mean=(20.0, 20.0, 20.0)),
    )


def train(folder: Path, parallel: str) -> None:
    """One attempt: from the last checkpoint in `folder` to the end, whose digest is left there."""
    graph = network()
    settings = Settings(parallel=parallel)  # type: ignore[arg-type]
    session = plugins.backends()["cpu"].open(graph, weights.initial(graph), settings)
    if parallel:
        leave(folder / f"pid{session.place.rank}", str(os.getpid()))
    run = trainer.Run(
        recipe=graph.recipe,
        steps=STEPS,
        checkpoints=folder / "checkpoints",
        every=1,
        metrics=folder / "metrics.jsonl",
    )
    digits = portnet.load_data("digits")
    data = images.Splits(train=digits.train.some(160), test=digits.test.some(40))
    trainer.train(session, graph, settings, data, run, backend="cpu")
    digest = weights.digest(session.state())
    if session.place.rank == 0:
        leave(folder / "digest", digest)


def leave(path: Path, text: str) -> None:
    """Leave a file that is there whole or not at all, for SIGKILL may come while it is written too."""
    files.write_atomically(path, text.encode(), portnet.PortNetError)


def start(folder: Path, parallel: str) -> int:
    """Start an attempt; its process, or that of torchrun."""
    if parallel:
        backend = plugins.backends()["cpu"]
        command = [*backend.launcher(2, 1000), __file__, "--child", str(folder), "--parallel", parallel]
        log = (folder / "log").open("a")
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}).pid
    child = os.fork()
    if child == 0:
        try:
            train(folder, parallel)
        finally:
            os._exit(0)
    return child


def newest(folder: Path) -> int:
    """The step of the newest checkpoint, which must be readable; -1 before the first."""
    path = folder / "checkpoints"
    found, damaged = checkpoint.latest(path) if path.is_dir() else (None, [])
    assert not damaged, f"a checkpoint is damaged: {damaged}"
    return found.step if found else -1


def manifests(folder: Path) -> set[str]:
    """The names of the checkpoints that are there: cheap, to be asked often."""
    return {path.name for path in (folder / "checkpoints").glob("*.json")}


def ended(pid: int, *, wait: bool = False) -> bool:
    try:
        return os.waitpid(pid, 0 if wait else os.WNOHANG)[0] == pid
    except ChildProcessError:  # it was seen to end before
        return True


def undisturbed(folder: Path, parallel: str) -> tuple[str, float]:
    """The digest that a run comes to, and the seconds from its first checkpoint to its end."""
    pid = start(folder, parallel)
    begun = None
    while not ended(pid):
        if begun is None and manifests(folder):
            begun = time.monotonic()
        time.sleep(0.005)
    assert begun is not None, "the run that nobody disturbs must end well"
    return (folder / "digest").read_text(), time.monotonic() - begun


def disturbed(folder: Path, parallel: str, seconds: float, kills: int, draw: random.Random) -> tuple[int, int]:
    """Kill a run up to `kills` times, until it has ended; how often, and how often while a checkpoint was written."""
    made = torn = 0
    pid = start(folder, parallel)
    while not (folder / "digest").exists():
        newest(folder)
        before = manifests(folder)
        # Not before it trains again, or a run whose start takes seconds would never be met at work.
        while manifests(folder) <= before and not (folder / "digest").exists():
            time.sleep(0.002)
            if not parallel and ended(pid):
                break
        if made < kills:
            time.sleep(draw.uniform(0, seconds))
            victim = int((folder / f"pid{draw.randrange(2)}").read_text()) if parallel else pid
            try:
                os.kill(victim, signal.SIGKILL)
            except ProcessLookupError:
                continue
            if not parallel:
                ended(pid, wait=True)
            made += 1
            torn += bool(files.unfinished(folder / "checkpoints"))
            newest(folder)
        if not parallel and not (folder / "digest").exists():
            pid = start(folder, parallel)
        if made >= kills and not parallel:
            ended(pid, wait=True)
    if parallel:
        ended(pid, wait=True)
    return made, torn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=20)
    parser.add_argument("--parallel", choices=["data", "towers"], default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        train(asked.child, asked.parallel)
        return
    if not asked.parallel:
        # Loads torch, which the processes to be killed inherit.
        import_module("portnet_backends.torch_session")
    draw, began = random.Random(asked.seed), time.monotonic()
    made = torn = runs = 0
    with tempfile.TemporaryDirectory() as temporary:
        clean = Path(temporary) / "clean"
        clean.mkdir()
        expected, seconds = undisturbed(clean, asked.parallel)
        while made < asked.kills:
            folder = Path(temporary) / f"run{runs}"
            folder.mkdir()
            more, inside = disturbed(folder, asked.parallel, seconds, asked.kills - made, draw)
            made, torn, runs = made + more, torn + inside, runs + 1
            found = (folder / "digest").read_text()
            if found != expected:
                sys.exit(f"run {runs} came to {found}, undisturbed to {expected}")
    print(
        f"{made} kills in {runs} runs of {STEPS} steps ({asked.parallel or 'one process'}), {torn} of them inside the "
        f"writing of a checkpoint; every run came to {expected[:16]}, every checkpoint was readable; "
        f"{time.monotonic() - began:.0f} s (seed {asked.seed})"
    )


if __name__ == "__main__":
    main()
