"""Horovod's torch side: two ranks end with the same weights, and with those of one rank that is
given the whole batches.

Each launcher runs one job with all checks, and one without the mends; this file is also the program
that its ranks run. Mends whose checks leave ranks apart, or hang, are undone one by one.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.ranks.mended import LAUNCHERS, Jobs, main

ENV = {
    "HOROVOD_DYNAMIC_PROCESS_SETS": "1",
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "10",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "20",
}
STEPS, BATCH = 4, 8


# -------------------------------------------------------------- what the checks have in common


def _hvd() -> tuple[Any, Any]:
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.manual_seed(1)
    return hvd, torch


def _net(dtype: Any = None) -> Any:
    import torch

    torch.manual_seed(1)
    layers = [torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)]
    return torch.nn.Sequential(*layers).to(dtype or torch.float64)


def _batches(mine: bool) -> list[tuple[Any, Any]]:
    """STEPS batches of inputs and targets: whole, or this rank's half of each."""
    import horovod.torch as hvd
    import torch

    random = torch.Generator().manual_seed(0)
    half = slice(hvd.rank() * BATCH // 2, (hvd.rank() + 1) * BATCH // 2) if mine else slice(None)
    shapes = [(BATCH, 3), (BATCH, 2)]
    made = [[torch.randn(s, generator=random, dtype=torch.float64) for s in shapes] for _ in "1234"]
    return [(x[half], y[half]) for x, y in made]


def _loss(net: Any, x: Any, y: Any) -> Any:
    return (net(x) - y).square().mean()


def _wrap(net: Any, optimizer: Any, **options: Any) -> Any:
    import horovod.torch as hvd

    return hvd.DistributedOptimizer(optimizer, named_parameters=net.named_parameters(), **options)


def _train(net: Any, optimizer: Any, mine: bool) -> None:
    for x, y in _batches(mine):
        optimizer.zero_grad()
        _loss(net, x, y).backward()
        optimizer.step()


def _alike(tensors: Iterable[Any]) -> None:
    """Ranks have the same bits."""
    import horovod.torch as hvd
    import torch

    bits = [
        t.detach().to_dense().contiguous().view(torch.uint8).tolist() for t in tensors if t.dim()
    ]
    assert all(other == bits for other in hvd.allgather_object(bits)), "ranks differ"


def _same(net: Any, one: Any, limit: float = 1e-12) -> None:
    """Ranks have the same weights, those of `one`: if not, every rank raises."""
    import horovod.torch as hvd

    _alike(net.parameters())
    pairs = zip(net.parameters(), one.parameters(), strict=True)
    far = max(float((p - q).detach().abs().max()) for p, q in pairs)
    far = max(hvd.allgather_object(far, name="far"))
    assert far <= limit, f"{far:.2g} from one rank with the whole batch"


def _ops() -> list[Any]:
    """Average and Adasum, which Horovod has over MPI alone."""
    import horovod.torch as hvd

    return [hvd.Average, hvd.Adasum] if hvd.mpi_enabled() else [hvd.Average]


def _refused(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    try:
        call()
    except kind as error:
        assert words in str(error), error
        return
    raise AssertionError(f"not refused: {words}")


# -------------------------------------------------------------------------------- the checks


def every_optimizer() -> None:
    """Each optimizer that torch ships, also with foreach and fused kernels."""
    _, torch = _hvd()
    optim = torch.optim
    makers = [
        lambda p: optim.SGD(p, 0.1),
        lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: optim.SGD(p, torch.tensor(0.1, dtype=torch.float64), foreach=True),
        lambda p: optim.SGD(p, 0.1, momentum=0.9, fused=True),
        lambda p: optim.Adam(p, 0.05),
        lambda p: optim.Adam(p, torch.tensor(0.05), amsgrad=True),
        lambda p: optim.Adam(p, 0.05, foreach=True),
        lambda p: optim.AdamW(p, 0.05, fused=True),
        lambda p: optim.Adagrad(p, 0.05, initial_accumulator_value=0.1),
        lambda p: optim.Adagrad(p, 0.05, fused=True),
        lambda p: optim.Adadelta(p),
        lambda p: optim.Adafactor(p, 0.05),
        lambda p: optim.Adamax(p),
        lambda p: optim.ASGD(p),
        lambda p: optim.NAdam(p),
        lambda p: optim.RAdam(p),
        lambda p: optim.RMSprop(p, centered=True, momentum=0.5),
        lambda p: optim.Rprop(p),
        lambda p: optim.Muon([q for q in p if q.dim() == 2]),
    ]
    for make in makers:
        net, one = _net(), _net()
        mine, other = make(list(net.parameters())), make(list(one.parameters()))
        _train(net, _wrap(net, mine), mine=True)
        _train(one, other, mine=False)
        _same(net, one, 1e-9)  # the sum of halves differs in the last bit, Rprop takes signs of it


def options() -> None:
    """Sum, a predivide factor, compression, process sets, groups by number and by lists."""
    hvd, torch = _hvd()
    both, alone = hvd.add_process_set([0]), hvd.global_process_set
    both, alone = alone, both

    def lists(net: Any) -> list[list[Any]]:
        p = list(net.parameters())
        return [[p[0], p[3]], [p[1]], []]

    cases: list[tuple[dict[str, Any], float, float]] = [
        ({"op": hvd.Sum}, 0.05, 1e-12),
        ({"gradient_predivide_factor": 2.0}, 0.1, 1e-12),
        ({"gradient_predivide_factor": 2.0, "groups": 2}, 0.1, 1e-12),
        ({"process_set": both, "groups": 1}, 0.1, 1e-12),
        ({"groups": lists}, 0.1, 1e-12),
        ({"groups": 2, "op": hvd.Sum, "backward_passes_per_step": 1}, 0.05, 1e-12),
        ({"compression": hvd.Compression.fp16}, 0.1, 1e-3),
        ({"compression": hvd.Compression.fp16, "groups": 3}, 0.1, 1e-3),
    ]
    for given, rate, limit in cases:
        net, one = _net(), _net()
        if callable(given.get("groups")):
            given["groups"] = given["groups"](net)
        _train(net, _wrap(net, torch.optim.SGD(net.parameters(), rate), **given), mine=True)
        _train(one, torch.optim.SGD(one.parameters(), 0.1), mine=False)
        _same(net, one, limit)
    # Rank 0 reduces with itself, rank 1 with nobody.
    net, one = _net(), _net()
    _train(net, _wrap(net, torch.optim.SGD(net.parameters(), 0.1), process_set=alone), mine=True)
    _train(one, torch.optim.SGD(one.parameters(), 0.1), mine=True)
    for p, q in zip(net.parameters(), one.parameters(), strict=True):
        assert torch.equal(p, q)
    hvd.remove_process_set(alone)


def zero_grad() -> None:
    """Both classes: set_to_none, and no clearing of what is being reduced."""
    _, torch = _hvd()
    for op in _ops():
        net = _net()
        optimizer = _wrap(net, torch.optim.SGD(net.parameters(), 0.1), op=op)
        for x, y in _batches(mine=True)[:2]:
            _loss(net, x, y).backward()
            _refused(optimizer.zero_grad, AssertionError, "race condition")
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            assert all(bool((p.grad == 0).all()) for p in net.parameters())
            optimizer.zero_grad(set_to_none=True)
            assert all(p.grad is None for p in net.parameters())
            optimizer.zero_grad()
        _alike(net.parameters())


def dropped_passes() -> None:
    """An epoch of 3 passes with 2 for a step: the last one is dropped by zero_grad."""
    _, torch = _hvd()
    for groups in (None, 2):
        net, one = _net(), _net()
        passes = {"backward_passes_per_step": 2, "groups": groups}
        mine = _wrap(net, torch.optim.Adam(net.parameters(), 0.05), **passes)
        other = torch.optim.Adam(one.parameters(), 0.05)
        for part, optimizer, halves in ((net, mine, True), (one, other, False)):
            for _ in range(2):
                optimizer.zero_grad()
                for number, (x, y) in enumerate(_batches(halves)[:3]):
                    _loss(part, x, y).backward()
                    if number % 2:
                        optimizer.step()
                        optimizer.zero_grad()
        _same(net, one)
        mine.zero_grad()
        for x, y in _batches(mine=True)[:2]:
            _loss(net, x, y).backward()
        once_more = lambda net=net, x=x, y=y: _loss(net, x, y).backward()  # noqa: E731
        _refused(once_more, AssertionError, "or zero_grad() of this optimizer")
        mine.synchronize()


def fewer_passes() -> None:
    """A step takes what each rank has added up since the last one: with
    backward_passes_per_step=3 rank 0 has 3 passes and rank 1 only 1; then each has 2."""
    hvd, torch = _hvd()
    for groups in (None, 1, 2):
        net, one = _net(), _net()
        passes = {"backward_passes_per_step": 3, "groups": groups}
        mine = _wrap(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), **passes)
        other = torch.optim.SGD(one.parameters(), 0.1, momentum=0.9)
        for counts in ((3, 1), (2, 2), (0, 1)):
            for x, y in _batches(mine=True)[: counts[hvd.rank()]]:
                _loss(net, x, y).backward()
            mine.step()
            mine.zero_grad()
            for rank, count in enumerate(counts):
                part = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
                for x, y in _batches(mine=False)[:count]:
                    (_loss(one, x[part], y[part]) / 2).backward()
            other.step()
            other.zero_grad(set_to_none=False)
        _same(net, one)


def groups() -> None:
    """A rank without some of a group's gradients, and options that groups had lost."""
    hvd, torch = _hvd()
    net, one = _net(), _net()
    mine = _wrap(net, torch.optim.SGD(net.parameters(), 0.1), groups=1)
    other = torch.optim.SGD(one.parameters(), 0.1)
    for _ in range(2):
        mine.zero_grad(), other.zero_grad()
        (_loss(net, *_batches(mine=False)[0]) if hvd.rank() else net[0].weight.sum()).backward()
        ((_loss(one, *_batches(mine=False)[0]) + one[0].weight.sum()) / 2).backward()
        mine.step(), other.step()
    _same(net, one)

    # A sum that overflows unless it is divided before.
    p = torch.nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([p], 1.0)
    mine = hvd.DistributedOptimizer(sgd, [("p", p)], gradient_predivide_factor=2.0, groups=1)
    (p * 3e38).sum().backward()
    mine.synchronize()
    assert torch.allclose(p.grad, torch.full((2,), 3e38)), p.grad

    table = torch.nn.Embedding(4, 2, sparse=True)
    with torch.no_grad():
        table.weight.fill_(1)
    sgd = torch.optim.SGD(table.parameters(), 0.5)
    mine = _wrap(table, sgd, groups=1, sparse_as_dense=True)
    table(torch.tensor([hvd.rank(), 2])).sum().backward()
    mine.step()
    assert table.weight[:, 0].tolist() == [0.75, 0.75, 0.5, 1], table.weight
    assert table.weight.grad.sparse_dim() == 1
    table.zero_grad()
    mine = _wrap(table, sgd, groups=1)
    backward = table(torch.tensor([0])).sum().backward
    _refused(backward, ValueError, "sparse_as_dense=True")

    second = hvd.add_process_set([1])
    net = _net()
    mine = _wrap(net, torch.optim.SGD(net.parameters(), 0.1), groups=2, process_set=second)
    _train(net, mine, mine=True)
    hvd.remove_process_set(second)


def reduced_once() -> None:
    """With Sum a gradient that is reduced twice is doubled."""
    hvd, torch = _hvd()
    p = torch.nn.Parameter(torch.zeros(2))
    mine = hvd.DistributedOptimizer(torch.optim.SGD([p], 1.0), [("p", p)], op=hvd.Sum)
    for step in range(1, 4):
        mine.zero_grad()
        (p * (1.0 + hvd.rank())).sum().backward()
        mine.synchronize()
        if step == 2:
            mine.synchronize()
        assert p.grad.tolist() == [3, 3]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            mine.step()
        words = "optimizer.step() called without optimizer.skip_synchronize()"
        assert len(said) == 1 and words in str(said[0].message), said
        assert p.tolist() == [-3 * step] * 2, p
    # A rank without a gradient takes part in the next reduction all the same.
    mine.zero_grad()
    if hvd.rank():
        p.sum().backward()
    mine.synchronize()
    assert p.grad.tolist() == [1, 1]


def skip_synchronize() -> None:
    _, torch = _hvd()
    net, one = _net(), _net()
    mine, other = (torch.optim.SGD(n.parameters(), 0.1) for n in (net, one))
    mine = _wrap(net, mine)
    for (x, y), whole in zip(_batches(mine=True), _batches(mine=False), strict=True):
        mine.zero_grad(), other.zero_grad()
        _loss(net, x, y).backward()
        with mine.skip_synchronize():
            _refused(mine.step, RuntimeError, "optimizer.synchronize() after loss.backward()")
        mine.synchronize()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        with mine.skip_synchronize():
            mine.step()
        _loss(one, *whole).backward()
        torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)
        other.step()
    _same(net, one)


def closure() -> None:
    """step(closure), and LBFGS with its line search: ranks go on, or end, together."""
    _, torch = _hvd()
    makers = [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, 0.5, max_iter=4),
        lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
    ]
    for make in makers:
        net, one = _net(), _net()
        mine, other = _wrap(net, make(net.parameters())), make(one.parameters())

        def closure(part: Any, optimizer: Any, batch: tuple[Any, Any]) -> Callable[[], Any]:
            def loss() -> Any:
                optimizer.zero_grad()
                found = _loss(part, *batch)
                found.backward()
                return found

            return loss

        for half, whole in zip(_batches(mine=True), _batches(mine=False), strict=True):
            mine.step(closure(net, mine, half))
            other.step(closure(one, other, whole))
        _same(net, one, 1e-10)  # LBFGS divides by differences
    with mine.skip_synchronize():
        again = closure(net, mine, half)
        _refused(lambda: mine.step(again), ValueError, "skip_synchronize")


def grad_scaler() -> None:
    """Any order of calls, an overflow on rank 1, which comes late to it: both ranks skip that
    step, and nothing else differs from one rank without a scaler."""
    hvd, torch = _hvd()
    for order in ("synchronize", "unscale", "unscale, synchronize", "step", "fused", "clip"):
        net, one = _net(torch.float32), _net(torch.float32)
        fused = order == "fused"
        mine = _wrap(net, torch.optim.Adam(net.parameters(), 0.05, fused=fused))
        other = torch.optim.Adam(one.parameters(), 0.05, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step, (half, whole) in enumerate(zip(_batches(True), _batches(False), strict=True)):
            mine.zero_grad(), other.zero_grad()
            loss = scaler.scale(_loss(net, *(t.float() for t in half)))
            if step == 1 and hvd.rank() == 1:
                time.sleep(0.2)
                loss = loss * float("inf")
            loss.backward()
            if order == "synchronize":
                mine.synchronize()
            if order in ("synchronize", "unscale", "unscale, synchronize", "clip"):
                scaler.unscale_(mine)
            if order == "unscale, synchronize":
                mine.synchronize()
            if order == "clip":
                torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of a step without skip_synchronize()
                if order == "synchronize":
                    with mine.skip_synchronize():
                        scaler.step(mine)
                else:
                    scaler.step(mine)
            scaler.update()
            if step != 1:
                _loss(one, *(t.float() for t in whole)).backward()
                if order == "clip":
                    torch.nn.utils.clip_grad_norm_(one.parameters(), 0.1)
                other.step()
        assert scaler.get_scale() == 512, (order, scaler.get_scale())
        _same(net, one, 2e-6)
    if hvd.Adasum not in _ops():
        return
    net = _net(torch.float32)
    mine = _wrap(net, torch.optim.SGD(net.parameters(), 0.1), op=hvd.Adasum)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(_loss(net, *(t.float() for t in half))).backward()
    _refused(lambda: scaler.step(mine), ValueError, "Adasum")
    mine.step()


def scaler_in_order() -> None:
    """The order that was right before."""
    hvd, torch = _hvd()
    net = _net(torch.float32)
    mine = _wrap(net, torch.optim.Adam(net.parameters(), 0.05))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, half in enumerate(_batches(mine=True)):
        mine.zero_grad()
        loss = scaler.scale(_loss(net, *(t.float() for t in half)))
        (loss * float("inf") if step == 1 and hvd.rank() == 1 else loss).backward()
        mine.synchronize()
        scaler.unscale_(mine)
        with mine.skip_synchronize():
            scaler.step(mine)
        scaler.update()
    assert scaler.get_scale() == 512
    _alike(net.parameters())


def half_precisions() -> None:
    """Sums of bfloat16 and float16 are those of float32, rounded once."""
    hvd, torch = _hvd()
    for dtype in (torch.bfloat16, torch.float16):
        for number, given in enumerate(({}, {"groups": 2}, {"op": hvd.Sum})):
            net = _net(dtype)
            mine = _wrap(net, torch.optim.SGD(net.parameters(), 0.1), **given)
            for step, (x, y) in enumerate(_batches(mine=True)):
                mine.zero_grad(set_to_none=step % 2 == 0)
                copy = _net(dtype)
                copy.load_state_dict(net.state_dict())
                for part in (net, copy):
                    _loss(part, x.to(dtype), y.to(dtype)).backward()
                mine.synchronize()
                for place, (p, own) in enumerate(
                    zip(net.parameters(), copy.parameters(), strict=True)
                ):
                    name = f"{dtype} {number} {place}"
                    total = hvd.allreduce(own.grad.float(), op=given.get("op"), name=name)
                    assert p.grad.dtype == dtype
                    assert torch.equal(p.grad, total.to(dtype)), "not a sum in float32"
                with mine.skip_synchronize():
                    mine.step()
            _alike(p.view(torch.int16) for p in net.parameters())
        large = torch.full((3,), 60000.0 if dtype is torch.float16 else 3e38, dtype=dtype)
        halves = hvd.Average, hvd.Sum
        found = [hvd.allreduce(large / 4, op=op, name=f"{dtype} {op}") for op in halves]
        assert [f.dtype for f in found] == [dtype, dtype]
        assert [f[0].item() for f in found] == [(large / 4)[0].item(), (large / 2)[0].item()]
        if dtype is torch.float16:
            assert torch.equal(hvd.allreduce(large, name="large"), large)
        ones = torch.ones(4, dtype=dtype)
        one, two = hvd.grouped_allreduce(
            [ones, ones[:2].clone()], op=hvd.Sum, name=f"{dtype} group"
        )
        assert one.tolist() == [2] * 4 and two.tolist() == [2, 2] and two.dtype == dtype
        part = hvd.reducescatter(ones, op=hvd.Sum, name=f"{dtype} part")
        assert part.tolist() == [2, 2] and part.dtype == dtype
        leaf = ones.clone().requires_grad_()
        reduced = hvd.allreduce(leaf, op=hvd.Sum, name=f"{dtype} leaf")
        (reduced * (1 + hvd.rank())).sum().backward()
        assert leaf.grad.tolist() == [3] * 4 and leaf.grad.dtype == dtype
    assert (
        hvd.Compression.fp16.compress(torch.ones(1, dtype=torch.float16))[0].dtype is torch.float16
    )


def broadcast_bfloat16() -> None:
    hvd, torch = _hvd()
    net = _net(torch.bfloat16)
    expected = {name: t.clone() for name, t in net.state_dict().items()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(hvd.rank())
    hvd.broadcast_parameters(net.state_dict(), root_rank=0)
    assert all(torch.equal(t, expected[name]) for name, t in net.state_dict().items())
    mine = torch.tensor([1.5, float("inf")], dtype=torch.bfloat16) * (hvd.rank() + 1)
    found = hvd.broadcast(mine, root_rank=1, name="bfloat16")
    assert found.dtype is torch.bfloat16 and found.tolist() == [3, float("inf")]
    assert mine[0] == 1.5 * (hvd.rank() + 1)


def kept_state() -> None:
    """What was trained, set or registered before wrapping, and a constructor of another kind."""
    _, torch = _hvd()
    net, one = _net(), _net()
    adam, other = (torch.optim.Adam(n.parameters(), 0.05) for n in (net, one))
    for part, optimizer in ((net, adam), (one, other)):
        _train(part, optimizer, mine=False)
    mine = _wrap(net, adam)
    _train(net, mine, mine=True)
    _train(one, other, mine=False)
    _same(net, one)

    net = _net()
    sgd = torch.optim.SGD(net[0].parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    torch.optim.lr_scheduler.StepLR(sgd, 1, 0.5)  # gives `sgd` a step of its own
    mine = _wrap(net, sgd)
    calls = []
    mine.register_step_post_hook(lambda *_: calls.append(1))
    mine.add_param_group({"params": list(net[2].parameters())})
    assert mine.param_groups[1]["weight_decay"] == 0.01
    _loss(net, *_batches(mine=True)[0]).backward()
    mine.step()
    assert calls == [1], "hooks of a step run once"
    mine.load_state_dict(mine.state_dict())
    mine.step()
    assert calls == [1, 1]
    _alike(net.parameters())

    class Own(torch.optim.SGD):
        def __init__(self, params: Any, rate: float) -> None:
            super().__init__(params, rate)

    net, one = _net(), _net()
    _train(net, _wrap(net, Own(net.parameters(), 0.1)), mine=True)
    _train(one, Own(one.parameters(), 0.1), mine=False)
    _same(net, one)


def new_parameters() -> None:
    """A layer is unfrozen, then another one frozen; a group is added."""
    _, torch = _hvd()
    for groups in (None, 1):
        net, one = _net(), _net()
        made = []
        for part in (net, one):
            part[2].requires_grad_(False)
            decay = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
            made.append(torch.optim.SGD(part[0].parameters(), **decay))
            made[-1].add_param_group({"params": [part[2].weight]})
        mine, other = _wrap(net, made[0], groups=groups), made[1]
        for part, optimizer, halves in ((net, mine, True), (one, other, False)):
            _train(part, optimizer, halves)
            part[2].requires_grad_(True)
            _train(part, optimizer, halves)
            optimizer.add_param_group({"params": [part[2].bias]})
            _train(part, optimizer, halves)
            optimizer.zero_grad()
            part[0].requires_grad_(False)
            _train(part, optimizer, halves)
            part[0].requires_grad_(True)
            _train(part, optimizer, halves)
            _loss(part, *_batches(halves)[0]).backward()
            part[2].requires_grad_(False)  # while its last gradient is being reduced
            optimizer.step()
            _train(part, optimizer, halves)
        _same(net, one)


def strides() -> None:
    """Weights in channels_last, and a transposed one."""
    hvd, torch = _hvd()

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.conv = torch.nn.Conv2d(2, 3, 2)
            self.weight = torch.nn.Parameter(torch.randn(3, 2).t())
            self.to(torch.float64, memory_format=torch.channels_last)

        def forward(self, x: Any) -> Any:
            return torch.tanh(self.conv(x)).mean((2, 3)) @ self.weight.t()

    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 3, 3, generator=random, dtype=torch.float64)
    mine = x[2 * hvd.rank() : 2 * hvd.rank() + 2]
    for given in ({}, {"groups": 1}, {"compression": hvd.Compression.fp16}):
        net, one = Net(), Net()
        assert not net.conv.weight.is_contiguous()
        with torch.no_grad():
            for p in net.parameters():
                p.add_(hvd.rank())
        hvd.broadcast_parameters(net.state_dict(), root_rank=0)
        _same(net, one, 0)
        made = [torch.optim.Adam(n.parameters(), 0.05, fused=True) for n in (net, one)]
        made[0] = _wrap(net, made[0], **given)
        for _ in range(2):
            for part, optimizer, data in ((net, made[0], mine), (one, made[1], x)):
                optimizer.zero_grad()
                part(data).square().mean().backward()
                optimizer.step()
        assert net.conv.weight.grad.stride() == net.conv.weight.stride()
        _same(net, one, 1e-3 if "compression" in given else 1e-12)


def broadcast_iterables() -> None:
    hvd, torch = _hvd()
    second = hvd.add_process_set([1])
    if hvd.rank():  # one operation more
        hvd.allreduce(torch.ones(1), process_set=second)
    for every in (
        lambda n: n.parameters(),
        lambda n: n.named_parameters(),
        lambda n: n.state_dict(),
    ):
        net = _net()
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(hvd.rank() + 1)
        hvd.broadcast_parameters(every(net), root_rank=1)
        assert all(bool((p == 2).all()) for p in net.parameters())
    _refused(lambda: hvd.broadcast_parameters(torch.ones(2), 0), ValueError, "invalid params")


def broadcast_object() -> None:
    hvd, torch = _hvd()
    sent = {"rank": hvd.rank(), "tensor": torch.full((2,), float(hvd.rank())), "list": [1, None]}
    found = hvd.broadcast_object(sent, root_rank=1)
    assert found["rank"] == 1 and found["tensor"].tolist() == [1, 1] and found["list"] == [1, None]
    assert hvd.allgather_object(hvd.rank()) == [0, 1]


def sparse() -> None:
    """Two ranks, indices of their own, some in common, against one rank with all."""
    hvd, torch = _hvd()
    indices = torch.tensor([[0, 1, 2, 2], [2, 3, 4, 0]])

    def table(dtype: Any) -> Any:
        made = torch.nn.Embedding(6, 2, sparse=True, dtype=dtype)
        with torch.no_grad():
            made.weight.copy_(torch.arange(12.0).reshape(6, 2) / 12)
        return made

    cases: list[tuple[Any, dict[str, Any], float]] = [
        (torch.float64, {}, 1e-12),
        (torch.float64, {"op": hvd.Sum}, 1e-12),
        (torch.float64, {"sparse_as_dense": True}, 1e-12),
        (torch.float64, {"compression": hvd.Compression.fp16}, 1e-12),
        (torch.float32, {"sparse_as_dense": True, "compression": hvd.Compression.fp16}, 1e-3),
        (torch.bfloat16, {}, 1e-2),
    ]
    for dtype, given, limit in cases:
        net, one = table(dtype), table(dtype)
        mine = _wrap(net, torch.optim.SGD(net.parameters(), 0.1), **given)
        other = torch.optim.SGD(one.parameters(), 0.1)
        factor = 1 if given.get("op") == hvd.Sum else 2
        for step in range(2):
            for part, optimizer, data in ((net, mine, indices[hvd.rank()]), (one, other, indices)):
                optimizer.zero_grad()
                out = part(data)
                # The gradient of a sum is an expanded tensor.
                (out.sum() if step else out.square().sum()).backward()
                if part is one:
                    one.weight.grad /= factor
                optimizer.step()
        _alike([net.weight.float()])
        far = float((net.weight - one.weight).detach().abs().max())
        assert far <= limit, (dtype, given, far)
    net, one = table(torch.float64), table(torch.float64)
    mine, other = (torch.optim.SparseAdam(n.parameters(), 0.1) for n in (net, one))
    mine = _wrap(net, mine, op=hvd.Sum)
    for _ in range(2):
        for part, optimizer, data in ((net, mine, indices[hvd.rank()]), (one, other, indices)):
            optimizer.zero_grad()
            part(data).square().sum().backward()
            optimizer.step()
    _same(net, one)
    net = table(torch.float32)
    mine = _wrap(net, torch.optim.SGD(net.parameters(), 0.1), op=hvd.Min)
    _refused(net(indices[0]).sum().backward, ValueError, "sparse_as_dense=True")


def optimizer_state() -> None:
    """A rank that has resumed gives its state to one that has none; nobody takes a step."""
    hvd, torch = _hvd()
    optim = torch.optim
    makers = [
        lambda p, rate: optim.SGD(p, rate),
        lambda p, rate: optim.SGD(p, rate, momentum=0.9, weight_decay=0.1),
        lambda p, rate: optim.AdamW(p, rate, weight_decay=0.1),
        lambda p, rate: optim.AdamW(p, torch.tensor(rate), amsgrad=True, fused=True),
        lambda p, rate: optim.NAdam(p, rate),
        lambda p, rate: optim.Adafactor(p, rate),
        lambda p, rate: optim.LBFGS(p, rate),
    ]
    for resumed in (False, True):
        for number, make in enumerate(makers):
            for wrapped in (False, True):
                net, one = _net(), _net()
                mine = make(net.parameters(), 0.05 / (1 + hvd.rank()))
                other = make(one.parameters(), 0.05)
                closures = number == len(makers) - 1

                def step(part: Any, optimizer: Any, batch: Any, closures: bool = closures) -> None:
                    def loss() -> Any:
                        optimizer.zero_grad()
                        found = _loss(part, *batch)
                        found.backward()
                        return found

                    optimizer.step(loss) if closures else (loss(), optimizer.step())

                first, second = _batches(mine=False)[:2]
                if resumed:
                    step(one, other, first)
                    if hvd.rank() == 0:
                        step(net, mine, first)
                        mine.zero_grad()
                if wrapped:
                    mine = _wrap(net, mine)
                hvd.broadcast_parameters(net.state_dict(), root_rank=0)
                hvd.broadcast_optimizer_state(mine, root_rank=0)
                _same(net, one, 0)
                # Gradients of zero are left where there is no state, which SGD alone never has.
                none = closures or (resumed and number > 0)
                assert all((p.grad is None) == none for p in net.parameters())
                assert none or not any(p.grad.any() for p in net.parameters())
                assert float(mine.param_groups[0]["lr"]) == float(other.param_groups[0]["lr"])
                step(net, mine, second)
                step(one, other, second)
                _same(net, one, 1e-12)
    net = _net()
    net[0].requires_grad_(False)
    net[2].bias.grad = torch.ones(2, dtype=torch.float64)
    hvd.broadcast_optimizer_state(optim.SGD(net.parameters(), 0.1), root_rank=0)
    found = [p.grad if p.grad is None else p.grad.unique().tolist() for p in net.parameters()]
    assert found == [None, None, [0], [1]], found
    net = torch.nn.Linear(2 + hvd.rank(), 1)
    adam = optim.Adam(net.parameters())
    _refused(lambda: hvd.broadcast_optimizer_state(adam, 0), ValueError, "other shapes")


def sync_batch_norm() -> None:
    """Batches of 3 and 6, of 0 and 9: output, gradients and running statistics are those of one
    rank with the whole batch."""
    hvd, torch = _hvd()
    double = torch.float64
    shapes = [(9, 3), (9, 3, 4), (9, 3, 2, 2), (9, 3, 2, 1, 2)]
    kinds = [torch.nn.BatchNorm1d, torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d]
    cases: list[tuple[Any, Any, dict[str, Any], int, float]] = [
        (double, double, {}, 3, 1e-10),
        (torch.float32, torch.float32, {}, 3, 2e-5),
        (torch.float32, torch.float32, {}, 0, 2e-5),
        (double, double, {"momentum": None}, 3, 1e-10),
        (double, double, {"affine": False}, 3, 1e-10),
        (double, double, {"track_running_stats": False}, 3, 1e-10),
        # The rounding of an output near 4: half a unit in the last place, 2^-8 and 2^-11 of it
        (torch.bfloat16, torch.float32, {}, 3, 4 * 2**-8),
        (torch.bfloat16, torch.bfloat16, {}, 3, 4 * 2**-8),
        (torch.float16, torch.float32, {}, 3, 4 * 2**-11),
    ]
    for shape, kind in zip(shapes, kinds, strict=True):
        for dtype, weights, given, cut, limit in cases:
            torch.manual_seed(3)
            mine = slice(0, cut) if hvd.rank() == 0 else slice(cut, 9)
            layer, one = hvd.SyncBatchNorm(3, **given).to(weights), kind(3, **given).to(weights)
            kept = None
            for step in range(2):
                x, pull = (3 * torch.randn(shape) + 1).to(dtype), torch.randn(shape).to(dtype)
                found, whole = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
                # In 16 bits torch's own batch norm rounds inside: exact is the one in float32.
                exact = dtype in (torch.bfloat16, torch.float16)
                reference = kind(3, **given).float() if exact else one
                if exact and step:
                    reference.running_mean.copy_(kept[0]), reference.running_var.copy_(kept[1])
                out = layer(found)
                expected = reference(whole.float() if exact else whole)
                assert out.dtype == dtype
                for o, g, p in ((out, pull[mine], layer), (expected, pull, reference)):
                    p.zero_grad()
                    o.backward(g.to(o.dtype))
                kept = reference.running_mean, reference.running_var
                pairs = [(out, expected[mine]), (found.grad, whole.grad[mine])]
                if given.get("affine", True):
                    for a, b in zip(layer.parameters(), reference.parameters(), strict=True):
                        mean = hvd.allreduce(a.grad.double(), op=hvd.Sum, name="gradient")
                        scale = max(1.0, float(b.grad.abs().max()))
                        far = float((mean - b.grad.double()).abs().max()) / scale
                        assert far < (2**-8 if exact else limit), (dtype, given, far)
                if given.get("track_running_stats", True):
                    pairs.append((layer.running_mean, reference.running_mean))
                    pairs.append((layer.running_var, reference.running_var))
                    _alike([layer.running_mean.float(), layer.running_var.float()])
                for a, b in pairs:
                    far = float((a.double() - b.double()).detach().abs().max()) if a.numel() else 0
                    assert far < limit, (shape, dtype, weights, given, step, far)
            layer.eval(), reference.eval()
            if hvd.rank() == 0:  # one rank evaluates, the other does not
                a, b = layer(x).detach(), reference(x.float() if exact else x).detach()
                assert exact or float((a - b).abs().max()) < limit
            layer.train()
    layer = hvd.SyncBatchNorm(2)
    few = torch.randn(1 - hvd.rank(), 2)
    _refused(lambda: layer(few), ValueError, "more than 1 value per channel over all ranks")


CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        # First: the backward pass of hvd.allreduce has a name that counts this rank's operations.
        half_precisions,
        every_optimizer,
        options,
        zero_grad,
        dropped_passes,
        fewer_passes,
        groups,
        reduced_once,
        skip_synchronize,
        closure,
        grad_scaler,
        scaler_in_order,
        broadcast_bfloat16,
        kept_state,
        new_parameters,
        strides,
        broadcast_iterables,
        broadcast_object,
        sparse,
        optimizer_state,
        sync_batch_norm,
    )
}
# What fails without each mend, on every rank, and can be followed by another check.
MENDS = {
    "torch_broadcast_bfloat16": "broadcast_bfloat16",
    "torch_broadcast_iterables": "broadcast_iterables",
    "torch_closure": "closure",
    "torch_half_precisions": "half_precisions",
    "torch_kept_state": "kept_state",
    "torch_new_parameters": "new_parameters",
    "torch_optimizer_state": "optimizer_state",
    "torch_reduced_once": "reduced_once",
    "torch_skip_synchronize": "skip_synchronize",
    "torch_sparse": "sparse",
    "torch_strides": "strides",
    "torch_sync_batch_norm": "sync_batch_norm",
    "torch_zero_grad": "zero_grad",
}
# Its ranks fail in other calls, and may then wait for each other.
LAST = "optimizer_state"
# The others, each in a job of its own, and what becomes of it.
ALONE = {
    "torch_dropped_passes": ("dropped_passes", "error"),
    "torch_grad_scaler": ("grad_scaler", "error"),
    "torch_groups": ("fewer_passes", "hang"),
}


# ------------------------------------------------------------------------------ tests, outside it

if __name__ == "__main__":
    main(CHECKS)
    sys.exit()

pytest.importorskip("horovod")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return Jobs(__file__, tmp_path_factory, ENV)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_are_one(jobs, launcher, check):
    jobs(launcher, list(CHECKS)).passed(check)


@pytest.mark.parametrize("mend", MENDS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_without_the_mend(jobs, launcher, mend):
    checks = [*(check for check in MENDS.values() if check != LAST), LAST]
    undone = [f"python/{name}" for name in MENDS]
    job = jobs(launcher, checks, undone=undone, check_seconds=20)
    job.failed(MENDS[mend], may_wait=MENDS[mend] == LAST)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("mend", ALONE)
def test_without_the_mend_alone(jobs, launcher, mend):
    check, how = ALONE[mend]
    seconds = 10 if how == "hang" else 60
    job = jobs(launcher, [check], undone=[f"python/{mend}"], seconds=seconds)
    job.failed(check, may_wait=True)
    assert job.output.startswith("hang") == (how == "hang"), job.output
