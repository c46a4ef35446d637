"""Reading a run's folder: `run.json` and `metrics.jsonl`, also while the run writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from horovod_lm.config import Config, load_config
from horovod_lm.profiles import SUMMARY
from horovod_lm.run_folder import STATE

REPORT = "report.json"  # in a comparison's folder
WARM_UP = 10  # steps at the beginning that no speed counts
PARTS = ("data", "forward_backward", "reduce", "update", "other")
Row = dict[str, Any]


class Follower:
    """Reads the rows of a growing `metrics.jsonl`; a line that is not whole yet waits."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.steps: list[Row] = []
        self.evaluations: list[Row] = []
        self.weights: list[Row] = []

    def poll(self) -> list[Row]:
        """The rows that are new since the last call, also appended to the list of their kind."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                block = file.read()
        except FileNotFoundError:
            return []
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        rows = [json.loads(line) for line in whole.splitlines() if line.strip()]
        kinds = {"step": self.steps, "evaluation": self.evaluations, "weights": self.weights}
        for row in rows:
            kinds[row["kind"]].append(row)
        return rows

    @property
    def step(self) -> int:
        """Number of the last step that is finished; 0 before the first."""
        return self.steps[-1]["step"] if self.steps else 0


@dataclass
class Run:
    """A run as its folder tells it. `profile` is None where none was taken."""

    folder: Path
    record: Row
    steps: list[Row]
    evaluations: list[Row] = field(default_factory=list)
    weights: list[Row] = field(default_factory=list)
    profile: Row | None = None

    @property
    def backend(self) -> str:
        """Name of the framework it was last trained in."""
        return str(self.record["backend"])

    @cached_property
    def config(self) -> Config:
        """The whole configuration."""
        return load_config(self.folder / "config.toml")

    @cached_property
    def losses(self) -> dict[int, float]:
        """Loss by step, in nats per target token; steps whose loss is not finite are left out."""
        return {row["step"]: row["loss"] for row in self.steps if row["loss"] is not None}

    @property
    def final_loss(self) -> float | None:
        """The last validation loss, or the loss of the last step if there was no validation."""
        validation = self.record.get("validation_loss")
        return self.record.get("loss") if validation is None else validation


def seed_folder(output: Path, number: int) -> Path:
    """Where a comparison's runs of a seed lie: those of the config's own seed in its folder itself,
    those of the second seed in `seed-2`, and so on."""
    return output / f"seed-{number + 1}" if number else output


def read_run(folder: Path) -> Run:
    """Read a run's folder."""
    text = (folder / STATE).read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=lambda _: None)  # a loss that is inf or nan
    follower = Follower(folder / "metrics.jsonl")
    follower.poll()
    profile = folder / SUMMARY
    return Run(
        folder,
        record,
        follower.steps,
        follower.evaluations,
        follower.weights,
        json.loads(profile.read_text(encoding="utf-8")) if profile.exists() else None,
    )


@dataclass(frozen=True)
class Slice:
    """A time in which one run alone was awake: that of variant `label` with seed number `seed`
    (0: the config's own). Unix times, and the round it belongs to."""

    round: int
    label: str
    begin: float
    end: float
    seed: int = 0


def whole_steps(run: Run, slice_: Slice) -> list[Row]:
    """Step rows that lie wholly in a slice, without the first: a step that a pause cut ends in no
    slice, and the one after it still finds the caches cold."""
    inside = [
        row
        for row in run.steps
        if row["time"] - row["seconds"] >= slice_.begin and row["time"] <= slice_.end
    ]
    return [row for row in inside[1:] if row["step"] > WARM_UP and not row.get("profiled")]


def whole_profile(run: Run, slices: Sequence[Slice]) -> Row | None:
    """A run's profile; None where there is none, or where the run slept within its steps, as a fast
    model may that passes a few more of them before it is put to sleep. `slices` are all of the run:
    each sleep ends with one."""
    spans = [
        (row["time"] - row["seconds"], row["time"]) for row in run.steps if row.get("profiled")
    ]
    slept = any(begin < s.begin < end for begin, end in spans for s in slices)
    return None if slept else run.profile


def tokens_per_second(rows: list[Row]) -> float | None:
    """Sum of target tokens over sum of seconds; synchronised steps (with parts) are left out."""
    counted = [row for row in rows if row["parts"] is None]
    seconds = sum(row["seconds"] for row in counted)
    return sum(row["tokens"] for row in counted) / seconds if seconds else None


def mean_parts(rows: list[Row]) -> dict[str, float] | None:
    """Mean time of a step by part, in ms; its sum is the mean synchronised step."""
    parts = [row["parts"] for row in rows if row["parts"] is not None]
    if not parts:
        return None
    return {name: sum(p[name] for p in parts) / len(parts) for name in PARTS}
