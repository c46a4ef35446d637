"""Checks of what is installed, by package metadata and by asking programs for their version."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from horovod_lm.checks.finding import BACKENDS, SECONDS, Finding, Level
from horovod_lm.installed import (
    BUILDER,
    DISTRIBUTIONS,
    Horovod,
    build_command,
    find_program,
    version_of,
)


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
            pip(str(requirement)),
        )
    if not bad:
        yield Finding("packages", "ok", f"all {len(wanted)} required packages are there")


def _satisfied(package: str, specifier: str) -> bool:
    version = version_of(package)
    return version is not None and SpecifierSet(specifier).contains(version, prereleases=True)


def pip(requirement: str) -> tuple[str, ...]:
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
        yield Finding("compiler", "ok", first_line(compiler, "--version"))
    if shutil.which("make") is None:
        yield Finding(
            "make",
            "warning",
            "no make; building Horovod needs it",
            "apt-get install make, dnf install make, or conda install make",
        )
    else:
        yield Finding("make", "ok", first_line("make", "--version"))
    cmake = find_program("cmake")
    if cmake is None:
        yield Finding("cmake", "note", "no cmake; the build of Horovod fetches one for itself")
    else:
        yield Finding("cmake", "ok", first_line(cmake, "--version"))


def first_line(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]} does not run: {error}"
    return next(iter(result.stdout.splitlines()), f"{command[0]} says nothing")


def check_frameworks(_: list[Finding]) -> Iterator[Finding]:
    """Presence and versions of torch, TensorFlow and Keras against what the extras ask for."""
    missing = [backend for backend in BACKENDS if version_of(backend) is None]
    for backend in BACKENDS:
        wanted = _extra(backend)
        install = " ".join(f"'{requirement}'" for requirement in wanted.values())
        mend = f"{sys.executable} -m pip install {install}, then build Horovod anew"
        if backend in missing:
            level: Level = "error" if len(missing) == len(BACKENDS) else "warning"
            text = f"{backend} is not installed: this backend can't be used, nor compare"
            yield Finding(backend, level, text, mend)
            continue
        for package, requirement in wanted.items():
            text = f"{package} {version_of(package) or 'is missing'}"
            specifier = str(Requirement(requirement).specifier)
            if _satisfied(package, specifier):
                yield Finding(backend, "ok", text)
            else:
                yield Finding(backend, "error", f"{text}; {specifier} is required", mend)


def _extra(backend: str) -> dict[str, str]:
    """What the extra of a backend asks for here: requirements by framework or package."""
    try:
        lines = metadata.requires("horovod-lm") or []
    except metadata.PackageNotFoundError:
        return {backend: backend}
    found = {}
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker and marker.evaluate({"extra": backend}) and not marker.evaluate({"extra": ""}):
            name = requirement.name
            package = "tensorflow" if name in DISTRIBUTIONS["tensorflow"] else name
            found[package] = f"{name}{requirement.specifier}"
    return found


def check_horovod(_: list[Finding]) -> Iterator[Finding]:
    """Horovod: there, ours, and built for what is installed now."""
    horovod = Horovod.find()
    present = [backend for backend in BACKENDS if version_of(backend)]
    faults = {backend: horovod.fault(backend) for backend in present}
    if not present:
        text = "no framework is installed, and Horovod is built for the ones that are"
        yield Finding("horovod", "error", text, f"install one, then: {build_command()}")
        return
    for fault in dict.fromkeys(filter(None, faults.values())):
        yield Finding(
            "horovod", "error", fault, f"build the one that fits: {build_command()}", build()
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


def build() -> tuple[str, ...]:
    """The command that builds and installs our Horovod, where the checkout is there."""
    return (sys.executable, str(BUILDER), "--install") if BUILDER.is_file() else ()
