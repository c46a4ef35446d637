"""The half precisions: near fp32, near each other, and fp16 overflows in both.

Tolerances. A product's result is rounded to a half: by 2^-9 (bf16) or 2^-12 (fp16) of itself.
Both backends round at the same places, but where their fp32 sums differ in the last bit, a result
beside a rounding boundary falls to different sides, and later layers see it. So they stand as far
apart as each of them from fp32: a few units of the half's rounding.
"""

from __future__ import annotations

import numpy as np
import pytest

from horovod_lm.backend import OVERFLOW
from horovod_lm.randomness import dropout_words
from tests.parity.compare import difference, differences
from tests.parity.conftest import ROWS, SEED, micro_batch, starting_weights
from tests.parity.reference import Reference

UNIT = {"bf16": 2**-9, "fp16": 2**-12}


@pytest.fixture(scope="module", params=UNIT)
def pair(request, make_pair):
    return make_pair(request.param)


def test_logits_and_gradients_agree_to_the_rounding_of_a_half(pair):
    spec, micro, unit = pair.spec, micro_batch(pair.spec), UNIT[pair.settings.precision]
    reference = Reference(spec, starting_weights(spec))
    exact = reference.logits(micro.inputs)
    lengths = {"decoder": spec.context}
    loss = reference.loss(micro, dropout_words(spec, SEED, 0, np.arange(ROWS), lengths))
    logits, gradients = {}, {}
    for name, engine in pair.fresh().items():
        logits[name] = engine.logits(micro.inputs)
        engine.forward_backward(micro, 0, 1024.0)
        reduced = engine.reduce_gradients()
        gradients[name] = engine.gradients()
        assert reduced.finite and reduced.status.tolist() == [0], name
        assert reduced.losses["lm"] == pytest.approx(loss, rel=unit), name
        assert unit / 100 < difference(logits[name], exact) <= 4 * unit, name
        worst = differences(gradients[name], reference.gradients)
        assert max(worst.values()) <= 10 * unit, (name, worst)
    assert difference(logits["tensorflow"], logits["torch"]) <= 4 * unit
    worst = differences(gradients["tensorflow"], gradients["torch"])
    assert max(worst.values()) <= 10 * unit, worst


def test_decoding_equals_the_logits_of_the_whole_sequence(pair):
    tokens = micro_batch(pair.spec).inputs["tokens"]
    for name, engine in pair.fresh().items():
        logits = engine.logits({"tokens": tokens})
        last, cache = engine.start({"tokens": tokens[:, :5]})
        last, _ = engine.next(tokens[:, 5], cache)
        assert difference(last, logits[:, 5]) <= 4 * UNIT[pair.settings.precision], name


def test_a_huge_loss_scale_overflows_fp16_alone(pair):
    for name, engine in pair.fresh().items():
        engine.forward_backward(micro_batch(pair.spec), 0, 2.0**30)
        reduced = engine.reduce_gradients()
        overflows = pair.settings.precision == "fp16"
        assert reduced.finite != overflows, name
        assert reduced.status.tolist() == [OVERFLOW if overflows else 0], name
        assert (reduced.tensor is not None) == overflows, name
        engine.forward_backward(micro_batch(pair.spec), 0, 1024.0)
        assert engine.reduce_gradients().finite, name
