"""The slopes of the reference's own automatic differentiation, against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.parity import autograd as a

ROWS = np.array([[0, 2], [2, 1]])
KEEP = np.array([[True, False, True, True]])
OPERATIONS = {
    "add": (lambda x, y: x + y, (3, 4), (4,)),
    "add a number": (lambda x: 2.0 + x + np.ones(4), (3, 4)),
    "subtract": (lambda x, y: x - y, (3, 1), (3, 4)),
    "subtract from": (lambda x: np.ones((3, 4)) - x, (1, 4)),
    "multiply": (lambda x, y: x * y, (2, 3, 4), (3, 1)),
    "by itself": (lambda x: x * x, (3,)),
    "divide": (lambda x, y: x / (2.5 + y * y), (3, 4), (3, 4)),
    "power": (lambda x: (x * x + 1.0) ** -0.5, (3, 4)),
    "negate": (lambda x: -x, (3, 4)),
    "product": (lambda x, y: x @ y, (3, 4), (4, 2)),
    "product of many": (lambda x, y: x @ y, (2, 3, 5, 4), (3, 4, 2)),
    "product with one": (lambda x, y: x @ y, (2, 3, 5, 4), (4, 2)),
    "rows taken twice": (lambda x: x[ROWS], (3, 4)),
    "slice": (lambda x: x[:, 1:3], (3, 4)),
    "pairs": (lambda x: x[np.arange(2)[:, None], ROWS], (2, 3, 4)),
    "reshape": (lambda x: x.reshape(2, 6), (3, 4)),
    "swap": (lambda x: x.swapaxes(0, 2), (2, 3, 4)),
    "sum": (lambda x: x.sum(), (3, 4)),
    "sum of an axis": (lambda x: x.sum(1), (3, 4)),
    "mean": (lambda x: x.mean(-1), (3, 4)),
    "exp": (a.exp, (3, 4)),
    "log": (lambda x: a.log(x * x + 1.0), (3, 4)),
    "tanh": (a.tanh, (3, 4)),
    "erf": (a.erf, (3, 4)),
    "relu": (a.relu, (3, 4)),
    "where": (lambda x: a.where(KEEP, x, -7.0), (3, 4)),
    "concatenate": (lambda x, y: a.concatenate([x, y, x], -2), (2, 3, 4), (2, 1, 4)),
    "softmax": (a.softmax, (3, 4)),
    "logsumexp": (a.logsumexp, (3, 4)),
    "used twice": (lambda x: a.tanh(x) * x + x, (3, 4)),
}  # fmt: skip


def value(function, arrays, weights):
    """A weighted sum of what `function` gives, so that each element has a slope of its own."""
    tensors = [a.Tensor(array) for array in arrays]
    return (function(*tensors) * weights).sum(), tensors


@pytest.mark.parametrize("name", OPERATIONS)
def test_slopes_are_those_of_finite_differences(name):
    function, *shapes = OPERATIONS[name]
    generator = np.random.default_rng(3)
    arrays = [generator.normal(size=shape) for shape in shapes]
    weights = generator.normal(size=function(*map(a.Tensor, arrays)).shape)
    total, tensors = value(function, arrays, weights)
    total.backward()
    step = 1e-5
    for array, tensor in zip(arrays, tensors, strict=True):
        slopes = np.empty(array.shape)
        for place in np.ndindex(*array.shape):
            middle, ends = array[place], []
            for side in (step, -step):
                array[place] = middle + side
                ends.append(value(function, arrays, weights)[0].value)
            array[place] = middle
            slopes[place] = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(tensor.gradient, slopes, rtol=1e-7, atol=1e-8)


def test_values_are_numpys():
    x = np.random.default_rng(4).normal(size=(3, 4))
    given = a.Tensor(x)
    assert np.array_equal((given @ given.swapaxes(0, 1)).value, x @ x.T)
    assert np.allclose(a.softmax(given).value.sum(-1), 1)
    assert np.allclose(a.logsumexp(given).value, np.log(np.exp(x).sum(-1)))
    assert a.erf(a.Tensor(0.5)).value == math.erf(0.5)
    assert np.array_equal(a.relu(given).value, np.maximum(x, 0))
    # Far masks: all equal, so each has its share.
    assert np.array_equal(a.softmax(a.Tensor(np.full(4, -1e30))).value, np.full(4, 0.25))
    assert a.softmax(a.Tensor([-1e30, 3.0])).value.tolist() == [0, 1]


def test_a_tensor_that_takes_no_part_has_no_gradient():
    x, y = a.Tensor(np.ones(3)), a.Tensor(np.ones(3))
    (x * 2.0).sum().backward()
    assert y.gradient is None and x.gradient.tolist() == [2, 2, 2]
