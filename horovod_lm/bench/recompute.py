"""`bench recompute`: what activation checkpointing costs in time, and saves in memory."""

from __future__ import annotations

from collections.abc import Sequence

from horovod_lm.bench.display import Display
from horovod_lm.bench.processes import Stage
from horovod_lm.bench.result import BenchResult, Column, Ratio
from horovod_lm.bench.rounds import interleave
from horovod_lm.bench.training import start_own, step_tokens
from horovod_lm.config import Config, with_keys

VARIANTS = {"kept": False, "recomputed": True}


def measure(config: Config, *, backends: Sequence[str], rounds: int, seconds: float) -> BenchResult:
    """Measure steps that keep all activations and steps that make each block's anew in the
    backward, each in a process of its own, whose peak of resident memory is compared."""
    threads, tokens = config.launch.threads or 1, step_tokens(config)
    result = BenchResult("recompute", "Activations kept and recomputed", [])
    result.columns = [
        Column("backend", "backend"),
        Column("variant", "variant"),
        Column("step_ms", "step, ms", 4),
        Column("tokens_per_second", "tokens/s", 4),
        Column("memory_mib", "MiB", 4),
    ]
    result.settings |= {"threads": threads, "rounds": rounds, "seconds": seconds}
    result.settings |= {"tokens_per_step": tokens, "parameters": config.model.size}
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
                rate = found.rate(contestant.label)
                result.rows.append(
                    {
                        "backend": backend,
                        "variant": contestant.label,
                        "step_ms": 1e3 * tokens / rate,
                        "tokens_per_second": rate,
                        "memory_mib": contestant.memory_mib,
                    }
                )
            value, interval = found.ratio("kept", "recomputed")  # of times: rates turned round
            label = "step time, recomputed / kept"
            result.ratios.append(Ratio(label, value, interval, None, True, {"backend": backend}))
            kept, recomputed = (contestant.memory_mib for contestant in contestants)
            result.notes.append(
                f"{backend}: the peak of memory is {kept:,.0f} MiB, and {recomputed:,.0f} MiB with "
                f"recomputation: {kept - recomputed:,.0f} MiB less."
            )
    return result
