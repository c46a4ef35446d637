"""Probes of horovod.torch."""

from __future__ import annotations

import time

from horovod_build.probes.common import STEPS, batches, rows

PROBES, probe = rows("PyTorch")


def _torch():
    import horovod.torch as hvd
    import torch

    hvd.init()
    torch.manual_seed(1)
    return hvd, torch


def _torch_model(dtype=None):
    import torch

    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(
        dtype or torch.float32
    )


def _torch_data(rank: int | None = None):
    import torch

    return [torch.from_numpy(a).reshape(STEPS, -1, a.shape[-1]) for a in batches(rank)]


def _torch_same(hvd, torch, model, one, tolerance: float = 1e-6) -> None:
    mine, other = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (model, one))
    far = float((mine - other).abs().max())
    assert far < tolerance, f"differs by {far:.2g} from one rank with the whole batch"
    both = hvd.allgather(mine.float().reshape(1, -1), name="all weights")
    assert torch.equal(both[0], both[1]), "ranks differ"


def _torch_distributed(hvd, torch, model, **options):
    adam = torch.optim.Adam(model.parameters(), 0.05)
    return hvd.DistributedOptimizer(adam, named_parameters=model.named_parameters(), **options)


def _torch_loss(torch, model, x, y):
    return torch.nn.functional.mse_loss(model(x), y)


@probe("`DistributedOptimizer`")
def torch_optimizer() -> None:
    hvd, torch = _torch()
    model, one = _torch_model(), _torch_model()
    mine, other = _torch_distributed(hvd, torch, model), torch.optim.Adam(one.parameters(), 0.05)
    for net, optimizer, data in (
        (model, mine, _torch_data(hvd.rank())),
        (one, other, _torch_data()),
    ):
        for x, y in zip(*data, strict=True):
            optimizer.zero_grad()
            _torch_loss(torch, net, x, y).backward()
            optimizer.step()
    _torch_same(hvd, torch, model, one)


@probe("`DistributedOptimizer.zero_grad(set_to_none=…)`")
def torch_zero_grad() -> None:
    hvd, torch = _torch()
    model = _torch_model()
    optimizer = _torch_distributed(hvd, torch, model)
    x, y = (a[0] for a in _torch_data(hvd.rank()))
    _torch_loss(torch, model, x, y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(bool((p.grad == 0).all()) for p in model.parameters())
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in model.parameters())


def _torch_uneven(uneven: int, at_end: bool) -> None:
    """Two epochs of `2 + uneven` passes with backward_passes_per_step=2, then a step at the end."""
    hvd, torch = _torch()
    model, one = _torch_model(), _torch_model()
    mine = _torch_distributed(hvd, torch, model, backward_passes_per_step=2)
    other = torch.optim.Adam(one.parameters(), 0.05)
    for net, optimizer, data in (
        (model, mine, _torch_data(hvd.rank())),
        (one, other, _torch_data()),
    ):
        for _ in range(2):
            optimizer.zero_grad()
            for number, (x, y) in enumerate(zip(*data, strict=True)):
                if number == 2 + uneven:
                    break
                (_torch_loss(torch, net, x, y) / 2).backward()
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            if at_end:
                optimizer.step()
    _torch_same(hvd, torch, model, one)


@probe("`backward_passes_per_step=2`, an epoch of 3 passes, a step at its end")
def torch_uneven_end() -> None:
    _torch_uneven(1, at_end=True)


@probe("`backward_passes_per_step=2`, an epoch of 3 passes, the last one dropped")
def torch_uneven_dropped() -> None:
    _torch_uneven(1, at_end=False)


def _scaler_steps(order: str, overflow: bool) -> None:
    """Steps with a GradScaler in one order of calls; with `overflow` rank 1 has an infinite
    gradient in the second step, and comes late to it."""
    hvd, torch = _torch()
    model, one = _torch_model(), _torch_model()
    mine = _torch_distributed(hvd, torch, model)
    other = torch.optim.Adam(one.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, (x, y) in enumerate(zip(*_torch_data(hvd.rank()), strict=True)):
        mine.zero_grad()
        loss = scaler.scale(_torch_loss(torch, model, x, y))
        if overflow and step == 1 and hvd.rank() == 1:
            time.sleep(0.5)
            loss = loss * float("inf")
        loss.backward()
        if order == "synchronize":
            mine.synchronize()
            scaler.unscale_(mine)
            with mine.skip_synchronize():
                scaler.step(mine)
        elif order == "unscale":
            scaler.unscale_(mine)
            scaler.step(mine)
        else:
            scaler.step(mine)
        scaler.update()
    for step, (x, y) in enumerate(zip(*_torch_data(), strict=True)):
        if not (overflow and step == 1):
            other.zero_grad()
            _torch_loss(torch, one, x, y).backward()
            other.step()
    _torch_same(hvd, torch, model, one)
    assert scaler.get_scale() == (512 if overflow else 1024)


@probe("`GradScaler` after `synchronize`, an overflow on one rank")
def scaler_right_order() -> None:
    _scaler_steps("synchronize", overflow=True)


@probe("`GradScaler.step` without `synchronize`, an overflow on one rank")
def scaler_without_synchronize() -> None:
    _scaler_steps("step", overflow=True)


@probe("`GradScaler.unscale_` before `synchronize`, an overflow on one rank")
def scaler_unscale_first() -> None:
    _scaler_steps("unscale", overflow=True)


@probe("`allreduce` of bfloat16")
def torch_bf16_allreduce() -> None:
    hvd, torch = _torch()
    mine = torch.tensor([1.0, 3.0], dtype=torch.bfloat16) * (hvd.rank() + 1)
    found = hvd.allreduce(mine, op=hvd.Sum)
    assert found.dtype == torch.bfloat16 and found.tolist() == [3, 9], found


@probe("`DistributedOptimizer` of a bfloat16 model")
def torch_bf16_model() -> None:
    hvd, torch = _torch()
    model = _torch_model(torch.bfloat16)
    optimizer = _torch_distributed(hvd, torch, model)
    x, y = (a[0].bfloat16() for a in _torch_data(hvd.rank()))
    loss = torch.nn.functional.mse_loss(model(x).float(), y.float())
    loss.backward()
    own = [p.grad.float() for p in model.parameters()]
    optimizer.synchronize()
    for number, (mine, p) in enumerate(zip(own, model.parameters(), strict=True)):
        exact = hvd.allreduce(mine, name=f"exact {number}").bfloat16()
        assert torch.equal(p.grad, exact), "not the mean taken in single precision"


@probe("`DistributedOptimizer`, sparse gradients")
def torch_sparse() -> None:
    hvd, torch = _torch()
    sgd = torch.optim.SGD
    model, one = (torch.nn.Embedding(6, 2, sparse=True) for _ in range(2))
    with torch.no_grad():
        for net in (model, one):
            net.weight.fill_(1)
    mine = hvd.DistributedOptimizer(
        sgd(model.parameters(), 0.1), named_parameters=model.named_parameters()
    )
    other = sgd(one.parameters(), 0.1)
    indices = torch.tensor([[0, 1, 2], [2, 3, 4]])
    for net, optimizer, part in ((model, mine, indices[hvd.rank()]), (one, other, indices)):
        for _ in range(2):
            optimizer.zero_grad()
            net(part).square().mean().backward()
            optimizer.step()
    _torch_same(hvd, torch, model, one)


@probe("`SyncBatchNorm` on CPUs, batches of other sizes")
def torch_sync_batch_norm() -> None:
    hvd, torch = _torch()
    x = torch.randn(9, 3)
    mine = slice(0, 3) if hvd.rank() == 0 else slice(3, 9)
    layer, one = hvd.SyncBatchNorm(3), torch.nn.BatchNorm1d(3)
    found, expected = x[mine].clone().requires_grad_(), x.clone().requires_grad_()
    out, whole = layer(found), one(expected)
    out.pow(3).sum().backward()
    whole.pow(3).sum().backward()
    for a, b in ((out, whole[mine]), (found.grad, expected.grad[mine])):
        far = float((a - b).abs().max())
        assert far < 1e-4, f"differs by {far:.2g} from one rank with the whole batch"
    assert torch.allclose(layer.running_var, one.running_var, atol=1e-6)


@probe("`broadcast_parameters`, `broadcast_optimizer_state`")
def torch_broadcast() -> None:
    hvd, torch = _torch()
    model = _torch_model()
    optimizer = torch.optim.Adam(model.parameters(), 0.05 / (1 + hvd.rank()))
    if hvd.rank() == 0:
        x, y = (a[0] for a in _torch_data(0))
        _torch_loss(torch, model, x, y).backward()
        optimizer.step()
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups[0]["lr"] == 0.05
    for p in model.parameters():
        slots = optimizer.state[p]
        assert int(slots["step"]) == 1
        for value in (p.detach(), slots["exp_avg"], slots["exp_avg_sq"]):
            both = hvd.allgather(value.reshape(1, -1))
            assert torch.equal(both[0], both[1]), "ranks differ"


@probe("elastic `TorchState`")
def torch_state() -> None:
    hvd, torch = _torch()
    model, one = _torch_model(), _torch_model()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(hvd.rank())
    if hvd.rank() == 0:
        x, y = (a[0] for a in _torch_data(0))
        _torch_loss(torch, model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, epoch=hvd.rank())
    state.sync()
    assert state.epoch == 0
    state.epoch = 3
    state.commit()
    one.load_state_dict(model.state_dict())
    x, y = (a[0] for a in _torch_data())
    _torch_loss(torch, model, x, y).backward()
    optimizer.step()
    state.epoch = 4
    state.restore()
    assert state.epoch == 3
    assert all(int(optimizer.state[p]["step"]) == 1 for p in model.parameters())
    _torch_same(hvd, torch, model, one, 1e-9)
