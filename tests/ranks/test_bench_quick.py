"""The benchmarks on real ranks at tiny sizes: what they write, not how fast anything is."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.jobs import needs_horovod, run_job

pytestmark = needs_horovod


def bench(folder: Path, *arguments: str) -> dict[str, Any]:
    """The JSON of a quick benchmark."""
    output = folder / "found.json"
    command = [sys.executable, "-m", "horovod_lm", "bench", *arguments, "--quick"]
    # A contestant that sleeps while others start looks stalled to its ranks.
    done = run_job(
        folder / "log", [*command, "--output", str(output)], ranks=0, limit=280, stall_seconds=280
    )
    assert done.code == 0, done.text
    found = json.loads(output.read_text())
    assert (found["schema"], found["bench"]) == (1, arguments[0])
    for ratio in found["ratios"]:
        low, high = ratio["interval"]["low"], ratio["interval"]["high"]
        assert 0 < low <= ratio["ratio"] <= high < math.inf
    return found


def ratios(found: dict[str, Any], *where: str) -> list[tuple[str, ...]]:
    """Names of the ratios, and of what."""
    return [(ratio["name"], *(ratio[key] for key in where)) for ratio in found["ratios"]]


def test_allreduce(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    found = bench(tmp_path, "allreduce", "-np", "2")
    names = ["torch MPI", "torch Gloo", "tensorflow MPI", "tensorflow Gloo"]
    raw = ["raw MPI in place", "raw MPI out of place", "copy"]
    for row, size in zip(found["rows"], (1_000, 64_000), strict=True):
        assert row["bytes"] == size
        assert all(row[name] > 0 for name in (*names, *raw))
    others = [raw[0], raw[0], raw[1], raw[1]]
    assert ratios(found, "size") == [
        (f"{name} / {other}", size)
        for name, other in zip(names, others, strict=True)
        for size in ("1 KB", "64 KB")
    ]


def test_loss_scaling(tmp_path: Path) -> None:
    found = bench(tmp_path, "loss-scaling")
    name = "step time, dynamic / none"
    assert ratios(found, "backend") == [(name, "torch"), (name, "tensorflow")]
    assert [ratio["aim"] for ratio in found["ratios"]] == [1.02, 1.02]
    assert all(row["step_ms"] > 0 for row in found["rows"])


def test_dropout(tmp_path: Path) -> None:
    found = bench(tmp_path, "dropout", "--backends", "torch")
    assert [row["variant"] for row in found["rows"]] == ["shared", "native", "none"]
    assert ("step time, shared / native", "torch") in ratios(found, "backend")


def test_dropout_needs_dropout(tmp_path: Path) -> None:
    without = ["--set", "model.dropout=0", "--set", "model.attention_dropout=0"]
    command = [sys.executable, "-m", "horovod_lm", "bench", "dropout", "--quick", *without]
    message = run_job(tmp_path / "log", command, ranks=0).only_message(2)
    assert "model.dropout and model.attention_dropout are 0" in message


def test_recompute(tmp_path: Path) -> None:
    found = bench(tmp_path, "recompute", "--backends", "torch")
    assert [row["variant"] for row in found["rows"]] == ["kept", "recomputed"]
    assert all(row["memory_mib"] > 0 for row in found["rows"])
    assert ratios(found, "backend") == [("step time, recomputed / kept", "torch")]


def test_data(tmp_path: Path) -> None:
    found = bench(tmp_path, "data", "--backends", "torch")
    assert ratios(found) == [("reader / copy in memory",), ("reader / training, torch",)]


def test_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    found = bench(tmp_path, "checkpoint", "--folder", str(disk))
    assert ratios(found) == [("save / write",), ("load / read",)]
    assert list(disk.iterdir()) == []


def test_cost_model(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    found = bench(tmp_path, "cost-model", "--backend", "torch", "--ranks", "8,1024")
    assert [row["ranks"] for row in found["rows"]] == [8, 1024] * 4
    for row in found["rows"]:
        assert 0 < row["efficiency"] <= row["efficiency_hidden"] <= 1
    assert [point["ranks"] for point in found["settings"]["points"]] == [2, 2]
