"""How real jobs of `horovod-lm train` end before their time: signals, kills, stalls, ranks that do
not fit together."""

import json
import os
import signal

import pytest

from horovod_lm import checkpoint
from horovod_lm.launch import reported_failure
from tests.ranks.jobs import (
    BACKENDS,
    TRAIN,
    WORKER,
    ended,
    needs_horovod,
    rank_process,
    rows,
    run_job,
    started,
    wait_for_step,
    write_tiny,
)

pytestmark = needs_horovod

LONG = ["--set", "train.steps=100000", "--set", "schedule.name=constant"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("ends"))


@pytest.fixture
def log(config, request):
    """The log of a test's job; beside it is the cache that all tests share."""
    return config.parent / f"{request.node.name}.log"


def train(config, output, backend="torch", *more):
    return [*TRAIN, str(config), "--output", str(output), "--backend", backend, *more]


def newest(output):
    """The step of the newest checkpoint, which can be loaded."""
    path = checkpoint.newest(output / "checkpoints", log=pytest.fail)
    return checkpoint.load(path).step


def state(output):
    return json.loads((output / "run.json").read_text())["state"]


@pytest.mark.parametrize(
    ("backend", "number", "code"),
    [("torch", signal.SIGTERM, 75), ("tensorflow", signal.SIGINT, 130)],
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(
    backend, number, code, config, log, tmp_path
):
    output = tmp_path / "out"
    with started(log, train(config, output, backend, *LONG), 2) as job:
        wait_for_step(output, 12, job)
        rank_process(job, 1).send_signal(number)
        message = ended(job).only_message(code)
    steps = len(rows(output))
    assert message == (
        f"stopped by a signal after step {steps}; the checkpoint is in {output}; "
        f"go on with --resume --output {output}"
    )
    assert newest(output) == steps
    assert state(output) == "stopped"


def test_usr1_to_mpirun_stops_all_with_a_checkpoint(config, log, tmp_path):
    """mpirun passes it on, and then lets the ranks take their time."""
    output = tmp_path / "out"
    with started(log, train(config, output, "torch", *LONG), 2) as job:
        wait_for_step(output, 12, job)
        os.kill(job.process.pid, signal.SIGUSR1)
        assert "--resume" in ended(job).only_message(75)
    assert newest(output) == len(rows(output))
    assert state(output) == "stopped"


@pytest.mark.parametrize(
    ("launcher", "controller", "number"),
    [("mpirun", "mpi", signal.SIGTERM), ("horovodrun", "gloo", signal.SIGINT)],
)
def test_a_signal_to_the_launcher_leaves_a_checkpoint_and_no_process(
    launcher, controller, number, config, log, tmp_path
):
    """Open MPI ends its ranks by force a second after SIGTERM, so the checkpoint may be the last
    periodic one; horovodrun waits longer."""
    output = tmp_path / "out"
    arguments = train(config, output, "torch", *LONG)
    with started(log, arguments, 2, launcher=launcher, controller=controller) as job:
        wait_for_step(output, 12, job)
        os.kill(job.process.pid, number)
        assert ended(job).code != 0
    assert newest(output) >= 10
    if launcher == "horovodrun":
        assert newest(output) == len(rows(output))
        assert state(output) == "stopped"


def test_a_killed_rank_ends_the_job_and_the_run_can_be_resumed(config, log, tmp_path):
    output = tmp_path / "out"
    arguments = train(config, output, "torch", *LONG)
    with started(log, arguments, 2) as job:
        wait_for_step(output, 12, job)
        rank_process(job, 1).kill()
        assert ended(job).code != 0
    step = newest(output)
    assert step >= 10 and step % 10 == 0
    arguments += ["--resume", "--set", f"train.steps={step + 4}"]
    result = run_job(log, arguments, 2)
    assert result.code == 0, result.text
    assert f"resuming from step-{step:08d}" in result.lines
    assert [row["step"] for row in rows(output)] == list(range(1, step + 5))
    assert state(output) == "finished"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rank_that_sleeps_for_good_ends_the_job_after_the_time_of_the_config(
    backend, config, log, tmp_path
):
    plan = [{"name": "out", "faults": [{"kind": "sleep", "rank": 1, "steps": [3]}]}]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    arguments = [*WORKER, str(config), str(tmp_path), backend]
    message = run_job(log, arguments, 2, stall_seconds=4).only_message(1)
    assert message.startswith("a collective failed, since another rank has ended or stalled")
    assert state(tmp_path / "out") == "failed"


def test_ranks_with_different_configs_are_refused_with_one_message(config, log, tmp_path):
    arguments = train(config, tmp_path / "out")
    other = [*arguments, "--set", "train.seed=7"]
    message = run_job(log, arguments, 1, others=[other]).only_message(2)
    assert message == (
        "ranks 0 and 1 were started with different configs (train.seed: 1 and 7); "
        "start all ranks with the same file and flags"
    )
    assert not (tmp_path / "out").exists()


def test_ranks_of_different_backends_end_soon_with_one_message(config, log, tmp_path):
    patience = ["--set", "launch.stall_seconds=5"]
    arguments = train(config, tmp_path / "out", "torch", *patience)
    other = train(config, tmp_path / "out", "tensorflow", *patience)
    message = run_job(log, arguments, 1, others=[other]).only_message(2)
    assert message.startswith("the ranks do not understand each other; start all of them with the ")
    assert not (tmp_path / "out").exists()


def test_a_frozen_rank_ends_the_job_although_horovod_waits_for_it(config, log, tmp_path):
    output = tmp_path / "out"
    arguments = train(config, output, "torch", *LONG, "--set", "launch.stall_seconds=2")
    with started(log, arguments, 2) as job:
        wait_for_step(output, 12, job)
        rank_process(job, 1).suspend()
        message = ended(job).only_message(1)
    assert message.startswith("a collective failed, since another rank does not answer")
    assert newest(output) >= 10


def test_a_mistake_that_one_rank_sees_before_the_ranks_can_talk_ends_all(config, log, tmp_path):
    arguments = train(config, tmp_path / "out")
    other = [*arguments, "--set", f'data.text=["{tmp_path}/missing.txt"]']
    result = run_job(log, arguments, 1, others=[other])
    (message,) = result.messages
    assert f"{tmp_path}/missing.txt" in message
    # mpirun's own status may be another one, where it ends rank 0 while that connects to it.
    assert result.code != 0
    failure = reported_failure(result.text)
    assert (failure.rank, failure.exit_code) == (1, 2)
    assert not (tmp_path / "out").exists()
