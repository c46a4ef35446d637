"""Every optimizer in both backends against its formula, written here again in NumPy and fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from horovod_lm.backend import EngineSettings, EngineState
from horovod_lm.optimizers import KEYS, moment_shapes
from horovod_lm.spec import ModelSpec, Parameter
from tests.parity.compare import difference, within
from tests.parity.conftest import starting_weights

SPEC = ModelSpec(vocabulary=16, context=8, width=8, feed_forward=16, layers=1, heads=2)
SHAPES = {p.name: p.shape for p in SPEC.parameters}
DECAY, BETA1, BETA2, EPSILON, MOMENTUM = 0.1, 0.9, 0.99, 1e-8, 0.8
RATE = 1e-2
# The relative error of an update, and how much one rounding moves a number.
PRECISIONS = {"fp32": (1e-5, 2**-24), "fp64": (1e-12, 2**-53)}
ZERO_GRADIENT = "decoder.0.attention.value.kernel"  # a third of a fused kernel
ZERO_ROW = "decoder.0.feed_forward.up.kernel"
ZERO_WEIGHT = "decoder.0.attention.key.kernel"


def rms(x: np.ndarray) -> float:
    return math.sqrt((x**2).mean())


@dataclass
class Formula:
    """One parameter under one optimizer: `weight`, and `moments` by name."""

    name: str
    parameter: Parameter
    weight: np.ndarray
    moments: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        shapes = moment_shapes(self.name, {"it": self.parameter.shape})
        self.moments = {moment: np.zeros(table["it"]) for moment, table in shapes.items()}
        self.decay = DECAY if self.parameter.decay else 0.0

    def step(self, g: np.ndarray, t: int) -> None:
        self.weight = self.weight + getattr(self, self.name)(g, self.weight, t)

    def _adam_direction(self, g: np.ndarray, t: int) -> np.ndarray:
        m = self.moments["first"] = BETA1 * self.moments["first"] + (1 - BETA1) * g
        v = self.moments["second"] = BETA2 * self.moments["second"] + (1 - BETA2) * g**2
        return m / (1 - BETA1**t) / (np.sqrt(v / (1 - BETA2**t)) + EPSILON)

    def adamw(self, g: np.ndarray, w: np.ndarray, t: int) -> np.ndarray:
        return -RATE * (self._adam_direction(g, t) + self.decay * w)

    def adam(self, g: np.ndarray, w: np.ndarray, t: int) -> np.ndarray:
        return -RATE * self._adam_direction(g, t)

    def sgd(self, g: np.ndarray, w: np.ndarray, t: int) -> np.ndarray:
        m = self.moments["first"] = MOMENTUM * self.moments["first"] + g
        return -RATE * (m + self.decay * w)

    def lamb(self, g: np.ndarray, w: np.ndarray, t: int) -> np.ndarray:
        u = self._adam_direction(g, t) + self.decay * w
        ratio = 1.0
        if self.decay and w.any() and u.any():
            ratio = np.linalg.norm(w) / np.linalg.norm(u)
        return -RATE * ratio * u

    def adafactor(self, g: np.ndarray, w: np.ndarray, t: int) -> np.ndarray:
        keep, squares, moments = 1 - t**-0.8, g**2 + 1e-30, self.moments
        if g.ndim == 2:
            row = moments["row"] = keep * moments["row"] + (1 - keep) * squares.mean(1)
            column = moments["column"] = keep * moments["column"] + (1 - keep) * squares.mean(0)
            v = np.outer(row, column) / row.mean()
        else:
            v = moments["second"] = keep * moments["second"] + (1 - keep) * squares
        u = g / np.sqrt(v)
        return -RATE * (max(1e-3, rms(w)) * u / max(1.0, rms(u)) + self.decay * w)


class Both:
    """The engines of both backends with one optimizer."""

    def __init__(self, backends, optimizer: str, precision: str) -> None:
        settings = EngineSettings(
            precision=precision, optimizer=optimizer, beta1=BETA1, beta2=BETA2, epsilon=EPSILON,
            momentum=MOMENTUM, weight_decay=DECAY,
        )  # fmt: skip
        self.optimizer, self.precision = optimizer, precision
        self.limit, self.unit = PRECISIONS[precision]
        self.type = np.float64 if precision == "fp64" else np.float32
        self.engines = {b.name: b.engine(SPEC, settings, c) for b, c in backends}

    def begin(self, weights: dict[str, np.ndarray]) -> dict[str, Formula]:
        """Give the engines weights and no moments; the formulas with the same."""
        weights = {name: array.astype(self.type) for name, array in weights.items()}
        for engine in self.engines.values():
            engine.load_state(EngineState(weights))
        return {
            p.name: Formula(self.optimizer, p, weights[p.name].astype(np.float64))
            for p in SPEC.parameters
        }


@pytest.fixture(scope="module", params=[(o, p) for o in KEYS for p in PRECISIONS], ids="-".join)
def both(request, backends):
    return Both(backends, *request.param)


def gradients(kind: type) -> Iterator[dict[str, np.ndarray]]:
    """Endless: from 1e-12 to 1e6, tensor by tensor, around AdamW's epsilon; some are 0."""
    generator = np.random.default_rng(3)
    sizes = np.geomspace(1e-12, 1e6, len(SPEC.parameters))
    while True:
        made = {
            p.name: (size * generator.normal(size=p.shape)).astype(kind)
            for p, size in zip(SPEC.parameters, sizes, strict=True)
        }
        made[ZERO_GRADIENT][:] = 0
        made[ZERO_ROW][2] = 0
        yield made


def clipped(gradient: dict[str, np.ndarray], clip: float | None) -> dict[str, np.ndarray]:
    exact = {name: array.astype(np.float64) for name, array in gradient.items()}
    norm = math.sqrt(sum((array**2).sum() for array in exact.values()))
    factor = 1.0 if clip is None else min(1.0, clip / norm)
    return {name: factor * array for name, array in exact.items()}


def moved(a: np.ndarray, b: np.ndarray, start: np.ndarray, rounding: float, limit: float) -> float:
    """|a - b| / |b - start|, forgiving what the roundings of the weights themselves, `rounding`
    times |b|, may cost at `limit`."""
    scale = np.linalg.norm(b - start) + rounding * np.linalg.norm(b) / limit
    return float(np.linalg.norm(a.astype(np.float64) - b) / scale) if scale else float(np.any(a))


def compare(both: Both, formulas: dict[str, Formula], start: dict, updates: int, how: str) -> None:
    """Weights and moments of both engines to the formula, and their weights to each other's."""
    states = {name: engine.state() for name, engine in both.engines.items()}
    rounding = both.unit * updates
    for name, state in states.items():
        assert state.updates == updates
        assert {m: {n: a.shape for n, a in t.items()} for m, t in state.moments.items()} == (
            moment_shapes(both.optimizer, SHAPES)
        )
        for key, formula in formulas.items():
            weight = state.weights[key]
            assert weight.dtype == both.type
            apart = moved(weight, formula.weight, start[key], rounding, both.limit)
            for moment, exact in formula.moments.items():
                given = state.moments[moment][key]
                assert given.dtype == both.type
                if exact.any():
                    apart = max(apart, difference(given, exact))
                else:
                    assert not given.any(), (name, moment, key)
            within(f"{both.precision}, {how}, {both.optimizer} to its formula", apart, both.limit)
    for key in formulas:
        pair = [states[name].weights[key] for name in ("tensorflow", "torch")]
        apart = moved(pair[0], pair[1].astype(np.float64), start[key], rounding, both.limit)
        within(f"{both.precision}, {how}, tensorflow to torch", apart, both.limit)


@pytest.mark.parametrize(
    ("zero", "clip"), [(False, 1e5), (True, None)], ids=["from weights, clipped", "from zero"]
)
def test_1_and_100_updates_follow_the_formula(both, zero, clip):
    start = starting_weights(SPEC)
    start[ZERO_WEIGHT] = np.zeros_like(start[ZERO_WEIGHT])
    if zero:  # nothing to round away: an update of 1e-14 is seen in full
        start = {name: np.zeros_like(array) for name, array in start.items()}
    formulas = both.begin(start)
    source = gradients(both.type)
    for t in range(1, 101):
        gradient = next(source)
        for engine in both.engines.values():
            engine.load_gradients(gradient)
            engine.apply_gradients(RATE, clip)
        for name, exact in clipped(gradient, clip).items():
            formulas[name].step(exact, t)
        if t in (1, 100):
            compare(both, formulas, start, t, f"update {t}")


def test_moments_go_from_backend_to_backend(both):
    """Torch, TensorFlow, torch: the moments come over bit by bit, and updates go on from them."""
    start = starting_weights(SPEC)
    formulas = both.begin(start)
    source = gradients(both.type)
    state = None
    for t, name in enumerate(("torch", "torch", "tensorflow", "tensorflow", "torch", "torch"), 1):
        engine = both.engines[name]
        if state is not None:
            engine.load_state(state)
            again = engine.state()
            assert again.updates == state.updates == t - 1
            for moment, table in state.moments.items():
                for key, array in table.items():
                    assert np.array_equal(again.moments[moment][key], array), (moment, key)
        gradient = next(source)
        engine.load_gradients(gradient)
        engine.apply_gradients(RATE, None)
        for key, exact in clipped(gradient, None).items():
            formulas[key].step(exact, t)
        state = engine.state()
    both.engines["tensorflow"].load_state(state)
    compare(both, formulas, start, 6, "torch, TensorFlow, torch")


def test_a_state_without_moments_starts_them_at_zero(both):
    both.begin(starting_weights(SPEC))
    for engine in both.engines.values():
        engine.load_gradients(next(gradients(both.type)))
        engine.apply_gradients(RATE, None)
        state = engine.state()
        assert any(a.any() for table in state.moments.values() for a in table.values())
        engine.load_state(EngineState(state.weights))
        again = engine.state()
        assert again.updates == 0 and again.moments.keys() == state.moments.keys()
        assert not any(a.any() for table in again.moments.values() for a in table.values())


def test_moments_of_another_optimizer_are_refused(both):
    shapes = moment_shapes("sgd" if both.optimizer != "sgd" else "adamw", SHAPES)
    moments = {m: {n: np.zeros(s, both.type) for n, s in t.items()} for m, t in shapes.items()}
    for engine in both.engines.values():
        with pytest.raises(AssertionError):
            engine.load_state(EngineState(engine.state().weights, moments, 1))


def test_both_backends_have_every_optimizer():
    from tf_backend.optimizer import OPTIMIZERS as TENSORFLOW
    from torch_backend.optimizer import OPTIMIZERS as TORCH

    assert list(TORCH) == list(TENSORFLOW) == list(KEYS)
    assert [c.__name__ for c in TORCH.values()] == [c.__name__ for c in TENSORFLOW.values()]
