"""Elastic jobs under `horovodrun`: workers that come late or fail as they start, hosts that come
at a bad time or come back, and what is said where a job can't go on; each fault again with its mend
undone. Elastic jobs are over Gloo alone.

The workers run this file, in one of `ROLES`. They use PyTorch, which starts faster.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.ranks.mended import package
from tests.ranks.test_horovod_elastic import HOSTS, _job, _write_hosts

FIRST, OTHER, SECOND = HOSTS  # jobs begin with the first and the second
AT = 3  # the step at which something happens
GLOO_SECONDS = 6  # what Gloo waits for a rank; 30 if nobody says so


# ----------------------------------------------------------------------------------- in each worker


def train(folder: Path, happen: Callable[[int], None], done: Callable[[list[int]], bool]) -> None:
    """Steps until `done` of the numbers of workers that each step had; `happen` comes before each
    step. Writes what this worker has seen."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.manual_seed(os.getpid())
    net = torch.nn.Linear(3, 1)
    sgd = torch.optim.SGD(net.parameters(), 0.01)
    optimizer = hvd.DistributedOptimizer(sgd, named_parameters=net.named_parameters())
    state = hvd.elastic.TorchState(net, optimizer, sizes=[])

    @hvd.elastic.run
    def steps(state) -> None:
        while not done(state.sizes):
            happen(len(state.sizes))
            optimizer.zero_grad()
            net(torch.ones(2, 3)).sum().backward()
            optimizer.step()
            state.sizes = [*state.sizes, hvd.size()]
            time.sleep(0.1)
            state.commit()

    steps(state)
    result = {"sizes": state.sizes, "weights": [p.tolist() for p in net.parameters()]}
    (folder / f"rank-{hvd.rank()}.json").write_text(json.dumps(result))


def new_workers(folder: Path) -> None:
    """At step AT a worker comes that fails at once, and when it has another one that is slow."""
    crashed = folder / "crashed"
    if os.environ["HOROVOD_HOSTNAME"] == OTHER:
        crashed.touch()
        sys.exit(3)
    if os.environ["HOROVOD_LOCAL_RANK"] == "1":
        time.sleep(GLOO_SECONDS + 3)

    def happen(step: int) -> None:
        if step == AT:
            _write_hosts(folder, {FIRST: 1, OTHER: 1, SECOND: 1})
        if step > AT and crashed.exists():
            _write_hosts(folder, {FIRST: 1, SECOND: 2})

    train(folder, happen, lambda sizes: sizes.count(3) == AT or len(sizes) == 300)


def missed_update(folder: Path) -> None:
    """A host comes while the first workers start."""
    if os.environ["HOROVOD_HOSTNAME"] != OTHER:
        _write_hosts(folder, {FIRST: 1, OTHER: 1, SECOND: 1})
        time.sleep(3)
    train(folder, lambda step: None, lambda sizes: sizes.count(3) == AT or len(sizes) == 60)


def revived_host(folder: Path) -> None:
    """One of two workers is killed, and both are needed."""
    killed = folder / "killed"

    def happen(step: int) -> None:
        if step == AT and os.environ["HOROVOD_HOSTNAME"] == SECOND and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    train(folder, happen, lambda sizes: len(sizes) == 2 * AT)


def lost_host(folder: Path) -> None:
    """One of two workers on the only host is killed."""

    def happen(step: int) -> None:
        if step == AT and os.environ["HOROVOD_LOCAL_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    train(folder, happen, lambda sizes: len(sizes) == 2 * AT)


ROLES = {role.__name__: role for role in (new_workers, missed_update, revived_host, lost_host)}


# --------------------------------------------------------------------------------------- the tests

if __name__ == "__main__":
    ROLES[sys.argv[3]](Path(sys.argv[2]))
    sys.exit()

pytest.importorskip("horovod")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str | None], Path]:
    @cache
    def make(undone: str | None) -> Path:
        return package(tmp_path_factory.mktemp("package"), [undone] if undone else [])

    return make


def run(
    folder: Path, path: Path, role: Callable, *options: str, lo: bool = True, **given
) -> tuple[list[dict], str]:
    """The results of the ranks of a job at its end, and its output."""
    options = ("--gloo-timeout-seconds", str(GLOO_SECONDS), *options)
    options += ("--network-interfaces", "lo") * lo
    given = {"seconds": 90, **given}
    arguments = (role.__name__,)
    return _job(folder, path, file=__file__, options=options, arguments=arguments, **given)


def ended_alike(results: list[dict], output: str, ranks: int) -> list[int]:
    """The numbers of workers, step by step, on which all ranks agree, as on their weights."""
    assert output.startswith("exit code 0, 0 left\n") and len(results) == ranks, output
    assert all(result == results[0] for result in results)
    return results[0]["sizes"]


def test_new_workers_that_fail_or_are_slow(made, tmp_path):
    results, output = run(tmp_path, made(None), new_workers, "--min-np", "1")
    sizes = ended_alike(results, output, 3)
    assert sizes == [2] * (len(sizes) - AT) + [3] * AT


def test_new_workers_without_the_mend(made, tmp_path):
    path = made("python/elastic_new_workers")
    results, output = run(tmp_path, path, new_workers, "--min-np", "1")
    assert results == [] and "gloo::IoException" in output, output


def test_a_host_that_comes_while_workers_start(made, tmp_path):
    results, output = run(tmp_path, made(None), missed_update, "--min-np", "1")
    assert ended_alike(results, output, 3)[-AT:] == [3] * AT


def test_a_host_that_comes_while_workers_start_without_the_mend(made, tmp_path):
    path = made("python/elastic_missed_updates")
    results, output = run(tmp_path, path, missed_update, "--min-np", "1")
    assert set(ended_alike(results, output, 2)) == {2}


REVIVED = ("--min-np", "2", "--blacklist-cooldown-range", "1", "2")


def test_a_host_comes_back(made, tmp_path):
    results, output = run(tmp_path, made(None), revived_host, *REVIVED)
    assert ended_alike(results, output, 2) == [2] * 2 * AT


def test_a_host_comes_back_without_the_mend(made, tmp_path):
    """Nobody is started there, and horovodrun waits."""
    path = made("python/elastic_revived_hosts")
    results, output = run(tmp_path, path, revived_host, *REVIVED, seconds=25)
    assert results == [] and output.startswith(("exit code 124,", "exit code -9,")), output


@pytest.mark.parametrize("undone", [None, "python/elastic_messages"])
def test_what_is_said_where_the_only_host_is_lost(made, undone, tmp_path):
    hosts = {FIRST: 2}
    results, output = run(tmp_path, made(undone), lost_host, "--min-np", "1", hosts=hosts)
    said = f"A worker has failed on every host that was left ({FIRST})." in output
    assert results == [] and not output.startswith("exit code 0,"), output
    assert said == (undone is None), output


@pytest.mark.parametrize("undone", [None, "python/elastic_messages"])
def test_what_is_said_where_a_second_host_is_awaited(made, undone, tmp_path):
    given = {"hosts": {FIRST: 2}, "seconds": 5, "lo": False}
    results, output = run(tmp_path, made(undone), lost_host, "--min-np", "1", **given)
    said = "horovodrun: waiting for a second host" in output
    assert results == [] and output.startswith("exit code 124,"), output
    assert said == (undone is None), output
