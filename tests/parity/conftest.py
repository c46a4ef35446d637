"""Both backends in one process, each with a job of one rank of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from horovod_lm.backend import EngineSettings, EngineState, Loss, MicroBatch
from horovod_lm.randomness import initial_weights, normals
from horovod_lm.spec import ModelSpec

SEED = 11
ROWS = 8  # x context 70 is more than one chunk of the head and one block of attention


@dataclass
class Pair:
    """The two engines of one spec."""

    spec: ModelSpec
    settings: EngineSettings
    torch: Any
    tensorflow: Any

    @property
    def engines(self) -> dict[str, Any]:
        return {"torch": self.torch, "tensorflow": self.tensorflow}

    def fresh(self) -> dict[str, Any]:
        """The engines with the same weights and no moments."""
        for engine in self.engines.values():
            engine.load_state(EngineState(starting_weights(self.spec)))
        return self.engines


def starting_weights(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Initial weights, all of them moved: zero biases would hide an error."""
    return {
        name: array + normals(SEED, f"moved.{name}", array.shape, 0.1)
        for name, array in initial_weights(spec, SEED).items()
    }


def micro_batch(spec: ModelSpec, part: slice = slice(0, ROWS)) -> MicroBatch:
    """Rows `part` of a global batch, a fifth of whose targets have no weight."""
    generator = np.random.default_rng(5)
    tokens = generator.integers(0, spec.vocabulary, (ROWS, spec.context + 1)).astype(np.int32)
    weights = (generator.random((ROWS, spec.context)) > 0.2).astype(np.float32)
    loss = Loss("lm", "lm", tokens[part, 1:], weights[part], float(weights.sum()))
    rows = np.arange(ROWS, dtype=np.int64)[part]
    return MicroBatch({"tokens": tokens[part, :-1]}, rows, (loss,))


@pytest.fixture(scope="session")
def backends():
    # One process makes both: whoever lacks a framework runs tests/unit.
    from tf_backend.backend import Backend as TensorFlowBackend
    from torch_backend.backend import Backend as TorchBackend

    made = [(b, b.communicator()) for b in (TorchBackend(1), TensorFlowBackend(1))]
    yield made
    # The first has begun MPI and ends it: at exit the order would be that of the last calls.
    for _, communicator in reversed(made):
        communicator.shutdown()


@pytest.fixture(scope="session")
def make_pair(backends):
    def make(precision: str = "fp32", dropout_generator: str = "shared", **changes) -> Pair:
        small = {"vocabulary": 61, "context": 70, "width": 16, "layers": 2, "heads": 2}
        spec = ModelSpec(**(small | changes))
        settings = EngineSettings(
            precision=precision,
            seed=SEED,
            weight_decay=0.1,
            dropout_generator=dropout_generator,
        )
        engines = [b.engine(spec, settings, communicator) for b, communicator in backends]
        pair = Pair(spec, settings, *engines)
        pair.fresh()
        return pair

    return make
