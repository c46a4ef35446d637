"""What horovodrun does about ranks that fail, signals and commands that can't be started."""

from __future__ import annotations

import codecs
import collections
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import psutil

LINES = 20  # of a failed rank's output that are shown again

GRACE = 5.0  # seconds between SIGTERM and SIGKILL

_JOB = "HOROVOD_LAUNCHED_JOB"  # in the environment of all of a job's processes on this machine
_LOST = "Horovod has been shut down. This was caused by"  # said where another rank has ended
# "[1,0]<stderr>: text" of mpirun, "[0]<stderr>:text" of Gloo's launcher, either after a time
_TAG = re.compile(r"^[^\[]*\[(?:\d+,)?(\d+)\]<std(?:out|err)>: ?")


class LauncherError(RuntimeError):
    """Ends horovodrun with `exit_code` after `message`."""

    def __init__(self, message: str, exit_code: int, text: str | None = None) -> None:
        super().__init__(text or message)
        self.message, self.exit_code = message, exit_code


class RankFailed(LauncherError):
    """A rank ended with an exit code other than 0; `tails` has the ends of all ranks' outputs.

    If that rank only lost the others, the rank that raised an exception before it is shown.
    """

    def __init__(self, rank: int, code: int, tails: Mapping[int, Tail], host: str = "") -> None:
        who = f"rank {rank} on {host}" if host else f"rank {rank}"
        shown, message = rank, f"{who} {_ended(code)}."
        if rank in tails and tails[rank].follows:
            raised = [other for other, tail in tails.items() if tail.raised and not tail.follows]
            if raised:
                shown, message = raised[0], f"rank {raised[0]} failed, then {who} {_ended(code)}."
        lines = list(tails[shown].lines)[-LINES:] if shown in tails else []
        if lines:
            message += f" The end of rank {shown}'s output:\n\n"
            message += "\n".join(f"  {line}" for line in lines)
        # Callers of horovod.run know its exception by these words.
        text = (
            "Horovod detected that one or more processes exited with non-zero status, thus causing "
            f"the job to be terminated. The first process to do so was:\nProcess name: {rank}\n"
            f"Exit code: {code}\n{message}\n"
        )
        super().__init__(message, code, text)


class Stopped(LauncherError):
    """A signal ended horovodrun; its exit code is a shell's: 128 and the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}", 128 + number)


def _ended(code: int) -> str:
    """A shell's exit code in words."""
    try:
        name = signal.Signals(code - 128).name
    except ValueError:
        return f"ended with exit code {code}"
    return f"was ended by signal {code - 128} ({name}), exit code {code}"


class Tail:
    """A text stream that keeps the last lines of one rank."""

    def __init__(self) -> None:
        self.lines: collections.deque[str] = collections.deque(maxlen=10 * LINES)
        self.code: int | None = None  # how the rank ended
        self._again = False

    @property
    def follows(self) -> bool:
        """Whether the rank says that it lost the others."""
        return any(_LOST in line for line in list(self.lines)[-LINES:])

    @property
    def raised(self) -> bool:
        """Whether the rank shows an exception."""
        return any(line.startswith("Traceback (most recent call last)") for line in self.lines)

    def write(self, text: str) -> None:
        line = _TAG.sub("", text, count=1)
        if not line.strip():
            return
        if self._again:  # a progress bar that is drawn over
            self.lines.pop()
        self._again = line.endswith("\r")
        self.lines.append(line.rstrip())

    def flush(self) -> None:
        """Part of a stream; nothing is held back here."""


def wait_for_cause(tails: Mapping[int, Tail], rank: int, events: Sequence[threading.Event]) -> None:
    """Where `rank` ended only since it had lost the others: wait until the one that failed ends.

    A rank that fails tells the others before its process ends, so theirs may end first.
    """
    end = time.monotonic() + 3
    while tails[rank].follows and time.monotonic() < end:
        others = [tail for other, tail in list(tails.items()) if other != rank]
        if any(event.is_set() for event in events) or None not in (t.code for t in others):
            break
        if any(tail.code and not tail.follows for tail in others):
            break
        time.sleep(0.05)


def say(error: LauncherError) -> None:
    """Print an error between lines like those of Open MPI's messages."""
    line = "-" * 74
    print(f"{line}\nhorovodrun: {error.message}\n{line}", file=sys.stderr, flush=True)


def check_command(command: list[str]) -> None:
    """Raises LauncherError if this machine has no program that `command` begins with."""
    program = command[0] if command else ""
    if "=" in program or shutil.which(program):  # VARIABLE=value may stand before the program
        return
    if not program:
        raise LauncherError("no command was given; give it after the options", 2)
    if not os.path.dirname(program):
        why, code = "there is no such program on the PATH", 127
    elif os.path.exists(program):
        why, code = "it is not an executable file", 126
    else:
        why, code = "there is no such file", 127
    raise LauncherError(f"the command {program!r} can't be started: {why}", code)


def end_session(grace: float) -> None:
    """End all other processes of the session that this process leads: SIGTERM, after `grace`
    seconds SIGKILL."""
    mine = os.getsid(0)
    if mine == os.getpid():
        _end(lambda process: os.getsid(process.pid) == mine, grace)


def wait_for_end(process: psutil.Process, seconds: float) -> bool:
    """Wait until a child has ended, and leave its exit code to the one that waits for that: psutil
    would take it away."""
    end = time.monotonic() + seconds
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
    return True


def _end(ours: Callable[[psutil.Process], bool], grace: float) -> None:
    for process in _living(ours):
        _send(process, signal.SIGTERM)
    end = time.monotonic() + grace
    while (left := _living(ours)) and time.monotonic() < end:
        time.sleep(0.05)
    for process in left:
        _send(process, signal.SIGKILL)


def _living(ours: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or not ours(process):
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # it has ended meanwhile, or is another user's
    return found


def _send(process: psutil.Process, number: int) -> None:
    # Not by psutil, which takes a process for another one where the clock was set meanwhile.
    with contextlib.suppress(OSError):
        os.kill(process.pid, number)


def run_mpirun(command: str, env: dict[str, str]) -> None:
    """Run mpirun's command line, pass signals on to it, and see how it ends.

    Raises RankFailed for the rank that mpirun names, Stopped after a signal, and LauncherError for
    another failure; what ranks on this machine have started and left is ended before, and also if
    this process is killed.

    mpirun names the folder of its session after its process's number, and fails where a killed one
    of the same number has left its own: https://github.com/openpmix/openpmix/issues/4022. So each gets
    a place for it that is new.
    """
    stopped: list[int] = []
    job = f"{os.getpid()}-{time.time_ns()}"
    place = tempfile.mkdtemp(prefix="horovodrun-")
    if not any(f"PRTE_MCA_prte_{which}tmpdir_base" in env for which in ("", "local_")):
        env = {**env, "PRTE_MCA_prte_local_tmpdir_base": place}
    # It outlives this process, whatever ends that, and then does what is left to do.
    watcher = subprocess.Popen(
        [sys.executable, "-P", __file__, job, place],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _run_mpirun(command, {**env, _JOB: job}, job, stopped)
    finally:
        watcher.kill()
        watcher.wait()
        shutil.rmtree(place, ignore_errors=True)


def _watch(job: str, place: str) -> None:
    """The watcher's part: wait for the end of the process that has started it, then end the job."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    _end(lambda process: process.environ().get(_JOB) == job, GRACE)
    shutil.rmtree(place, ignore_errors=True)


def _run_mpirun(command: str, env: dict[str, str], job: str, stopped: list[int]) -> None:
    mpirun = subprocess.Popen(
        ["/bin/sh", "-c", f"exec {command}"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )

    def pass_on(number: int, frame: object) -> None:
        stopped.append(number)
        mpirun.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    tails: dict[int, Tail] = collections.defaultdict(Tail)
    said: list[str] = []
    readers = [
        threading.Thread(target=_forward, args=(pipe, to, tails, said), daemon=True)
        for pipe, to in ((mpirun.stdout, sys.stdout), (mpirun.stderr, sys.stderr))
    ]
    for reader in readers:
        reader.start()
    code = mpirun.wait()
    if code or stopped:
        # They may hold the output open.
        _end(lambda process: process.environ().get(_JOB) == job, GRACE)
    for reader in readers:
        reader.join(5)
    code = 128 - code if code < 0 else code
    if stopped:
        raise Stopped(stopped[0])
    if code:
        rank = _failed_rank("\n".join(said))
        if rank is None:
            raise LauncherError(f"mpirun {_ended(code)}", code)
        raise RankFailed(rank, code, tails)


def _forward(pipe, to, tails: dict[int, Tail], said: list[str]) -> None:
    """Copy bytes at once, and keep each rank's last lines and mpirun's own first ones."""
    rest = b""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while chunk := os.read(pipe.fileno(), 65536):
        try:
            if hasattr(to, "buffer"):
                to.buffer.write(chunk)
                to.buffer.flush()
            else:  # an io.StringIO, say, that a caller has put there
                to.write(decoder.decode(chunk))
        except OSError:
            pass  # nobody reads any more; a full pipe would stop the ranks
        *lines, rest = re.split(rb"(?<=[\r\n])", rest + chunk)
        for line in lines:
            _sort(line.decode(errors="replace"), tails, said)
    _sort(rest.decode(errors="replace"), tails, said)


def _sort(line: str, tails: dict[int, Tail], said: list[str]) -> None:
    tag = _TAG.match(line)
    if tag:
        tails[int(tag.group(1))].write(line)
    elif len(said) < 1000:
        said.append(line.rstrip())


def _failed_rank(said: str) -> int | None:
    """The rank that a message of mpirun's names as the first that failed."""
    for form in (r"^\s*Process name: \[\S*[,\]](\d+)\]\s*$", r"process rank (\d+) with PID"):
        if found := re.search(form, said, re.MULTILINE):
            return int(found.group(1))
    return None


if __name__ == "__main__":
    _watch(*sys.argv[1:])
