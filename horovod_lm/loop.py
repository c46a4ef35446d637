"""The common training loop. It knows no framework, no objective and no hook by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from horovod_lm.agreement import agree, together
from horovod_lm.backend import (
    ERROR,
    INTERRUPT,
    OVERFLOW,
    STOP,
    Communicator,
    Engine,
    Reduced,
)
from horovod_lm.config import Config
from horovod_lm.data.batches import Batches, RankBatch
from horovod_lm.errors import CollectiveFailed, RunFailed
from horovod_lm.loss_scale import LossScaler

TIMED_EVERY = 10  # every so many steps the device is waited for between the parts
PARTS = ("data", "forward_backward", "reduce", "update")


class Clock:
    """Times the parts of a step, in seconds; `other` is what is left of the whole.

    A step lasts from the end of the one before it; what `pause` covers (evaluation, checkpoints)
    is no part of any step. `span`, in ns since the Unix epoch, is without what hooks do between
    two steps.
    """

    def __init__(self, synchronise: Callable[[], None]) -> None:
        self._synchronise = synchronise
        self._start = self._mark = time.perf_counter()
        self._paused = 0.0
        self.parts: dict[str, float] | None = None
        self.span = (0, 0)

    def begin(self, timed: bool) -> None:
        """A step begins; `timed`: its parts are measured, with synchronisation."""
        self.parts = {} if timed else None
        self._mark = time.perf_counter()
        self.span = (time.time_ns(), 0)

    def part(self, name: str) -> None:
        """What was done since the last call belongs to `name`."""
        if self.parts is not None:
            self._synchronise()
            now = time.perf_counter()
            self.parts[name] = self.parts.get(name, 0.0) + now - self._mark
            self._mark = now

    def end(self) -> float:
        """The step ends: its seconds."""
        now = time.perf_counter()
        self.span = (self.span[0], time.time_ns())
        seconds = now - self._start - self._paused
        self._start, self._paused = now, 0.0
        if self.parts is not None:
            self.parts["other"] = seconds - sum(self.parts.values())
        return seconds

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside belongs to no step."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin


@dataclass
class Run:
    """Where a run stands, and what a hook may use.

    `step` counts attempts, `updates` applied steps; they are `profiled` while they are recorded.
    `signal` holds bits STOP or INTERRUPT once a signal has come to this rank; `trouble` an error of
    this rank that the others don't know of yet.
    """

    config: Config
    engine: Engine
    communicator: Communicator
    batches: Batches
    scaler: LossScaler
    rate: Callable[[int], float]
    step: int = 0
    updates: int = 0
    signal: int = 0
    trouble: Exception | None = None
    stopped: int = 0
    batch: RankBatch | None = None
    profiled: bool = False
    learning_rate: float = 0.0
    loss_scale: float = 1.0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.engine.synchronise)

    @property
    def status(self) -> int:
        """This rank's bits in the reduced buffer."""
        return self.signal | (ERROR if self.trouble else 0)

    @property
    def last(self) -> bool:
        """Whether no further step will follow."""
        return bool(self.stopped) or self.step >= self.config.train.steps

    @contextmanager
    def guard(self) -> Iterator[None]:
        """An error inside becomes this rank's `trouble`, so that all ranks leave at the next
        reduction instead of waiting for this one. Only a broken collective goes on at once."""
        try:
            yield
        except CollectiveFailed:
            raise
        except Exception as error:
            self.trouble = self.trouble or error


def apply_step(run: Run, reduced: Reduced) -> bool:
    """What the scaler says of this step, the same on every rank. Its error says where."""
    try:
        return run.scaler.update(reduced.finite)
    except RunFailed as error:
        overflow = overflow_of(reduced)
        rank = "" if overflow["rank"] is None else f", on rank {overflow['rank']}"
        where = f"step {run.step + 1} (first in {overflow['tensor']}{rank})"
        raise together(RunFailed(f"{where}: {error}"), run.communicator) from error


def overflow_of(reduced: Reduced) -> dict[str, Any]:
    """The first tensor that is not finite, and the first rank that knew it before the sum."""
    ranks = np.flatnonzero(reduced.status & OVERFLOW)
    return {"rank": int(ranks[0]) if ranks.size else None, "tensor": reduced.tensor}


class Hook(Protocol):
    """Called after every step that `every` divides, and after the last one."""

    every: int

    def __call__(self, run: Run, reduced: Reduced) -> None: ...


def train_steps(run: Run, hooks: Sequence[Hook]) -> None:
    """Train until the config's steps are done or a signal stops all ranks.

    Raises on every rank alike: the error of the lowest rank that has one, or that of the scaler.
    """
    engine, scaler = run.engine, run.scaler
    clock = run.clock = Clock(engine.synchronise)  # the first step begins now
    max_norm = run.config.train.max_norm
    with run.batches.ahead(run.step) as stream:
        while not run.last:
            clock.begin(timed=(run.step + 1) % TIMED_EVERY == 0)
            with run.guard():
                batch = next(stream)
                clock.part("data")
                for micro in batch.micros:
                    engine.forward_backward(micro, run.step, scaler.scale)
                clock.part("forward_backward")
            reduced = engine.reduce_gradients(run.status)
            clock.part("reduce")
            if (reduced.status & ERROR).any():
                agree(run.communicator, run.trouble)
            run.loss_scale, run.learning_rate = scaler.scale, run.rate(run.updates)
            if apply_step(run, reduced):
                with run.guard():
                    engine.apply_gradients(run.learning_rate, max_norm)
                run.updates += 1
            clock.part("update")
            run.step += 1
            run.batch = batch
            run.stopped = max(int(bits) & (STOP | INTERRUPT) for bits in reduced.status)
            for hook in hooks:
                if run.last or (hook.every and run.step % hook.every == 0):
                    with run.guard():
                        hook(run, reduced)
    agree(run.communicator, run.trouble)
