"""`bench checkpoint`: saving and loading, against plainly writing and reading as many bytes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

from horovod_lm import checkpoint
from horovod_lm.backend import EngineState
from horovod_lm.bench.display import Display
from horovod_lm.bench.result import BenchResult, Column, Ratio
from horovod_lm.bench.rounds import Repeated, interleave
from horovod_lm.checkpoint import RunState
from horovod_lm.config import Config
from horovod_lm.errors import UserError
from horovod_lm.loss_scale import LossScaler
from horovod_lm.optimizers import moment_shapes
from horovod_lm.randomness import initial_weights, normals


def measure(config: Config, *, folder: Path, rounds: int, seconds: float) -> BenchResult:
    """Measure checkpoints of the config's model on the disk of `folder`. Raises `UserError` if
    nothing can be written there."""
    engine = _state(config)
    arrays = [*engine.weights.values(), *(a for m in engine.moments.values() for a in m.values())]
    content = b"".join(array.tobytes() for array in arrays)
    scaler = LossScaler(config.loss_scale, enabled=False).state()
    steps = count(1)
    try:
        place = tempfile.TemporaryDirectory(prefix="horovod-lm-bench-", dir=folder)
    except OSError as error:
        raise UserError(
            f"{folder} can't be written to: {error.strerror}; give another --folder"
        ) from None
    with place as name:
        saved, plain = Path(name) / "saved", Path(name) / "plain"

        def save() -> None:
            step = next(steps)
            checkpoint.save(saved, RunState(step, step, scaler, engine), config, keep=1)

        def load() -> None:
            checkpoint.load(next(saved.iterdir()))

        def write() -> None:
            _write(plain, content)

        functions: dict[str, Callable[[], object]] = {
            "save": save, "write": write, "load": load, "read": plain.read_bytes,
        }  # fmt: skip
        for function in functions.values():
            function()
        contestants = [Repeated(n, f, len(content)) for n, f in functions.items()]
        with Display(rounds * len(contestants), "B") as display:
            measured = interleave(contestants, rounds, seconds, display.turn)
    result = BenchResult(
        "checkpoint",
        f"Checkpoints of {len(content) / 1e6:,.0f} MB",
        [Column("what", "what"), Column("mb_per_second", "MB/s"), Column("seconds", "seconds")],
        {"bytes": len(content), "rounds": rounds, "seconds": seconds},
    )
    words = {
        "save": "save a checkpoint",
        "write": "write and fsync as many bytes",
        "load": "load a checkpoint",
        "read": "read as many bytes",
    }
    for label, what in words.items():
        rate = measured.rate(label)
        row = {"what": what, "mb_per_second": rate / 1e6, "seconds": len(content) / rate}
        result.rows.append(row)
    for first, second in (("save", "write"), ("load", "read")):
        result.ratios.append(Ratio(f"{first} / {second}", *measured.ratio(first, second)))
    result.notes = [
        "A checkpoint is weights and moments with a SHA-256 of each file, computed on saving and "
        "on loading; saving also removes the checkpoint before. What is read was just written, "
        "and comes from the page cache.",
    ]
    return result


def _state(config: Config) -> EngineState:
    """New weights, and moments that are not all zeros."""
    weights, seed = initial_weights(config.model, config.train.seed), config.train.seed
    shapes = {name: array.shape for name, array in weights.items()}
    moments = {
        moment: {name: normals(seed, f"{moment}.{name}", shape, 1.0) for name, shape in s.items()}
        for moment, s in moment_shapes(config.optimizer.name, shapes).items()
    }
    return EngineState(weights, moments, 1)


def _write(path: Path, content: bytes) -> None:
    """Write a new file in place of an old one, and wait until it is on the disk."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
