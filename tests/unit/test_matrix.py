"""The list of models that both backends are compared on has what it says."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from horovod_lm.randomness import dropout_words, normals
from tests.parity.matrix import (
    AXES,
    FORBIDDEN,
    covering,
    lengths_of,
    micro_batch_of,
    name_of,
    pairs,
    pairs_of,
    spec_of,
    spread,
)
from tests.parity.reference import Reference

CHOICES = covering(3)


def test_every_pair_that_can_go_together_is_there_three_times():
    found = Counter(pair for choice in CHOICES for pair in pairs_of(choice))
    assert set(found) == set(pairs())
    assert min(found.values()) >= 3
    assert len(CHOICES) >= 60
    assert len({name_of(choice) for choice in CHOICES}) == len(CHOICES)
    assert covering(3) == CHOICES


def test_a_spread_of_choices_has_every_value():
    some = spread(CHOICES)
    for axis, values in AXES.items():
        assert {choice[axis] for choice in some} == set(values), axis
    assert len(some) <= 11
    exact = [choice for choice in CHOICES if choice["precision"] == "fp32"]
    some = spread(exact)
    for axis, values in AXES.items():
        assert {choice[axis] for choice in some} == set(values if axis != "precision" else ["fp32"])
    assert len(some) <= 7
    assert len(spread(CHOICES, ["mask", "kind"])) == len(AXES["mask"])


def test_nothing_else_is_left_out():
    possible = {frozenset(pair) for pair in pairs()} | FORBIDDEN
    values = sum(len(values) for values in AXES.values())
    within = sum(len(values) ** 2 for values in AXES.values())
    assert len(possible) == (values**2 - within) // 2


def test_what_is_forbidden_is_so_for_a_reason():
    choice = dict(CHOICES[0]) | {"kind": "decoder", "inputs": "pooler"}
    with pytest.raises(ValueError, match="pooler = true needs kind"):
        spec_of(choice)


@pytest.mark.parametrize("choice", CHOICES, ids=name_of)
def test_a_choice_makes_a_model_and_a_batch_that_fit_together(choice):
    spec = spec_of(choice)
    micro = micro_batch_of(spec, choice)
    for name, array in micro.inputs.items():
        source = name.startswith("source")
        stack = "encoder" if source else list(spec.stacks)[-1]
        assert array.shape == (3, lengths_of(spec)[stack]) and array.dtype == np.int32, name
    for loss in micro.losses:
        assert loss.targets.shape == loss.weights.shape and loss.weights.sum() > 0
    mask = choice["mask"]
    assert ("blocks" in micro.inputs) == (mask in ("padding", "packed", "packed-prefix"))
    assert ("prefix" in micro.inputs) == (mask in ("prefix", "packed-prefix"))


@pytest.mark.parametrize("choice", CHOICES[::4], ids=name_of)
def test_gradients_of_the_reference_are_those_of_finite_differences(choice):
    """Along one direction, in which every weight moves."""
    spec = spec_of(choice)
    micro = micro_batch_of(spec, choice)
    words = dropout_words(spec, 11, 3, micro.rows, lengths_of(spec))
    start = {p.name: normals(1, p.name, p.shape, 0.3).astype(float) for p in spec.parameters}
    to = {p.name: normals(2, p.name, p.shape, 1.0).astype(float) for p in spec.parameters}
    reference = Reference(spec, start)
    reference.loss(micro, words)
    gradients = reference.gradients
    assert list(gradients) == list(start)
    slope = sum(float((gradients[name] * to[name]).sum()) for name in start)
    step, ends = 1e-6, []
    for side in (step, -step):
        moved = {name: array + side * to[name] for name, array in start.items()}
        ends.append(Reference(spec, moved).loss(micro, words))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)
