"""What happens beside the steps: metrics, evaluation, checkpoints, the check of the replicas."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from horovod_lm.agreement import agreed
from horovod_lm.backend import Engine, MicroBatch, Reduced, Sums
from horovod_lm.checkpoint import RunState, save
from horovod_lm.data.cache import replace
from horovod_lm.drift import compare_replicas
from horovod_lm.loop import Run, overflow_of
from horovod_lm.objectives import LossKind
from horovod_lm.run_folder import plain
from horovod_lm.sketch import sketch

Sink = Callable[[dict[str, Any]], None]  # takes a row of metrics


def peak_memory() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, written at once. A resumed run drops the lines
    beyond the step it goes on from."""

    def __init__(self, path: Path, step: int) -> None:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        kept = []
        for line in before.splitlines():
            try:  # a kill may have cut the last line
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        if (text := "".join(kept)) != before:
            replace(path, text)  # a kill or a full disk must not take the rows so far
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file. Every line was written before; what a full disk refused was reported."""
        with suppress(OSError):
            self._file.close()


class Metrics:
    """Rank 0 gives a row for every step to each sink."""

    every = 1

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks
        self.first_step_seconds: float | None = None
        self.loss: float | None = None

    def __call__(self, run: Run, reduced: Reduced) -> None:
        seconds = run.clock.end()
        if self.first_step_seconds is None:
            self.first_step_seconds = seconds
        batch = run.batch
        assert batch is not None
        self.loss = total_loss(reduced.losses, batch.factors)
        parts = run.clock.parts
        # A loss without a target, as of whole words of which none fits, is 0 and means nothing.
        losses = {n: x if batch.sums.get(n, 1) else math.nan for n, x in reduced.losses.items()}
        row = {
            "kind": "step",
            "step": run.step,
            "updates": run.updates,
            **plain({"loss": self.loss, "losses": losses, "norm": reduced.norm}),
            "learning_rate": run.learning_rate,
            "loss_scale": run.loss_scale if run.config.train.precision == "fp16" else None,
            "skipped": run.scaler.skipped,
            "overflow": None if reduced.finite else overflow_of(reduced),
            "tokens": batch.targets,
            "efficiency": round(batch.real / batch.computed, 4) if batch.computed else None,
            "seconds": round(seconds, 6),
            "time": time.time(),
            "parts": parts and {name: round(1e3 * part, 3) for name, part in parts.items()},
            "memory_mib": None if parts is None else round(peak_memory(), 1),
        }
        if run.profiled:
            row["profiled"] = True
        for sink in self._sinks:
            sink(row)


class Evaluation:
    """Validation losses and accuracies, with the windows dealt over all ranks. A row goes to each
    sink."""

    def __init__(
        self,
        every: int,
        batches: Callable[[], Iterator[MicroBatch]],
        kinds: Sequence[LossKind],
        sinks: list[Sink],
    ) -> None:
        self.every = every
        self._batches, self._kinds, self._sinks = batches, kinds, sinks
        self.loss: float | None = None

    def __call__(self, run: Run, reduced: Reduced) -> None:
        if run.stopped:  # whoever sent the signal waits for the checkpoint, not for this
            return
        with run.clock.pause():
            begin = time.perf_counter()
            local = no_sums(self._kinds)
            with run.guard():
                local = local_evaluation(run.engine, self._batches(), self._kinds)
            sums = run.communicator.allreduce(local)
            found = evaluated(self._kinds, sums, run.batch.factors if run.batch else {})
            self.loss = found["loss"]
            row = {
                "kind": "evaluation",
                "step": run.step,
                **plain(found),
                "seconds": round(time.perf_counter() - begin, 3),
                "time": time.time(),
            }
            for sink in self._sinks:
                sink(row)


def no_sums(kinds: Sequence[LossKind]) -> np.ndarray:
    """What `local_evaluation` gives where there is nothing to evaluate."""
    return np.zeros((len(kinds), len(Sums._fields)))


def local_evaluation(
    engine: Engine, batches: Iterator[MicroBatch], kinds: Sequence[LossKind]
) -> np.ndarray:
    """The `Sums` of each loss of `kinds` over `batches` on this rank, (losses, 3) fp64."""
    total = no_sums(kinds)
    for micro in batches:
        found = engine.evaluate(micro)
        total += [found[kind.name] for kind in kinds]
    return total


def evaluated(
    kinds: Sequence[LossKind], sums: np.ndarray, factors: Mapping[str, float]
) -> dict[str, Any]:
    """What is said of an evaluation, of the sums (losses, 3) over all ranks: the mean nll of each
    of the `losses`, and in sum with their `factors`; `accuracies`; `perplexities` of those over
    tokens, and `perplexity` of one that is alone; `targets` of each, and in sum as `tokens`.
    What had no target is nan."""
    losses, accuracies = (
        {
            kind.name: float(row[what] / row[1]) if row[1] else math.nan
            for kind, row in zip(kinds, sums, strict=True)
        }
        for what in (0, 2)
    )
    perplexities = {k.name: perplexity(losses[k.name]) for k in kinds if k.over == "token"}
    return {
        "loss": total_loss(losses, factors),
        "losses": losses,
        "accuracies": accuracies,
        "perplexities": perplexities,
        "perplexity": perplexities.get(kinds[0].name) if len(kinds) == 1 else None,
        "targets": {kind.name: int(row[1]) for kind, row in zip(kinds, sums, strict=True)},
        "tokens": int(sums[:, 1].sum()),
    }


def total_loss(losses: Mapping[str, float], factors: Mapping[str, float]) -> float:
    """The sum of the losses, each times its factor: what is trained on."""
    return float(sum(factors.get(name, 1.0) * loss for name, loss in losses.items()))


def perplexity(loss: float) -> float:
    """exp(loss), inf where that is too large."""
    return math.inf if loss >= 700 else math.exp(loss)


class WeightSketches:
    """Rank 0 gives each sink a row with a sketch of every layer's weights: two runs' reports tell
    from them how far their weights have drifted apart."""

    def __init__(self, every: int, sinks: list[Sink]) -> None:
        self.every = every
        self._sinks = sinks

    def start(self, run: Run) -> None:
        """The weights that a new run starts with are those of step 0."""
        if run.step == 0:
            self(run)

    def __call__(self, run: Run, reduced: Reduced | None = None) -> None:
        if not self._sinks or run.stopped:
            return
        with run.clock.pause():
            found = sketch(run.engine.state().weights)
            row = {
                "kind": "weights",
                "step": run.step,
                # enough digits that the rounding of fp32 weights shows in a difference
                "sketch": {k: [float(f"{v:.12g}") for v in s] for k, s in found.items()},
                "time": time.time(),
            }
            for sink in self._sinks:
                sink(row)


class Checkpoint:
    """Rank 0 writes the run's whole state."""

    def __init__(self, every: int, folder: Path, extra: dict[str, Any], start: int) -> None:
        self.every = every
        self._folder, self._extra = folder, extra
        self._saved = start
        self.path: Path | None = None

    def __call__(self, run: Run, reduced: Reduced) -> None:
        if run.communicator.rank or run.trouble or run.step == self._saved:
            return
        with run.clock.pause():
            state = RunState(
                run.step, run.updates, run.scaler.state(), run.engine.state(), self._extra
            )
            self.path = save(self._folder, state, run.config, run.config.checkpoint.keep)
            self._saved = run.step


class ReplicaCheck:
    """After the first update, and then every so many, all ranks compare a digest of weights,
    moments, scaler and step."""

    every = 1

    def __init__(self, check_every: int) -> None:
        self._check_every = check_every
        self._checked: int | None = None

    def __call__(self, run: Run, reduced: Reduced) -> None:
        if not run.updates or run.updates == self._checked or not self._due(run):
            return
        self._checked = run.updates
        with run.clock.pause():
            # Else a rank without memory for the copy would leave the others waiting for its digest.
            with agreed(run.communicator):
                state = run.engine.state()
            compare_replicas(run.communicator, state, run.scaler.state(), run.step)

    def _due(self, run: Run) -> bool:
        if self._checked is None or (run.last and self._check_every):
            return True
        return bool(self._check_every) and run.updates % self._check_every == 0
