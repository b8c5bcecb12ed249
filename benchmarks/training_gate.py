"""What the training gate lets through: honest ways to compute the same, and training that is slightly another.

    python benchmarks/training_gate.py paper2012 --seed 1

Each line is how far the losses lie from those of eight equals, as a share of what the gate allows; above 1 a stack is
`wrong`. On 2 cores the equals, which come first and are kept, take a few minutes, and each line half a minute.
"""

import argparse
import sys
from dataclasses import replace

import numpy as np

from portnet import alexnet, plugins, weights, workload
from portnet.contract import Settings
from portnet.graph import Graph
from portnet.record import Spec

HONEST = {
    "channels-last": {"channels_last": True},
    "regions": {"engine": "regions"},
    "regions, channels-last": {"engine": "regions", "channels_last": True},
    "unfold": {"formulation": "unfold"},
    "PyTorch's operators": {"formulation": "stock"},
    "PyTorch's operators, channels-last": {"formulation": "stock", "channels_last": True},
}
OTHER = {
    "momentum 0.001 lower": lambda recipe: replace(recipe, momentum=recipe.momentum - 0.001),
    "learning rate 0.01% higher": lambda recipe: replace(recipe, learning_rate=1.0001 * recipe.learning_rate),
    "other decay of biases": lambda recipe: replace(recipe, bias_decay=1.0 - recipe.bias_decay),
    "no decay": lambda recipe: replace(recipe, weight_decay=0.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=alexnet.PRESETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="synthetic")
    args = parser.parse_args()
    spec = Spec(backend="cpu", mode="train", preset=args.preset, seed=args.seed, data=args.data)
    work, cpu = workload.AlexNet(spec), plugins.backends()["cpu"]
    graph: Graph = work.graph_of(spec.curve_size)
    start, plain = weights.initial(graph, spec.seed), Settings(seed=spec.seed)

    def say(line: str) -> None:
        print(f"\r{line:<80}", end="", file=sys.stderr)

    equals = work._equals(graph, plain, start, say)

    def told(label: str, settings: Settings, trained: Graph, moved: weights.Arrays) -> None:
        losses = work._fit(trained, cpu, settings, moved, label, say)
        seen = workload.curve_verdict({"losses": losses, "perturbed": equals})
        print(f"\r{label:<40}{seen['share']:8.2f} at step {seen['step']}{'':40}", flush=True)

    for run in range(spec.perturbed, spec.perturbed + 7):
        moved = {n: start[n] + (w - start[n]) * np.float32(8) for n, w in weights.perturbed(start, run).items()}
        told(f"honest: weights eight roundings away, run {run}", plain, graph, moved)
    for label, fields in HONEST.items():
        told(f"honest: {label}", replace(plain, **fields), graph, start)
    for label, changed in OTHER.items():
        told(f"other: {label}", plain, replace(graph, recipe=changed(graph.recipe)), start)


if __name__ == "__main__":
    main()
