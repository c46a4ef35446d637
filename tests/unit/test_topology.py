"""A rank's place and cores, from environments and control groups as launchers and kernels write
them, and under a real mpirun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from horovod_lm.topology import Place, cpu_quota, place, slurm_tasks, threads_per_rank, usable_cores

OMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
SRUN = {
    "SLURM_PROCID": "4",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}
GLOO = {
    "HOROVOD_RANK": "1",
    "HOROVOD_SIZE": "2",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_CONTROLLER": "gloo",
}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
# What an sbatch script sees: it is a process of Slurm, but no rank.
SBATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Place()),
        (OMPI, Place(3, 4, 1, 2, "mpirun", "mpi")),
        (SRUN, Place(4, 5, 0, 1, "srun", "mpi")),
        (GLOO, Place(1, 2, 1, 2, "horovodrun", "gloo")),
        (PMI, Place(1, 2, 1, 2, "mpiexec", "mpi")),
        (SBATCH, Place()),
        ({**SRUN, **OMPI}, Place(3, 4, 1, 2, "mpirun", "mpi")),
        ({**SBATCH, **GLOO}, Place(1, 2, 1, 2, "horovodrun", "gloo")),
    ],
)
def test_place_is_read_from_the_launchers_environment(environ, expected):
    assert place(environ) == expected


@pytest.mark.parametrize(
    ("text", "tasks"), [("", []), ("2", [2]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2)", [1, 4, 4])]
)
def test_slurms_short_form_of_tasks(text, tasks):
    assert slurm_tasks(text) == tasks


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        # the parent's quota is less than the process's own group's
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
            },
            2.0,
        ),
        # in a container the path is the host's, and the mount's root is the container's group
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/docker/123\n2:memory:/docker/123\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_cpu_quota_of_both_kinds_of_control_groups(tmp_path, files, quota):
    assert cpu_quota(write(tmp_path, files)) == quota


def test_ranks_of_a_machine_divide_its_cores():
    cores = usable_cores()
    assert threads_per_rank(Place()) == cores
    assert threads_per_rank(Place(size=2, local_size=2)) == max(1, cores // 2)
    assert threads_per_rank(Place(size=1000, local_size=1000)) == 1
    # two ranks on two machines have a machine each
    assert threads_per_rank(Place(size=2, local_size=1)) == cores


def test_slurms_grant_counts():
    assert threads_per_rank(Place(launcher="srun"), {"SLURM_CPUS_ON_NODE": "1"}) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_affinity_counts():
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from horovod_lm.topology import *; print(usable_cores(), threads_per_rank(Place()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["1", "1"], result.stderr


def mpirun() -> str | None:
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.exists() else shutil.which("mpirun")


@pytest.mark.skipif(mpirun() is None, reason="no mpirun")
@pytest.mark.parametrize("binding", ["none", "core"])
def test_two_ranks_under_mpirun(binding):
    cores = usable_cores()
    if binding == "core" and cores < 2:
        pytest.skip("one core can't be bound to two ranks")
    code = (
        "from horovod_lm.topology import *;"
        "p = place(); print(p.rank, p.size, p.local_size, p.launcher, threads_per_rank(p))"
    )
    command = [mpirun(), "-np", "2", "--bind-to", binding, sys.executable, "-c", code]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **allowed}
    )
    threads = max(1, cores // 2) if binding == "none" else 1
    lines = sorted(result.stdout.splitlines())
    assert lines == [f"{rank} 2 2 mpirun {threads}" for rank in (0, 1)], result.stderr
