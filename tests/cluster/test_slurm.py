"""The Slurm job scripts, submitted to a real Slurm of one node."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import ROOT, Host, filled_in, stopping, tiny_config, why_not
from tests.helpers import open_to_others

REASON = why_not("slurmctld", "slurmd", "munged", "sbatch")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SLURM_CONF = """
ClusterName=test
SlurmctldHost=node(10.99.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
MpiDefault=none
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
NodeName=node NodeAddr=10.99.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host on which munged, slurmctld and slurmd run."""
    folder = tmp_path_factory.mktemp("slurm")
    open_to_others(folder)  # munge wants its socket to be reachable
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.99.0.1 node\n")
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder))
    host = Host("node", folder, folder / "hosts")
    with stopping(host):
        host.env["SLURM_CONF"] = str(folder / "slurm.conf")
        # Slurm's look-ups want an interface that isn't the loopback.
        host.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        host.run("ip", "address", "add", "10.99.0.1/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        host.run("ip", "link", "set", "eth1", "up")
        munge = [f"--{name}={folder}/munge/{name}" for name in ("socket", "pid-file", "seed-file")]
        host.start("munged", "--foreground", f"--key-file={key}", *munge)
        wait_for(folder / "munge" / "socket")
        host.start("slurmctld", "-D")
        host.start("slurmd", "-D")
        for _ in range(100):
            if "idle" in host.run("sinfo", "--noheader", "--format=%t"):
                break
            time.sleep(0.2)
        yield host


def wait_for(path: Path) -> None:
    """Until the file is there, for ten seconds."""
    for _ in range(100):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize(
    ("script", "flags", "backend"),
    [
        ("slurm-srun.sbatch", ["--ntasks=2"], "torch"),
        ("slurm-horovodrun.sbatch", ["--ntasks-per-node=2"], "tensorflow"),
    ],
)
def test_job_script(
    node: Host, tmp_path: Path, script: str, flags: list[str], backend: str
) -> None:
    job = filled_in(
        script, tmp_path,
        project=ROOT, config=tiny_config(tmp_path), output=tmp_path / "run", backend=backend,
    )  # fmt: skip
    log = tmp_path / "job.log"
    try:
        node.run("sbatch", "--wait", f"--output={log}", *flags, str(job))
    except AssertionError as error:
        raise AssertionError(f"{error}\n{log.read_text()}") from None
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["state"], run["ranks"], run["backend"], run["steps"]) == (
        "finished", 2, backend, 6,
    )  # fmt: skip
