"""TensorFlow as a backend of horovod_lm: the object behind the entry point `tensorflow`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path

from horovod_lm.backend import EngineSettings
from horovod_lm.spec import ModelSpec

# Read by the imports below: Keras must run on TensorFlow, whatever a user's keras.json says, and
# TensorFlow's notes about its build are of no use to a reader of training logs.
os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing reaches stderr, not from C++ either. TensorFlow's library writes a note on oneDNN
    as it is loaded, before it looks at its log level."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


@contextmanager
def _without(name: str) -> Iterator[None]:
    """As if a module that is not imported yet were not installed."""
    absent = name not in sys.modules
    if absent:
        sys.modules[name] = None
    try:
        yield
    finally:
        if absent:
            del sys.modules[name]


# Keras imports Matplotlib if it is there, for plots that no run draws: a sixth of the time that
# all of this takes.
with _silence(), _without("matplotlib"):
    import keras
    import tensorflow as tf

    from tf_backend.bench import BenchTools
    from tf_backend.communicator import Communicator
    from tf_backend.convert import ConvertTools
    from tf_backend.engine import Engine
    from tf_backend.profiler import profile


class Backend:
    """See `horovod_lm.backend.Backend`."""

    name = "tensorflow"

    def __init__(self, threads: int) -> None:
        tf.get_logger().setLevel("ERROR")  # it counts the tracings of all engines together
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        # One operation at a time: it has all threads, and the order of work never changes.
        tf.config.threading.set_inter_op_parallelism_threads(1)

    def versions(self) -> dict[str, str]:
        """Names and versions of what it runs on."""
        return {
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "horovod": version("horovod"),
        }

    def communicator(self) -> Communicator:
        """Start Horovod."""
        communicator = Communicator()
        # Before the first operation, which would take every GPU of the machine.
        gpus = tf.config.list_physical_devices("GPU")
        if gpus:
            tf.config.set_visible_devices(gpus[communicator.local_rank], "GPU")
        return communicator

    def engine(
        self, spec: ModelSpec, settings: EngineSettings, communicator: Communicator
    ) -> Engine:
        """A model with zero weights."""
        # The one place that chooses a device, of those that `communicator` left visible.
        device = "/GPU:0" if tf.config.get_visible_devices("GPU") else "/CPU:0"
        return Engine(spec, settings, communicator, device)

    def profile(self, path: Path) -> AbstractContextManager[None]:
        """Record what happens inside and write it to `path`."""
        return profile(path)

    def bench(self) -> BenchTools:
        """Peers, bare products and an allreduce, for `horovod-lm bench`."""
        return BenchTools()

    def convert(self) -> ConvertTools:
        """Its part in conversion, for `horovod-lm convert`."""
        return ConvertTools()
