"""Elastic states of PyTorch: what they keep, restore and send, on two ranks over MPI and over Gloo;
each fault again with the mends undone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.ranks.mended import LAUNCHERS, Jobs, main

# ---------------------------------------------------------------------------- checks, in each rank


def _net() -> tuple[Any, Any]:
    """A layer of this rank's own and an optimizer that has moments."""
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.manual_seed(hvd.rank())
    net = torch.nn.Linear(3, 2)
    return net, torch.optim.Adam(net.parameters(), 0.1)


def _backward(net: Any) -> None:
    import torch

    net(torch.ones(4, 3)).square().mean().backward()


def _step(net: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    _backward(net)
    optimizer.step()


def _values(net: Any, optimizer: Any) -> list[list[float]]:
    moments = optimizer.state_dict()["state"].values()
    tensors = [*net.parameters(), *(t for state in moments for t in state.values())]
    return [t.detach().ravel().tolist() for t in tensors]


def restored_twice() -> None:
    """Two failures between commits: weights and moments are those of the commit each time, and
    gradients of the step that failed are gone."""
    import horovod.torch as hvd

    net, optimizer = _net()
    state = hvd.elastic.TorchState(net, optimizer)
    _step(net, optimizer)
    state.save()
    saved = _values(net, optimizer)
    for _ in range(2):
        _step(net, optimizer)
        _backward(net)
        state.restore()
        assert _values(net, optimizer) == saved
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def synchronized_is_saved() -> None:
    """A failure right after `sync` brings back what was synchronized, on every rank."""
    import horovod.torch as hvd

    net, optimizer = _net()
    state = hvd.elastic.TorchState(net, optimizer, step=0)
    for _ in range(2 - hvd.rank()):
        _step(net, optimizer)
        state.step += 1
    state.sync()
    synchronized = _values(net, optimizer)
    _step(net, optimizer)
    state.step += 1
    state.restore()
    assert _values(net, optimizer) == synchronized and state.step == 2
    assert all(each == synchronized for each in hvd.allgather_object(synchronized))


def synchronized_after_each_reset() -> None:
    """Hosts were only removed: what is left of an epoch is shared out anew all the same."""
    import horovod.torch as hvd
    from horovod.common.elastic import run_fn
    from horovod.common.exceptions import HostsUpdatedInterrupt

    hvd.init()
    sampler = hvd.elastic.ElasticSampler(list(range(8)), shuffle=False)
    seen: list[int] = []

    def train(state: Any) -> None:
        if not seen:
            seen.append(next(iter(sampler)))
            sampler.record_batch(0, 1)
            raise HostsUpdatedInterrupt(skip_sync=True)
        seen.extend(sampler)

    run_fn(train, lambda: None)(hvd.elastic.TorchState(sampler=sampler))
    assert seen == list(range(hvd.rank(), 8, 2)), seen


def schedules() -> None:
    """A schedule is rank 0's after `sync`, still that of this rank's optimizer, and is restored."""
    import horovod.torch as hvd
    import torch

    net, _ = _net()
    sgd = torch.optim.SGD(net.parameters(), 0.8)
    schedule = torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5)
    state = hvd.elastic.TorchState(net, sgd, schedule=schedule)
    for _ in range(1 + hvd.rank()):
        _step(net, sgd)
        schedule.step()
    state.sync()

    def now() -> tuple[int, float]:
        return schedule.last_epoch, sgd.param_groups[0]["lr"]

    assert state.schedule is schedule and now() == (1, 0.4), now()
    for _ in range(2):
        _step(net, sgd)
        state.schedule.step()
    assert now() == (3, 0.1), now()
    state.restore()
    assert state.schedule is schedule and now() == (1, 0.4), now()


def one_sample_for_three() -> None:
    """An epoch with one sample left gives it to each of three ranks."""
    import horovod.torch as hvd

    hvd.init()
    sampler = hvd.elastic.ElasticSampler(list(range(7)), shuffle=False)
    sampler.record_batch(0, 2)
    sampler.reset()
    assert (len(sampler), list(sampler)) == (1, [6])


# The last one can leave ranks apart without its mend.
CHECK_OF = {
    "python/torch_elastic_optimizer": restored_twice,
    "python/torch_elastic_sync": synchronized_is_saved,
    "python/elastic_always_sync": synchronized_after_each_reset,
    "python/torch_elastic_state_dicts": schedules,
}
SAMPLER = "python/torch_elastic_sampler"
CHECKS = {check.__name__: check for check in (*CHECK_OF.values(), one_sample_for_three)}


# ------------------------------------------------------------------------------ tests, outside it

if __name__ == "__main__":
    main(CHECKS)
    sys.exit()

pytest.importorskip("horovod")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(__file__, tmp_path_factory)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_states(jobs, launcher):
    names = [check.__name__ for check in CHECK_OF.values()]
    for name in names:
        jobs(launcher, names).passed(name)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_states_without_the_mends(jobs, launcher):
    names = [check.__name__ for check in CHECK_OF.values()]
    job = jobs(launcher, names, undone=CHECK_OF, check_seconds=15)
    for name in names:
        job.failed(name, may_wait=name == names[-1])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_end_of_an_epoch_on_three_ranks(jobs, launcher):
    name = one_sample_for_three.__name__
    jobs(launcher, [name], ranks=3).passed(name)
    jobs(launcher, [name], undone=[SAMPLER], ranks=3).failed(name)
