"""Distances of weights from their sketches."""

import json

import numpy as np
import pytest

from horovod_lm.presets import preset
from horovod_lm.randomness import initial_weights
from horovod_lm.sketch import ERROR, SIZE, distance, layer_of, sketch
from horovod_lm.spec import ModelSpec

SPEC = ModelSpec(vocabulary=300, width=16, layers=2, heads=2, feed_forward=32, context=8)


def test_layers_are_those_of_the_parameter_table():
    layers = list(dict.fromkeys(layer_of(p.name) for p in SPEC.parameters))
    assert layers == ["embeddings", "decoder.0", "decoder.1", "decoder.norm"]
    untied = ModelSpec(**{**SPEC.model_dump(), "tied": False})
    assert layer_of(untied.parameters[-1].name) == "heads"
    bert = preset("bert-tiny").spec
    assert list(dict.fromkeys(layer_of(p.name) for p in bert.parameters)) == [
        "embeddings", "encoder.0", "encoder.1", "pooler", "heads",
    ]  # fmt: skip


def test_the_estimate_is_within_its_stated_error():
    generator = np.random.default_rng(1)
    ratios = []
    for trial in range(400):
        # names are the seeds of signs and places; sizes beyond a chunk, and no multiple of 8
        name, size = f"decoder.0.{trial}", 70_003 if trial < 5 else 611
        first = generator.standard_normal(size).astype(np.float32)
        second = first + 1e-3 * generator.standard_normal(size).astype(np.float32) ** 3
        true = np.linalg.norm(first.astype(np.float64) - second)
        (a,), (b,) = sketch({name: first}).values(), sketch({name: second}).values()
        assert a.shape == (SIZE,)
        ratios.append(distance(a, b) / true)
    errors = np.array(ratios) - 1
    assert np.abs(errors).max() < 5 * ERROR
    assert np.sqrt((errors**2).mean()) == pytest.approx(ERROR, rel=0.15)
    # squares are unbiased: their mean is 1 up to its own standard error
    assert (np.array(ratios) ** 2).mean() == pytest.approx(1, abs=3 * 2 * ERROR / 20)


def test_one_large_difference_among_equal_weights_is_seen():
    weights = initial_weights(SPEC, 1)
    changed = {name: array.copy() for name, array in weights.items()}
    changed["decoder.1.feed_forward.up.kernel"][3, 5] += 0.25
    first, second = sketch(weights), sketch(changed)
    apart = {layer: distance(first[layer], second[layer]) for layer in first}
    assert apart["decoder.1"] == pytest.approx(0.25, rel=1e-6)
    assert {layer for layer, value in apart.items() if value} == {"decoder.1"}


def test_rounding_survives_the_digits_of_a_row():
    weights = initial_weights(SPEC, 1)
    generator = np.random.default_rng(2)
    rounded = {
        name: array * (1 + 2**-24 * generator.standard_normal(array.shape))
        for name, array in weights.items()
    }
    layer, (first, second) = "decoder.0", (sketch(weights), sketch(rounded))
    written = json.loads(
        json.dumps([[float(f"{v:.12g}") for v in s[layer]] for s in (first, second)])
    )
    assert distance(*written) == pytest.approx(distance(first[layer], second[layer]), rel=1e-3)


def test_golden_signs_and_places():
    # Sketches lie in old runs: a change here would make them strangers to new ones.
    found = sketch({"embeddings.tokens": np.arange(1, 301, dtype=np.float32)})["embeddings"]
    assert found[:4].tolist() == [-320.0, 89.0, -682.0, -410.0]
