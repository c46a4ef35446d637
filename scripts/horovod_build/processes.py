"""Runs a program with a log and a time limit, and leaves none of its children behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

GRACE = 5.0  # seconds between asking a group of processes to end and ending it


def run_logged(
    command: list[str],
    log: TextIO,
    env: Mapping[str, str],
    cwd: Path,
    seconds: float,
    each_line: Callable[[str], None] = lambda line: None,
) -> int:
    """Runs `command` in a process group of its own and returns its exit code (negative: a signal
    ended it).

    Its output goes to `log` line by line, and each line to `each_line`. After `seconds`, or when
    the caller is interrupted, the whole group is ended: compilers and ranks too.
    """
    log.write(f"$ {' '.join(command)}\n")
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=dict(env),
        cwd=cwd,
        start_new_session=True,
    )
    timer = threading.Timer(seconds, end_group, [process])
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            each_line(line)
        return process.wait()
    finally:
        timer.cancel()
        log.flush()
        end_group(process)


def end_group(process: subprocess.Popen[str]) -> None:
    """Ends every process of the group that `process` leads: by request, then after a grace time by
    force.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
