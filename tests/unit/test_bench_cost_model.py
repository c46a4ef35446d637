"""The cost model without measuring: its formula, the fit, what it foretells, and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from horovod_lm.bench.cost_model import (
    GIGABIT,
    AllreduceCost,
    Plan,
    Point,
    fit,
    largest_error,
)
from horovod_lm.cli.bench import command

COST = AllreduceCost(fixed=2e-4, host=3e-10, share=0.8)


def points(cost: AllreduceCost, links: tuple[float | None, ...]) -> list[Point]:
    """Exact ones, on 2 and 4 ranks."""
    return [
        Point(ranks, size, cost.seconds(ranks, size, link, 1e-5 if link else 0.0), link,
              1e-5 if link else 0.0)
        for ranks in (2, 4)
        for size in (1_000, 1_000_000, 100_000_000)
        for link in links
    ]  # fmt: skip


def test_the_formula_by_hand() -> None:
    # 4 ranks: 6 messages one after another, and 3/2 of the bytes through memory and link
    cost = AllreduceCost(fixed=0.5, host=1e-9, share=0.5)
    assert cost.seconds(4, 1e9, link=2e9, latency=0.25) == pytest.approx(0.5 + 1.5 + 1.5 * 2)
    assert cost.seconds(2, 1e9) == pytest.approx(0.5 + 1)
    assert cost.seconds(1, 1e9, link=1) == 0


def test_a_fit_finds_what_made_the_points() -> None:
    found = fit(points(COST, (None, 0.1 * GIGABIT, GIGABIT)))
    assert found.fixed == pytest.approx(COST.fixed, rel=1e-6)
    assert found.host == pytest.approx(COST.host, rel=1e-6)
    assert found.share == pytest.approx(COST.share, rel=1e-6)
    assert largest_error(found, points(COST, (0.5 * GIGABIT,))) < 1e-6


def test_without_a_link_all_of_it_is_for_data() -> None:
    found = fit(points(COST, (None,)))
    assert (found.share, found.host) == (1.0, pytest.approx(COST.host, rel=1e-6))


def test_nothing_is_fitted_below_zero() -> None:
    # Large ones faster than the small one foretells: the best line would start below 0.
    found = fit([Point(2, 1000, 1e-6), Point(2, 2000, 4e-6), Point(2, 4000, 9e-6)])
    assert found.fixed == 0 and found.host > 0


def test_efficiency_by_hand() -> None:
    cost = AllreduceCost(fixed=0.0, host=0.0)
    plan = Plan(compute=1.0, size=1_000_000_000)
    communication = plan.communication(cost, 2, link=2e9, latency=0.0)
    assert communication == pytest.approx(0.5)
    assert plan.efficiency(communication) == (pytest.approx(2 / 3), 1.0)
    assert plan.efficiency(2.0) == (pytest.approx(1 / 3), 0.5)
    assert plan.communication(cost, 1, link=2e9, latency=1.0) == 0


def test_each_fused_buffer_costs_a_cycle_or_the_negotiation_if_that_is_longer() -> None:
    one = Plan(1.0, 100, fusion=0, cycle=9.0)
    four = Plan(1.0, 100, fusion=30, cycle=1.0)
    assert (one.buffers, four.buffers) == (1, 4)
    short, long = AllreduceCost(fixed=0.25, host=0.0), AllreduceCost(fixed=2.0, host=0.0)
    assert one.communication(short, 2, 1e9, 0) == pytest.approx(0.25, rel=1e-3)
    assert four.communication(short, 2, 1e9, 0) == pytest.approx(4, rel=1e-3)
    assert four.communication(long, 2, 1e9, 0) == pytest.approx(8, rel=1e-3)


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """What the two benchmarks would write: 1 ms + 1 ns a byte on 2 ranks, 1000 tokens/s."""
    rows = [{"bytes": size, "torch MPI": 1 + 1e-6 * size} for size in (1_000, 1_000_000)]
    allreduce = {"bench": "allreduce", "settings": {"ranks": 2}, "rows": rows}
    model = {"width": 8, "heads": 2, "layers": 1, "context": 10, "vocabulary": 16}
    step = {"contestant": "torch backend", "precision": "fp32", "tokens_per_second": 1000.0}
    throughput = {
        "bench": "throughput", "settings": {"model": model, "batch": 5}, "rows": [step],
    }  # fmt: skip
    return [
        "--allreduce", write(tmp_path / "allreduce.json", allreduce),
        "--throughput", write(tmp_path / "throughput.json", throughput),
    ]  # fmt: skip


def test_from_the_files_of_other_benchmarks(files: list[str]) -> None:
    options = ["--link-gbit", "8", "--latency-us", "0", "--ranks", "2,4", "--json"]
    done = CliRunner().invoke(command, ["cost-model", *files, *options], catch_exceptions=False)
    found = json.loads(done.stdout)
    settings = found["settings"]
    assert settings["fixed_ms"] == pytest.approx(1)
    assert settings["host_gb_per_second"] == pytest.approx(1)
    assert settings["compute_ms"] == pytest.approx(50)  # 5 x 10 tokens
    size = settings["gradient_bytes"]
    assert size > 1000
    # 8 Gbit/s are 1 ns a byte, as is memory
    for row, moved in zip(found["rows"], (1.0, 1.5), strict=True):
        assert row["allreduce_ms"] == pytest.approx(1 + 2e-6 * moved * size)
        assert row["efficiency"] == pytest.approx(50 / (50 + row["allreduce_ms"]))
        assert row["efficiency_hidden"] == 1


@pytest.mark.parametrize(
    ("broken", "content", "message"),
    [
        ("--allreduce", {"bench": "throughput"}, "is not what horovod-lm bench allreduce"),
        (
            "--allreduce",
            {"bench": "allreduce", "settings": {"ranks": 1}, "rows": []},
            "has no allreduce of torch over MPI on two or more ranks",
        ),
        (
            "--throughput",
            {"bench": "throughput", "settings": {"model": {}, "batch": 1}, "rows": []},
            "has no torch backend in fp32",
        ),
    ],
)
def test_other_files_are_refused(
    files: list[str], tmp_path: Path, broken: str, content: object, message: str
) -> None:
    files[files.index(broken) + 1] = write(tmp_path / "other.json", content)
    done = CliRunner().invoke(command, ["cost-model", *files])
    assert message in str(done.exception)
