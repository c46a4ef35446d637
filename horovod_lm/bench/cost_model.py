"""`bench cost-model`: measured allreduces and steps foretell those of more ranks on other links."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from horovod_lm.bench import allreduce
from horovod_lm.bench.display import Display
from horovod_lm.bench.processes import Stage
from horovod_lm.bench.result import BenchResult, Column
from horovod_lm.bench.rounds import interleave
from horovod_lm.bench.throughput import BACKENDS
from horovod_lm.bench.training import start_own, step_tokens
from horovod_lm.config import Config
from horovod_lm.errors import UserError
from horovod_lm.spec import ModelSpec, element_sizes

GIGABIT = 1e9 / 8  # bytes a second

COLUMNS = (
    Column("link_gbit", "link, Gbit/s"),
    Column("ranks", "ranks"),
    Column("allreduce_ms", "allreduce, ms"),
    Column("step_ms", "step, ms"),
    Column("efficiency", "efficiency", share=True),
    Column("efficiency_hidden", "if hidden", share=True),
)


@dataclass(frozen=True)
class Point:
    """One measured allreduce: `size` bytes on `ranks` ranks took `seconds`, over a link of `link`
    bytes a second in each direction with `latency` seconds; None: in one machine's memory."""

    ranks: int
    size: int
    seconds: float
    link: float | None = None
    latency: float = 0.0


@dataclass(frozen=True)
class AllreduceCost:
    """The time of a ring allreduce (Patarasuk and Yuan, 2009): 2 (n - 1) messages one after
    another, each of size / n bytes,

        seconds = fixed + 2 (n - 1) latency + 2 (n - 1) / n x size x (host + 1 / (share x link)).

    `fixed`: seconds whatever the size (ranks agree that the tensor is ready, threads wake); `host`:
    seconds a byte takes in a rank's memory, to be copied and added; `share`: of the link's rate,
    what is left for data.
    """

    fixed: float
    host: float
    share: float = 1.0

    def seconds(
        self, ranks: int, size: float, link: float | None = None, latency: float = 0.0
    ) -> float:
        """The time of one allreduce; see `Point` for the units."""
        if ranks == 1:
            return 0.0
        steps = 2 * (ranks - 1)
        byte = self.host + (0.0 if link is None else 1 / (self.share * link))
        return self.fixed + steps * latency + steps / ranks * size * byte


def fit(points: Sequence[Point]) -> AllreduceCost:
    """The cost with the least relative squared error, none of its parts below 0; `share` is 1 where
    no point has a link."""
    names = ["fixed", "host", "per_link"]
    columns, times = [], []
    for point in points:
        steps = 2 * (point.ranks - 1)
        moved = steps / point.ranks * point.size
        over = moved / point.link if point.link else 0.0
        columns.append([1.0, moved, over])
        times.append(point.seconds - steps * point.latency)
    matrix, wanted = np.array(columns), np.array(times)
    weights = 1 / np.array([point.seconds for point in points])
    found = dict.fromkeys(names, 0.0)
    kept = [i for i in range(3) if matrix[:, i].any()]
    while kept:
        scales = matrix[:, kept].max(0)  # seconds and seconds a byte are far apart
        scaled = matrix[:, kept] / scales * weights[:, None]
        values = np.linalg.lstsq(scaled, wanted * weights, rcond=None)[0] / scales
        if (values >= 0).all():
            found |= {names[i]: float(v) for i, v in zip(kept, values, strict=True)}
            break
        kept.pop(int(np.argmin(values * scales)))
    share = 1 / found["per_link"] if found["per_link"] else 1.0
    return AllreduceCost(found["fixed"], found["host"], share)


def largest_error(cost: AllreduceCost, points: Sequence[Point]) -> float:
    """The largest relative difference of a point from the fit."""
    return max(
        abs(cost.seconds(p.ranks, p.size, p.link, p.latency) / p.seconds - 1) for p in points
    )


@dataclass(frozen=True)
class Plan:
    """A data-parallel step to be foretold: `compute` seconds without communication, `size` bytes of
    gradients. `fusion`: bytes of Horovod's fusion buffer (0: all in one tensor, as ours); `cycle`:
    seconds of Horovod's cycle, each of which reduces one buffer at most."""

    compute: float
    size: int
    fusion: int = 0
    cycle: float = 0.0

    @property
    def buffers(self) -> int:
        """How many allreduces a step has."""
        return max(1, math.ceil(self.size / self.fusion)) if self.fusion else 1

    def communication(self, cost: AllreduceCost, ranks: int, link: float, latency: float) -> float:
        """Seconds of all allreduces of a step."""
        if ranks == 1:
            return 0.0
        each = cost.seconds(ranks, self.size / self.buffers, link, latency)
        waiting = max(0.0, self.cycle - cost.fixed) if self.fusion else 0.0
        return self.buffers * (each + waiting)

    def efficiency(self, communication: float) -> tuple[float, float]:
        """The share of a rank's speed that is left: with the allreduce after the backward, as ours
        is, and if all of it could be hidden behind the computation."""
        compute = self.compute
        return compute / (compute + communication), compute / max(compute, communication)


def measure(
    config: Config,
    *,
    allreduces: Sequence[Path],
    throughput: Path | None,
    step_seconds: float | None,
    sizes: Sequence[int],
    links: Sequence[float],
    latency: float,
    ranks: Sequence[int],
    fusion: int,
    cycle: float,
    rounds: int,
    seconds: float,
) -> BenchResult:
    """Fit the model and foretell steps over links of `links` Gbit/s with `latency` seconds.

    `allreduces` and `throughput` are JSON of those benchmarks; what is not given is measured here,
    for the config's backend. `step_seconds` stands in place of a measured step. Raises `UserError`
    for files that are something else.
    """
    backend, spec = config.launch.backend, config.model
    points = [p for path in allreduces for p in _points(path, backend)]
    if not points:
        points = _measured_points(config, sizes, rounds, seconds)
    if throughput is not None:
        spec, measured = _step(throughput, backend)
        step_seconds = step_seconds or measured
    compute = step_seconds or _measured_step(config, rounds, seconds)
    cost = fit(points)
    plan = Plan(compute, element_sizes(config.train.precision)[0] * spec.size, fusion, cycle)
    result = BenchResult(
        "cost-model",
        "Foretold steps",
        COLUMNS,
        {
            "fixed_ms": 1e3 * cost.fixed,
            "host_gb_per_second": 1e-9 / cost.host if cost.host else None,
            "fit_largest_error": largest_error(cost, points),
            "points": [vars(point) for point in points],
            "compute_ms": 1e3 * compute,
            "gradient_bytes": plan.size,
            "latency_us": 1e6 * latency,
            "fusion_bytes": fusion,
            "cycle_ms": 1e3 * cycle,
            "buffers": plan.buffers,
        },
        group_by=("link_gbit",),
    )
    result.rows = [_row(plan, cost, link, latency, n) for link in links for n in ranks]
    result.notes = _notes(plan, cost, points, latency)
    return result


def _row(
    plan: Plan, cost: AllreduceCost, link: float, latency: float, ranks: int
) -> dict[str, Any]:
    """The foretold step of `ranks` ranks over links of `link` Gbit/s."""
    communication = plan.communication(cost, ranks, link * GIGABIT, latency)
    after, hidden = plan.efficiency(communication)
    return {
        "link_gbit": link,
        "ranks": ranks,
        "allreduce_ms": 1e3 * communication,
        "step_ms": 1e3 * (plan.compute + communication),
        "efficiency": after,
        "efficiency_hidden": hidden,
    }


def _notes(plan: Plan, cost: AllreduceCost, points: Sequence[Point], latency: float) -> list[str]:
    memory = f"{1e-9 / cost.host:.3g} GB/s" if cost.host else "no time"
    return [
        f"Fitted to {len(points)} allreduces: {1e3 * cost.fixed:.3g} ms whatever the size, "
        f"{memory} in a rank's memory; largest error {largest_error(cost, points):.0%}.",
        f"A step computes for {1e3 * plan.compute:.4g} ms on each rank and reduces "
        f"{plan.size / 1e6:.3g} MB in {plan.buffers} allreduce{'s' * (plan.buffers > 1)}; "
        f"latency {1e6 * latency:g} µs a message, each rank on a link of its own.",
        "Efficiency: a rank's speed against one rank's alone, the allreduce after the backward; "
        "if hidden: the most that could be reached by reducing during the backward.",
    ]


def _read(path: Path, bench: str) -> dict[str, Any]:
    """The JSON of a benchmark. Raises `UserError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(content, dict) or content.get("bench") != bench:
        raise UserError(
            f"{path} is not what horovod-lm bench {bench} --output writes; give such a file"
        )
    return content


def _points(path: Path, backend: str) -> list[Point]:
    points = _points_of(_read(path, "allreduce"), backend)
    if not points:
        raise UserError(
            f"{path} has no allreduce of {backend} over MPI on two or more ranks; measure one with "
            f"horovod-lm bench allreduce -np 2 --backends {backend}"
        )
    return points


def _points_of(content: Mapping[str, Any], backend: str) -> list[Point]:
    label, ranks = f"{backend} MPI", content["settings"]["ranks"]
    rows = [row for row in content["rows"] if label in row] if ranks > 1 else []
    return [Point(ranks, row["bytes"], 1e-3 * row[label]) for row in rows]


def _step(path: Path, backend: str) -> tuple[ModelSpec, float]:
    """The model, and the seconds of a step of one rank, that a throughput benchmark had."""
    content = _read(path, "throughput")
    settings = content["settings"]
    spec = ModelSpec.model_validate(settings["model"])
    wanted = BACKENDS.get(backend, backend)
    for row in content["rows"]:
        if row["contestant"] == wanted and row["precision"] == "fp32":
            return spec, settings["batch"] * spec.context / row["tokens_per_second"]
    raise UserError(f"{path} has no {wanted} in fp32; measure it, or give --step-ms")


def _measured_points(
    config: Config, sizes: Sequence[int], rounds: int, seconds: float
) -> list[Point]:
    """Allreduces of the config's backend over MPI, measured now."""
    backend = config.launch.backend
    found = allreduce.measure(
        config,
        sizes=sizes,
        backends=[backend],
        transports=["mpi"],
        rounds=rounds,
        seconds=seconds,
    )
    return _points_of(found.as_json(), backend)


def _measured_step(config: Config, rounds: int, seconds: float) -> float:
    """Seconds of a step of one rank, measured now."""
    with Stage() as stage, Display(rounds, "tokens") as display:
        training = start_own(stage, config).contestant("step")
        measured = interleave([training], rounds, seconds, display.turn)
    return step_tokens(config) / measured.rate("step")
