"""Trainings on real ranks of both backends. Each job does several of them, since its start is what
costs."""

import hashlib
import itertools
import json
import shutil

import numpy as np
import pytest

from tests.parity.compare import within
from tests.ranks.jobs import BACKENDS, losses, needs_horovod, rows, run_plan, write_tiny

pytestmark = needs_horovod

FP16 = [
    "train.precision=fp16", "train.steps=14", "loss_scale.initial=1024",
    "loss_scale.growth_interval=4",
]  # fmt: skip
OVERFLOWS = {"kind": "overflow", "rank": 1, "steps": [2, 7, 8]}
NATIVE = ["train.dropout_generator=native"]
STOP = [{"kind": "terminate", "rank": 1, "steps": [9]}]
STUCK = ["train.precision=fp16", "loss_scale.initial=2", "loss_scale.minimum=1"]

ONE = [{"name": "whole"}]
TWO = [
    {"name": "whole"},
    {"name": "cut", "set": ["train.micro_batch_size=2"]},
    {"name": "fp16", "set": FP16, "faults": [OVERFLOWS]},
    {"name": "stuck", "set": STUCK, "faults": [{"kind": "overflow", "rank": 1, "steps": [3, 4]}]},
    {"name": "stop", "faults": STOP},
    {"name": "stop", "resume": True},
    {"name": "native", "set": NATIVE},
    {"name": "native-stop", "set": NATIVE, "faults": STOP},
    {"name": "native-stop", "set": NATIVE, "resume": True},
    {"name": "data", "faults": [{"kind": "data", "rank": 1, "steps": [13]}]},
    {"name": "drift", "set": ["train.check_every=4"],
     "faults": [{"kind": "ulp", "rank": 1, "steps": [13]}]},
]  # fmt: skip
FOUR = [
    {"name": "whole"},
    {"name": "cut", "set": ["train.micro_batch_size=1"]},
    {"name": "few", "set": ["train.global_batch_size=3"]},
]
# A run that goes from two ranks of PyTorch to four of TensorFlow to one of PyTorch, each time by
# a checkpoint that the one before left: (backend, ranks) -> where from, and the faults.
CROSSINGS = {
    ("tensorflow", 4): ("torch", 2, "data", [{"kind": "terminate", "rank": 0, "steps": [16]}]),
    ("torch", 1): ("tensorflow", 4, "crossed", []),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def done(config):
    """Folder and answers of the job of a backend on a number of ranks, run when first asked for."""
    jobs = {}

    def job(backend, ranks):
        if (backend, ranks) not in jobs:
            folder = config.parent / f"{backend}-{ranks}"
            plan = {1: ONE, 2: TWO, 4: FOUR}[ranks]
            if (backend, ranks) in CROSSINGS:
                *before, name, faults = CROSSINGS[backend, ranks]
                source = job(*before)[0] / name / "checkpoints"
                shutil.copytree(source, folder / "crossed" / "checkpoints")
                plan = [*plan, {"name": "crossed", "resume": True, "faults": faults}]
            answers = run_plan(folder, config, plan, backend, ranks, limit=180.0)
            names = [entry["name"] + "+" * entry.get("resume", False) for entry in plan]
            jobs[backend, ranks] = folder, dict(zip(names, answers, strict=True))
        return jobs[backend, ranks]

    return job


def difference(a, b):
    """The largest difference of two curves."""
    return float(np.abs(np.array(a) - np.array(b)).max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_curve_does_not_depend_on_ranks_micro_batches_or_framework(backend, done):
    curve = losses(done("torch", 1)[0] / "whole")
    assert len(curve) == 25 and curve[-1] < curve[0] - 0.1
    for ranks, names in ((1, ["whole"]), (2, ["whole", "cut"]), (4, ["whole", "cut"])):
        folder, answers = done(backend, ranks)
        for name in names:
            assert [answer["error"] for answer in answers[name]] == [None] * ranks
            apart = difference(losses(folder / name), curve)
            within(f"loss curve, {backend} on {ranks} ranks to torch on 1", apart, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_smaller_than_the_ranks_works_and_warns_once(backend, done):
    folder, answers = done(backend, 4)
    assert [answer["error"] for answer in answers["few"]] == [None] * 4
    curve = losses(folder / "few")
    assert len(curve) == 25 and all(np.isfinite(curve))
    text = (folder / "job.log").read_text()
    assert text.count("global_batch_size = 3 is smaller than the 4 ranks") == 1


def scaler_trace(run):
    return [(row["loss_scale"], row["skipped"], row["updates"]) for row in rows(run)]


def test_overflows_on_one_rank_skip_the_same_steps_in_both_backends(done):
    runs = [done(backend, 2)[0] / "fp16" for backend in BACKENDS]
    # The scale that a step was tried with: halved by each of the overflows in steps 3, 8 and 9,
    # doubled after 4 good steps in a row.
    scales = [1024.0] * 3 + [512.0] * 4 + [1024.0, 512.0] + [256.0] * 4 + [512.0]
    assert scaler_trace(runs[0]) == scaler_trace(runs[1])
    assert [scale for scale, _, _ in scaler_trace(runs[0])] == scales
    for run in runs:
        lines = rows(run)
        skipped = [line for line in lines if line["overflow"]]
        assert [line["step"] for line in skipped] == [3, 8, 9]
        assert {line["overflow"]["rank"] for line in skipped} == {1}
        assert {line["overflow"]["tensor"] for line in skipped} == {"embeddings.tokens"}
        for before, line in itertools.pairwise(lines):
            if line["overflow"]:
                assert line["updates"] == before["updates"]  # so the schedule stands still too
        rates = [line["learning_rate"] for line in lines]
        assert rates[2] == rates[3] != rates[4] and rates[7] == rates[8] == rates[9]
        log = (run.parent / "job.log").read_text()
        said = "skipped, the gradient overflows in embeddings.tokens, first on rank 1"
        assert log.count(said) == 4  # three here, one in the run whose scale gets stuck


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_scale_stuck_at_its_minimum_ends_the_run_with_one_message(backend, done):
    folder, answers = done(backend, 2)
    one, other = answers["stuck"]
    assert one["code"] == other["code"] == 1
    assert one["error"] == other["error"]
    assert one["error"].startswith("step 5 (first in embeddings.tokens, on rank 1): the gradient")
    assert "loss_scale.minimum = 1, after 2 skipped steps" in one["error"]
    assert (one["shown"], other["shown"]) == (True, False)
    assert json.loads((folder / "stuck" / "run.json").read_text())["state"] == "failed"


def digests(run, step=25):
    folder = run / "checkpoints" / f"step-{step:08d}"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("whole", "stop"), [("whole", "stop"), ("native", "native-stop")])
def test_sigterm_on_one_rank_stops_all_and_the_resumed_run_repeats_the_whole_one(
    backend, whole, stop, done
):
    folder, answers = done(backend, 2)
    for answer in answers[stop]:
        assert answer["kind"] == "Stopped" and answer["code"] == 75
        assert answer["error"].startswith("stopped by a signal after step 10;")
    assert [answer["shown"] for answer in answers[stop]] == [True, False]
    assert [answer["error"] for answer in answers[f"{stop}+"]] == [None, None]
    assert losses(folder / stop) == losses(folder / whole)
    assert digests(folder / stop) == digests(folder / whole)
    assert [row["step"] for row in rows(folder / stop, "evaluation")] == [25]


@pytest.mark.parametrize("backend", BACKENDS)
def test_native_dropout_draws_another_curve(backend, done):
    folder, _ = done(backend, 2)
    assert 1e-5 < difference(losses(folder / "native"), losses(folder / "whole")) < 0.1


def test_a_run_goes_from_one_framework_and_number_of_ranks_to_another(done):
    four, answers = done("tensorflow", 4)
    assert {answer["kind"] for answer in answers["crossed+"]} == {"Stopped"}
    one, answers = done("torch", 1)
    assert [answer["error"] for answer in answers["crossed+"]] == [None]
    assert [row["step"] for row in rows(four / "crossed")] == list(range(11, 18))
    assert [row["step"] for row in rows(one / "crossed")] == list(range(18, 26))
    curve = losses(four / "crossed") + losses(one / "crossed")
    assert difference(curve, losses(one / "whole")[10:]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_data_error_on_one_rank_ends_all_with_its_message(backend, done):
    folder, answers = done(backend, 2)
    for answer in answers["data"]:
        assert answer["error"] == "rank 1: train-00000.bin: input/output error"
        assert answer["code"] == 1
    assert [answer["shown"] for answer in answers["data"]] == [False, True]
    assert len(rows(folder / "data")) == 13
    record = json.loads((folder / "data" / "run.json").read_text())
    assert record["state"] == "failed" and record["message"] == answers["data"][0]["error"]
    assert record["checkpoint"] == "step-00000010"
    assert [p.name for p in (folder / "data" / "checkpoints").iterdir()] == ["step-00000010"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_replica_that_drifts_by_one_ulp_is_found_and_named(backend, done):
    folder, answers = done(backend, 2)
    for answer in answers["drift"]:
        assert answer["code"] == 1
        assert answer["error"].startswith(
            "the replicas have drifted apart at step 16: weight decoder.0.feed_forward.up.bias on "
            "rank 1 is not that of rank 0; in all, 1 of "
        )
    assert [answer["shown"] for answer in answers["drift"]] == [True, False]
    assert [p.name for p in (folder / "drift" / "checkpoints").iterdir()] == ["step-00000010"]
