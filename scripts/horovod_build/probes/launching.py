"""Probes of `init` and of horovodrun."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from horovod_build import ranks
from horovod_build.probes.common import rows

PROBES, probe = rows("Starting and ending")


@probe("`shutdown`, then `init` again, one rank late")
def init_again() -> None:
    import horovod.torch as hvd
    import torch

    hvd.init()
    rank = hvd.rank()
    for times in range(10):
        hvd.shutdown()
        time.sleep(0.05 * ((times + rank) % 2))
        hvd.init()
        assert hvd.allreduce(torch.ones(3), op=hvd.Sum).tolist() == [2] * 3


FAILING = """
import subprocess, sys, time
import horovod.torch as hvd
hvd.init()
if hvd.rank() == 1:
    if "helper" in sys.argv:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)", *sys.argv])
    print("the reason", file=sys.stderr, flush=True)
    sys.exit(7)
time.sleep(100)
"""


def _horovodrun(
    launcher: str, path: Path | None, script: str, *arguments: str
) -> tuple[int, str, list[int]]:
    """Runs `script` on two ranks: the exit code, the output, and the processes of the job that are
    still there a moment later, which are then ended."""
    mark = f"job-{os.getpid()}-{time.monotonic_ns()}"
    command = [str(ranks.BIN / "horovodrun"), f"--{launcher}", "-np", "2", sys.executable]
    try:
        ended = subprocess.run(
            [*command, "-c", script, mark, *arguments],
            env=ranks.environment(path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        time.sleep(1)
    finally:
        left = ranks.end_processes_with(mark)
    return ended.returncode, ended.stdout, left


@probe("`horovodrun` starts a job", of_launcher=True)
def horovodrun_starts(launcher: str, path: Path | None) -> None:
    script = "import horovod.torch as hvd; hvd.init(); print('size', hvd.size())"
    code, output, _ = _horovodrun(launcher, path, script)
    if code or output.count("size 2") != 2:
        raise RuntimeError(f"exit code {code}: {output[-300:]}")


def _failed_job(launcher: str, path: Path | None, *arguments: str) -> tuple[int, str, list[int]]:
    """How horovodrun ends a job whose rank 1 exits with 7. RuntimeError if it does not start it."""
    code, output, left = _horovodrun(launcher, path, FAILING, *arguments)
    if "the reason" not in output:
        raise RuntimeError(f"the ranks' output is missing, exit code {code}: {output[-300:]}")
    return code, output, left


@probe("`horovodrun` returns the exit code of the rank that failed", of_launcher=True)
def horovodrun_exit_code(launcher: str, path: Path | None) -> None:
    code, _, _ = _failed_job(launcher, path)
    assert code == 7, f"the exit code is {code} instead of 7"


@probe("`horovodrun` names the rank that failed, without a traceback", of_launcher=True)
def horovodrun_message(launcher: str, path: Path | None) -> None:
    _, output, _ = _failed_job(launcher, path)
    assert "Traceback" not in output, "the output has a traceback of the launcher"
    last = output.strip().splitlines()[-8:]
    assert any("rank 1" in line.lower() for line in last), f"rank 1 is not named: {last}"


@probe("`horovodrun` ends what a failed rank had started", of_launcher=True)
def horovodrun_leaves_nothing(launcher: str, path: Path | None) -> None:
    _, _, left = _failed_job(launcher, path, "helper")
    assert not left, f"{len(left)} processes are left"
