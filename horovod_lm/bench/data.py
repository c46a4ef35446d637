"""`bench data`: how fast batches are read, against a copy in memory and against training."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from horovod_lm.bench.display import Display
from horovod_lm.bench.processes import Stage
from horovod_lm.bench.result import BenchResult, Column, Ratio
from horovod_lm.bench.rounds import Contestant, Repeated, Rounds, interleave
from horovod_lm.bench.training import start_own, step_tokens
from horovod_lm.config import Config, with_keys
from horovod_lm.data.batches import Batches
from horovod_lm.data.shards import Tokens, TokenWriter
from horovod_lm.objectives.registry import causal_windows

TOKENS, QUICK_TOKENS = 50_000_000, 100_000
COPIED = 64_000_000  # bytes: more than any cache
BYTES = 12  # of a token in a batch: input and target ids of 4 bytes each, a weight of 4


def measure(
    config: Config, *, tokens: int, backends: Sequence[str], rounds: int, seconds: float
) -> BenchResult:
    """Measure batches of one rank from memory-mapped shards of `tokens` ids, prepared ahead in a
    thread as the training loop has them. The ids are drawn from a seed."""
    with tempfile.TemporaryDirectory(prefix="horovod-lm-bench-") as folder:
        batches = Batches(
            causal_windows(
                _write(Path(folder), tokens, config),
                config.model.context,
                config.train.global_batch_size,
                config.train.seed,
            ),
            micro_batch_size=config.train.micro_batch_size,
            rank=0,
            ranks=1,
        )
        measured = _race(config, batches, backends, rounds, seconds)
    result = BenchResult(
        "data",
        "Batches from memory-mapped shards",
        [
            Column("who", "who"),
            Column("tokens_per_second", "tokens/s"),
            Column("mb_per_second", "MB/s of batches"),
        ],
        {
            "tokens": tokens,
            "tokens_per_batch": step_tokens(config),
            "threads": config.launch.threads or 1,
            "rounds": rounds,
            "seconds": seconds,
        },
    )
    names = {"reader": "reader", "copy": "copy in memory"}
    names |= {backend: f"training, {backend}" for backend in backends}
    for label, name in names.items():
        rate = measured.rate(label)
        row = {"who": name, "tokens_per_second": rate, "mb_per_second": rate * BYTES / 1e6}
        result.rows.append(row)
    for label, name in list(names.items())[1:]:
        result.ratios.append(Ratio(f"reader / {name}", *measured.ratio("reader", label)))
    result.notes = [
        f"A token takes {BYTES} bytes of a batch: input, target and weight. The copy is of "
        f"{COPIED // 1_000_000} MB by one thread; the shards are in the page cache.",
    ]
    return result


def _race(
    config: Config, batches: Batches, backends: Sequence[str], rounds: int, seconds: float
) -> Rounds:
    """Let `reader`, `copy` and a training by each backend take turns."""
    source = np.ones(COPIED // 4, np.float32)
    target = np.empty_like(source)
    turns = rounds * (2 + len(backends))
    with batches.ahead(0) as stream, Stage() as stage, Display(turns, "tokens") as display:
        contestants: list[Contestant] = [
            Repeated("reader", lambda: next(stream), step_tokens(config)),
            Repeated("copy", lambda: np.copyto(target, source), COPIED / BYTES),
        ]
        for backend in backends:
            process = start_own(stage, with_keys(config, launch={"backend": backend}))
            contestants.append(process.contestant(backend))
        return interleave(contestants, rounds, seconds, display.turn)


def _write(folder: Path, count: int, config: Config) -> Tokens:
    """Shards of drawn ids in documents of 1000."""
    vocabulary = config.model.vocabulary
    with TokenWriter(folder, "train", vocabulary) as writer:
        generator = np.random.default_rng(config.train.seed)
        for start in range(0, count, 1_000_000):
            ids = generator.integers(vocabulary, size=min(1_000_000, count - start))
            writer.write([(part, True) for part in np.split(ids, range(1000, len(ids), 1000))])
        return Tokens(folder, writer.finish())
