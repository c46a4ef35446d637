"""Where a process stands in its job: ranks, its slice of a batch, and the cores it really has."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Processes that start ranks; their own affinity is what the ranks of a machine have together.
_DAEMONS = {
    "mpirun", "mpiexec", "prterun", "prted", "orted", "slurmstepd", "srun", "horovodrun",
    "hydra_pmi_proxy", "sshd",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A process's place in its job, as the launcher's environment tells it.

    `launcher` is `mpirun`, `horovodrun`, `srun`, `mpiexec` or None (started alone); `controller`
    is what Horovod's coordination runs over there.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str | None = None
    controller: Literal["mpi", "gloo"] = "mpi"


def place(environ: Mapping[str, str] = os.environ) -> Place:
    """The place of this process, without any communication.

    horovodrun over Gloo sets HOROVOD_RANK and its kin; Open MPI (also below `horovodrun --mpi`)
    OMPI_COMM_WORLD_*; MPICH and its kin PMI_*; srun SLURM_*. A batch script of Slurm is not a rank,
    though it has SLURM_PROCID: only a step has SLURM_STEP_NUM_TASKS.
    """

    def number(name: str, default: int) -> int:
        value = environ.get(name, "")
        return int(value) if value.isdigit() else default

    if "HOROVOD_RANK" in environ and "HOROVOD_SIZE" in environ:
        return Place(
            number("HOROVOD_RANK", 0),
            number("HOROVOD_SIZE", 1),
            number("HOROVOD_LOCAL_RANK", 0),
            number("HOROVOD_LOCAL_SIZE", 1),
            "horovodrun",
            "mpi" if environ.get("HOROVOD_CONTROLLER") == "mpi" else "gloo",
        )
    if "OMPI_COMM_WORLD_RANK" in environ:
        return Place(
            number("OMPI_COMM_WORLD_RANK", 0),
            number("OMPI_COMM_WORLD_SIZE", 1),
            number("OMPI_COMM_WORLD_LOCAL_RANK", 0),
            number("OMPI_COMM_WORLD_LOCAL_SIZE", 1),
            "mpirun",
        )
    if "PMI_RANK" in environ and "PMI_SIZE" in environ:
        return Place(
            number("PMI_RANK", 0),
            number("PMI_SIZE", 1),
            number("MPI_LOCALRANKID", 0),
            number("MPI_LOCALNRANKS", 1),
            "mpiexec",
        )
    if "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        node = number("SLURM_NODEID", 0)
        tasks = slurm_tasks(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return Place(
            number("SLURM_PROCID", 0),
            number("SLURM_STEP_NUM_TASKS", 1),
            number("SLURM_LOCALID", 0),
            tasks[node] if node < len(tasks) else 1,
            "srun",
        )
    return Place()


def slurm_tasks(text: str) -> list[int]:
    """Tasks of each node from Slurm's short form: `2(x3),1` is [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    return tasks


def threads_per_rank(where: Place, environ: Mapping[str, str] = os.environ) -> int:
    """How many threads a rank may use so that the ranks of one machine do not fight for cores.

    A rank that its launcher bound to cores has those; ranks that share cores divide them, and a
    container's CPU quota is divided by the ranks in it. At least 1.
    """
    mine, machine = _own_cores(), _machine_cores(environ)
    share_of_machine = machine // where.local_size
    quota = cpu_quota()
    if quota is not None:
        share_of_machine = min(share_of_machine, int(quota / where.local_size))
    return max(1, min(mine, share_of_machine))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, or the CPU quota if that is less."""
    quota = cpu_quota()
    cores = _own_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _own_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _machine_cores(environ: Mapping[str, str]) -> int:
    """Cores that the ranks of this machine have together: those of the daemon that started them,
    since the launcher may have bound this rank to a part; never more than Slurm granted."""
    cores = _own_cores()
    daemon = _daemon()
    if daemon is not None and hasattr(os, "sched_getaffinity"):
        with suppress(OSError):  # it ended, or belongs to another user
            cores = max(cores, len(os.sched_getaffinity(daemon)))
    granted = environ.get("SLURM_CPUS_ON_NODE", "")
    return min(cores, int(granted)) if granted.isdigit() and int(granted) else cores


def _daemon() -> int | None:
    """The nearest ancestor that is a launcher or its daemon."""
    pid = os.getppid()
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        if name in _DAEMONS:
            return pid
        pid = int(stat[stat.rindex(")") + 2 :].split()[1])
    return None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU quota of this process's control group, in cores; None without one.

    Of cgroup v2 (`cpu.max`) and v1 (`cpu.cfs_quota_us`), the least from the process's own group up
    to the root. `root` is the file system to look in, for tests.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    quotas = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
                quotas += _quotas(root / mount, path, _quota_v2)
        elif "cpu" in controllers.split(","):
            for mount in ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"):
                quotas += _quotas(root / mount, path, _quota_v1)
    return min(quotas, default=None)


def _quotas(mount: Path, path: str, read: Callable[[Path], float | None]) -> list[float]:
    """Quotas of the group `path` and of all above it. In a container the path may be the host's
    and not be there; the mount's root then is the container's group."""
    folder = mount / path.lstrip("/")
    found = []
    while True:
        quota = read(folder)
        if quota is not None:
            found.append(quota)
        if folder == mount or mount not in folder.parents:
            return found
        folder = folder.parent


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        period = int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return None if quota <= 0 else quota / period
