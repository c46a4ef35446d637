#!/usr/bin/env python3
"""What a step with hvd.DistributedOptimizer costs, in Keras and in PyTorch, on two ranks.

  python scripts/horovod_cost.py [--rounds 200] [--launcher mpi|gloo] [--mends]

Four steps of one net (2.1 million weights, Adam) take turns in one job: with DistributedOptimizer,
and with the gradients put into one flat allreduce by hand; each in both frameworks, with one thread
a rank. Prints the median time of each and the medians of paired ratios with their 95% intervals.
The aim is 1.05 of by hand. `--mends` takes the mends of this checkout, without a build.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from horovod_build import ranks
from horovod_build.facts import BuildError

from horovod_lm.statistics import median, ratio

WIDTH, LAYERS, CLASSES, ROWS = 512, 8, 10, 64
RATIOS = (
    ("Keras, DistributedOptimizer", "Keras, by hand"),
    ("PyTorch, DistributedOptimizer", "PyTorch, by hand"),
    ("Keras, DistributedOptimizer", "PyTorch, DistributedOptimizer"),
    ("Keras, by hand", "PyTorch, by hand"),
)


def batch(rank: int) -> tuple[Any, Any]:
    import numpy as np

    rng = np.random.default_rng(rank)
    return rng.normal(size=(ROWS, WIDTH)).astype("float32"), rng.integers(0, CLASSES, ROWS)


def torch_steps() -> dict[str, Callable[[], object]]:
    """Each call is one step."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.set_num_threads(1)
    inputs, targets = (torch.from_numpy(part) for part in batch(hvd.rank()))

    def step(by_hand: bool) -> Callable[[], object]:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
        hidden = [module for layer in layers for module in (layer, torch.nn.ReLU())]
        net = torch.nn.Sequential(*hidden, torch.nn.Linear(WIDTH, CLASSES))
        optimizer = torch.optim.Adam(net.parameters(), 1e-3, foreach=True)
        if not by_hand:
            names = net.named_parameters()
            optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=names)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(net(inputs), targets).backward()
            if by_hand:
                gradients = [p.grad for p in net.parameters()]
                flat = torch.cat([g.reshape(-1) for g in gradients])
                hvd.allreduce_(flat, op=hvd.Average, name="torch_by_hand")
                parts = flat.split([g.numel() for g in gradients])
                for parameter, part in zip(net.parameters(), parts, strict=True):
                    parameter.grad = part.view_as(parameter)
            optimizer.step()

        return run

    return {
        "PyTorch, DistributedOptimizer": step(by_hand=False),
        "PyTorch, by hand": step(by_hand=True),
    }


def keras_steps() -> dict[str, Callable[[], object]]:
    """Each call is one step."""
    import horovod.tensorflow as hvd
    import horovod.tensorflow.keras as hvd_keras
    import keras
    import tensorflow as tf

    hvd.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    inputs, targets = (tf.constant(part) for part in batch(hvd.rank()))
    cost = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(by_hand: bool) -> Callable[[], object]:
        keras.utils.set_random_seed(0)
        dense = keras.layers.Dense
        hidden = [dense(WIDTH, activation="relu") for _ in range(LAYERS)]
        net = keras.Sequential([keras.Input((WIDTH,)), *hidden, dense(CLASSES)])
        optimizer = keras.optimizers.Adam(1e-3)
        if not by_hand:
            optimizer = hvd_keras.DistributedOptimizer(optimizer)
        variables = net.trainable_variables
        optimizer.build(variables)

        @tf.function
        def run() -> None:
            with tf.GradientTape() as tape:
                loss = cost(targets, net(inputs, training=True))
            gradients = tape.gradient(loss, variables)
            if by_hand:
                flat = tf.concat([tf.reshape(g, [-1]) for g in gradients], 0)
                flat = hvd.allreduce(flat, op=hvd.Average, name="keras_by_hand")
                parts = tf.split(flat, [v.shape.num_elements() for v in variables])
                gradients = [tf.reshape(p, v.shape) for p, v in zip(parts, variables, strict=True)]
            optimizer.apply(gradients, variables)

        return run

    return {
        "Keras, DistributedOptimizer": step(by_hand=False),
        "Keras, by hand": step(by_hand=True),
    }


def work(folder: Path, rounds: int) -> None:
    """One rank: the steps in turns, in another order each round."""
    steps = torch_steps() | keras_steps()
    import horovod.torch as hvd

    for step in steps.values():
        for _ in range(10):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for round_ in range(rounds):
        for place in range(len(names)):
            name = names[(place + round_) % len(names)]
            hvd.barrier()
            begin = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - begin)
    if hvd.rank() == 0:
        (folder / "result.json").write_text(json.dumps(times))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200, help="steps of each kind (200)")
    parser.add_argument("--launcher", choices=list(ranks.LAUNCHERS), default="mpi")
    parser.add_argument("--mends", action="store_true", help="those of this checkout")
    options = parser.parse_args()
    env = {"COST_ROUNDS": str(options.rounds), "HOROVOD_CYCLE_TIME": "5"}
    try:
        times = ranks.measured(__file__, options.launcher, mends=options.mends, env=env)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    for kind, values in times.items():
        print(f"{kind:32} {1000 * median(values)[0]:7.2f} ms")
    for first, second in RATIOS:
        value, interval = ratio(times[first], times[second])
        print(f"{first} / {second}: {value:.3f} ({interval.low:.3f} to {interval.high:.3f})")
    return 0


if __name__ == "__main__":
    if sys.argv[2:] == ["work"]:  # a rank, see ranks.measured
        work(Path(sys.argv[1]), int(os.environ["COST_ROUNDS"]))
        sys.exit()
    sys.exit(main())
