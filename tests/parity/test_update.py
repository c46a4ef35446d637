"""The same norms, clipping and state in both backends; test_optimizers.py has the updates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.parity.compare import difference
from tests.parity.conftest import micro_batch


@pytest.fixture(scope="module")
def pair(make_pair):
    return make_pair(context=8)


def give_gradient(engine, gradients) -> None:
    """Put `gradients`, by canonical name, where `forward_backward` would have added its own."""
    engine.forward_backward(micro_batch(engine.spec), 0, 1.0)
    engine.load_gradients(gradients)


def made_gradients(spec) -> dict[str, np.ndarray]:
    """Gradients whose sizes go from 1e-8 (epsilon) to 1e2, tensor by tensor."""
    generator = np.random.default_rng(3)
    sizes = np.geomspace(1e-8, 1e2, len(spec.parameters))
    return {
        p.name: (size * generator.normal(size=p.shape)).astype(np.float32)
        for p, size in zip(spec.parameters, sizes, strict=True)
    }


def test_clipping_scales_to_the_norm(pair):
    gradients = made_gradients(pair.spec)
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    for name, engine in pair.fresh().items():
        give_gradient(engine, gradients)
        reduced = engine.reduce_gradients()
        assert reduced.norm == pytest.approx(norm, rel=1e-6), name
        given = engine.gradients()
        assert all(np.array_equal(given[key], gradients[key]) for key in gradients), name
        engine.apply_gradients(1e-2, norm / 4)
        for key, first in engine.state().moments["first"].items():
            expected = 0.1 * gradients[key].astype(np.float64) / 4
            assert difference(first, expected) <= 1e-6, (name, key)


def test_the_norm_does_not_overflow_where_the_elements_do_not(pair):
    gradients = {key: g * np.float32(1e24) for key, g in made_gradients(pair.spec).items()}
    norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
    assert norm**2 > float(np.finfo(np.float32).max)
    for name, engine in pair.fresh().items():
        give_gradient(engine, gradients)
        reduced = engine.reduce_gradients()
        assert reduced.finite and reduced.tensor is None, name
        assert reduced.norm == pytest.approx(norm, rel=1e-6), name


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", ["decoder.1.attention.key.kernel", "decoder.norm.bias"])
def test_the_tensor_that_is_not_finite_is_named(pair, key, bad):
    for name, engine in pair.fresh().items():
        gradients = made_gradients(pair.spec)
        gradients[key].flat[3] = bad
        give_gradient(engine, gradients)
        reduced = engine.reduce_gradients()
        assert not reduced.finite and reduced.tensor == key, name
        assert not math.isfinite(reduced.norm), name


def test_a_rank_without_a_micro_batch_gives_zeros_and_its_status(pair):
    for name, engine in pair.fresh().items():
        engine.forward_backward(micro_batch(pair.spec), 0, 1.0)
        engine.reduce_gradients()
        reduced = engine.reduce_gradients(status=3)
        assert (reduced.losses, reduced.norm) == ({"lm": 0.0}, 0.0), name
        assert reduced.finite and reduced.status.tolist() == [3], name
        assert not any(g.any() for g in engine.gradients().values()), name


def test_state_goes_from_backend_to_backend_unchanged(pair):
    def train(engine):
        for step in range(2):
            engine.forward_backward(micro_batch(pair.spec), step, 1.0)
            engine.reduce_gradients()
            engine.apply_gradients(1e-2, 1.0)

    engines = pair.fresh()
    for first, second in (("torch", "tensorflow"), ("tensorflow", "torch")):
        train(engines[first])
        given = engines[first].state()
        engines[second].load_state(given)
        taken = engines[second].state()
        assert taken.updates == given.updates
        names = [p.name for p in pair.spec.parameters]
        for a, b in [(given.weights, taken.weights)] + [
            (given.moments[kind], taken.moments[kind]) for kind in ("first", "second")
        ]:
            assert list(a) == list(b) == names
            assert all(np.array_equal(a[name], b[name]) for name in names)
            assert all(a[name].dtype == b[name].dtype == np.float32 for name in names)
            assert any(a[name].any() for name in names)


def test_a_state_is_a_copy(pair):
    for name, engine in pair.fresh().items():
        state = engine.state()
        before = {key: array.copy() for key, array in state.weights.items()}
        engine.forward_backward(micro_batch(pair.spec), 0, 1.0)
        engine.reduce_gradients()
        engine.apply_gradients(1e-2, None)
        assert all(np.array_equal(before[key], state.weights[key]) for key in before), name
