"""Step times of variants of one training: in one process, so that nothing but the variant differs,
and what others that measure step times say in the same words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from horovod_lm.bench.display import Display
from horovod_lm.bench.processes import Stage
from horovod_lm.bench.result import BenchResult, Column, Ratio
from horovod_lm.bench.rounds import Rounds, interleave
from horovod_lm.bench.training import OwnTraining, step_tokens
from horovod_lm.config import Config, with_keys

STEP_COLUMNS = (
    Column("backend", "backend"),
    Column("variant", "variant"),
    Column("step_ms", "step, ms", 4),
    Column("tokens_per_second", "tokens/s", 4),
)


def step_settings(config: Config, rounds: int, seconds: float) -> dict[str, Any]:
    """The settings of a result of step times."""
    return {
        "threads": config.launch.threads or 1,
        "rounds": rounds,
        "seconds": seconds,
        "tokens_per_step": step_tokens(config),
        "parameters": config.model.size,
    }


def step_row(backend: str, variant: str, found: Rounds, tokens: int) -> dict[str, Any]:
    """The row of a variant, whose steps have so many tokens, in the table of `STEP_COLUMNS`."""
    rate = found.rate(variant)
    row = {"backend": backend, "variant": variant}
    return row | {"step_ms": 1e3 * tokens / rate, "tokens_per_second": rate}


def time_ratio(
    backend: str, found: Rounds, first: str, second: str, aim: float | None = None
) -> Ratio:
    """The ratio of two variants' step times, and the most that it should be."""
    value, interval = found.ratio(second, first)  # of times, so rates the other way round
    label = f"step time, {first} / {second}"
    return Ratio(label, value, interval, aim, True, {"backend": backend})


class Variants:
    """Our own trainings of several configs, by their names, which are the parts."""

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], threads: int) -> None:
        self.parts = list(configs)
        self._trainings = {name: self.training(name, configs[name], threads) for name in configs}

    def training(self, name: str, config: Mapping[str, Any], threads: int) -> OwnTraining:
        """The training called `name`."""
        return OwnTraining(config, threads)

    def step(self, part: str) -> float:
        """One step of a training's loop; its target tokens."""
        return self._trainings[part].step("")

    def broadcast(self, data: bytes) -> bytes:
        """There is one rank only."""
        return data


def compare_variants(
    result: BenchResult,
    configs: Mapping[str, Config],
    figures: Sequence[tuple[str, str, float | None]],
    *,
    backends: Sequence[str],
    work: str = f"{__name__}:Variants",
    rounds: int,
    seconds: float,
) -> BenchResult:
    """Fill `result` with the step times of every config in every backend, on one rank.

    Each of `figures` is a ratio of step times: the names of two configs, and the most that it
    should be. `work` makes the `Variants` in a process for each backend.
    """
    config = next(iter(configs.values()))
    threads = config.launch.threads or 1
    measured: dict[str, Rounds] = {}
    with Stage() as stage, Display(len(backends) * len(configs) * rounds, "tokens") as display:
        for backend in backends:
            dumps = {
                name: with_keys(variant, launch={"backend": backend}).model_dump(mode="json")
                for name, variant in configs.items()
            }
            process = stage.start(
                backend,
                work,
                {"configs": dumps, "threads": threads},
                config=config,
                threads=threads,
            )
            contestants = [process.contestant(name, name) for name in configs]
            measured[backend] = interleave(contestants, rounds, seconds, display.turn)
    result.columns = STEP_COLUMNS
    result.settings |= step_settings(config, rounds, seconds)
    for backend, found in measured.items():
        result.rows += [step_row(backend, name, found, step_tokens(config)) for name in configs]
        result.ratios += [time_ratio(backend, found, *figure) for figure in figures]
    return result
