"""Run folders as training writes them, made up: what the report is tested on."""

import json
import math
from pathlib import Path

from horovod_lm.config import Config, make_config, to_toml
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import Slice, read_run

BACKENDS = ("torch", "tensorflow")
BEGIN = 1_764_000_000.0


def make_comparison(
    folder: Path,
    *,
    steps: int = 120,
    apart: float = 1e-5,
    ratios: tuple[float, ...] = (1.1,) * 6,
    precision: str = "fp32",
    sample: str = "and then the rest",
) -> Comparison:
    """Two runs whose losses lie `apart`, torch `ratios` times as fast as TensorFlow by round."""
    config = make_config(
        {
            "name": "made-up",
            "train": {"steps": steps, "precision": precision},
            "launch": {"ranks": 2},
        },
        "test",
    )
    slices = _write(folder, config, apart, ratios, sample)
    return Comparison(config, (read_run(folder / "torch"), read_run(folder / "tensorflow")), slices)


def _write(
    folder: Path, config: Config, apart: float, ratios: tuple[float, ...], sample: str
) -> list[Slice]:
    steps, time, slices = config.train.steps, BEGIN, []
    rows: dict[str, list[dict]] = {backend: [] for backend in BACKENDS}
    for number, ratio in enumerate(ratios):
        for backend in BACKENDS:
            seconds = 0.2 if backend == "tensorflow" else 0.2 / ratio
            begin = time
            for step in range(steps * number // len(ratios), steps * (number + 1) // len(ratios)):
                time += seconds
                shift = apart * (step % 7) / 6 if backend == "torch" else 0.0
                rows[backend].append(_step(step + 1, 4 + 5 * math.exp(-step / 60) + shift, seconds))
                rows[backend][-1]["time"] = time
            slices.append(Slice(number, backend, begin - 1e-3, time + 1e-3))
    for backend in BACKENDS:
        run = folder / backend
        run.mkdir(parents=True)
        evaluation = {
            "kind": "evaluation", "step": steps, "loss": 4.6, "perplexity": 99.5, "tokens": 51200,
            "seconds": 3.2, "time": time,
        }  # fmt: skip
        lines = [json.dumps(row) + "\n" for row in [*rows[backend], evaluation]]
        (run / "metrics.jsonl").write_text("".join(lines))
        (run / "run.json").write_text(json.dumps(_record(backend, config, sample)))
        launch = config.launch.model_copy(update={"backend": backend})
        (run / "config.toml").write_text(to_toml(config.model_copy(update={"launch": launch})))
    return slices


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


def _record(backend: str, config: Config, sample: str) -> dict:
    return {
        "schema": 1, "name": config.name, "state": "finished", "message": None,
        "backend": backend, "ranks": 2, "threads": 1, "controller": "mpi", "launcher": "mpirun",
        "versions": {"python": "3.11", backend: "2.0", "horovod": "0.28.1+lm1"},
        "machine": {
            "cpu": "a processor", "cores": 2, "memory_gib": 23.4, "host": "here", "system": "Linux"
        },
        "started": BEGIN, "ended": BEGIN + 60, "steps": config.train.steps,
        "updates": config.train.steps, "first_step_seconds": 0.9, "loss": 4.5,
        "validation_loss": 4.6, "unigram_entropy": 6.4,
        "memory_mib": {"largest": 812.3, "sum": 1601.2}, "parameters": 5_000_000,
        "digest": config.digest, "checkpoint": None,
        "sample": {
            "prompt": "It was a <b>dark</b> night,", "truth": " and a stormy one.",
            "continuation": sample,
        },
    }  # fmt: skip
