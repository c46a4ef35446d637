"""The state of an optimizer of torch, from one rank to all."""

from __future__ import annotations

import collections

import torch
from horovod.torch.functions import allgather_object, broadcast_object, broadcast_parameters
from horovod.torch.mpi_ops import rank

# What stands for a tensor: the shape, type and kind of device that the root's has.
_Tensor = collections.namedtuple("_Tensor", ["shape", "dtype", "device"])


def broadcast(optimizer: torch.optim.Optimizer, root_rank: int) -> None:
    """Make state and options of `optimizer` those that it has on the rank `root_rank`.

    Options are everything in a group but its parameters. Tensors that exist with the right shape
    and type are filled in place. Gradients stay as they are; where the root has no state yet, a
    parameter without one gets zeros, on every rank alike. Raises ValueError on every rank if the
    parameters of some rank's optimizer have other shapes, or are grouped in another way.
    """
    groups = optimizer.param_groups
    params = [p for group in groups for p in group["params"]]
    shapes = [[tuple(p.shape) for p in group["params"]] for group in groups]
    mine = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    mine += [optimizer.state.get(p) for p in params]
    described = [_describe(part) for part in mine]
    sent = broadcast_object((shapes, described), root_rank, name="optimizer state")
    agree = allgather_object(sent[0] == shapes, name="optimizer state agrees")
    if not all(agree):
        other = ", ".join(str(r) for r, same in enumerate(agree) if not same)
        raise ValueError(
            f"The parameters of the optimizer on rank {root_rank} have other shapes or groups than "
            f"those on rank {other}: build the same model and the same groups on every rank."
        )
    tensors: list[torch.Tensor] = []
    devices = [torch.device("cpu")] * len(groups) + [p.device for p in params]
    parts = [
        _prepare(part, kept, device, tensors)
        for part, kept, device in zip(sent[1], mine, devices, strict=True)
    ]
    broadcast_parameters([(f"state.{i}", t) for i, t in enumerate(tensors)], root_rank)
    if not any(sent[1][len(groups) :]):
        _zero_gradients(optimizer, params)
    if rank() == root_rank:
        return
    for group, options in zip(groups, parts, strict=False):
        group.update(options)
    for p, state in zip(params, parts[len(groups) :], strict=True):
        if state is None:
            optimizer.state.pop(p, None)
        else:
            optimizer.state[p] = state


def _zero_gradients(optimizer, params):
    """Leave the gradients that the release's first step left: there was none with these two."""
    if not isinstance(optimizer, (torch.optim.LBFGS, torch.optim.SparseAdam)):
        for p in params:
            if p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)


def _describe(part):
    """`part` with a description in the place of each tensor."""
    if torch.is_tensor(part):
        return _Tensor(tuple(part.shape), part.dtype, part.device.type)
    if isinstance(part, dict):
        return {key: _describe(value) for key, value in part.items()}
    if type(part) in (list, tuple):
        return type(part)(map(_describe, part))
    return part


def _prepare(described, kept, device, tensors):
    """What was `described`, with tensors to be filled, which are appended to `tensors`: those of
    `kept` where they fit, else new ones (on `device` if that is of the right kind)."""
    if isinstance(described, _Tensor):
        if not torch.is_tensor(kept) or _describe(kept) != described:
            place = device if device.type == described.device else described.device
            kept = torch.empty(described.shape, dtype=described.dtype, device=place)
        tensors.append(kept)
        return kept
    if isinstance(described, dict):
        known = kept if isinstance(kept, dict) else {}
        return {
            key: _prepare(value, known.get(key), device, tensors)
            for key, value in described.items()
        }
    if type(described) in (list, tuple):
        known = kept if type(kept) is type(described) else ()
        known = [*known, *[None] * len(described)]
        return type(described)(
            _prepare(value, other, device, tensors)
            for value, other in zip(described, known, strict=False)
        )
    return described
