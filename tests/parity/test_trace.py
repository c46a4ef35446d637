"""The activations of a forward, site by site: the same in both backends, and those of training."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from horovod_lm.activations import record
from horovod_lm.randomness import dropout_words, keep_mask
from tests.parity.compare import difference, differences, within
from tests.parity.conftest import ROWS, SEED, micro_batch, starting_weights
from tests.parity.reference import Reference

VARIANTS = {
    "pre": {"dropout": 0, "attention_dropout": 0, "activation": "gelu_tanh"},
    "pre-dropout": {},
    "post": {"norm_placement": "post", "dropout": 0, "attention_dropout": 0, "tied": False},
    "post-dropout": {"norm_placement": "post", "positions": "sinusoidal", "key_bias": True},
}
STEP = 3


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def exact(make_pair, variant):
    return make_pair("fp64", **variant)


@pytest.fixture(scope="module")
def traces(exact):
    """By backend, in fp64."""
    micro = micro_batch(exact.spec)
    return {name: engine.trace(micro, STEP) for name, engine in exact.fresh().items()}


def lengths(spec) -> dict[str, int]:
    return dict.fromkeys(spec.stacks, spec.context)


def sites(spec) -> list[str]:
    post = spec.norm_placement == "post"
    names = ["embeddings.sum", *["embeddings.norm"] * post, "embeddings"]
    for index in range(spec.layers):
        attention = ["query", "key", "value", "scores", "probabilities"]
        attention += ["dropped"] * (spec.attention_dropout > 0) + ["mixed", "output", "residual"]
        feed_forward = ["up", "activation", "down", "residual"]
        for branch, parts in (("attention", attention), ("feed_forward", feed_forward)):
            own = [f"{branch}.{part}" for part in parts]
            own.insert(len(own) if post else 0, f"{branch}_norm")
            names += [f"decoder.{index}.{name}" for name in own]
    return names + ["decoder.norm"] * (not post) + ["logits", "loss"]


def test_the_sites_their_order_and_shapes(exact, traces):
    spec = exact.spec
    heads = (ROWS, spec.heads, spec.context)
    shapes = {
        **dict.fromkeys(("query", "key", "value"), (*heads, spec.head_width)),
        **dict.fromkeys(("scores", "probabilities", "dropped"), (*heads, spec.context)),
        **dict.fromkeys(("up", "activation"), (ROWS, spec.context, spec.inner_width)),
        "logits": (ROWS, spec.context, spec.vocabulary),
        "loss": (),
    }
    for name, trace in traces.items():
        assert list(trace) == sites(spec), name
        for site, array in trace.items():
            expected = shapes.get(site.rpartition(".")[2], (ROWS, spec.context, spec.width))
            assert (array.shape, array.dtype) == (expected, np.float64), (name, site)


def test_in_fp64_both_backends_compute_the_same(exact, traces):
    reference = Reference(exact.spec, starting_weights(exact.spec))
    words = dropout_words(exact.spec, SEED, STEP, np.arange(ROWS), lengths(exact.spec))
    micro = micro_batch(exact.spec)
    logits = reference.logits(micro.inputs, words)
    loss = reference.loss(micro, words)
    for site, array in traces["torch"].items():
        apart = difference(traces["tensorflow"][site], array)
        within("an activation in fp64, tensorflow to torch", apart, 1e-12)
    for name, trace in traces.items():
        within(f"logits in fp64, {name} to reference", difference(trace["logits"], logits), 1e-12)
        assert trace["loss"] == pytest.approx(loss, rel=1e-12), name
    for name, engine in exact.fresh().items():
        engine.forward_backward(micro, STEP, 1.0)
        reduced = engine.reduce_gradients()
        assert reduced.losses["lm"] == pytest.approx(loss, rel=1e-12), name
        worst = max(differences(engine.gradients(), reference.gradients).values())
        within(f"a tensor's gradient in fp64, {name} to reference", worst, 1e-12)
        engine.apply_gradients(1e-3, 1.0)
    one, two = (engine.state() for engine in exact.engines.values())
    worst = max(differences(two.weights, one.weights).values())
    within("a tensor after an update in fp64, tensorflow to torch", worst, 1e-12)
    assert {array.dtype for array in (*one.weights.values(), *two.weights.values())} == {
        np.dtype(np.float64)
    }


def test_masked_scores_are_zero_and_dropped_probabilities_those_of_the_mask(exact, traces):
    spec = exact.spec
    words = dropout_words(spec, SEED, STEP, np.arange(ROWS), lengths(spec)).get("decoder")
    for name, trace in traces.items():
        for index in range(spec.layers):
            at = f"decoder.{index}.attention"
            scores, probabilities = trace[f"{at}.scores"], trace[f"{at}.probabilities"]
            products = trace[f"{at}.query"] @ trace[f"{at}.key"].swapaxes(2, 3)
            products = np.tril(products / np.sqrt(spec.head_width))
            assert difference(scores, products) < 1e-14, name
            assert not np.triu(scores, 1).any() and not np.triu(probabilities, 1).any(), name
            assert np.allclose(probabilities.sum(-1), 1, rtol=1e-14), name
            if spec.attention_dropout:
                rate = spec.attention_dropout
                rows, columns = words.attention_rows[index], words.attention_columns[index]
                expected = probabilities * keep_mask(rows, columns, rate) / (1 - rate)
                assert difference(trace[f"{at}.dropped"], expected) < 1e-14, name


def check_near(pair, exact, limit) -> None:
    """That a trace in this precision is within `limit` of the fp64 one, and of training's loss."""
    micro, precision = micro_batch(pair.spec), pair.settings.precision
    for name, engine in pair.engines.items():
        trace = engine.trace(micro, STEP)
        assert list(trace) == list(exact)
        for site, array in trace.items():
            assert array.dtype == np.float32, (name, site)
            apart = difference(array, exact[site])
            within(f"an activation in {precision}, {name} to fp64", apart, limit)
        engine.forward_backward(micro, STEP, 1.0)
        assert trace["loss"] == pytest.approx(engine.reduce_gradients().losses["lm"], rel=limit)


# Limits: some ten roundings of the type, 2^-24, 2^-9 or 2^-12.


def test_fp32_is_near_fp64(make_pair, variant, traces):
    check_near(make_pair("fp32", **variant), traces["torch"], 1e-6)


@pytest.mark.parametrize(("precision", "limit"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_halves_are_near_fp64(make_pair, precision, limit):
    exact = make_pair("fp64")
    check_near(make_pair(precision), exact.torch.trace(micro_batch(exact.spec), STEP), limit)


def test_a_trace_leaves_nothing_behind(exact):
    micro = micro_batch(exact.spec)
    for name, engine in exact.fresh().items():
        results = []
        for traced in (False, True):
            if traced:
                first = engine.trace(micro, STEP)
                assert list(engine.trace(micro, STEP)) == list(first), name
            engine.forward_backward(micro, STEP, 1.0)
            results.append((engine.reduce_gradients().losses, engine.gradients()))
        assert results[0][0] == results[1][0], name
        assert all(np.array_equal(g, results[1][1][key]) for key, g in results[0][1].items()), name
    assert not tf.config.functions_run_eagerly()
    record("nobody asks", None)  # would fail if it looked at the tensor


def test_fp64_decodes_and_takes_states(exact):
    tokens = micro_batch(exact.spec).inputs["tokens"]
    for name, engine in exact.fresh().items():
        logits = engine.logits({"tokens": tokens})
        last, cache = engine.start({"tokens": tokens[:, :5]})
        assert logits.dtype == last.dtype == np.float64, name
        assert difference(last, logits[:, 4]) <= 1e-12, name
        last, _ = engine.next(tokens[:, 5], cache)
        assert difference(last, logits[:, 5]) <= 1e-12, name
        state = engine.state()
        state.weights["decoder.0.attention.query.kernel"] += 1e-12  # would be lost in fp32
        engine.load_state(state)
        again = engine.state().weights
        assert all(np.array_equal(again[key], w) for key, w in state.weights.items()), name
