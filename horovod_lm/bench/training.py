"""What the contestants of `throughput` and `scaling` do: training steps, and bare products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from horovod_lm.backend import EngineState, load_backend
from horovod_lm.bench.tools import products_of
from horovod_lm.config import Config, make_config
from horovod_lm.data.batches import Batches, share
from horovod_lm.loss_scale import LossScaler
from horovod_lm.objectives.registry import causal_windows
from horovod_lm.randomness import initial_weights
from horovod_lm.schedule import learning_rate
from horovod_lm.train import make_engine

if TYPE_CHECKING:
    from horovod_lm.bench.processes import Process, Stage

WINDOWS = 64  # batches of different tokens before they come again


class SeededTokens:
    """A stream of evenly drawn token ids in memory, read as `horovod_lm.data.shards.Tokens` is."""

    def __init__(self, vocabulary: int, count: int, seed: int) -> None:
        self._ids = np.random.default_rng(seed).integers(vocabulary, size=count, dtype=np.int32)
        self.documents = np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from position `start`."""
        return self._ids[start : start + count]


def stream(config: Config) -> SeededTokens:
    """The tokens that all contestants train on."""
    windows = WINDOWS * config.train.global_batch_size
    return SeededTokens(
        config.model.vocabulary, windows * config.model.context + 1, config.train.seed
    )


def arguments(config: Config, threads: int, **more: Any) -> dict[str, Any]:
    """The keyword arguments of the works below, as JSON can hold them."""
    return {"config": config.model_dump(mode="json"), "threads": threads, **more}


def step_tokens(config: Config) -> int:
    """Target tokens of a step of all ranks."""
    return config.train.global_batch_size * config.model.context


def start_own(stage: Stage, config: Config) -> Process:
    """A process with `OwnTraining` of the config, on one rank."""
    threads = config.launch.threads or 1
    return stage.start(
        config.launch.backend,
        f"{__name__}:OwnTraining",
        arguments(config, threads),
        config=config,
        threads=threads,
    )


def batch_sizes(config: Config, sizes: Mapping[str, int] | None) -> dict[str, int]:
    """The parts of a training: the global batch size of each, by default the config's alone."""
    return dict(sizes or {"": config.train.global_batch_size})


class OwnTraining:
    """Steps of our own engine: what the training loop does, without its hooks. `sizes` are its
    parts, see `batch_sizes`. A unit is a target token."""

    def __init__(
        self, config: Mapping[str, Any], threads: int, sizes: Mapping[str, int] | None = None
    ) -> None:
        self._config = make_config(config, "the bench")
        settings = self._config.train
        backend = load_backend(self._config.launch.backend, threads)
        self._communicator = backend.communicator()
        self._engine = make_engine(self._config, backend, self._communicator)
        self._engine.load_state(EngineState(initial_weights(self._config.model, settings.seed)))
        self._scaler = LossScaler(self._config.loss_scale, settings.precision == "fp16")
        tokens = stream(self._config)
        self._batches = {
            part: Batches(
                causal_windows(tokens, self._config.model.context, size, settings.seed),
                micro_batch_size=settings.micro_batch_size,
                rank=self._communicator.rank,
                ranks=self._communicator.size,
            )
            for part, size in batch_sizes(self._config, sizes).items()
        }
        self.parts = list(self._batches)
        self._step = self._updates = 0

    def step(self, part: str) -> float:
        """One step of the loop; its target tokens."""
        config, engine = self._config, self._engine
        batch = self._batches[part][self._step]
        for micro in batch.micros:
            engine.forward_backward(micro, self._step, self._scaler.scale)
        reduced = engine.reduce_gradients()
        if self._scaler.update(reduced.finite):
            steps = config.train.steps
            rate = learning_rate(self._updates, config.optimizer, config.schedule, steps)
            engine.apply_gradients(rate, config.train.max_norm)
            self._updates += 1
        self._step += 1
        engine.synchronise()
        return float(batch.targets)

    def broadcast(self, data: bytes) -> bytes:
        """`data` of rank 0."""
        return self._communicator.broadcast(data) if self._communicator.size > 1 else data


class PeerTraining:
    """Steps of somebody else's GPT-2, with the same parts and units as `OwnTraining`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        threads: int,
        peer: str,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self._config = make_config(config, "the bench")
        backend = load_backend(self._config.launch.backend, threads)
        self._peer = backend.bench().peer(peer, self._config, threads)
        self._tokens = stream(self._config)
        self._sizes = batch_sizes(self._config, sizes)
        self.parts = list(self._sizes)
        self._step = 0

    def step(self, part: str) -> float:
        """One training step; the target tokens of all ranks."""
        size, context = self._sizes[part], self._config.model.context
        windows = (len(self._tokens) - 1) // context
        rows = [
            self._tokens.read((self._step * size + row) % windows * context, context + 1)
            for row in share(size, self._peer.rank, self._peer.size)
        ]
        self._peer.step(np.stack(rows))
        self._step += 1
        return float(size * context)

    def broadcast(self, data: bytes) -> bytes:
        """`data` of rank 0."""
        return self._peer.broadcast(data)


class Ceiling:
    """The matrix products of a training step alone. The parts are the libraries; a unit is a
    floating-point operation."""

    def __init__(self, config: Mapping[str, Any], threads: int) -> None:
        checked = make_config(config, "the bench")
        self._tools = load_backend(checked.launch.backend, threads).bench()
        self._products = products_of(checked.model, checked.train.global_batch_size)
        self._precision = checked.train.precision
        self._functions: dict[str, Callable[[], None]] = {}
        self.parts = self._tools.product_libraries(self._precision)

    def step(self, part: str) -> float:
        """All products of a step, with both gradients; their operations."""
        if part not in self._functions:
            self._functions[part] = self._tools.products(part, self._products, self._precision)
        self._functions[part]()
        return sum(product.flops for product in self._products)

    def broadcast(self, data: bytes) -> bytes:
        """There is one rank only."""
        return data
