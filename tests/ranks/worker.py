"""One rank of a test job: several trainings, one after the other, with faults put in.

    python -m tests.ranks.worker CONFIG FOLDER BACKEND

`FOLDER/plan.json` lists the trainings: `name` (of the run's folder below FOLDER), `set` (overrides
of the config), `resume`, and `faults`, of which each has a `kind`, a `rank` and `steps` (from 0):
`overflow` (a loss scale of inf), `data` (the batch can't be read), `ulp` (one weight moves by the
least amount after the step), `terminate` (SIGTERM to itself), `sleep` (for good). Each rank writes
`FOLDER/rank-N.json`: for each training the error that `Training.run` raised, if any.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from horovod_lm import environment
from horovod_lm.backend import load_backend
from horovod_lm.config import load_config
from horovod_lm.data.prepare import prepare
from horovod_lm.errors import CollectiveFailed, HorovodLmError
from horovod_lm.train import Training


class Faults:
    """Which faults happen on this rank, and when."""

    def __init__(self, faults, rank):
        self._faults = [fault for fault in faults if fault["rank"] == rank]

    def at(self, kind, step):
        return any(f["kind"] == kind and step in f["steps"] for f in self._faults)


class FaultyEngine:
    """A real engine with faults before or after its work."""

    def __init__(self, engine, faults):
        self._engine, self._faults = engine, faults
        self._step = 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def forward_backward(self, micro, step, loss_scale):
        self._step = step
        if self._faults.at("terminate", step):
            os.kill(os.getpid(), signal.SIGTERM)
        if self._faults.at("sleep", step):
            time.sleep(1000)
        if self._faults.at("overflow", step):
            loss_scale = math.inf
        self._engine.forward_backward(micro, step, loss_scale)

    def apply_gradients(self, learning_rate, clip):
        self._engine.apply_gradients(learning_rate, clip)
        if self._faults.at("ulp", self._step):
            state = self._engine.state()
            bias = state.weights["decoder.0.feed_forward.up.bias"]
            bias[3] = np.nextafter(bias[3], np.float32(1))
            self._engine.load_state(state)


class FaultyBackend:
    def __init__(self, backend, faults):
        self._backend, self._faults = backend, faults

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def engine(self, spec, settings, communicator):
        return FaultyEngine(self._backend.engine(spec, settings, communicator), self._faults)


class FaultyTraining(Training):
    """Training whose batches may fail to be read."""

    def _batches(self):
        batches, faults = super()._batches(), self.backend._faults

        class FaultyBatches:
            @contextmanager
            def ahead(self, start):
                with batches.ahead(start) as stream:
                    yield self._follow(stream, start)

            def _follow(self, stream, step):
                for batch in stream:
                    if faults.at("data", step):
                        raise OSError(5, "Input/output error", "train-00000.bin")
                    yield batch
                    step += 1

        return FaultyBatches()


def main(path, folder, name):
    base = load_config(path)
    threads = environment.apply(base)
    backend = load_backend(name, threads)
    communicator = backend.communicator()
    results = []
    for entry in json.loads((folder / "plan.json").read_text()):
        config = load_config(path, [*entry.get("set", []), f"launch.backend={name}"])
        faulty = FaultyBackend(backend, Faults(entry.get("faults", []), communicator.rank))
        training = FaultyTraining(
            config, prepare(config), faulty, communicator, threads, folder / entry["name"],
            entry.get("resume", False),
        )  # fmt: skip
        result = {"error": None, "code": 0, "shown": None}
        try:
            training.run()
        except CollectiveFailed as error:  # there is nobody to go on with
            sys.exit(f"horovod-lm: {error}")
        except HorovodLmError as error:
            result = {
                "error": str(error),
                "code": error.exit_code,
                "kind": type(error).__name__,
                "shown": error.shown_by_me,
            }
        results.append(result)
        (folder / f"rank-{communicator.rank}.json").write_text(json.dumps(results))
    communicator.barrier()
    communicator.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
