"""The cost model against real ranks: fitted over two speeds of a shaped link, it foretells a third.

Each rank is on a host of its own, whose link to the switch lets out so many bits a second. At these
speeds the link alone decides how long an allreduce takes, on a busy machine too. This file is also
the program that the ranks run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from horovod_lm.bench.cost_model import GIGABIT, Point, fit, largest_error
from horovod_lm.config import make_config
from horovod_lm.environment import rank_environment
from tests.cluster.hosts import ROOT, Host, stopping, why_not

REASON = why_not("tc")
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SIZES = (125_000, 250_000, 500_000)
SEEN, UNSEEN = (5, 20), 10  # Mbit/s
REPEATS = 3
ERROR = 0.2  # of a foretold time
# A ring, which is what the model describes, at every size; and messages that are sent at once: the
# receiver's leave to send would wait in the queue of its own data.
MPI = {
    "coll_tuned_use_dynamic_rules": "1",
    "coll_tuned_allreduce_algorithm": "4",
    "btl_tcp_eager_limit": "4000000",
    "btl_tcp_rndv_eager_limit": "4000000",
    "btl_tcp_max_send_size": "4000000",
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    """h1 to h4 at 10.97.0.1 to 4, joined by a switch, a host of its own."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    switch = Host("switch", folder, folder / "hosts")
    found = [Host(f"h{number}", folder, folder / "hosts") for number in range(1, 5)]
    with stopping(switch, *found):
        switch.run("ip", "link", "add", "bridge0", "type", "bridge")
        switch.run("ip", "link", "set", "bridge0", "up")
        for number, host in enumerate(found, start=1):
            ends = ["eth0", "netns", str(host.pid), "type", "veth"]
            other = ["peer", "name", f"port{number}", "netns", str(switch.pid)]
            subprocess.run(["ip", "link", "add", *ends, *other], check=True)
            switch.run("ip", "link", "set", f"port{number}", "master", "bridge0", "up")
            host.run("ip", "address", "add", f"10.97.0.{number}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
            _let_the_link_set_the_pace(host)
        yield found


def _let_the_link_set_the_pace(host: Host) -> None:
    """Acknowledgements wait in the same long queue as data. So TCP is told to send a whole message
    without waiting for any, at once and after a pause too, and not to take one that is late for a
    loss."""
    windows = ["initcwnd", "8000", "initrwnd", "8000", "rto_min", "10s"]
    host.run("ip", "route", "change", "10.97.0.0/24", "dev", "eth0", *windows)
    settings = {"tcp_slow_start_after_idle": "0"}
    settings |= dict.fromkeys(("tcp_rmem", "tcp_wmem"), "4096 16777216 16777216")
    for name, value in settings.items():
        host.run("sh", "-c", f"echo {value} > /proc/sys/net/ipv4/{name}")


def shape(hosts: list[Host], mbit: float) -> None:
    """Let each host send so much; the queue is long enough to lose nothing."""
    for host in hosts:
        host.run(
            "tc", "qdisc", "replace", "dev", "eth0", "root",
            "tbf", "rate", f"{mbit}mbit", "burst", "16kb", "limit", "8mb",
        )  # fmt: skip


def measured(hosts: list[Host], ranks: int, folder: Path) -> dict[int, list[Point]]:
    """By Mbit/s, allreduces of one job with a rank on each of the first `ranks` hosts."""
    addresses = {f"10.97.0.{number}": host.pid for number, host in enumerate(hosts, start=1)}
    agent = folder / "agent.sh"  # what mpirun takes for ssh
    agent.write_text(
        "#!/bin/sh\ncase $1 in\n"
        + "".join(f"{address}) host={pid};;\n" for address, pid in addresses.items())
        + 'esac\nshift\nexec nsenter --target $host --net --uts -- sh -c "$*"\n'
    )
    agent.chmod(0o755)
    settings = rank_environment(make_config({"launch": {"ranks": ranks}}, "the job"), 1)
    settings |= {"PYTHONPATH": str(ROOT)}
    command = ["nsenter", "--target", str(hosts[0].pid), "--net", "--uts", "--"]
    command += [str(ROOT / ".venv/bin/mpirun"), "-np", str(ranks), "--bind-to", "none"]
    command += ["--host", ",".join(f"{address}:1" for address in list(addresses)[:ranks])]
    command += ["--prtemca", "plm_ssh_agent", str(agent), "--prtemca", "prte_if_include", "eth0"]
    command += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self"]
    command += ["--mca", "btl_tcp_if_include", "eth0"]
    for name, value in MPI.items():
        command += ["--mca", name, value]
    command += ["--prtemca", "prte_tmpdir_base", str(folder)]  # see horovod_lm.launch
    for name in settings:
        command += ["-x", name]
    command += [sys.executable, "-m", "tests.cluster.test_cost_model", str(folder)]
    points = {}
    with (folder / "log").open("wb") as log:
        job = subprocess.Popen(
            command, cwd=ROOT, env={**hosts[0].env, **settings}, stdout=log, stderr=log
        )
        try:
            for mbit in (*SEEN, UNSEEN):
                shape(hosts, mbit)
                (folder / f"go-{mbit}").touch()
                found = folder / f"found-{mbit}.json"
                while not found.exists():
                    assert job.poll() is None, (folder / "log").read_text()
                    time.sleep(0.05)
                link = 1e-3 * mbit * GIGABIT
                points[mbit] = [
                    Point(ranks, int(size), seconds, link)
                    for size, seconds in json.loads(found.read_text()).items()
                ]
            assert job.wait(30) == 0, (folder / "log").read_text()
        finally:
            job.kill()
            job.wait()
    return points


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_third_speed_is_foretold(hosts: list[Host], tmp_path: Path, ranks: int) -> None:
    points = measured(hosts, ranks, tmp_path)
    cost = fit([point for mbit in SEEN for point in points[mbit]])
    for point in points[UNSEEN]:
        foretold = cost.seconds(point.ranks, point.size, point.link)
        print(
            f"{ranks} ranks, {point.size / 1e6:g} MB at {UNSEEN} Mbit/s: "
            f"foretold {foretold:.3f} s, measured {point.seconds:.3f} s"
        )
    assert largest_error(cost, points[UNSEEN]) < ERROR


def rank(folder: Path) -> None:
    """In a rank: allreduces of each size at each speed, once the test has set it."""
    from horovod_lm.backend import load_backend

    backend = load_backend("torch")
    communicator = backend.communicator()
    for mbit in (*SEEN, UNSEEN):
        while communicator.rank == 0 and not (folder / f"go-{mbit}").exists():
            time.sleep(0.05)
        communicator.barrier()
        found = {}
        for size in SIZES:
            reduce = backend.bench().allreduce(communicator, size // 4)
            times = []
            for _ in range(1 + REPEATS):
                communicator.barrier()
                begin = time.perf_counter()
                reduce()
                times.append(time.perf_counter() - begin)
            found[size] = min(times[1:])  # the least disturbed by others
        if communicator.rank == 0:
            (folder / "writing").write_text(json.dumps(found))
            os.rename(folder / "writing", folder / f"found-{mbit}.json")
    communicator.shutdown()


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
