"""The masks of both backends are those of horovod_lm.randomness, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import torch

from horovod_lm.randomness import dropout_words, keep_mask
from horovod_lm.spec import ModelSpec
from tests.parity.conftest import micro_batch


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_masks_are_bit_equal(backends, rate):
    from tf_backend.layers import keep_mask as tensorflow_mask
    from torch_backend.layers import keep_mask as torch_mask

    spec = ModelSpec(width=32, layers=2, heads=4, context=40)
    words = dropout_words(spec, 7, 123, np.array([0, 5, 2**31]), 40)
    pairs = [
        (words.residual_rows[1], words.residual_columns[1]),
        (words.attention_rows[0], words.attention_columns[0]),
    ]
    traced = tf.function(tensorflow_mask)
    for rows, columns in pairs:
        expected = keep_mask(rows, columns, rate)
        assert abs(expected.mean() - (1 - rate)) < 0.03
        given = torch_mask(torch.from_numpy(rows), torch.from_numpy(columns), rate).numpy()
        assert np.array_equal(given, expected)
        for function in (tensorflow_mask, traced):
            given = function(tf.constant(rows), tf.constant(columns), rate).numpy()
            assert np.array_equal(given, expected)


def test_masks_change_with_the_step_alone(make_pair):
    pair = make_pair(context=8)
    for name, engine in pair.fresh().items():
        losses = []
        for step in (0, 1, 0):
            engine.forward_backward(micro_batch(pair.spec), step, 1.0)
            losses.append(engine.reduce_gradients().losses["lm"])
        assert losses[0] == losses[2] != losses[1], name
