"""Dropout. The shared masks of both backends are those of horovod_lm.randomness, bit for bit, and
training with them is the same however the batch is cut; native ones are the framework's own, and
repeat on one layout. tests/unit/test_dropout_masks.py has the statistics of the shared ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf
import torch

from horovod_lm.backend import EngineState
from horovod_lm.randomness import dropout_words, keep_mask, normals
from horovod_lm.spec import ModelSpec
from tests.parity.compare import within
from tests.parity.conftest import ROWS, SEED, micro_batch, starting_weights

CUTS = {
    "4 + 4": [slice(0, 4), slice(4, 8)],
    "3 + 5": [slice(0, 3), slice(3, 8)],
    "single rows, from the last": [slice(i, i + 1) for i in reversed(range(ROWS))],
    "two ranks, each second row": [slice(0, ROWS, 2), slice(1, ROWS, 2)],
}


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_masks_are_bit_equal(backends, rate):
    from tf_backend.layers import keep_mask as tensorflow_mask
    from torch_backend.layers import keep_mask as torch_mask

    spec = ModelSpec(width=32, layers=2, heads=4, context=40)
    words = dropout_words(spec, 7, 123, np.array([0, 5, 2**31]), {"decoder": 40})["decoder"]
    pairs = [
        (words.residual_rows[1], words.residual_columns[1]),
        (words.attention_rows[0], words.attention_columns[0]),
    ]
    forms = [tensorflow_mask]
    forms += [tf.function(tensorflow_mask, jit_compile=xla) for xla in (False, True)]
    for rows, columns in pairs:
        expected = keep_mask(rows, columns, rate)
        assert abs(expected.mean() - (1 - rate)) < 0.03
        given = torch_mask(torch.from_numpy(rows), torch.from_numpy(columns), rate).numpy()
        assert np.array_equal(given != 0, expected)
        for form in forms:
            given = form(tf.constant(rows), tf.constant(columns), rate).numpy()
            assert np.array_equal(given, expected)


def curve(engine, spec, cut: list[slice]) -> list[float]:
    engine.load_state(EngineState(starting_weights(spec)))
    losses = []
    for step in range(4):
        for part in cut:
            engine.forward_backward(micro_batch(spec, part), step, 1.0)
        losses.append(engine.reduce_gradients().losses["lm"])
        engine.apply_gradients(1e-2, 1.0)
    return losses


def test_shared_dropout_gives_one_curve_however_the_batch_is_cut(make_pair):
    pair = make_pair("fp64", dropout=0.1, attention_dropout=0.1)
    whole = curve(pair.torch, pair.spec, [slice(0, ROWS)])
    assert whole[3] < whole[0]
    for name, engine in pair.engines.items():
        for cut in CUTS.values():
            losses = curve(engine, pair.spec, cut)
            apart = max(abs(a / b - 1) for a, b in zip(losses, whole, strict=True))
            # One element of one mask that differs changes the loss by more than 1e-8.
            within(f"loss of 4 steps in fp64, {name} cut to torch whole", apart, 1e-12)


def test_shared_masks_change_with_the_step_alone(make_pair):
    pair = make_pair(context=8)
    for name, engine in pair.fresh().items():
        losses = []
        for step in (0, 1, 0):
            engine.forward_backward(micro_batch(pair.spec), step, 1.0)
            losses.append(engine.reduce_gradients().losses["lm"])
        assert losses[0] == losses[2] != losses[1], name


# Native dropout


RATES = {"dropout": 0.2, "attention_dropout": 0.3}


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def native(request, make_pair):
    return make_pair(request.param, dropout_generator="native", **RATES)


def kept(trace, spec) -> dict[str, np.ndarray]:
    """For each site of dropout that a trace shows, which elements were kept."""
    masks = {"embeddings": trace["embeddings"] != 0}
    lower = np.tril(np.ones((spec.context, spec.context), dtype=bool))
    for index in range(spec.layers):
        site = f"decoder.{index}.attention.dropped"
        masks[site] = (trace[site] != 0)[:, :, lower]
    return masks


def test_native_dropout_drops_a_share_and_keeps_the_expected_value(native):
    spec, micro = native.spec, micro_batch(native.spec)
    for name, engine in native.fresh().items():
        trace = engine.trace(micro, 3)
        before = {"embeddings": (trace["embeddings.sum"], spec.dropout)}
        for index in range(spec.layers):
            at = f"decoder.{index}.attention"
            before[f"{at}.dropped"] = trace[f"{at}.probabilities"], spec.attention_dropout
        for site, (x, rate) in before.items():
            after, x = trace[site].astype(np.float64), x.astype(np.float64)
            scales = np.unique(np.round(after[x != 0] / x[x != 0], 4))
            assert np.allclose(scales, [0, 1 / (1 - rate)], rtol=1e-4), (name, site)
            z = (after - x).sum() / math.sqrt((x**2).sum() * rate / (1 - rate))
            assert abs(z) < 4, (name, site)
        for site, mask in kept(trace, spec).items():
            rate = before[site][1]
            z = (mask.sum() - (1 - rate) * mask.size) / math.sqrt(rate * (1 - rate) * mask.size)
            assert abs(z) < 4, (name, site)


def test_native_masks_differ_by_step_rows_layer_and_head(native):
    spec, rate = native.spec, native.spec.attention_dropout
    for name, engine in native.fresh().items():
        parts = [slice(0, 4), slice(4, 8)]
        traces = [engine.trace(micro_batch(spec, part), step) for step in (3, 4) for part in parts]
        masks = [mask for trace in traces for mask in list(kept(trace, spec).values())[1:]]
        masks += [np.flip(masks[0], axis) for axis in (0, 1)]  # other rows and heads
        for i, one in enumerate(masks):
            for two in masks[:i]:
                products = (one - (1 - rate)) * (two - (1 - rate))
                # A flipped mask has each product with its own origin twice.
                assert abs(products.sum()) < 6 * rate * (1 - rate) * math.sqrt(one.size), name


def test_the_gradient_of_native_dropout_has_the_mask_of_its_forward(make_pair):
    pair = make_pair("fp64", dropout_generator="native", **RATES)
    spec, micro, step = pair.spec, micro_batch(pair.spec), 1e-5
    weights = {key: w.astype(np.float64) for key, w in starting_weights(spec).items()}
    direction = {key: normals(SEED, f"to.{key}", w.shape, 1.0) for key, w in weights.items()}
    for name, engine in pair.engines.items():
        losses = []
        for side in (step, -step, 0):
            moved = {key: w + side * direction[key] for key, w in weights.items()}
            engine.load_state(EngineState(moved))
            engine.forward_backward(micro, 3, 1.0)
            losses.append(engine.reduce_gradients().losses["lm"])
        slope = sum((g * direction[key]).sum() for key, g in engine.gradients().items())
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-6), name


def test_native_dropout_repeats_in_a_resumed_run(native, backends):
    spec, half = native.spec, [slice(0, 4), slice(4, 8)]

    def train(engine, steps: range) -> list:
        rows = []
        for step in steps:
            for part in half:
                engine.forward_backward(micro_batch(spec, part), step, 1.0)
            rows.append((engine.reduce_gradients().losses["lm"], engine.gradients()))
            engine.apply_gradients(1e-2, 1.0)
        return rows

    for (name, engine), (backend, communicator) in zip(
        native.fresh().items(), backends, strict=True
    ):
        train(engine, range(2))
        state = engine.state()
        whole = train(engine, range(2, 4))
        resumed = backend.engine(spec, native.settings, communicator)
        resumed.load_state(state)
        resumed.evaluate(micro_batch(spec))  # draws nothing
        again = train(resumed, range(2, 4))
        for (loss, gradients), (same, others) in zip(whole, again, strict=True):
            assert loss == same, name
            assert all(np.array_equal(g, others[key]) for key, g in gradients.items()), name
        assert whole[0][0] != whole[1][0]
        if name == "tensorflow":
            assert engine._backward.experimental_get_tracing_count() == 1


def test_native_dropout_draws_by_the_cut(native):
    for name, engine in native.fresh().items():
        losses = [curve(engine, native.spec, cut)[0] for cut in ([slice(0, ROWS)], CUTS["4 + 4"])]
        assert abs(losses[0] - losses[1]) > 1e-5, name
