"""One rank of the smoke test: an allreduce on each of the frameworks named, which must come out
right.
"""

from __future__ import annotations

import sys


def try_torch() -> tuple[int, list[float]]:
    import horovod.torch as hvd
    import torch

    hvd.init()
    return hvd.size(), hvd.allreduce(torch.ones(5) * (hvd.rank() + 1), op=hvd.Sum).tolist()


def try_tensorflow() -> tuple[int, list[float]]:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    return hvd.size(), hvd.allreduce(tf.ones(5) * (hvd.rank() + 1), op=hvd.Sum).numpy().tolist()


def main() -> int:
    """Returns 0 where every framework gave 1 + 2 on each of two ranks."""
    for framework in sys.argv[1:]:
        size, total = {"torch": try_torch, "tensorflow": try_tensorflow}[framework]()
        print(f"{framework}: {size} ranks, {total}", flush=True)
        if (size, total) != (2, [3.0] * 5):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
