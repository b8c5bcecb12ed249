"""What a peer script says and is asked, so that it takes turns with others: see `benchmarks/against_peers.py`.

A script is started with one argument, what to run as JSON; it opens it by a function of its own, answers with the
logits of evaluation, and then times as many steps as it is asked to, each time it is asked.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One network and its batch: `images` (n, 3, height, width) float32 as the network takes them, `labels` (n,) int64.

    `weights` are float32 in torch's shapes, by PortNet's names, for dropout as frameworks have it: scaled in training.
    """

    preset: str
    mode: str
    precision: str
    weights: dict[str, np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """`logits` of evaluation with the initial weights; `steps` runs so many steps and returns when they are done.

    What is no network has no logits. `weights`, if given, are those reached so far, by PortNet's names.
    """

    logits: np.ndarray | None
    steps: Callable[[int], None]
    weights: Callable[[], dict[str, np.ndarray]] | None = None


def serve(open_: Callable[[Asked], Opened]) -> None:
    """Open what the command line says, and answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    told = json.loads(sys.argv[1])
    with np.load(told["arrays"]) as file:
        arrays = dict(file)
    images, labels = arrays.pop(".images"), arrays.pop(".labels")
    opened = open_(
        Asked(
            preset=told["preset"],
            mode=told["mode"],
            precision=told["precision"],
            weights=arrays,
            images=images,
            labels=labels,
            options=told["options"],
        )
    )
    if opened.logits is not None:
        np.save(told["logits"], np.asarray(opened.logits, np.float32))
    print(json.dumps("ready"), file=answers)
    for line in sys.stdin:
        images.sum()  # like PortNet's, a block begins with a process that is awake and has just seen its input
        began = perf_counter()
        opened.steps(int(line))
        print(json.dumps(perf_counter() - began), file=answers)
