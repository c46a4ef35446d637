"""Training across two hosts, by mpirun and by horovodrun, over ssh and a network of their own."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import ROOT, Host, filled_in, stopping, tiny_config, why_not

REASON = why_not("sshd", "ssh", "ssh-keygen")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SSH = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, Host]]:
    """h1 and h2, joined by a cable, each with an sshd."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.98.0.1 h1\n10.98.0.2 h2\n")
    (folder / "ssh_config").write_text(SSH.format(folder=folder))
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
    subprocess.run(keygen, check=True)
    pair = Host("h1", folder, folder / "hosts"), Host("h2", folder, folder / "hosts")
    with stopping(*pair):
        ends = [["eth0", "netns", str(host.pid)] for host in pair]
        cable = ["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]]
        subprocess.run(cable, check=True)
        for number, host in enumerate(pair, start=1):
            host.run("ip", "address", "add", f"10.98.0.{number}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            host.run("mount", "--bind", str(folder / "ssh_config"), "/etc/ssh/ssh_config")
            host.run("mkdir", "/run/sshd")
            host.start("/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config"))
        for host in pair:
            host.run("sh", "-c", "for i in $(seq 50); do ssh h1 true && ssh h2 true && exit; done")
        yield pair


def finished(output: Path) -> dict[str, object]:
    """The record of a run, which must have finished on two ranks."""
    run: dict[str, object] = json.loads((output / "run.json").read_text())
    assert (run["state"], run["ranks"], run["steps"]) == ("finished", 2, 6)
    return run


def test_mpirun_script(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("h1 slots=1\nh2 slots=1\n")
    job = filled_in(
        "mpirun.sh", tmp_path,
        project=ROOT, config=tiny_config(tmp_path), output=tmp_path / "run",
        hostfile=tmp_path / "hostfile", ranks=2, network="eth0",
    )  # fmt: skip
    hosts[0].run(str(job))
    assert finished(tmp_path / "run")["launcher"] == "mpirun"


def test_horovodrun_over_gloo(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    bin_ = ROOT / ".venv" / "bin"
    hosts[0].run(
        str(bin_ / "horovodrun"), "-np", "2", "-H", "h1:1,h2:1", "--gloo",
        "--network-interfaces", "eth0",
        str(bin_ / "horovod-lm"), "train", str(tiny_config(tmp_path)), "--output",
        str(tmp_path / "run"),
    )  # fmt: skip
    assert finished(tmp_path / "run")["controller"] == "gloo"
