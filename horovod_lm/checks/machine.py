"""Checks of the machine: cores, memory, disk, GPUs, and how launchers treat a rank."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from horovod_lm import topology
from horovod_lm.checks.finding import Finding, Level
from horovod_lm.installed import Horovod, build_command, version_of

MIB = 2**20
YIELD = "OMPI_MCA_mpi_yield_when_idle"


def check_cores(_: list[Finding]) -> Iterator[Finding]:
    """Cores that this process really has, and what two ranks would get."""
    cores, machine, quota = topology.usable_cores(), os.cpu_count() or 1, topology.cpu_quota()
    text = f"{cores} usable of {machine} cores"
    if quota is not None:
        text += f", under a CPU quota of {quota:g}"
    if cores < 2:
        yield Finding(
            "cores",
            "warning",
            f"{text}: two ranks take turns on one, which works, but says nothing about speed",
            "give this machine or container two cores, or compare with -np 1",
        )
    else:
        yield Finding("cores", "ok", f"{text}: two ranks use {cores // 2} thread(s) each")
    forced = os.environ.get("OMP_NUM_THREADS", "")
    if forced.isdigit() and int(forced) > max(1, cores // 2):
        yield Finding(
            "cores",
            "warning",
            f"OMP_NUM_THREADS={forced} makes two ranks fight for {cores} cores",
            "unset it: train and compare set the threads of a rank from its cores",
        )


def check_polling(_: list[Finding]) -> Iterator[Finding]:
    """What a user's own launcher has to be told; the rest `train` sets itself in each rank."""
    if os.environ.get(YIELD, "1") not in ("1", "true"):
        yield Finding(
            "polling",
            "warning",
            f"{YIELD} is off: waiting ranks poll and take cores from others",
            "unset it: train and compare turn it on",
        )
    if topology.usable_cores() > 2:  # two ranks could have more than the core they are bound to
        yield Finding(
            "launching",
            "note",
            "mpirun by itself binds each of two ranks to one core, and they train with one thread",
            "start your own jobs so: mpirun -np 2 --bind-to none horovod-lm train …",
        )


def check_root(_: list[Finding]) -> Iterator[Finding]:
    """Open MPI refuses root unless it is told twice."""
    names = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    if os.geteuid() != 0:
        yield Finding("root", "ok", "not running as root")
    elif all(os.environ.get(name) == "1" for name in names):
        yield Finding("root", "ok", "running as root, which Open MPI is told to allow")
    else:
        yield Finding(
            "root",
            "warning",
            "running as root, which mpirun refuses; compare allows it for its own jobs",
            f"for your own mpirun: export {' '.join(f'{name}=1' for name in names)}",
        )


def check_space(_: list[Finding]) -> Iterator[Finding]:
    """Free disk for the cache and for runs, shared memory for MPI, and free memory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = {"cache": cache, "runs": Path.cwd(), "shared memory": Path("/dev/shm")}
    for name, folder in places.items():
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        free = shutil.disk_usage(folder).free // MIB
        least, good = (16, 64) if name == "shared memory" else (200, 2000)
        level: Level = "ok" if free >= good else "warning" if free >= least else "error"
        if not os.access(folder, os.W_OK):
            yield Finding(
                "disk",
                "warning" if name == "runs" else "error",
                f"{name}: {folder} can't be written to",
                _elsewhere(name),
            )
        elif level == "ok":
            yield Finding("disk", "ok", f"{name}: {free:,} MiB free in {folder}")
        else:
            text = f"{name}: only {free:,} MiB free in {folder}; {good:,} MiB are comfortable"
            yield Finding("disk", level, text, _elsewhere(name))
    free = _free_memory() // MIB
    if free < 2000:
        yield Finding(
            "memory",
            "warning",
            f"{free:,} MiB free; two ranks of the quickstart take about 2,000 MiB",
            "end other programs, or use a smaller train.micro_batch_size",
        )
    else:
        yield Finding("memory", "ok", f"{free:,} MiB free")


def _elsewhere(name: str) -> str:
    return {
        "cache": "free some, or set XDG_CACHE_HOME to a folder elsewhere",
        "runs": "free some, or give --output a folder elsewhere",
        "shared memory": "in a container: docker run --shm-size=256m",
    }[name]


def _free_memory() -> int:
    """Bytes that this process can still take: the machine's, or its control group's."""
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")):
            texts = [
                path.read_text().strip() for path in (root / limit, root / used) if path.exists()
            ]
            if len(texts) == 2 and all(text.isdigit() for text in texts):
                free = min(free, max(0, int(texts[0]) - int(texts[1])))
    return free


def check_gpus(_: list[Finding]) -> Iterator[Finding]:
    """GPUs, and whether torch and Horovod were built to use them."""
    smi = shutil.which("nvidia-smi")
    listed = (
        "" if smi is None else subprocess.run([smi, "-L"], capture_output=True, text=True).stdout
    )
    gpus = re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", listed, re.MULTILINE)
    if not gpus:
        yield Finding("gpus", "note", "no NVIDIA GPU: training runs on the processor")
        return
    yield Finding("gpus", "ok", f"{len(gpus)}: {', '.join(dict.fromkeys(gpus))}")
    torch = version_of("torch") or ""
    if torch.endswith("+cpu"):
        yield Finding(
            "gpus",
            "warning",
            f"torch {torch} is a build for processors and won't use them",
            "install torch from a CUDA index (pytorch.org lists them), then build Horovod anew",
        )
        return
    switches = Horovod.find().record.get("switches")
    if switches is not None and not any(name.startswith("HOROVOD_GPU_") for name in switches):
        yield Finding(
            "gpus",
            "warning",
            "Horovod was built without NCCL: it reduces through the processor's memory",
            f"HOROVOD_GPU_OPERATIONS=NCCL {build_command()}",
        )
