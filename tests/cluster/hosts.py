"""Hosts of their own on this machine: each has its own network, name, processes and mounts."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
NAMESPACES = ["--net", "--uts", "--pid", "--mount"]
CONFIG = """
[model]
width = 16
layers = 1
heads = 2
context = 16

[data]
text = ["text.txt"]
vocabulary = 300
validation_fraction = 0.2

[train]
steps = 6
global_batch_size = 4

[schedule]
warmup = 2

[output]
tensorboard = false
"""


def why_not(*commands: str) -> str | None:
    """The reason why such hosts can't be had here, or None."""
    if os.geteuid() != 0:
        return "needs root, for namespaces"
    missing = [c for c in ("unshare", "nsenter", "ip", *commands) if not shutil.which(c)]
    if missing:
        return f"not installed: {', '.join(missing)} (scripts/test.sh --system installs them)"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True)
    if tried.returncode:
        return "this machine allows no new namespaces"
    if Path(sys.prefix) != ROOT / ".venv":
        return "the job scripts want the tests to run in the clone's .venv"
    return None


class Host:
    """One host. `run` runs a command there; everything on it ends with `stop`."""

    def __init__(self, name: str, folder: Path, hosts_file: Path) -> None:
        self.name, self.folder = name, folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        command = ["unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child"]
        # A first process must take in the orphans, which bash does: Slurm waits for their end.
        self._holder = subprocess.Popen([*command, "bash", "-c", "sleep infinity & wait"])
        self.pid = self._first_process()
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_"))},
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        }
        self.run("hostname", name)
        self.run("ip", "link", "set", "lo", "up")
        self.run("mount", "--bind", str(hosts_file), "/etc/hosts")
        self.run("mount", "-t", "tmpfs", "tmpfs", "/run")

    def _first_process(self) -> int:
        """The `bash`, once it is inside its namespaces."""
        for _ in range(200):
            for child in psutil.Process(self._holder.pid).children():
                if child.name() == "bash":
                    return child.pid
            time.sleep(0.02)
        raise AssertionError("unshare started nothing")

    def _inside(self, *command: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *NAMESPACES, "--", *command]

    def run(self, *command: str, seconds: float = 150, code: int = 0) -> str:
        """The output of a command, which must end with `code`."""
        done = subprocess.run(
            self._inside(*command),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=self.env, timeout=seconds,
        )  # fmt: skip
        assert done.returncode == code, f"{' '.join(command)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def start(self, *command: str) -> None:
        """Starts a daemon that stays in the foreground."""
        with (self.folder / f"{self.name}-{Path(command[0]).name}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    self._inside(*command),
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env,
                )
            )  # fmt: skip

    def stop(self) -> None:
        """Ends every process of the host, by ending its first one; the namespaces go with them."""
        self._holder.send_signal(signal.SIGKILL)
        for process in (self._holder, *self._daemons):
            process.wait()


@contextmanager
def stopping(*hosts: Host) -> Iterator[None]:
    """Stops the hosts at the end, and shows that none of their processes is left."""
    inside = [str(Path(f"/proc/{host.pid}/ns/pid").readlink()) for host in hosts]
    try:
        yield
    finally:
        for host in hosts:
            host.stop()
    for _ in range(50):
        left = [pid for pid in psutil.pids() if _namespace(pid) in inside]
        if not left:
            return
        time.sleep(0.1)
    raise AssertionError(f"still running: {[Path(f'/proc/{p}/cmdline').read_text() for p in left]}")


def _namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:  # it has ended meanwhile
        return None


def tiny_config(folder: Path) -> Path:
    """A config that trains in a second, with its text."""
    sentences = [
        f"In the year {year} the mill by the river ground {year % 17} sacks of wheat.\n\n"
        for year in range(1700, 2000)
    ]
    (folder / "text.txt").write_text("".join(sentences))
    config = folder / "tiny.toml"
    config.write_text(CONFIG)
    return config


def filled_in(script: str, folder: Path, **values: object) -> Path:
    """A copy of a script in scripts/cluster, executable, with its first lines filled in."""
    text = (ROOT / "scripts/cluster" / script).read_text()
    for name, value in values.items():
        text, count = re.subn(rf"^{name}=\S*", f"{name}={value}", text, count=1, flags=re.M)
        assert count == 1, f"{script} has no line {name}="
    copy = folder / script
    copy.write_text(text)
    copy.chmod(0o755)
    return copy
