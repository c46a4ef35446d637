"""`bench recompute`: what activation checkpointing costs in time, and saves in memory."""

from __future__ import annotations

from collections.abc import Sequence

from horovod_lm.bench.display import Display
from horovod_lm.bench.processes import Stage
from horovod_lm.bench.result import BenchResult, Column
from horovod_lm.bench.rounds import interleave
from horovod_lm.bench.training import start_own, step_tokens
from horovod_lm.bench.variants import STEP_COLUMNS, step_row, step_settings, time_ratio
from horovod_lm.config import Config, with_keys

VARIANTS = {"kept": False, "recomputed": True}


def measure(config: Config, *, backends: Sequence[str], rounds: int, seconds: float) -> BenchResult:
    """Measure steps that keep all activations and steps that make each block's anew in the
    backward, each in a process of its own, whose peak of resident memory is compared."""
    result = BenchResult(
        "recompute",
        "Activations kept and recomputed",
        [*STEP_COLUMNS, Column("memory_mib", "MiB", 4)],
        step_settings(config, rounds, seconds),
    )
    turns = len(backends) * len(VARIANTS) * rounds
    with Stage() as stage, Display(turns, "tokens") as display:
        for backend in backends:
            contestants = []
            for name, recompute in VARIANTS.items():
                variant = with_keys(
                    config, launch={"backend": backend}, train={"recompute": recompute}
                )
                contestants.append(start_own(stage, variant).contestant(name))
            found = interleave(contestants, rounds, seconds, display.turn)
            for contestant in contestants:
                row = step_row(backend, contestant.label, found, step_tokens(config))
                result.rows.append(row | {"memory_mib": contestant.memory_mib})
            result.ratios.append(time_ratio(backend, found, "recomputed", "kept"))
            kept, recomputed = (contestant.memory_mib for contestant in contestants)
            result.notes.append(
                f"{backend}: the peak of memory is {kept:,.0f} MiB, and {recomputed:,.0f} MiB with "
                f"recomputation: {kept - recomputed:,.0f} MiB less."
            )
    return result
