"""Are the replicas still the same? Ranks compare digests of all that they should share."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from horovod_lm.backend import Communicator, EngineState
from horovod_lm.errors import RunFailed


def compare_replicas(
    communicator: Communicator, state: EngineState, scaler: Mapping[str, float], step: int
) -> None:
    """Compare weights, moments, update count, loss scaler and step over the ranks, bit by bit.

    Collective. Costs one allgather of 32 bytes while all agree. Otherwise a second one fetches a
    digest of each part, and every rank raises `RunFailed` that names the first part that differs
    and the ranks that hold another one than most do.
    """
    parts = _digests(state, scaler, step)
    whole = hashlib.sha256(json.dumps(parts).encode()).digest()
    if len(set(communicator.allgather(whole))) == 1:
        return
    gathered = communicator.allgather(json.dumps(parts).encode())
    raise RunFailed(_difference([json.loads(data) for data in gathered], step))


def _digests(state: EngineState, scaler: Mapping[str, float], step: int) -> dict[str, str]:
    """SHA-256 of each tensor by name, and the counts as text."""
    parts = {"step": str(step), "updates": str(state.updates)}
    parts |= {f"loss scaler's {key}": repr(float(value)) for key, value in sorted(scaler.items())}
    parts |= {f"weight {name}": _digest(array) for name, array in sorted(state.weights.items())}
    for moment, table in sorted(state.moments.items()):
        for name, array in sorted(table.items()):
            parts[f"{moment} moment of {name}"] = _digest(array)
    return parts


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).data.cast("B"))
    return digest.hexdigest()


def _difference(ranks: Sequence[Mapping[str, str]], step: int) -> str:
    """The message about ranks' digests that are not all the same."""
    names = list(dict.fromkeys(name for parts in ranks for name in parts))
    different = [name for name in names if len({parts.get(name) for parts in ranks}) > 1]
    first = different[0]
    holders = defaultdict(list)
    for rank, parts in enumerate(ranks):
        holders[parts.get(first)].append(rank)
    # Most ranks are taken to be right; where no value has more, the one of the lowest rank.
    right = max(holders.values(), key=len)
    wrong = sorted(set(range(len(ranks))) - set(right))
    return (
        f"the replicas have drifted apart at step {step}: {first} on {_list_ranks(wrong)} is not "
        f"that of {_list_ranks(right)}; in all, {len(different)} of {len(names)} parts differ. "
        f"Start again with --resume from the last checkpoint; if it comes back, look for ranks on "
        f"different processors or libraries, or for faulty memory"
    )


def _list_ranks(ranks: Sequence[int]) -> str:
    word = "rank" if len(ranks) == 1 else "ranks"
    return f"{word} {', '.join(map(str, ranks))}"
