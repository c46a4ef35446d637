#!/usr/bin/env python3
"""Whether a Keras `fit` on two ranks ends as on one rank with the whole batches.

  python scripts/horovod_fit.py [--launcher mpi|gloo] [--mends] [--only SGD ...]

For every optimizer that Keras ships, under float32, mixed_float16 and mixed_bfloat16, a small
convolutional net and a Transformer block are fitted with hvd.DistributedOptimizer on two ranks,
each with its half of every batch, and with the plain optimizer on all of it. Printed is the largest
distance of a weight or a moment, over the tensors, as a share of the largest change of that tensor
in training; in brackets, of the halves, that of one rank's weights from float32: what rounding
alone does. The weights and moments of the two ranks must be the same bit for bit. `--mends` takes
the mends of this checkout, without a build. A table of all takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from horovod_build import ranks
from horovod_build.facts import BuildError

STEPS, BATCH = 6, 8
POLICIES = ("float32", "mixed_float16", "mixed_bfloat16")
NETS = ("convolutions", "Transformer")
SCALE = 256.0  # of mixed_float16: one that overflows nothing


def net(kind: str) -> Any:
    """Without biases of keys, whose gradient is rounding alone."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    if kind == "convolutions":
        inputs = keras.Input((8, 8, 2))
        x = layers.Conv2D(4, 3, activation="tanh")(inputs)
        x = layers.Flatten()(layers.Conv2D(4, 3, activation="tanh")(x))
    else:
        inputs = keras.Input((6,), dtype="int32")
        x = layers.Embedding(11, 8)(inputs)
        mixed = layers.MultiHeadAttention(2, 4, use_bias=False)
        x = layers.LayerNormalization()(x + mixed(x, x))
        x = layers.LayerNormalization()(x + layers.Dense(8)(layers.Dense(16, "gelu")(x)))
        x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3, dtype="float32")(x))


def data(kind: str) -> tuple[Any, Any]:
    import numpy as np

    rng, samples = np.random.default_rng(0), STEPS * BATCH
    if kind == "convolutions":
        inputs = rng.normal(size=(samples, 8, 8, 2)).astype("float32")
    else:
        inputs = rng.integers(0, 11, (samples, 6))
    return inputs, rng.integers(0, 3, samples)


def fitted(kind: str, policy: str, optimizer: Any, part: tuple[int, int]) -> list[Any]:
    """Weights and moments after training on part `part[0]` of `part[1]` of each batch."""
    import keras

    keras.config.set_dtype_policy(policy)
    model = net(kind)
    keras.config.set_dtype_policy("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss)
    model.optimizer.initial_scale = SCALE
    rank, count = part
    inputs, targets = (
        a.reshape(STEPS, count, -1, *a.shape[1:])[:, rank].reshape(-1, *a.shape[1:])
        for a in data(kind)
    )
    model.fit(inputs, targets, batch_size=BATCH // count, shuffle=False, verbose=0)
    plain = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    moments = [v for v in plain.variables if v.shape]
    return [v.numpy().astype("float64") for v in (*model.weights, *moments)]


def distance(these: list[Any], those: list[Any], start: list[Any]) -> float:
    import numpy as np

    assert len(these) == len(those)
    start = [*start, *(0 * value for value in those[len(start) :])]
    largest = 0.0
    for one, other, before in zip(these, those, start, strict=True):
        change = np.abs(other - before).max()
        apart = np.abs(one - other).max()
        largest = max(largest, apart / change if change else apart)
    return float(largest)


def optimizers() -> dict[str, Any]:
    """What makes each optimizer of this Keras."""
    import keras

    base, wrapper = keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer
    found = {
        name: cls
        for name, cls in sorted(vars(keras.optimizers).items())
        if isinstance(cls, type) and issubclass(cls, base) and cls not in (base, wrapper)
    }
    several = found.pop("MultiOptimizer", None)
    makers = {name: lambda cls=cls: cls(learning_rate=0.01) for name, cls in found.items()}
    if several is not None:
        of = keras.optimizers.OptimizerMap
        makers["MultiOptimizer"] = lambda: several(
            of(keras.optimizers.SGD(0.01), {".*kernel.*": keras.optimizers.Adam(0.01)})
        )
    return makers


def work(folder: Path) -> None:
    """A rank: one line of results for each net, policy and optimizer."""
    import horovod.tensorflow as hvd
    import horovod.tensorflow.keras as hvd_keras
    import numpy as np

    hvd.init()
    chosen = json.loads(os.environ["FIT_ONLY"])
    lines = []
    for name, make in optimizers().items():
        if chosen and name not in chosen:
            continue
        for kind in NETS:
            start = [v.astype("float64") for v in net(kind).get_weights()]
            exact = None
            for policy in POLICIES:
                share = (hvd.rank(), hvd.size())
                ours = fitted(kind, policy, hvd_keras.DistributedOptimizer(make()), share)
                all_of_it = fitted(kind, policy, make(), (0, 1))
                flat = np.concatenate([value.ravel() for value in ours])
                both = hvd.allgather(flat[None], name=f"{name} {kind} {policy}").numpy()
                exact = all_of_it if exact is None else exact
                lines.append(
                    {
                        "optimizer": name,
                        "net": kind,
                        "policy": policy,
                        "alike": bool((both == both[0]).all() and np.isfinite(both).all()),
                        "distance": distance(ours, all_of_it, start),
                        "rounding": distance(all_of_it[: len(start)], exact[: len(start)], start),
                    }
                )
        if hvd.rank() == 0:
            (folder / "result.json").write_text(json.dumps(lines))


def show(lines: list[dict[str, Any]]) -> None:
    heads = [f"{kind + ', ' + policy:>34}" for kind in NETS for policy in POLICIES]
    print(f"{'':16}" + "".join(heads))
    cells = {(c["optimizer"], c["net"], c["policy"]): c for c in lines}
    for name in dict.fromkeys(c["optimizer"] for c in lines):
        row = []
        for kind in NETS:
            for policy in POLICIES:
                cell = cells[name, kind, policy]
                text = f"{cell['distance']:.1e}"
                if policy != "float32":
                    text += f" [{cell['rounding']:.1e}]"
                row.append(f"{text if cell['alike'] else 'RANKS DIFFER':>34}")
        print(f"{name:16}" + "".join(row))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launcher", choices=list(ranks.LAUNCHERS), default="mpi")
    parser.add_argument("--mends", action="store_true", help="those of this checkout")
    parser.add_argument("--only", nargs="+", default=[], metavar="OPTIMIZER")
    options = parser.parse_args()
    env = {"FIT_ONLY": json.dumps(options.only)}
    try:
        lines = ranks.measured(__file__, options.launcher, mends=options.mends, env=env)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    show(lines)
    return 0 if all(line["alike"] for line in lines) else 3


if __name__ == "__main__":
    if sys.argv[2:] == ["work"]:  # a rank, see ranks.measured
        work(Path(sys.argv[1]))
        sys.exit()
    sys.exit(main())
