"""Made-up runs of many variants, with all that a report can show."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from horovod_lm.config import to_toml
from horovod_lm.report.results import Comparison
from horovod_lm.report.runs import Run, read_run
from horovod_lm.sketch import sketch
from horovod_lm.spec import ModelSpec
from tests.unit.report_runs import make_comparison

KINDS = (
    "matrix products", "attention", "norms", "activations", "loss", "embedding", "dropout",
    "optimizer", "communication", "copies", "framework overhead and waiting",
)  # fmt: skip

# A few weights of each parameter are enough for a sketch.
WEIGHTS = {p.name: np.random.default_rng(1).normal(size=50) for p in ModelSpec().parameters}


def make_variants(
    folder: Path, count: int, sample: str = "and then the rest", steps: int = 120
) -> Comparison:
    """`count` runs in fp16 that differ in their backend and threads, in alternating rounds."""
    base = make_comparison(
        folder / "base", steps=steps, apart=1e-4, precision="fp16", sample=sample, ratios=(1.1,) * 7
    )
    labels = [f"variant-{i}" for i in range(count)]
    runs = [_variant(base.runs[i % 2], folder / label, i) for i, label in enumerate(labels)]
    backends = [run.backend for run in base.runs]
    slices = [
        replace(s, label=label)
        for s in base.slices
        for i, label in enumerate(labels)
        if s.label == backends[i % 2]
    ]
    seeds = [[_reseeded(run, i, seed) for i, run in enumerate(runs)] for seed in (1, 2)]
    return Comparison(base.config, runs, slices, ["made up"], labels, seeds=seeds, margin=0.01)


def _variant(run: Run, folder: Path, which: int) -> Run:
    folder.mkdir(parents=True)
    launch = run.config.launch.model_copy(update={"threads": 1 + which})
    config = run.config.model_copy(update={"launch": launch})
    (folder / "config.toml").write_text(to_toml(config))
    lines = []
    for row in run.steps:
        step = row["step"]
        overflow = {"rank": 1, "tensor": "heads.lm.kernel"} if step in (5, 50 + which) else None
        scale = 2.0 ** (16 - (step > 5) - (step > 50 + which))
        changed = {
            "loss": None if overflow else row["loss"] + which * 1e-3 * math.sin(step),
            "norm": None if overflow else 1 + 0.2 * math.cos(step / 9) + 1e-3 * which,
            "loss_scale": scale, "overflow": overflow, "seconds": row["seconds"] / (1 + which / 20),
        }  # fmt: skip
        lines.append(row | changed)
    for step in range(0, len(run.steps) + 1, max(20, len(run.steps) // 50)):
        weights = {
            name: array * (1 + step / 100) + step * 1e-4 * which * np.sin(np.arange(array.size))
            for name, array in WEIGHTS.items()
        }
        found = {layer: values.tolist() for layer, values in sketch(weights).items()}
        lines.append({"kind": "weights", "step": step, "sketch": found, "time": 0.0})
    lines += run.evaluations
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.json").write_text(json.dumps(run.record))
    kinds = {
        kind: {"ms": 10 / (1 + i) + which, "share": 0.1, "ceiling_share": None}
        for i, kind in enumerate(KINDS)
    }
    profile = {"schema": 1, "steps": [20, 25], "kinds": kinds, "step_ms": 60.0 + which}
    (folder / "profile.json").write_text(json.dumps(profile))
    return read_run(folder)


def _reseeded(run: Run, which: int, seed: int) -> Run:
    loss = 4.6 + 0.03 * seed + 1e-3 * which * math.cos(seed + which)
    return replace(run, record=run.record | {"validation_loss": loss}, steps=[])
