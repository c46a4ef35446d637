"""Many small models that between them have every pair of choices, and a batch for each.

A choice names a value on each of `AXES`. `covering` makes a list in which every pair of values of
two axes that can go together does so at least `times` times (greedily, as AETG does: Cohen et al.,
1997); a model that has one of a hundred thousand combinations wrong mostly has a pair wrong.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from horovod_lm.backend import Loss, MicroBatch
from horovod_lm.spec import ModelSpec

Choice = Mapping[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]

AXES: dict[str, tuple[Any, ...]] = {
    "kind": ("decoder", "encoder", "encoder-decoder"),
    "norm": ("layer_norm", "rms_norm"),
    "norm_placement": ("pre", "post"),
    "positions": ("learned", "sinusoidal", "rotary", "relative", "alibi"),
    "activation": ("gelu", "gelu_tanh", "relu", "silu"),
    "gated": (False, True),
    "key_value_heads": (4, 2, 1),
    "bias": (True, False),
    "output": ("tied", "scaled", "untied"),
    "head": ("plain", "bias", "transform"),
    "inputs": ("tokens", "segments", "pooler"),
    "mask": ("none", "padding", "packed", "prefix", "packed-prefix"),
    "loss": ("plain", "smoothed", "gathered", "heads"),
    "dropout": (0.0, 0.2),
    "odd": (False, True),
    "recompute": (False, True),
    "precision": ("fp32", "bf16", "fp16", "fp64"),
}
# What can't go together: only an encoder has a pooler, only a decoder a prefix.
FORBIDDEN: set[frozenset[tuple[str, Any]]] = {
    frozenset(pair)
    for pair in [
        (("kind", "decoder"), ("inputs", "pooler")),
        (("kind", "encoder-decoder"), ("inputs", "pooler")),
        (("kind", "encoder"), ("mask", "prefix")),
        (("kind", "encoder"), ("mask", "packed-prefix")),
        (("inputs", "pooler"), ("mask", "prefix")),
        (("inputs", "pooler"), ("mask", "packed-prefix")),
    ]
}

ROWS = 3
SIZES: dict[str, Any] = {
    "vocabulary": 23, "context": 11, "width": 16, "heads": 4, "layers": 2, "feed_forward": 24,
    "relative_buckets": 8, "relative_distance": 8,
}  # fmt: skip


def pairs(axes: Mapping[str, tuple[Any, ...]] = AXES) -> list[Pair]:
    """Every pair of values that can go together."""
    return [
        (one, two)
        for a, b in itertools.combinations(axes, 2)
        for one, two in itertools.product([(a, v) for v in axes[a]], [(b, v) for v in axes[b]])
        if frozenset((one, two)) not in FORBIDDEN
    ]


def pairs_of(choice: Choice) -> list[Pair]:
    """Those that a choice has."""
    return list(itertools.combinations([(axis, choice[axis]) for axis in AXES], 2))


def covering(times: int) -> list[dict[str, Any]]:
    """Choices that have every pair at least `times` times; always the same."""
    wanted = Counter(dict.fromkeys(pairs(), times))
    chance = random.Random(1)
    found = []
    while wanted := +wanted:
        choice = _next_choice(wanted, chance)
        wanted.subtract(pair for pair in pairs_of(choice) if wanted[pair] > 0)
        found.append(choice)
    return found


def _next_choice(wanted: Counter[Pair], chance: random.Random) -> dict[str, Any]:
    """The best of some choices that start from a pair most wanted and take one axis after the
    other, in any order, each with the value that brings most of what is wanted."""

    def gain(choice: Choice, given: tuple[str, Any]) -> float:
        """How many wanted pairs `given` makes with what is chosen; less than 0 if it can't be."""
        total = 0
        for item in choice.items():
            if frozenset((item, given)) in FORBIDDEN:
                return -1
            total += wanted[(item, given) if rank[item[0]] < rank[given[0]] else (given, item)] > 0
        return total

    rank = {axis: number for number, axis in enumerate(AXES)}
    most = max(wanted.values())
    best: tuple[int, dict[str, Any]] = (-1, {})
    for _ in range(8):
        choice = dict(chance.choice([pair for pair, n in wanted.items() if n == most]))
        rest = [axis for axis in AXES if axis not in choice]
        chance.shuffle(rest)
        # Axes that others depend on come first, so that none is left without a value.
        rest.sort(key=lambda axis: axis not in ("kind", "inputs", "mask"))
        for axis in rest:
            values = list(AXES[axis])
            chance.shuffle(values)
            choice[axis] = max(values, key=lambda value: gain(choice, (axis, value)))
        assert not any(frozenset(pair) in FORBIDDEN for pair in pairs_of(choice)), choice
        count = sum(wanted[pair] > 0 for pair in pairs_of(choice))
        best = max(best, (count, choice), key=lambda one: one[0])
    return best[1]


def spread(choices: Sequence[Choice], axes: Iterable[str] = tuple(AXES)) -> list[Choice]:
    """A few of `choices` that between them have every value of each of `axes` that any of them has:
    each time the one that brings most that is not there yet."""
    wanted = {(axis, choice[axis]) for choice in choices for axis in axes}
    found: list[Choice] = []
    while wanted:
        found.append(max(choices, key=lambda choice: len(wanted & set(choice.items()))))
        wanted -= set(found[-1].items())
    return found


def name_of(choice: Choice) -> str:
    """For a test: what is not the first value of its axis, and the kind."""
    parts = [choice["kind"]]
    for axis, value in choice.items():
        if axis != "kind" and value != AXES[axis][0]:
            parts.append(axis if value is True else f"no-{axis}" if value is False else str(value))
    return "-".join(parts)


def spec_of(choice: Choice, **sizes: Any) -> ModelSpec:
    """A model of this choice, as small as can be with two layers, or of other `sizes`. An odd one
    has heads that do not fill the width, unscaled scores, scaled embeddings, the norm of embeddings
    that is not usual and a key's bias."""
    copied = ("kind", "norm", "norm_placement", "positions", "activation", "gated", "bias")
    fields = SIZES | {axis: choice[axis] for axis in (*copied, "key_value_heads")}
    fields |= {
        "tied": choice["output"] != "untied",
        "scale_output": choice["output"] == "scaled",
        "head_bias": choice["head"] != "plain",
        "head_transform": choice["head"] == "transform",
        "segments": 0 if choice["inputs"] == "tokens" else 2,
        "pooler": choice["inputs"] == "pooler",
        "dropout": choice["dropout"],
        "attention_dropout": choice["dropout"],
    }
    if choice["kind"] == "encoder-decoder":
        fields["encoder_layers"] = 1
    if choice["loss"] == "heads":
        fields["task_heads"] = (
            {"name": "label", "outputs": 3},
            {"name": "tag", "outputs": 5, "over": "token"},
        )
    if choice["odd"]:
        fields |= {
            "head_size": 6, "scale_attention": False, "scale_embeddings": True,
            "embedding_norm": choice["norm_placement"] == "pre", "key_bias": True,
            "position_offset": 2 if choice["positions"] == "learned" else 0,
        }  # fmt: skip
    return ModelSpec(**fields | sizes)


def lengths_of(spec: ModelSpec) -> dict[str, int]:
    """Of the sequences in each stack: shorter than the context, and an encoder's another one."""
    last = list(spec.stacks)[-1]
    return {stack: spec.context - (1 if stack == last else 2) for stack in spec.stacks}


def inputs_of(spec: ModelSpec, mask: str, seed: int) -> dict[str, np.ndarray]:
    """The arrays that go in."""
    generator = np.random.default_rng(seed)
    inputs: dict[str, np.ndarray] = {}
    for stack, length in lengths_of(spec).items():
        name = "source_" if stack == "encoder" and len(spec.stacks) == 2 else ""
        shape = (ROWS, length)
        inputs["source" if name else "tokens"] = generator.integers(0, spec.vocabulary, shape)
        if spec.segments:
            inputs[f"{name}segments"] = generator.integers(0, spec.segments, shape)
        place = np.broadcast_to(np.arange(length), shape)
        # Each row of another length, the first one full.
        ends = length - np.arange(ROWS)[:, None] * 2
        if mask == "padding":
            inputs[f"{name}blocks"] = place < ends
        elif mask in ("packed", "packed-prefix"):
            first = 3 + np.arange(ROWS)[:, None]
            inputs[f"{name}blocks"] = (1 + (place >= first)) * (place < ends)
            inputs[f"{name}positions"] = np.where(place < first, place, place - first)
        if not name and mask == "prefix":
            inputs["prefix"] = place < 1 + 2 * np.arange(ROWS)[:, None]
        elif not name and mask == "packed-prefix":  # two tokens of each sequence
            inputs["prefix"] = (inputs["positions"] < 2) * (inputs["blocks"] > 0)
    return {name: array.astype(np.int32) for name, array in inputs.items()}


def micro_batch_of(spec: ModelSpec, choice: Choice, seed: int = 5) -> MicroBatch:
    """A batch of two thirds of its global one, whose targets weigh between 0 and 1, and 0 where
    there is padding."""
    generator = np.random.default_rng(seed + 1)
    inputs = inputs_of(spec, choice["mask"], seed)
    real = inputs.get("blocks", np.ones_like(inputs["tokens"])) > 0
    smoothing, z_loss = (0.1, 1e-2) if choice["loss"] == "smoothed" else (0.0, 0.0)
    positions = None
    if choice["loss"] == "gathered":
        # In any order and one of them twice, as filler of a row with fewer targets.
        positions = np.array([[5, 0, 2, 5], [1, 3, 0, 4], [2, 4, 1, 0]], dtype=np.int32)
        real = np.take_along_axis(real, positions, 1)

    def loss(
        name: str,
        outputs: int,
        shape: tuple[int, ...],
        factor: float,
        smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> Loss:
        targets = generator.integers(0, outputs, shape).astype(np.int32)
        weights = generator.choice([0.0, 0.5, 1.0], shape, p=[0.2, 0.3, 0.5])
        weights.flat[0] = 1.0
        if weights.shape == real.shape:
            weights = weights * real
        return Loss(
            name, name, targets, weights.astype(np.float32), 1.5 * float(weights.sum()), factor,
            positions=positions if name == "lm" else None,
            smoothing=smoothing, z_loss=z_loss,
        )  # fmt: skip

    losses = [loss("lm", spec.vocabulary, real.shape, 1.0, smoothing, z_loss)]
    if spec.task_heads:  # with either addition alone, which "smoothed" has together
        losses.append(loss("label", 3, (ROWS,), 0.5, smoothing=0.2))
        losses.append(loss("tag", 5, real.shape, 2.0, z_loss=2e-2))
    rows = np.array([4, 0, 7], dtype=np.int64)
    return MicroBatch(inputs, rows, tuple(losses))
