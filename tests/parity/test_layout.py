"""One global batch, cut in every way into ranks and micro-batches: the same loss, gradient and
update up to rounding, also where rows have very different numbers of targets.

One engine takes the micro-batches of all ranks, one after the other, which adds up what an
allreduce does. tests/ranks/test_sameness.py has the real one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from horovod_lm.backend import EngineSettings, EngineState, MicroBatch
from horovod_lm.data.batches import Batches
from horovod_lm.data.feeds import Feed
from horovod_lm.data.layout import Single
from horovod_lm.data.shards import Tokens, TokenWriter
from horovod_lm.objectives import Corpus, Targets
from horovod_lm.objectives.causal_lm import CausalLM
from horovod_lm.spec import ModelSpec
from tests.parity.compare import difference, differences, within
from tests.parity.conftest import starting_weights

SPEC = ModelSpec(vocabulary=61, context=16, width=16, layers=1, heads=2)
ROWS, STEP, SEED = 10, 1, 7
LARGEST_HALF = 65504.0  # of fp16
LENGTH = 13 * SPEC.context + 4  # 14 windows, the last one of 3 targets
LAYOUTS = [(ranks, micro) for ranks in (1, 2, 3, 4) for micro in (None, 2, 1)]
HALF_LAYOUTS = [(1, None), (1, 2), (3, 1), (4, None)]
# The losses are sums of the same products in another order; a half rounds a product where that sum
# differs in the last bit to its other neighbour.
LIMITS = {"fp32": (1e-6, 1e-5), "bf16": (2**-13, 2**-7), "fp16": (2**-16, 2**-10)}


class Uneven(CausalLM):
    """Window w has no more than 1 + 5 w mod 16 targets."""

    def counts(self, examples, epochs):
        lengths = np.minimum(1 + 5 * examples % 16, self.lengths[examples, 0])
        return {"lm": lengths}

    def example(self, number, epoch):
        example = super().example(number, epoch)
        (count,) = self.counts(np.array([number]), np.array([epoch]))["lm"]
        return replace(example, targets={"lm": Targets(example.targets["lm"].values[:count])})


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    with TokenWriter(folder, "train", SPEC.vocabulary, shard_tokens=100) as writer:
        text = np.random.default_rng(2).integers(0, SPEC.vocabulary, LENGTH).astype(np.int32)
        writer.write([(text, True)])
    return Tokens(folder, writer.finish())


@pytest.fixture(scope="module", params=LIMITS)
def engines(request, backends):
    # SGD's step is as long as the gradient, where AdamW would turn noise around 0 into steps.
    settings = EngineSettings(precision=request.param, seed=SEED, optimizer="sgd")
    return {backend.name: backend.engine(SPEC, settings, c) for backend, c in backends}


def micro_batches(tokens: Tokens, kind: type[CausalLM], ranks: int, micro: int | None) -> list:
    """Those of all ranks."""
    objective = kind(Corpus("corpus", tokens), SPEC.context)
    layout = Single(objective, (SPEC.context,))
    feed = Feed([objective], [layout], [1.0], seed=SEED, rows=ROWS)
    return [
        batch
        for rank in range(ranks)
        for batch in Batches([feed], micro_batch_size=micro, rank=rank, ranks=ranks)[STEP].micros
    ]


@dataclass
class Result:
    """What one step gave; `move` is how far it moved all weights, as one vector."""

    loss: float
    norm: float
    gradients: dict[str, np.ndarray]
    move: np.ndarray


def one_step(engine, micros: list[MicroBatch], scale: float) -> Result:
    start = starting_weights(SPEC)
    engine.load_state(EngineState(start))
    for micro in micros:
        engine.forward_backward(micro, STEP, scale)
    reduced = engine.reduce_gradients()
    assert reduced.finite
    gradients = engine.gradients()
    engine.apply_gradients(0.5, reduced.norm / 2)
    weights = engine.state().weights
    move = np.concatenate([(weights[name] - start[name]).ravel() for name in start])
    return Result(reduced.losses["lm"], reduced.norm, gradients, move)


@pytest.mark.parametrize("objective", [CausalLM, Uneven], ids=["windows", "uneven"])
def test_every_layout_gives_the_same_step(engines, tokens, objective):
    on_4_ranks = micro_batches(tokens, objective, 4, None)
    counts = [micro.losses[0].weights.sum() for micro in on_4_ranks]
    assert max(counts) > 1.2 * min(counts)  # a mean of the ranks' means would be another loss
    for name, engine in engines.items():
        precision = engine.settings.precision
        layouts = LAYOUTS if precision == "fp32" else HALF_LAYOUTS
        scale = 1024.0 if precision == "fp16" else 1.0
        whole, *others = (
            one_step(engine, micro_batches(tokens, objective, *layout), scale) for layout in layouts
        )
        near, limit = LIMITS[precision]
        title = f"{precision}, {name}, any layout to the whole batch"
        for other in others:
            within(f"{title}: loss", abs(other.loss / whole.loss - 1), near)
            within(f"{title}: norm", abs(other.norm / whole.norm - 1), limit)
            worst = max(differences(other.gradients, whole.gradients).values())
            within(f"{title}: a tensor's gradient", worst, limit)
            within(f"{title}: update", difference(other.move, whole.move), limit)


def of_many(micro: MicroBatch, targets: float) -> MicroBatch:
    """`micro` as a part of a global batch with so many targets."""
    (loss,) = micro.losses
    return replace(micro, losses=(replace(loss, normaliser=targets),))


@pytest.mark.parametrize("engines", ["bf16", "fp16"], indirect=True)
def test_neither_scale_nor_count_overflows(engines, tokens):
    """A scale of 2^24 over 2^22 targets is a factor of 4 on each target's loss: nothing else of
    them reaches a half. The sum of the losses, or the scale, would be inf in fp16."""
    (micro,) = micro_batches(tokens, Uneven, 1, None)
    scale, targets = 2.0**24, 2.0**22
    assert min(scale, targets) > LARGEST_HALF
    for name, engine in engines.items():
        plain = one_step(engine, [of_many(micro, 1.0)], scale / targets)
        many = one_step(engine, [of_many(micro, targets)], scale)
        assert many.loss == pytest.approx(plain.loss / targets, rel=1e-6), name
        for key, gradient in many.gradients.items():
            assert np.allclose(gradient * targets, plain.gradients[key], rtol=1e-6, atol=0), key


@pytest.mark.parametrize("engines", ["fp16"], indirect=True)
def test_the_sum_over_micro_batches_may_be_larger_than_a_half(engines, tokens):
    """Each part's scaled gradient fits into fp16, their sum only into the fp32 that it is kept and
    reduced in."""
    (micro,) = micro_batches(tokens, Uneven, 1, None)
    for name, engine in engines.items():
        once = one_step(engine, [micro], 1.0)
        largest = max(float(np.abs(gradient).max()) for gradient in once.gradients.values())
        scale = 2.0 ** np.floor(np.log2(40000 / largest))
        engine.load_state(EngineState(starting_weights(SPEC)))
        for _ in range(8):
            engine.forward_backward(micro, STEP, scale)
        assert engine.reduce_gradients().finite, name
        assert 8 * largest * scale > 2 * LARGEST_HALF
        gradients = {key: gradient / 8 for key, gradient in engine.gradients().items()}
        assert max(differences(gradients, once.gradients).values()) < LIMITS["fp16"][1], name
