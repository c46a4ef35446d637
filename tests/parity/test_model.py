"""The same function and the same gradients in both backends, and in an fp64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from horovod_lm.backend import EngineState
from horovod_lm.randomness import dropout_words
from tests.parity.compare import difference, differences, within
from tests.parity.conftest import ROWS, SEED, micro_batch, starting_weights
from tests.parity.reference import Reference

VARIANTS = {
    "pre": {"dropout": 0, "attention_dropout": 0},
    "pre-dropout": {},
    "post-sinusoidal-untied-tanh": {
        "norm_placement": "post",
        "positions": "sinusoidal",
        "tied": False,
        "activation": "gelu_tanh",
    },
    "post-relu-key-bias": {
        "norm_placement": "post",
        "activation": "relu",
        "key_bias": True,
        "attention_dropout": 0,
    },
    "no-bias-sinusoidal": {"bias": False, "positions": "sinusoidal", "dropout": 0},
    "untied-relu": {"tied": False, "activation": "relu", "feed_forward": 24},
}
STEP = 3


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, make_pair):
    return make_pair(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def reference(pair):
    """Losses and gradients of the reference, with dropout."""
    reference = Reference(pair.spec, starting_weights(pair.spec))
    words = dropout_words(pair.spec, SEED, STEP, np.arange(ROWS), {"decoder": pair.spec.context})
    loss = reference.loss(micro_batch(pair.spec), words)
    return loss, reference.gradients


def test_logits_agree_with_the_reference_and_each_other(pair):
    engines, micro = pair.fresh(), micro_batch(pair.spec)
    logits = {name: engine.logits(micro.inputs) for name, engine in engines.items()}
    expected = Reference(pair.spec, starting_weights(pair.spec)).logits(micro.inputs)
    for name, array in logits.items():
        within(f"logits, {name} to fp64", difference(array, expected), 1e-5)
    apart = difference(logits["tensorflow"], logits["torch"])
    within("logits, tensorflow to torch", apart, 1e-5)


def test_the_step_that_xla_compiles_agrees_too(pair, reference, monkeypatch):
    loss, expected = reference
    monkeypatch.setattr("tf_backend.engine._compiles", lambda settings: True)
    engine = type(pair.tensorflow)(
        pair.spec, pair.settings, pair.tensorflow.communicator, pair.tensorflow.device
    )
    engine.load_state(EngineState(starting_weights(pair.spec)))
    engine.forward_backward(micro_batch(pair.spec), STEP, 1.0)
    assert engine.reduce_gradients().losses["lm"] == pytest.approx(loss, rel=1e-5)
    worst = max(differences(engine.gradients(), expected).values())
    within("a tensor's gradient, tensorflow with XLA to fp64", worst, 1e-4)


def test_gradients_agree_with_the_reference_and_each_other(pair, reference):
    loss, expected = reference
    results, gradients = {}, {}
    for name, engine in pair.fresh().items():
        engine.forward_backward(micro_batch(pair.spec), STEP, 1.0)
        results[name] = engine.reduce_gradients()
        gradients[name] = engine.gradients()
        worst = differences(gradients[name], expected)
        within(f"a tensor's gradient, {name} to fp64", max(worst.values()), 1e-4)
        assert results[name].losses["lm"] == pytest.approx(loss, rel=1e-5)
        assert results[name].finite and results[name].tensor is None
        assert results[name].status.tolist() == [0]
    worst = differences(gradients["tensorflow"], gradients["torch"])
    within("a tensor's gradient, tensorflow to torch", max(worst.values()), 1e-4)
    whole = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients["torch"].values()))
    assert results["torch"].norm == pytest.approx(whole, rel=1e-6)
    assert results["tensorflow"].norm == pytest.approx(results["torch"].norm, rel=1e-5)


def test_accumulation_and_loss_scale_change_nothing(pair, reference):
    loss, expected = reference
    for name, engine in pair.fresh().items():
        for part in (slice(0, 4), slice(4, 8)):
            engine.forward_backward(micro_batch(pair.spec, part), STEP, 1024.0)
        reduced = engine.reduce_gradients()
        worst = differences(engine.gradients(), expected)
        assert max(worst.values()) <= 1e-4, (name, worst)
        assert reduced.losses["lm"] == pytest.approx(loss, rel=1e-5)


def test_evaluations_agree(pair):
    micro = micro_batch(pair.spec)
    engines = pair.fresh()
    expected, given = (e.evaluate(micro)["lm"] for e in engines.values())
    assert expected.weights == given.weights == micro.losses[0].weights.sum()
    assert given.nll == pytest.approx(expected.nll, rel=1e-6)
    assert given.hits == expected.hits > 0


def test_a_tie_of_n_is_a_hit_of_one_in_n(pair):
    """So it is no matter which one a framework finds first."""
    micro, size = micro_batch(pair.spec), pair.spec.vocabulary
    weights = {name: np.zeros_like(w) for name, w in starting_weights(pair.spec).items()}
    for name, engine in pair.engines.items():
        engine.load_state(EngineState(weights))
        found = engine.evaluate(micro)["lm"]
        assert found.nll == pytest.approx(found.weights * np.log(size), rel=1e-5), name
        assert found.hits == pytest.approx(found.weights / size, rel=1e-5), name


def test_decoding_equals_the_logits_of_the_whole_sequence(pair):
    tokens = micro_batch(pair.spec).inputs["tokens"]
    for name, engine in pair.fresh().items():
        logits = engine.logits({"tokens": tokens})
        last, cache = engine.start({"tokens": tokens[:, :5]})
        assert difference(last, logits[:, 4]) <= 1e-5, name
        for position in range(5, 9):
            last, cache = engine.next(tokens[:, position], cache)
            assert difference(last, logits[:, position]) <= 1e-5, (name, position)


def test_steps_repeat_bit_for_bit(pair):
    for name, engine in pair.fresh().items():
        runs = []
        for _ in range(2):
            engine.forward_backward(micro_batch(pair.spec), STEP, 1.0)
            engine.reduce_gradients()
            runs.append(engine.gradients())
        assert all(np.array_equal(runs[0][key], runs[1][key]) for key in runs[0]), name


def test_training_follows_the_same_curve(pair):
    losses = {}
    for name, engine in pair.fresh().items():
        losses[name] = []
        for step in range(6):
            engine.forward_backward(micro_batch(pair.spec), step, 1.0)
            losses[name].append(engine.reduce_gradients().losses["lm"])
            engine.apply_gradients(1e-2, 1.0)
    assert losses["torch"][5] < losses["torch"][0]
    assert losses["tensorflow"] == pytest.approx(losses["torch"], abs=1e-4)
