"""What the environment of a rank must say: threads, allocator, MPI's polling, Horovod's cycle."""

from __future__ import annotations

import ctypes
import os

from horovod_lm.config import Config
from horovod_lm.topology import place, threads_per_rank

# With these glibc keeps large blocks instead of giving them back to the kernel at every step, whose
# page faults cost 13 to 22% of a step. The arenas of other threads than the first give theirs back
# all the same: an allreduce of 100 MB in Horovod's thread, for which MPI allocates as much, took
# twice as long. So there is one arena. And it asks for huge pages: where ranks read each other's
# memory, the kernel looks up each page, and an allreduce of 20 MB took half as long again.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# What mallopt(3) can still set in a process that has started, by the variable whose place it takes:
# a parameter and its value. Huge pages it can't.
_LATE = {
    "MALLOC_MMAP_THRESHOLD_": (-4, 0),  # M_MMAP_MAX: no block is too large
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
    "MALLOC_ARENA_MAX": (-8, 1),
}


def rank_environment(config: Config, threads: int | None = None) -> dict[str, str]:
    """The variables that a rank starts with; `threads` where the launcher knows them.

    Open MPI polls busily, which takes cores from ranks that compute, unless it yields when idle.
    The gradients are one tensor: nothing is fused, and our Horovod reduces at once what can't be
    fused. All else that is asked of it is rare, so a cycle may be 5 ms: at 1 ms, ranks that compute
    lost 1% to its background threads, which met a thousand times a second. Its stalls end by
    themselves only if a time is given, and Gloo's waits must be as patient.
    """
    stall = str(config.launch.stall_seconds)
    values = {
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "HOROVOD_CYCLE_TIME": "5",
        "HOROVOD_FUSION_THRESHOLD": "0",
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": stall,
        "HOROVOD_STALL_CHECK_TIME_SECONDS": str(max(1, config.launch.stall_seconds // 2)),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": stall,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        **_ALLOCATOR,
    }
    if config.output.profile is not None:
        # The timeline can then be started at a step; torch's profiler doesn't speak of itself.
        values |= {"HOROVOD_TIMELINE": "DYNAMIC", "KINETO_LOG_LEVEL": "6"}
    if threads is not None:
        values |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return values


def apply(config: Config) -> int:
    """In a rank, before a framework is imported: set what can still be set, without overriding
    the user's own. Returns the number of threads for this rank."""
    threads = config.launch.threads or threads_per_rank(place())
    late = [setting for name, setting in _LATE.items() if not _is_set(name)]
    for name, value in rank_environment(config, threads).items():
        os.environ.setdefault(name, value)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, number in late:
            mallopt(parameter, number)
    return threads


def _is_set(name: str) -> bool:
    """Whether glibc has read a variable of its allocator, or the tunable of the same meaning."""
    tunable = "glibc.malloc." + name.removeprefix("MALLOC_").rstrip("_").lower()
    return name in os.environ or tunable in os.environ.get("GLIBC_TUNABLES", "")
