"""Run folders as training writes them, made up: what the report is tested on."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from horovod_lm.config import Config, make_config, to_toml
from horovod_lm.report.curves import SEED_MARGIN
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import Slice, read_run

BEGIN = 1_764_000_000.0
BACKENDS = ({"launch.backend": "torch"}, {"launch.backend": "tensorflow"})


def make_comparison(
    folder: Path,
    *,
    steps: int = 120,
    apart: float = 1e-5,
    ratios: Sequence[float] = (1.1,) * 6,
    precision: str = "fp32",
    sample: str = "and then the rest",
) -> Comparison:
    """Two runs whose losses lie `apart`, torch `ratios` times as fast as TensorFlow by round."""
    return make_variants(
        folder,
        BACKENDS,
        steps=steps,
        apart=(apart, 0.0),
        speeds=[(ratio, 1.0) for ratio in ratios],
        common={"train.precision": precision},
        sample=sample,
    )


def make_variants(
    folder: Path,
    variants: Sequence[dict[str, Any]],
    *,
    steps: int = 120,
    apart: Sequence[float] | None = None,
    speeds: Sequence[Sequence[float]] | None = None,
    finals: Sequence[Sequence[float | None]] = ((),),
    margin: float = SEED_MARGIN,
    profiles: Sequence[dict[str, Any]] = (),
    common: dict[str, Any] | None = None,
    sample: str = "and then the rest",
) -> Comparison:
    """A run for each of `variants`, values by key. Their curves lie `apart` from one that all
    share; `speeds` are in units of 10240 tokens/s, by round and run; `finals` the validation
    losses, by seed and run (4.6 where none is given)."""
    count = len(variants)
    configs = [_config(steps, {**(common or {}), **values}) for values in variants]
    labels = ["-".join(str(v) for v in values.values()) for values in variants]
    speeds = speeds or [(1.0,) * count] * 6
    seeds, slices = [], []
    for number, losses in enumerate(finals):
        place = folder / f"seed-{number + 1}" if number else folder
        rows, turns = _train(labels, steps, apart or (0.0,) * count, speeds, number)
        slices += turns
        for index, (label, config) in enumerate(zip(labels, configs, strict=True)):
            final = losses[index] if losses else 4.6
            _write(place / label, config, rows[label], final, sample)
            if profiles:
                (place / label / "profile.json").write_text(json.dumps(profiles[index]))
        seeds.append([read_run(place / label) for label in labels])
    return Comparison(
        configs[0],
        seeds[0],
        slices,
        (),
        labels,
        seeds=seeds[1:],
        margin=margin,
        starts=[2.5 * (1 + index) for index in range(count)],
        before=1.0,
    )


def make_profile(**kinds: float) -> dict[str, Any]:
    """A profile of steps 118 to 120 with so many ms a step of each kind."""
    whole = sum(kinds.values())
    return {
        "schema": 1,
        "steps": [118, 120],
        "step_ms": whole,
        "kinds": {
            name.replace("_", " "): {
                "ms": ms,
                "share": ms / whole,
                "ceiling_share": 0.8 if name == "matrix_products" else None,
            }
            for name, ms in kinds.items()
        },
    }


def _config(steps: int, values: dict[str, Any]) -> Config:
    sections: dict[str, Any] = {"name": "made-up", "train": {"steps": steps}, "launch": {}}
    for key, value in {"launch.ranks": 2, **values}.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return make_config(sections, "test")


def _train(
    labels: Sequence[str],
    steps: int,
    apart: Sequence[float],
    speeds: Sequence[Sequence[float]],
    seed: int,
) -> tuple[dict[str, list[dict]], list[Slice]]:
    """Step rows by label, and the slices in which they were made."""
    time, slices = BEGIN + 1e5 * seed, []
    rows: dict[str, list[dict]] = {label: [] for label in labels}
    for number, factors in enumerate(speeds):
        for index, label in enumerate(labels):
            seconds, begin = 0.2 / factors[index], time
            for step in range(steps * number // len(speeds), steps * (number + 1) // len(speeds)):
                time += seconds
                shift = apart[index] * (step % 7) / 6
                loss = 4 + 5 * math.exp(-step / 60) + shift
                rows[label].append({**_step(step + 1, loss, seconds), "time": time})
            round_ = number + seed * len(speeds)
            slices.append(Slice(round_, label, begin - 1e-3, time + 1e-3, seed))
    return rows, slices


def _write(
    run: Path, config: Config, rows: Sequence[dict], final: float | None, sample: str
) -> None:
    run.mkdir(parents=True)
    evaluation = {
        "kind": "evaluation", "step": config.train.steps, "loss": final, "perplexity": 99.5,
        "tokens": 51200, "seconds": 3.2, "time": rows[-1]["time"],
    }  # fmt: skip
    lines = [json.dumps(row) + "\n" for row in [*rows, evaluation]]
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "run.json").write_text(json.dumps(_record(config, final, sample)))
    (run / "config.toml").write_text(to_toml(config))


def _step(step: int, loss: float, seconds: float) -> dict:
    parts = None
    if step % 10 == 0:
        ms = 1e3 * seconds
        parts = {
            "data": 0.01 * ms, "forward_backward": 0.8 * ms, "reduce": 0.12 * ms,
            "update": 0.05 * ms, "other": 0.02 * ms,
        }  # fmt: skip
    return {
        "kind": "step", "step": step, "updates": step, "loss": loss, "norm": 1.0,
        "learning_rate": 1e-3, "loss_scale": None, "skipped": 0, "overflow": None, "tokens": 2048,
        "seconds": seconds, "parts": parts, "memory_mib": None,
    }  # fmt: skip


def _record(config: Config, final: float | None, sample: str) -> dict:
    backend = config.launch.backend
    return {
        "schema": 1, "name": config.name, "state": "finished", "message": None,
        "backend": backend, "ranks": config.launch.ranks, "threads": 1, "controller": "mpi",
        "launcher": "mpirun",
        "versions": {"python": "3.11", backend: "2.0", "horovod": "0.28.1+lm1"},
        "machine": {
            "cpu": "a processor", "cores": 2, "memory_gib": 23.4, "host": "here", "system": "Linux"
        },
        "started": BEGIN, "ended": BEGIN + 60, "steps": config.train.steps,
        "updates": config.train.steps, "first_step_seconds": 0.9, "loss": 4.5,
        "validation_loss": final, "unigram_entropy": 6.4,
        "memory_mib": {"largest": 812.3, "sum": 1601.2}, "parameters": 5_000_000,
        "digest": config.digest, "checkpoint": None,
        "sample": {
            "prompt": "It was a <b>dark</b> night,", "truth": " and a stormy one.",
            "continuation": sample,
        },
    }  # fmt: skip
