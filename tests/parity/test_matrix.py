"""Every family of Transformers in both backends and in the fp64 reference: the same function, the
same gradients. See `tests.parity.matrix` for which, and tests/unit/test_matrix.py for whether the
list is complete.

In fp32 and fp64 each backend is held against the reference and the other one; in a half, one
against the other, with the tolerances of test_precision.py. TensorFlow runs without graphs here,
since tracing one model takes longer than everything else with it; some models run in graphs, too.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from horovod_lm.backend import EngineSettings, EngineState, MicroBatch
from horovod_lm.parity.run import moved_weights
from horovod_lm.randomness import dropout_words
from horovod_lm.spec import ModelSpec
from tests.parity.compare import difference, differences, within
from tests.parity.conftest import SEED
from tests.parity.matrix import (
    AXES,
    FORBIDDEN,
    covering,
    lengths_of,
    micro_batch_of,
    name_of,
    pairs_of,
    spec_of,
)
from tests.parity.reference import Reference
from tests.parity.test_precision import UNIT

CHOICES = covering(3)
STEP = 3
# Of logits and of gradients.
LIMITS = {"fp32": (1e-5, 1e-4), "fp64": (1e-12, 1e-11)}
HALF_LIMITS = {name: (4 * unit, 10 * unit) for name, unit in UNIT.items()}
LONG = {"context": 73, "relative_buckets": 16, "relative_distance": 40}


@contextmanager
def without_graphs():
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


@pytest.fixture(scope="module")
def compare(backends):
    """A function: compare both backends on one model and batch."""

    def run(spec: ModelSpec, micro: MicroBatch, precision: str, recompute: bool = False) -> None:
        names = tuple(loss.name for loss in micro.losses)
        chosen = EngineSettings(precision, seed=SEED, loss_names=names, recompute=recompute)
        weights = moved_weights(spec, SEED)
        engines = {b.name: b.engine(spec, chosen, communicator) for b, communicator in backends}
        for engine in engines.values():
            engine.load_state(EngineState(weights))
        Comparison(spec, micro, precision, weights, engines).check()

    return run


class Comparison:
    """Two engines of one model, with the same weights, on one batch."""

    def __init__(
        self,
        spec: ModelSpec,
        micro: MicroBatch,
        precision: str,
        weights: Mapping[str, np.ndarray],
        engines: Mapping[str, Any],
    ) -> None:
        self.spec, self.micro, self.precision, self.engines = spec, micro, precision, engines
        self.exact = precision in LIMITS
        self.reference = Reference(spec, weights)
        self.near, self.limit = (LIMITS | HALF_LIMITS)[precision]

    def check(self) -> None:
        self.check_outputs()
        self.check_gradients()
        self.check_trace()
        if self.exact and "decoder" in self.spec.stacks:
            self.check_decoding()

    def compare(self, what: str, given: Mapping[str, np.ndarray], exact: np.ndarray) -> None:
        """One tensor, of each backend and of the reference."""
        sides = {"tensorflow to torch": (given["tensorflow"], given["torch"])}
        if self.exact:
            sides |= {f"{name} to reference": (array, exact) for name, array in given.items()}
        for title, (one, two) in sides.items():
            assert one.shape == two.shape, (what, title)
            within(f"{self.precision}, {what}, {title}", difference(one, two), self.near)

    def check_outputs(self) -> None:
        inputs = self.micro.inputs
        for head in ("lm", *(task.name for task in self.spec.task_heads)):
            given = {name: e.logits(inputs, head) for name, e in self.engines.items()}
            self.compare("logits", given, self.reference.logits(inputs, head=head))
        hidden = {name: engine.hidden(inputs) for name, engine in self.engines.items()}
        expected = self.reference.hidden(inputs)
        for name, states in hidden.items():
            assert sorted(states) == sorted(expected), name
        for stack, array in expected.items():
            self.compare("hidden", {name: s[stack] for name, s in hidden.items()}, array)
        sums = [engine.evaluate(self.micro) for engine in self.engines.values()]
        for loss in self.micro.losses:
            one, two = (found[loss.name] for found in sums)
            assert one.weights == two.weights == pytest.approx(float(loss.weights.sum()))
            assert one.nll == pytest.approx(two.nll, rel=self.near)
            if self.exact:
                exact = self.reference.hits(inputs, loss)
                assert one.hits == two.hits == pytest.approx(exact, abs=1e-6), loss.name

    def check_gradients(self) -> None:
        micro, spec = self.micro, self.spec
        words = dropout_words(spec, SEED, STEP, micro.rows, lengths_of(spec))
        self.reference.loss(micro, words)
        gradients = {}
        for name, engine in self.engines.items():
            engine.forward_backward(micro, STEP, 1.0 if self.exact else 1024.0)
            reduced = engine.reduce_gradients()
            assert reduced.finite, (name, reduced.tensor)
            gradients[name] = engine.gradients()
            for loss, expected in self.reference.losses.items():
                assert reduced.losses[loss] == pytest.approx(expected, rel=self.near), (name, loss)
        exact = self.reference.gradients
        limits = dict.fromkeys(exact, self.limit)
        sides = {"tensorflow to torch": (gradients["tensorflow"], gradients["torch"])}
        if self.exact:
            sides |= {f"{name} to reference": (g, exact) for name, g in gradients.items()}
        else:
            # Where rounding alone costs both of them more than the limit, they may be as far from
            # each other as the better one is from what is exact.
            errors = [differences(given, exact) for given in gradients.values()]
            limits = {name: max(self.limit, min(e[name] for e in errors)) for name in exact}
        for title, (one, two) in sides.items():
            apart = differences(one, two)
            if not self.exact:
                apart = {name: v for name, v in apart.items() if not self.cancelled(name)}
            worst = max(apart, key=lambda name: apart[name] / limits[name])
            within(f"{self.precision}, a gradient, {title}", apart[worst], limits[worst])

    def cancelled(self, name: str) -> bool:
        """Whether softmax cancels it, so that its gradient is nothing but rounding: a key's bias,
        where keys are not turned."""
        turned = self.spec.positions == "rotary" and ".cross_attention." not in name
        return name.endswith("key.bias") and not turned

    def check_trace(self) -> None:
        one, two = (engine.trace(self.micro, STEP) for engine in self.engines.values())
        assert list(one) == list(two)
        for site, array in one.items():
            assert array.shape == two[site].shape, site
            if self.exact:
                apart = difference(two[site], array) if array.any() else np.abs(two[site]).max()
                assert apart <= self.near, (site, apart)

    def check_decoding(self) -> None:
        """The cache gives what the whole sequence gives, behind a prefix too."""
        kept = ("tokens", "source", "source_blocks", "prefix")
        inputs = {name: array for name, array in self.micro.inputs.items() if name in kept}
        prompt = {name: inputs[name][:, :4] for name in ("tokens", "prefix") if name in inputs}
        if "prefix" in inputs:
            inputs["prefix"] = np.pad(
                prompt["prefix"], ((0, 0), (0, inputs["tokens"].shape[1] - 4))
            )
        tokens = inputs["tokens"]
        whole = self.reference.logits(inputs)
        for name, engine in self.engines.items():
            title = f"{self.precision}, logits of decoding, {name} to reference"
            last, cache = engine.start(inputs | prompt)
            within(title, difference(last, whole[:, 3]), self.near)
            for position in range(4, 7):
                last, cache = engine.next(tokens[:, position], cache)
                within(title, difference(last, whole[:, position]), self.near)


@pytest.mark.parametrize("choice", CHOICES, ids=name_of)
def test_both_backends_compute_the_same(compare, choice):
    spec = spec_of(choice)
    with without_graphs():
        compare(spec, micro_batch_of(spec, choice), choice["precision"], choice["recompute"])


@pytest.mark.parametrize("choice", CHOICES[::9], ids=name_of)
def test_in_graphs_too(compare, choice):
    spec = spec_of(choice)
    compare(spec, micro_batch_of(spec, choice), choice["precision"], choice["recompute"])


COMPILED = [choice for choice in CHOICES if choice["precision"] == "fp32"][::6]


@pytest.mark.parametrize("choice", COMPILED, ids=name_of)
def test_compiled_by_xla_too(compare, choice, monkeypatch):
    monkeypatch.setattr("tf_backend.engine._compiles", lambda settings: True)
    spec = spec_of(choice)
    compare(spec, micro_batch_of(spec, choice), "fp32", choice["recompute"])


@pytest.mark.parametrize("generator", ["shared", "native"])
@pytest.mark.parametrize("kind", AXES["kind"])
def test_recomputing_changes_nothing(backends, kind, generator):
    """Bit for bit: the same operations on the same numbers."""
    choice = CHOICES[0] | {"kind": kind, "mask": "packed", "inputs": "segments", "dropout": 0.2}
    choice |= {"positions": "relative", "loss": "plain"}
    spec = spec_of(choice)
    micro = micro_batch_of(spec, choice)
    for backend, communicator in backends:
        gradients = []
        for recompute in (False, True):
            chosen = EngineSettings(seed=SEED, dropout_generator=generator, recompute=recompute)
            engine = backend.engine(spec, chosen, communicator)
            engine.load_state(EngineState(moved_weights(spec, SEED)))
            with without_graphs():
                engine.forward_backward(micro, STEP, 1.0)
                engine.reduce_gradients()
            gradients.append(engine.gradients())
        for name, gradient in gradients[0].items():
            assert np.array_equal(gradients[1][name], gradient), (backend.name, name)


@pytest.mark.parametrize("kind", AXES["kind"])
def test_recomputing_calls_each_block_twice(backends, kind):
    """The test above would pass, too, if nothing were recomputed."""
    choice = CHOICES[0] | {"kind": kind, "mask": "none", "inputs": "tokens", "dropout": 0.2}
    spec = spec_of(choice)
    micro = micro_batch_of(spec, choice)
    names = tuple(loss.name for loss in micro.losses)
    for (backend, communicator), recompute in itertools.product(backends, (False, True)):
        chosen = EngineSettings(seed=SEED, loss_names=names, recompute=recompute)
        engine = backend.engine(spec, chosen, communicator)
        engine.load_state(EngineState(moved_weights(spec, SEED)))
        calls: Counter[str] = Counter()
        for stack in spec.stacks:
            for index, block in enumerate(stack_of(engine, stack).blocks):
                count_activations(block.feed_forward, calls, f"{stack}.{index}")
        with without_graphs():
            engine.forward_backward(micro, STEP, 1.0)
        blocks = [f"{stack}.{index}" for stack, n in spec.stacks.items() for index in range(n)]
        assert calls == dict.fromkeys(blocks, 1 + recompute), (backend.name, recompute)


def stack_of(engine: Any, name: str) -> Any:
    """PyTorch's modules are attributes, Keras keeps a dictionary."""
    stacks = getattr(engine.model, "stacks", None)
    return getattr(engine.model, name) if stacks is None else stacks[name]


def count_activations(feed_forward: Any, calls: Counter[str], name: str) -> None:
    activation = feed_forward.activation

    def counted(x):
        calls[name] += 1
        return activation(x)

    feed_forward.activation = counted


LONGER = [choice | {"precision": "fp32"} for choice in CHOICES[4::8]]


@pytest.mark.parametrize("choice", LONGER, ids=name_of)
def test_longer_than_one_block_of_rows(compare, choice, monkeypatch):
    monkeypatch.setattr("tf_backend.layers.FREE_ROWS", 64)
    spec = spec_of(choice, **LONG)
    with without_graphs():
        compare(spec, micro_batch_of(spec, choice), "fp32", choice["recompute"])


choices = st.fixed_dictionaries({axis: st.sampled_from(v) for axis, v in AXES.items()}).filter(
    lambda choice: not any(frozenset(pair) in FORBIDDEN for pair in pairs_of(choice))
)
sizes = st.fixed_dictionaries(
    {
        "vocabulary": st.integers(5, 40),
        "context": st.integers(9, 20),
        "width": st.sampled_from([8, 16, 24, 40]),
        "layers": st.integers(1, 3),
        "feed_forward": st.integers(3, 40),
        "head_size": st.sampled_from([2, 4, 10]),
        "relative_buckets": st.sampled_from([4, 8, 12]),
        "norm_epsilon": st.sampled_from([1e-12, 1e-6, 1e-3]),
        "rotary_base": st.sampled_from([100.0, 500000.0]),
        "dropout": st.sampled_from([0.0, 0.1, 0.6]),
        "attention_dropout": st.sampled_from([0.0, 0.1, 0.6]),
    }
)


@given(choice=choices, sizes=sizes, seed=st.integers(0, 99))
@settings(max_examples=12, derandomize=True)
def test_models_by_chance(compare, choice, sizes, seed):
    spec = spec_of(choice, **sizes)
    with without_graphs():
        compare(spec, micro_batch_of(spec, choice, seed), "fp32", choice["recompute"])
