"""Figures that follow from a config alone: parameters, FLOPs, memory, and the plan of a run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from horovod_lm.config import Config
from horovod_lm.data.batches import cut
from horovod_lm.errors import UserError
from horovod_lm.presets import preset
from horovod_lm.spec import Initialiser, ModelSpec, Parameter


@dataclass(frozen=True)
class Row:
    """Parameters of equal shape that differ in their layer only: `decoder.0-3.attention…`."""

    name: str
    shape: tuple[int, ...]
    layers: int
    count: int
    initialiser: str
    decay: bool


def rows(parameters: Iterable[Parameter]) -> list[Row]:
    """The parameter table with the layers of a stack folded into one row, in its order."""
    folded: dict[tuple[Any, ...], list[tuple[int | None, Parameter]]] = {}
    for parameter in parameters:
        head, layer, tail = _split(parameter.name)
        key = (head, tail, parameter.shape, parameter.initialiser, parameter.decay)
        folded.setdefault(key, []).append((layer, parameter))
    table = []
    for (head, tail, shape, initialiser, decay), group in folded.items():
        name = head + tail
        first, last = group[0][0], group[-1][0]
        if first is not None:
            name = f"{head}.{first}{'' if first == last else f'-{last}'}.{tail}"
        count = sum(parameter.size for _, parameter in group)
        table.append(Row(name, shape, len(group), count, _initialiser(initialiser), decay))
    return table


def _split(name: str) -> tuple[str, int | None, str]:
    match = re.fullmatch(r"([a-z_]+)\.(\d+)\.(.+)", name)
    return (match[1], int(match[2]), match[3]) if match else (name, None, "")


def _initialiser(initialiser: Initialiser) -> str:
    if initialiser.kind == "normal":
        return f"normal {initialiser.std:.3g}"
    return initialiser.kind


def parts(spec: ModelSpec) -> dict[str, int]:
    """Number of parameters by part of the model: embeddings, attention (a bias by distance is of
    it), cross_attention, feed_forward, norms, pooler, heads."""
    totals: dict[str, int] = {}
    for parameter in spec.parameters:
        first, *rest = parameter.name.split(".")
        part = first
        if "norm" in parameter.name:
            part = "norms"
        elif first in spec.stacks:
            part = "attention" if rest[0] == "relative_bias" else rest[1]
        totals[part] = totals.get(part, 0) + parameter.size
    return totals


def published(name: str, spec: ModelSpec) -> dict[str, Any]:
    """What `horovod-lm inspect --preset` says beside the figures of a config: the number of
    parameters of the preset as published and where, and by how much that of `spec` differs."""
    found = preset(name)
    return {
        "preset": name,
        "published": found.parameters,
        "source": found.published,
        "difference": spec.size - found.parameters,
    }


def describe(config: Config) -> dict[str, Any]:
    """What `horovod-lm inspect --json` prints: every parameter, totals, FLOPs of one training
    token, and bytes of one rank by part for the config's micro-batch."""
    spec = config.model
    micro = micro_batch_rows(config, config.launch.ranks)
    return {
        "name": config.name,
        "digest": config.digest,
        "parameters": [
            {
                "name": parameter.name,
                "shape": list(parameter.shape),
                "count": parameter.size,
                "initialiser": _initialiser(parameter.initialiser),
                "decay": parameter.decay,
            }
            for parameter in spec.parameters
        ],
        "parts": parts(spec),
        "total": spec.size,
        "decayed": sum(p.size for p in spec.parameters if p.decay),
        "flops_per_token": spec.flops_per_token(),
        "micro_batch_rows": micro,
        "memory": spec.memory(
            micro, config.train.precision, config.optimizer.name, config.train.recompute
        ),
    }


def micro_batch_rows(config: Config, ranks: int) -> int:
    """Sequences of one forward: the largest rank's part in equal micro-batches, none larger than
    `train.micro_batch_size`."""
    return cut(config.train.global_batch_size, config.train.micro_batch_size, ranks)[1]


def plan(config: Config, ranks: int, training_tokens: int) -> dict[str, Any]:
    """What a run of `config` on `ranks` ranks will do with a corpus of `training_tokens`.

    FLOPs are those of all ranks; memory is bytes of one rank; checkpoints are weights and moments,
    fp64 in a run of that precision and otherwise fp32, one of them unfinished beside those that are
    kept.
    """
    spec, settings = config.model, config.train
    tokens = settings.global_batch_size * spec.context
    micro = micro_batch_rows(config, ranks)
    memory = spec.memory(micro, settings.precision, config.optimizer.name, settings.recompute)
    return {
        "parameters": spec.size,
        "backend": config.launch.backend,
        "precision": settings.precision,
        "ranks": ranks,
        "global_batch_size": settings.global_batch_size,
        "micro_batch_rows": micro,
        "micro_batches": -(-settings.global_batch_size // (ranks * micro)),
        "tokens_per_step": tokens,
        "flops_per_step": tokens * spec.flops_per_token(),
        "memory": memory,
        "steps": settings.steps,
        "tokens": settings.steps * tokens,
        "epochs": settings.steps * tokens / training_tokens,
        "checkpoint_bytes": (config.checkpoint.keep + 1) * (memory["weights"] + memory["moments"]),
    }


def check_disk(folder: Path, needed: int) -> None:
    """Raise `UserError` unless `needed` bytes are free where `folder` is or will be."""
    place = folder.absolute()
    while not os.path.exists(place):
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**20:,.0f} MiB free, and the run's checkpoints take "
            f"{needed / 2**20:,.0f} MiB; free some, lower checkpoint.keep, or give another --output"
        )
