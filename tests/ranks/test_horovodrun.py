"""How horovodrun ends, over MPI and over Gloo: which rank failed and why, its exit code, signals, a
command that can't be started, and that no process stays behind; each fault again with its mend
undone.

The ranks run this file, as one of `ROLES`; only one of these uses Horovod.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import pytest

MARKER = "HOROVODRUN_TEST"  # in the environment of all processes of one job
BIN = Path(sys.executable).parent
PATIENCE = 20.0  # seconds for processes to end that must; on a busy machine it takes some
LAUNCHERS = ["gloo", "mpi"]


# ------------------------------------------------------------------------------------ in each rank


def fail() -> None:
    """Rank 1 leaves a process that holds its output, and exits with 3."""
    if rank() == 1:
        subprocess.Popen(["sleep", "300"])
        for line in range(30):
            print(f"line {line} of rank 1", file=sys.stderr)
        sys.exit(3)
    sleep()


def killed() -> None:
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    sleep()


def lost() -> None:
    """Rank 1 fails, and tells rank 0 so well before it ends."""
    if rank() == 1:
        atexit.register(time.sleep, 0.7)  # called after Horovod's own
    import horovod.torch as hvd
    import torch

    hvd.init()
    hvd.allreduce(torch.ones(3))
    if hvd.rank() == 1:
        try:
            raise ValueError("the reason")
        except ValueError:
            traceback.print_exc()
            sys.exit(3)
    for number in range(10000):
        hvd.allreduce(torch.ones(3), name=str(number))


def sleep() -> None:
    """With a process of its own that outlives it."""
    subprocess.Popen(["sleep", "300"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    print("ready", flush=True)
    time.sleep(300)


def rank() -> int:
    return int(os.environ.get("HOROVOD_RANK") or os.environ["OMPI_COMM_WORLD_RANK"])


ROLES = {role.__name__: role for role in (fail, killed, lost, sleep)}


# --------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    from tests.ranks import mended  # not in the ranks, which find Horovod alone

    @cache
    def made(undone: str | None = None) -> Path:
        names = [f"python/{undone}"] if undone else []
        return mended.package(tmp_path_factory.mktemp("package"), names)

    return made


@contextmanager
def started(
    launcher: str, path: Path, *command: str, binding: bool = True, more: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """horovodrun in a process group of its own, with the package at `path`, and `more` on the path;
    in the end all of the job's processes are killed. Ranks are bound as horovodrun does it, or may
    be more than there are cores if `binding` is given."""
    from tests.ranks import mended

    marker = f"{os.getpid()}-{time.monotonic_ns()}"
    environment = mended.environment(path)
    environment[MARKER] = marker
    environment["PYTHONPATH"] = os.pathsep.join(str(p) for p in (path, more) if p is not None)
    given = "--binding-args=--bind-to none --map-by slot:OVERSUBSCRIBE"
    slots = [given] * (launcher == "mpi" and binding)
    job = subprocess.Popen(
        [str(BIN / "horovodrun"), f"--{launcher}", *slots, "-np", "2", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    job.marker = marker  # type: ignore[attr-defined]
    try:
        yield job
    finally:
        for process in processes(job):
            process.kill()
        job.wait()
        job.stdout.close()  # type: ignore[union-attr]


def processes(job: subprocess.Popen[str]) -> list[psutil.Process]:
    """The job's living processes."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARKER) == job.marker  # type: ignore[attr-defined]
        except (psutil.Error, OSError):
            continue
        if ours and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def left_behind(job: subprocess.Popen[str], seconds: float) -> list[str]:
    """Names of the job's processes that are still there after this time."""
    end = time.monotonic() + seconds
    while (left := processes(job)) and time.monotonic() < end:
        time.sleep(0.05)
    return [process.name() for process in left]


def run(
    launcher: str, path: Path, role: str, patience: float = PATIENCE
) -> tuple[int, str, list[str]]:
    """A job's exit code, output, and what it leaves behind."""
    with started(launcher, path, sys.executable, __file__, role) as job:
        text, _ = job.communicate(timeout=30)
        return job.returncode, text, left_behind(job, patience)


def interrupt(
    launcher: str,
    path: Path,
    number: int,
    *,
    all_of_them: bool = False,
    early: float | None = None,
    patience: float = PATIENCE,
) -> tuple[int, str, list[str]]:
    """As `run`, of a job that gets a signal: its launcher alone, or as Ctrl-C `all_of_them`; when
    all ranks run, or `early` seconds after horovodrun has started the first helper."""
    with started(launcher, path, sys.executable, __file__, "sleep") as job:
        assert job.stdout is not None
        if early is not None:
            while not any(is_helper(process) for process in processes(job)):
                time.sleep(0.005)
            time.sleep(early)
        text = ""
        while early is None and text.count("ready") < 2:
            line = job.stdout.readline()
            assert line, text
            text += line
        (os.killpg if all_of_them else os.kill)(job.pid, number)
        try:
            job.wait(12)
        except subprocess.TimeoutExpired:
            return 0, "hang", left_behind(job, 0)
        left = left_behind(job, patience)
        for process in processes(job):  # they hold the pipe
            process.kill()
        return job.returncode, text + job.stdout.read(), left


def is_helper(process: psutil.Process) -> bool:
    try:
        return "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def message(text: str) -> str:
    """What horovodrun says in the end."""
    assert "Traceback" not in text.partition("horovodrun: ")[0], text
    assert text.count("horovodrun: ") == 1, text
    return text.partition("horovodrun: ")[2]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_failed_rank_is_named_with_its_code_and_the_end_of_its_output(launcher, package) -> None:
    code, text, left = run(launcher, package(), "fail")
    assert (code, left) == (3, [])
    who = "rank 1 on localhost" if launcher == "gloo" else "rank 1"
    begin, *lines = message(text).splitlines()
    assert begin == f"{who} ended with exit code 3. The end of rank 1's output:"
    shown = [line.strip() for line in lines if "of rank 1" in line]
    assert shown == [f"line {number} of rank 1" for number in range(10, 30)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_a_signal_ended(launcher, package) -> None:
    code, text, left = run(launcher, package(), "killed")
    assert (code, left) == (137, [])
    assert "was ended by signal 9 (SIGKILL), exit code 137." in message(text)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_rank_that_failed_is_shown_also_where_another_ends_before_it(launcher, package) -> None:
    """mpirun ends all at the first end, and its exit code is that rank's."""
    code, text, left = run(launcher, package(), "lost")
    said = text.partition("horovodrun: ")[2]
    assert left == []
    if launcher == "gloo":
        assert code == 3 and said.startswith("rank 1 on localhost ended with exit code 3."), text
    else:
        assert code == 1, text
        assert said.startswith("rank 1 failed, then rank 0 ended with exit code 1."), text
    assert said.splitlines()[-2] == "  ValueError: the reason"


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("number", "all_of_them"),
    [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)],
)
def test_a_signal_ends_all(launcher, number, all_of_them, package) -> None:
    code, text, left = interrupt(launcher, package(), number, all_of_them=all_of_them)
    assert (code, left) == (128 + number, []), text
    assert message(text).startswith(f"stopped by {number.name}\n")


def test_ctrl_c_while_ranks_start(package) -> None:
    code, text, left = interrupt("gloo", package(), signal.SIGINT, all_of_them=True, early=0)
    assert (code, left) == (130, []), text
    assert message(text).startswith("stopped by SIGINT\n")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nothing_stays_behind_where_horovodrun_is_killed(launcher, package) -> None:
    _, text, left = interrupt(launcher, package(), signal.SIGKILL)
    assert left == [], text


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_command_that_cant_be_started(launcher, package, tmp_path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    for command, code, why in (
        ("no-such-program", 127, "there is no such program on the PATH"),
        (str(plain), 126, "it is not an executable file"),
    ):
        with started(launcher, package(), command) as job:
            text, _ = job.communicate(timeout=30)
        assert job.returncode == code
        said = f"the command {command!r} can't be started: {why}"
        assert message(text).splitlines()[0] == said
        assert text.count(command) == 1


def test_mpirun_writes_into_a_stream_of_text_that_a_caller_has_put_there(package) -> None:
    """It has no `buffer`; what is more than a pipe takes must be read all the same."""
    program = """
import contextlib, io, os
from horovod.runner._launching import run_mpirun
with contextlib.redirect_stdout(io.StringIO()) as out:
    run_mpirun("seq 100000", dict(os.environ))
assert out.getvalue().split() == [str(number) for number in range(1, 100001)]
"""
    command = [sys.executable, "-c", program]
    subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(package())}, check=True, timeout=30
    )


def test_options_that_ask_for_too_much_end_in_one_message(package) -> None:
    with started("gloo", package(), "-H", "localhost:1", sys.executable) as job:
        text, _ = job.communicate(timeout=30)
    assert job.returncode == 1
    assert message(text).startswith("Requested more processes (2) than there are available slots")


def frameworks_imported(launcher: str, path: Path, folder: Path) -> bool:
    """Whether horovodrun does that by itself, before a job of a program that needs none."""
    for name in ("tensorflow", "torch"):
        (folder / name).mkdir()
        note = folder / "imported"
        text = f"open({str(note)!r}, 'w').close()\nraise ImportError\n"
        (folder / name / "__init__.py").write_text(text)
    with started(launcher, path, "true", more=folder) as job:
        job.communicate(timeout=60)
    return (folder / "imported").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_no_framework_is_imported_to_start_a_job(launcher, package, tmp_path) -> None:
    assert not frameworks_imported(launcher, package(), tmp_path)


# ---------------------------------------------------------------------------- with a mend undone


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_runner_built(launcher, package, tmp_path) -> None:
    assert frameworks_imported(launcher, package("runner_built"), tmp_path)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_runner_message(launcher, package) -> None:
    code, text, _ = run(launcher, package("runner_message"), "killed")
    assert code == 1 and "in run_commandline" in text and "horovodrun: " not in text


def test_without_runner_failed_rank(package) -> None:
    code, text, _ = run("gloo", package("runner_failed_rank"), "lost")
    assert code == 1 and "Process name: 0" in text and "Process name: 1" not in text


def test_without_runner_signals(package) -> None:
    code, text, _ = interrupt("gloo", package("runner_signals"), signal.SIGTERM)
    assert code == 143 and "stopped by" not in text
    assert "exited" in message(text) or "ended" in message(text)


def test_without_runner_start_signal(package) -> None:
    path = package("runner_start_signal")
    # A helper shows its traceback from where Python has begun until it leaves the process group.
    for early in (0.02, 0.05, 0.1, 0.2, 0.4):
        _, text, _ = interrupt("gloo", path, signal.SIGINT, all_of_them=True, early=early)
        if "KeyboardInterrupt" in text:
            return
    raise AssertionError(text)


def test_without_runner_orphans(package) -> None:
    _, text, left = interrupt("gloo", package("runner_orphans"), signal.SIGTERM, patience=3)
    assert left == ["sleep", "sleep"], text


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_runner_missing_command(launcher, package) -> None:
    with started(launcher, package("runner_missing_command"), "no-such-program") as job:
        text, _ = job.communicate(timeout=30)
    assert "can't be started" not in text
    assert launcher == "gloo" or job.returncode not in (126, 127)


def test_without_runner_mpirun(package, tmp_path, monkeypatch) -> None:
    path = package("runner_mpirun")
    monkeypatch.setenv("PRTE_MCA_prte_local_tmpdir_base", str(tmp_path))  # what it leaves there
    _, text, left = interrupt("mpi", path, signal.SIGTERM, patience=3)
    assert "prterun" in left, text
    _, text, _ = run("mpi", path, "fail", patience=0)
    assert "horovodrun: " not in text


@pytest.mark.parametrize("undone", [None, "open_mpi_5"])
def test_binding_of_ranks_in_open_mpi_5(undone, package) -> None:
    with started("mpi", package(undone), "true", binding=False) as job:
        text, _ = job.communicate(timeout=30)
    assert (job.returncode == 0) == (undone is None), text


@pytest.mark.parametrize("undone", [None, "no_distutils"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_python_without_distutils(launcher, undone, package, tmp_path, monkeypatch) -> None:
    missing = "No module named 'distutils'"
    (tmp_path / "distutils.py").write_text(f"raise ModuleNotFoundError({missing!r})\n")
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # setuptools would bring its own
    with started(launcher, package(undone), "true", more=tmp_path) as job:
        text, _ = job.communicate(timeout=30)
    assert (job.returncode == 0, missing in text) == (undone is None, undone is not None), text


if __name__ == "__main__":
    ROLES[sys.argv[1]]()
