"""Makes .venv and installs everything into it; a second run finds that nothing is left to do.

Called by set_up.sh; uses the standard library alone, since nothing is installed yet. What a stopped
run has installed stays, and the next one goes on from there.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "set-up.log"
STAGES = 5  # the fifth is what the calling script does next
EXTRAS = {"main": ["torch", "tensorflow", "mpi"], "test": ["torch", "tensorflow", "mpi", "test"]}
# What Horovod's build and the wheel itself want, here so that the constraints apply to them.
BUILD_TOOLS = ["setuptools", "wheel", "packaging", "cffi", "cloudpickle", "psutil", "pyyaml"]
# `--user`, where it is someone's default, can't be meant inside .venv.
ENVIRONMENT = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


class SetUpError(Exception):
    """Set-up can't go on; the message says why and what mends it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--test", action="store_true", help="also what the tests and lint need")
    parser.add_argument("--choose", action="store_true", help="make .venv with this very Python")
    options = parser.parse_args()
    kind = "test" if options.test else "main"
    other_python = options.choose and venv_version() not in (None, own_version())
    if not other_python and is_current(kind):
        return 0
    try:
        with (ROOT / "setup.py").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two set-ups at once: the second waits, then is done
            if other_python or not is_current(kind):
                set_up(kind, clear=other_python)
    except SetUpError as error:
        print(f"\nSet-up stopped. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Start it again: it goes on from here.", file=sys.stderr)
        return 130
    return 0


def set_up(kind: str, clear: bool) -> None:
    """The four stages; each leaves alone what is already there."""
    check_machine()
    with stage(1, f"Python {own_version()} in {VENV.name}"):
        make_venv(clear)
        forget_unfinished()
        pip("install", "-c", "constraints.txt", "pip", *BUILD_TOOLS)
    with stage(2, "Looking up what is to be installed"):
        report = look_up(EXTRAS[kind])
        print(f"      {describe(report)}")
    with stage(3, f"Installing {len(report['pins'])} packages"):
        install(report)
    with stage(4, "Building Horovod for these frameworks, or taking it from the cache"):
        command = [str(PYTHON), "scripts/build_horovod.py", "--install"]
        if subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL).returncode:
            raise SetUpError("Horovod is not built; the lines above say why.")
    for done in ("main", kind):
        stamp(done).write_text(digest())


def stamp(kind: str) -> Path:
    """The file that says with which files this kind of set-up was finished."""
    return VENV / f"set-up-{kind}"


def is_current(kind: str) -> bool:
    """Whether set-up was finished with the files as they are now."""
    return stamp(kind).is_file() and PYTHON.exists() and stamp(kind).read_text() == digest()


def digest() -> str:
    """SHA-256 over every file that decides what is installed."""
    sha = hashlib.sha256(str(ROOT).encode())  # an editable install points to this very place
    names = ["setup.py", "pyproject.toml", "constraints.txt", "scripts/build_horovod.py"]
    for name in names + sorted(str(p) for p in (ROOT / "scripts/horovod_build").rglob("*.py")):
        sha.update((ROOT / name).read_bytes())
    return sha.hexdigest()


def own_version() -> str:
    """This interpreter's version, as 3.11.2."""
    return ".".join(map(str, sys.version_info[:3]))


def venv_version() -> str | None:
    """The version of the Python that .venv was made with."""
    settings = VENV / "pyvenv.cfg"
    found = re.search(r"version\S* = ([\d.]+)", settings.read_text()) if settings.exists() else None
    return found.group(1) if found else None


def check_machine() -> None:
    """One message for everything that is missing, before gigabytes are downloaded."""
    short = ".".join(own_version().split(".")[:2])
    header = Path(sysconfig.get_path("include", vars={"installed_base": sys.base_prefix}))
    wanted = [
        ("a C++ compiler", bool(os.environ.get("CXX") or shutil.which("c++")), "g++", "gcc-c++"),
        ("make", bool(shutil.which("make")), "make", "make"),
        (
            "Python's venv module",
            bool(importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")),
            f"python{short}-venv",
            f"python{short}",
        ),
        (
            "Python's headers",
            (header / "Python.h").is_file(),
            f"python{short}-dev",
            f"python{short}-devel",
        ),
    ]
    missing = [item for item in wanted if not item[1]]
    if missing:
        raise SetUpError(
            f"Missing on this machine: {', '.join(item[0] for item in missing)}. Install with\n"
            f"  apt-get install {' '.join(item[2] for item in missing)}    (Debian, Ubuntu)\n"
            f"  dnf install {' '.join(item[3] for item in missing)}    (Fedora, RHEL)\n"
            "and start this again."
        )


def make_venv(clear: bool) -> None:
    """Makes .venv, or repairs one whose making was stopped."""
    probe = [str(PYTHON), "-c", "import pip"]
    if not clear and PYTHON.exists() and not subprocess.run(probe, capture_output=True).returncode:
        return
    command = [sys.executable, "-m", "venv", str(VENV)] + (["--clear"] if clear else [])
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise SetUpError(f"{VENV} can't be made:\n{made.stdout}{made.stderr}")


def forget_unfinished() -> None:
    """Makes pip install again what it was installing when it was stopped.

    A package counts as installed once its dist-info is there, which may be before its modules;
    INSTALLER is what pip writes last.
    """
    for folder in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (folder / "INSTALLER").exists():
            shutil.rmtree(folder)


def look_up(extras: list[str]) -> dict:
    """What pip would install now, and how much of it would be downloaded."""
    wanted = f".[{','.join(extras)}]"
    text = pip(
        "install", "--dry-run", "--quiet", "--report", "-", "--no-build-isolation",
        "-c", "constraints.txt", "-e", wanted,
    )  # fmt: skip
    command = [str(PYTHON), "scripts/download_sizes.py"]
    sizes = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, input=text, stdout=subprocess.PIPE, text=True
    )
    if sizes.returncode:
        raise SetUpError("pip's report of what it would install can't be read; see above.")
    return json.loads(sizes.stdout)


def describe(report: dict) -> str:
    """One line on what will be downloaded."""
    if not report["pins"]:
        return "everything is there"
    largest = ", ".join(f"{name} {mega(size)}" for name, size in report["largest"])
    text = f"{len(report['pins'])} packages; at most {mega(report['bytes'])} to download"
    if report["unknown"]:
        text += f", and {report['unknown']} files whose size the index does not tell"
    return f"{text}; largest: {largest}" if largest else text


def mega(size: int) -> str:
    """Bytes as a person reads them, in millions."""
    return f"{size / 1e6:,.0f} MB"


def install(report: dict) -> None:
    """Installs exactly what was looked up, then the project itself."""
    if report["pins"]:
        progress = Progress(report["bytes"])
        pip("install", "--no-deps", "--progress-bar", "raw", *report["pins"], follow=progress)
        progress.close()
    pip("install", "--no-deps", "--no-build-isolation", "-e", ".")


class Progress:
    """Follows pip's output: one changing line on a terminal, now and then a line in a log."""

    def __init__(self, total: int) -> None:
        self.total, self.before, self.now = total, 0, 0
        self.begun = self.shown = time.monotonic()

    def __call__(self, line: str) -> None:
        if found := re.match(r"Progress (\d+) of (\d+)", line):
            self.now = int(found.group(1))
            if found.group(1) == found.group(2):
                self.before, self.now = self.before + self.now, 0
            self.show(f"{mega(self.before + self.now)} of {mega(self.total)} downloaded")
        elif line.startswith("Installing collected packages"):
            self.show("unpacking", at_once=True)

    def show(self, text: str, at_once: bool = False) -> None:
        terminal = sys.stdout.isatty()
        now = time.monotonic()
        if at_once or now - self.shown > (0.3 if terminal else 15):
            self.shown = now
            line = f"      {text} after {now - self.begun:.0f} s"
            print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", flush=True)

    def close(self) -> None:
        if sys.stdout.isatty():
            print("\r\033[K", end="")


def pip(*arguments: str, follow=lambda line: None) -> str:
    """Runs pip of .venv and gives back what it printed; its whole output also goes to the log."""
    command = [str(PYTHON), "-m", "pip", *arguments]
    lines = []
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        # Errors go to the log by way of the file, so that they don't mix into a report on stdout.
        with subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process:
            for line in process.stdout:
                lines.append(line)
                follow(line)
        log.writelines(line for line in lines if not line.startswith(("Progress", "{")))
    if process.returncode:
        end = "".join(LOG.read_text().splitlines(keepends=True)[-12:])
        raise SetUpError(f"pip failed. The end of {LOG}:\n{end}")
    return "".join(lines)


@contextmanager
def stage(number: int, what: str) -> Iterator[None]:
    """Says what begins, and at its end how long it took."""
    print(f"[{number}/{STAGES}] {what} …", flush=True)
    begun = time.monotonic()
    yield
    print(f"      done in {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
