"""Profiles of real jobs: one trace of all ranks with Horovod's timeline, time that adds up, and a
training that does not notice."""

import json
import re
import statistics
from collections import defaultdict

import pytest

from horovod_lm.profiles import KINDS, OVERHEAD, Trace
from tests.ranks.jobs import BACKENDS, TRAIN, needs_horovod, rows, run_job, write_tiny

pytestmark = needs_horovod

FIRST, LAST = 12, 14
# Large enough that a step is more than the calls around its operations.
SIZES = ["model.width=64", "model.feed_forward=256", "model.context=64", "model.layers=2"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("profile"))


def trained(config, name, backend, *arguments, ranks=2):
    """A run's folder, once its job has ended."""
    folder = config.parent / name
    sizes = [part for size in SIZES for part in ("--set", size)]
    command = [*TRAIN, str(config), "--backend", backend, "--output", str(folder), *sizes]
    result = run_job(config.parent / f"{name}.log", [*command, *arguments], ranks, limit=180)
    assert result.code == 0, result.text
    assert "USDT" not in result.text  # torch's profiler speaks of itself
    return folder


@pytest.fixture(scope="module")
def profiled(config):
    """By backend the folder of a run on two ranks with a profile."""
    done = {}

    def run(backend):
        if backend not in done:
            arguments = ["--profile", f"{FIRST}:{LAST}"]
            done[backend] = trained(config, f"{backend}-profiled", backend, *arguments)
        return done[backend]

    return run


def trace_of(folder):
    """Rows by the name of their process, and the steps' begin and end in µs."""
    trace = Trace.read(folder / "trace.json.gz")
    named = [row for row in trace.rows if row.get("name") == "process_name"]
    names = {row["pid"]: row["args"]["name"] for row in named}
    found = defaultdict(list)
    for row in trace.rows:
        if row["ph"] != "M":
            found[names[row["pid"]]].append(row)
    steps = [(r["ts"], r["ts"] + r["dur"]) for r in trace.rows if r.get("cat") == "step"]
    return found, steps


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_ranks_and_the_allreduce_of_each_step_are_in_the_trace(profiled, backend):
    found, steps = trace_of(profiled(backend))
    label = {"torch": "PyTorch", "tensorflow": "TensorFlow"}[backend]
    ranks = [f"rank 0 {label}", f"rank 1 {label}"]
    assert set(found) == {f"{label} steps", *ranks, f"Horovod under {label}"}
    assert [row["name"] for row in found[f"{label} steps"]] == ["step 12", "step 13", "step 14"]
    timeline = found[f"Horovod under {label}"]
    begins = [row["ts"] for row in timeline if row.get("name") == "ALLREDUCE"]
    ends = [row["ts"] for row in timeline if "args" in row and "shape" in row["args"]]
    lasted = 0.0
    for begin, end in steps:
        (reduced,) = [moment for moment in begins if begin < moment < end]
        lasted += min(moment for moment in ends if moment > reduced) - reduced
        # One clock: the timeline's operation lies in what each rank calls communication. (A rank
        # may begin to wait before the step of rank 0, whose steps these are.)
        for rank in ranks:
            waits = [row for row in found[rank] if row["cat"] == "communication"]
            assert any(w["ts"] - 500 < reduced < w["ts"] + w["dur"] + 500 for w in waits), waits
    for rank in ranks:
        assert sum(row["cat"] == "matrix products" for row in found[rank]) >= 12 * len(steps)
    values = json.loads((profiled(backend) / "profile.json").read_text())
    assert values["kinds"]["communication"]["ms"] > 0.9e-3 * lasted / len(steps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kinds_add_up_to_the_steps_of_the_metrics(profiled, backend):
    folder = profiled(backend)
    values = json.loads((folder / "profile.json").read_text())
    assert (values["schema"], values["steps"], values["ranks"]) == (1, [FIRST, LAST], 2)
    kinds = values["kinds"]
    assert list(kinds) == list(KINDS)
    total = sum(kind["ms"] for kind in kinds.values())
    assert total == pytest.approx(values["step_ms"], abs=0.02)
    marked = [row for row in rows(folder) if row.get("profiled")]
    assert [row["step"] for row in marked] == [FIRST, FIRST + 1, LAST]
    # The metrics of rank 0 have what hooks do between two steps as well.
    seconds = statistics.fmean(row["seconds"] for row in marked)
    assert 0.5 < values["step_ms"] / (1e3 * seconds) < 1.5
    for name, kind in kinds.items():
        assert kind["ms"] > 0, name
        limited = name not in ("loss", "communication", "copies", OVERHEAD)
        assert (kind["ceiling_share"] is not None) == limited, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_curves_are_the_same_to_the_bit_with_and_without(config, profiled, backend):
    plain, other = trained(config, f"{backend}-plain", backend), profiled(backend)
    assert [row["loss"] for row in rows(plain)] == [row["loss"] for row in rows(other)]
    assert [row["norm"] for row in rows(plain)] == [row["norm"] for row in rows(other)]
    files = sorted(path.relative_to(plain) for path in plain.glob("checkpoints/*/*.safetensors"))
    assert len(files) >= 4
    for file in files:
        assert (plain / file).read_bytes() == (other / file).read_bytes(), file
    assert not (plain / "profile.json").exists() and not (plain / "trace.json.gz").exists()


def test_what_xla_compiles_is_sorted_by_the_layers_it_came_from(config):
    more = ["--set", "launch.threads=2", "--profile", f"{FIRST}:{LAST}"]
    folder = trained(config, "xla", "tensorflow", *more, ranks=1)
    kinds = json.loads((folder / "profile.json").read_text())["kinds"]
    for name, kind in kinds.items():
        assert kind["ms"] > 0, name
    found, _ = trace_of(folder)
    scopes = {row["args"].get("scope", "") for row in found["rank 0 TensorFlow"]}
    # Keras numbers a name that it has seen before.
    assert any(re.search(r"decoder\w*/0\w*/feed_forward", scope) for scope in scopes)
    assert not any(row["name"] == "fusion" for row in found["rank 0 TensorFlow"])


def test_a_profile_before_the_second_step_is_refused_before_the_work(config):
    command = [*TRAIN, str(config), "--output", str(config.parent / "no"), "--profile", "1:3"]
    result = run_job(config.parent / "no.log", command, 1)
    assert "output.profile = 1:3 must be FIRST:LAST" in result.only_message(2)
    assert not (config.parent / "no").exists()
