"""The neutral part of parity: places and their order, figures, verdict; with engines in NumPy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from horovod_lm import backend
from horovod_lm.backend import Loss, MicroBatch, Reduced
from horovod_lm.config import make_config
from horovod_lm.errors import UserError
from horovod_lm.parity.measure import TOLERANCES, UNIT_ROUNDOFF, Squares
from horovod_lm.parity.places import backward_order, layer, within_layer, words
from horovod_lm.parity.result import Place, Result
from horovod_lm.parity.run import Comparison, batch, check, more_inputs, moved_weights
from horovod_lm.spec import ModelSpec
from tests.helpers import on_ranks
from tests.numpy_backend import TABLE, NumpyEngine

SPEC = ModelSpec(vocabulary=16, width=16, heads=1, layers=1, context=8)


# ---- places


@pytest.mark.parametrize(
    ("name", "expected", "of"),
    [
        ("embeddings.sum", "embeddings, sum of tokens and positions", "embeddings"),
        ("embeddings", "embeddings after dropout", "embeddings"),
        ("embeddings.norm", "embeddings, norm", "embeddings"),
        ("embeddings.tokens", "embeddings, tokens", "embeddings"),
        ("decoder.1.attention.scores", "block 2, attention scores", "block 2"),
        ("decoder.0.attention_norm", "block 1, attention norm", "block 1"),
        ("decoder.0.attention_norm.scale", "block 1, attention norm scale", "block 1"),
        ("decoder.10.feed_forward.up.kernel", "block 11, feed-forward up kernel", "block 11"),
        ("decoder.0.feed_forward_norm", "block 1, feed-forward norm", "block 1"),
        ("decoder.0.attention.mixed", "block 1, attention, values mixed by it", "block 1"),
        (
            "decoder.0.attention.dropped",
            "block 1, attention probabilities after dropout",
            "block 1",
        ),
        (
            "decoder.0.feed_forward.residual",
            "block 1, residual stream after feed-forward",
            "block 1",
        ),
        ("decoder.norm", "final norm", "final norm"),
        ("decoder.norm.bias", "final norm bias", "final norm"),
        ("encoder.2.attention.key", "encoder block 3, attention key", "encoder block 3"),
        (
            "decoder.0.cross_attention.key",
            "block 1, cross-attention key",
            "block 1",
        ),
        (
            "decoder.0.cross_attention.dropped",
            "block 1, cross-attention probabilities after dropout",
            "block 1",
        ),
        (
            "decoder.3.cross_attention.mixed",
            "block 4, cross-attention, values mixed by it",
            "block 4",
        ),
        (
            "encoder.0.feed_forward.residual",
            "encoder block 1, residual stream after feed-forward",
            "encoder block 1",
        ),
        ("encoder.norm.scale", "encoder final norm scale", "encoder final norm"),
        ("encoder.relative_bias", "encoder, relative bias", "encoder"),
        ("pooler.kernel", "pooler kernel", "pooler"),
        ("pooled", "pooler output", "pooler"),
        (
            "source_embeddings.sum",
            "source embeddings, sum of tokens and positions",
            "source embeddings",
        ),
        ("source_embeddings", "source embeddings after dropout", "source embeddings"),
        ("source_embeddings.norm", "source embeddings, norm", "source embeddings"),
        ("heads.lm.activation", "output layer activation", "output"),
        ("label.logits", "head label logits", "output"),
        ("heads.lm.kernel", "output layer kernel", "output"),
        ("heads.lm.transform.bias", "output layer transform bias", "output"),
        ("heads.label.kernel", "head label kernel", "output"),
        ("logits", "logits", "output"),
        ("loss", "loss", "output"),
        ("norm", "global norm of the gradient", "all"),
        ("something.of_mine", "something, of mine", "something"),
    ],
)
def test_places_in_words(name, expected, of):
    assert (words(name), layer(name)) == (expected, of)
    assert within_layer(name) in expected and within_layer(name)


def test_a_table_does_not_repeat_the_layer():
    assert within_layer("decoder.1.attention.scores") == "attention scores"
    assert within_layer("decoder.norm") == "final norm"
    assert within_layer("decoder.norm.bias") == "bias"


def test_a_backward_goes_from_the_output_to_the_embeddings():
    order = backward_order(ModelSpec(width=16, heads=2, layers=2, tied=False))
    assert order[:3] == ["heads.lm.kernel", "decoder.norm.bias", "decoder.norm.scale"]
    assert order[3:5] == ["decoder.1.feed_forward.down.bias", "decoder.1.feed_forward.down.kernel"]
    assert order[-2:] == ["embeddings.positions", "embeddings.tokens"]
    below = order.index("decoder.1.attention_norm.scale")
    assert order[below + 1] == "decoder.0.feed_forward.down.bias"


def test_a_backward_of_both_stacks_ends_with_the_encoder():
    spec = ModelSpec(
        kind="encoder-decoder", width=16, heads=2, layers=1, norm_placement="post",
        positions="relative", head_transform=True, gated=True,
    )  # fmt: skip
    order = backward_order(spec)
    assert sorted(order) == sorted(p.name for p in spec.parameters)
    assert order[:3] == [
        "heads.lm.norm.bias", "heads.lm.norm.scale", "heads.lm.transform.bias",
    ]  # fmt: skip
    blocks = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in order[4:]))
    assert blocks == [
        *("decoder.0.feed_forward_norm", "decoder.0.feed_forward"),
        *("decoder.0.cross_attention_norm", "decoder.0.cross_attention"),
        *("decoder.0.attention_norm", "decoder.0.attention", "decoder.relative_bias"),
        *("encoder.0.feed_forward_norm", "encoder.0.feed_forward"),
        *("encoder.0.attention_norm", "encoder.0.attention", "encoder.relative_bias"),
        *("embeddings.norm.bias", "embeddings.norm.scale", "embeddings.tokens"),
    ]


def test_with_post_norm_a_norm_follows_its_sublayer():
    spec = ModelSpec(width=16, heads=2, layers=2, norm_placement="post")
    order = backward_order(spec)
    assert sorted(order) == sorted(p.name for p in spec.parameters)
    assert order[0] == "decoder.1.feed_forward_norm.bias"
    assert order[2] == "decoder.1.feed_forward.down.bias"
    assert order.index("decoder.1.attention_norm.bias") < order.index(
        "decoder.1.attention.output.bias"
    )
    assert order[-3:] == ["embeddings.norm.scale", "embeddings.positions", "embeddings.tokens"]


# ---- figures


def test_tolerances_are_what_the_project_promises():
    assert TOLERANCES["fp32"].activation == 1e-5
    assert TOLERANCES["fp32"].gradient == 1e-4
    assert all(TOLERANCES[p].update == 1e-5 for p in ("fp32", "bf16", "fp16"))
    multiple = TOLERANCES["fp32"].activation / UNIT_ROUNDOFF["fp32"]
    assert TOLERANCES["fp64"].activation == pytest.approx(multiple * 2.0**-53)
    assert UNIT_ROUNDOFF["bf16"] == 2 * (2**-9) and UNIT_ROUNDOFF["fp16"] == 2**-11
    assert np.finfo(np.float16).eps / 2 == UNIT_ROUNDOFF["fp16"]


def test_differences_are_norms_over_the_norm_of_the_referee():
    squares = Squares()
    for scale in (1.0, 2.0):  # two micro-batches of one place
        one = scale * np.array([3.0, 4.0])
        squares.add([one + 0.1, one - 0.1, one, one + 0.01])
    norm = math.sqrt(25 + 100)
    assert squares.relative(squares.apart) == pytest.approx(0.2 * 2 / norm)
    assert squares.relative(squares.first) == pytest.approx(0.1 * 2 / norm)
    assert squares.relative(squares.second) == pytest.approx(0.1 * 2 / norm)
    assert squares.relative(squares.fp64) == pytest.approx(0.01 * 2 / norm)


def test_without_a_referee_the_first_is_the_reference():
    squares = Squares()
    squares.add([np.array([2.0]), np.array([3.0])])
    assert squares.relative(squares.apart) == 0.5
    assert squares.relative(squares.first) is squares.relative(squares.fp64) is None


@pytest.mark.parametrize(
    ("first", "second", "whole", "expected"),
    [
        ([0.0, 0.0], [0.0, 0.0], None, 0.0),
        ([0.0, 0.0], [1.0, 0.0], None, math.inf),
        ([1.0, 0.0], [1.0, 0.0, 0.0], None, math.inf),
        ([1e-9], [2e-9], 1.0, 1e-9),
        ([1e-9], [2e-9], 1e-4, 1.0),
    ],
)
def test_figures_at_the_edges(first, second, whole, expected):
    squares = Squares()
    squares.add([np.array(first), np.array(second)])
    assert squares.relative(squares.apart, whole) == pytest.approx(expected)


def test_what_is_not_finite_is_over():
    squares = Squares()
    squares.add([np.array([1.0]), np.array([math.nan])])
    place = Place("activation", "logits", squares.relative(squares.apart), 1e-5)
    assert place.share == math.inf
    assert place.as_json()["apart"] is None and place.as_json()["over"]


# ---- the verdict


def place(kind, name, apart, fp64=None, **more):
    to = None if fp64 is None else apart
    tolerance = getattr(TOLERANCES["fp32"], kind)
    exact = getattr(TOLERANCES["fp64"], kind)
    return Place(kind, name, apart, tolerance, first=to, second=to, fp64=fp64,
                 fp64_tolerance=exact, **more)  # fmt: skip


GOOD = [
    place("activation", "embeddings", 1e-7, 1e-16),
    place("gradient", "decoder.norm.bias", 5e-5, 1e-16),
    place("update", "decoder.norm.bias", 1e-8, 1e-16, quantity="the first update, weights"),
]


def test_the_same_is_said_with_the_nearest_place():
    result = Result(("torch", "mine"), "fp32", GOOD, "torch")
    assert result.same and result.first is None
    assert result.verdict[0] == (
        "The same: in fp32 all 3 compared places of mine are within tolerance of torch; nearest to "
        "it is the gradient of final norm bias, at 50% of what is allowed."
    )


def test_the_first_place_is_named_and_not_the_largest():
    bad = [
        place("activation", "decoder.1.attention.scores", 2e-4, 3e-4),
        place("activation", "logits", 0.5, 0.5),
    ]
    result = Result(("torch", "mine"), "fp32", [GOOD[0], *bad, *GOOD[1:]], "torch")
    assert not result.same
    assert result.verdict[0] == (
        "mine and torch differ. The first activation over its tolerance is block 2, attention "
        "scores: 2.0e-04, allowed 1.0e-05. 2 of 5 places are over."
    )
    assert "not a matter of rounding" in result.verdict[2]


def test_a_gradient_is_named_from_the_output_back():
    bad = place("gradient", "decoder.0.attention.key.kernel", 0.5, 1e-16)
    result = Result(("torch", "mine"), "fp32", [GOOD[0], GOOD[1], bad], "torch")
    assert result.verdict[0] == (
        "mine and torch differ. All activations agree. The first gradient over its tolerance, from "
        "the output back, is the gradient of block 1, attention key kernel: 5.0e-01, allowed "
        "1.0e-04. 1 of 3 places are over."
    )
    assert "its rounding is not" in result.verdict[2]


def test_the_very_first_gradient_points_to_the_loss():
    bad = place("gradient", "decoder.norm.bias", 0.5, 0.5)
    result = Result(("torch", "mine"), "fp32", [GOOD[0], bad], "torch")
    assert "It is the first of all, so look at the loss too" in result.verdict[0]


def test_what_rounding_hides_is_found_in_fp64():
    bad = place("update", "embeddings.tokens", 3e-8, 1e-9, quantity="the first update, weights")
    result = Result(("torch", "mine"), "fp32", [*GOOD, bad], "torch")
    assert result.first is bad and bad.hidden
    assert result.verdict[0] == (
        "mine and torch differ. All activations and gradients agree. The first update over its "
        "tolerance is the update of embeddings, tokens (the first update, weights): 1.0e-09 in "
        "fp64, allowed 1.9e-14; in fp32 rounding hides it (3.0e-08). 1 of 4 places are over."
    )


def test_who_is_further_from_the_referee():
    places = [
        Place("activation", "logits", 1e-7, 1e-5, first=2e-7, second=1e-7),
        Place("gradient", "embeddings.tokens", 1e-7, 1e-4, first=1e-7, second=3e-7),
    ]
    result = Result(("torch", "mine"), "fp32", places, "torch", left_out=("this", "that"))
    assert result.verdict[1:] == [
        "Further from the fp64 result of torch: torch in activations (2.0e-07, mine 1.0e-07), "
        "mine in gradients (3.0e-07, torch 1.0e-07).",
        "Not compared: this.",
        "Not compared: that.",
    ]


def test_json_holds_everything_and_no_nan():
    bad = place("gradient", "decoder.norm.bias", math.nan, math.inf)
    result = Result(("torch", "mine"), "fp32", [GOOD[0], bad], "torch", {"rows": 4}, ("that",))
    values = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert (values["schema"], values["same"], values["setting"]) == (1, False, {"rows": 4})
    assert values["first"]["words"] == "gradient of final norm bias"
    assert values["places"][1]["apart"] is None
    assert values["tolerances"] == {"activation": 1e-5, "gradient": 1e-4, "update": 1e-5}
    assert [p["over"] for p in values["places"]] == [False, True]


# ---- engines


class Traced(NumpyEngine):
    """With what parity asks for beyond training, and knobs to turn things wrong."""

    factor = 1.0  # on gradients
    shift = 0.0  # on logits in a trace
    largest = math.inf  # loss scale that does not overflow
    scales: list[float]

    def trace(self, micro, step):
        logits = self.logits(micro.inputs) + np.float32(self.shift)
        return {"logits": logits, "loss": np.array(logits.sum())}

    def forward_backward(self, micro, step, loss_scale):
        super().forward_backward(micro, step, loss_scale)
        self._gradient *= self.factor

    def reduce_gradients(self, status=0):
        scale = self._scale
        reduced = super().reduce_gradients(status)
        self.scales = [*getattr(self, "scales", []), scale]
        if scale > self.largest:
            return Reduced(reduced.losses, False, math.inf, reduced.status, TABLE)
        return reduced

    def load_gradients(self, gradients):
        self.reduced = gradients[TABLE].astype(np.float64)
        self._norm = float(np.sqrt((self.reduced**2).sum()))


class Plain(NumpyEngine):
    """A user's own, with neither."""


class Clips(Traced):
    def apply_gradients(self, learning_rate, clip):
        self._norm += 1e-6
        super().apply_gradients(learning_rate, clip)


@pytest.fixture
def micros():
    generator = np.random.default_rng(3)
    made = []
    for first in (0, 2):
        tokens = generator.integers(0, 16, (2, 9)).astype(np.int32)
        weights = np.ones((2, 8), np.float32)
        loss = Loss("lm", "lm", tokens[:, 1:], weights, 32.0)
        made.append(MicroBatch({"tokens": tokens[:, :-1]}, np.arange(first, first + 2), (loss,)))
    return made


@pytest.fixture
def compared(micros):
    """A function: engine classes (or makers) of both sides, and of both in fp64, to a Result."""

    def compare(*makers, precision="fp32", sets=None):
        config = make_config(sets or {}, "test").model_copy(update={"model": SPEC})
        (communicator,) = on_ranks(1, lambda c: c)
        engines = [make and make(communicator, SPEC.vocabulary) for make in makers]
        left_out: list[str] = []
        comparison = Comparison(config, ("one", "two"), engines, precision, left_out)
        places = comparison.run(micros, log=lambda text: None)
        found = Result(("one", "two"), precision, places, comparison.referee, {}, tuple(left_out))
        return found, comparison, engines

    return compare


def wrong(**values):
    def make(*arguments):
        engine = Traced(*arguments)
        for name, value in values.items():
            setattr(engine, name, value)
        return engine

    return make


def test_equal_engines_are_the_same(compared):
    result, comparison, _ = compared(Traced, Traced, Traced, Traced)
    assert result.same and result.left_out == () and comparison.referee == "one"
    kinds = [p.kind for p in result.places]
    assert kinds == sorted(kinds)  # activation, gradient, update
    names = [(p.kind, p.name, p.quantity) for p in result.places]
    assert names[:4] == [
        ("activation", "logits", ""),
        ("activation", "loss", ""),
        ("activation", "logits", "without dropout"),
        ("activation", "loss", "of the whole batch"),
    ]
    assert names[4:6] == [("gradient", TABLE, ""), ("gradient", "norm", "")]
    assert [quantity for _, _, quantity in names[6:]] == [
        "the first update, weights",
        "the second update, weights",
        "an update near epsilon, weights",
    ]


def test_an_activation_that_differs_comes_first(compared):
    result, *_ = compared(Traced, wrong(shift=0.5, factor=2.0), Traced, Traced)
    assert (result.first.kind, result.first.name) == ("activation", "logits")
    assert result.first.fp64 == 0


def test_gradients_that_differ_do_not_make_updates_differ(compared):
    result, *_ = compared(Traced, wrong(factor=1.5), Traced, wrong(factor=1.5))
    assert result.first.words == "gradient of embeddings, tokens"
    assert result.first.apart > 0.5
    assert all(p.share <= 1 for p in result.places if p.kind == "update")


def test_a_clipping_that_differs_by_little_is_seen(compared):
    result, *_ = compared(Traced, Clips, Traced, Clips)
    assert result.first.kind == "update" and result.first.name == TABLE
    near = [p for p in result.places if p.quantity == "an update near epsilon, weights"]
    assert near[0].share > result.first.share


def test_without_clipping_there_is_none(compared):
    result, *_ = compared(Traced, Clips, sets={"train": {"max_norm": 0}})
    assert result.same


def test_what_a_backend_lacks_is_left_out_and_said(compared):
    result, *_ = compared(Traced, Plain, Traced, None)
    assert result.same
    assert {(p.kind, p.quantity) for p in result.places} == {
        ("activation", "without dropout"),
        ("activation", "of the whole batch"),
        ("gradient", ""),
    }
    assert list(result.left_out) == [
        "activations: no Engine.trace in two",
        "updates: no Engine.load_gradients in two",
    ]


def test_sites_of_one_backend_alone_are_left_out(compared):
    class More(Traced):
        def trace(self, micro, step):
            return {"mine": np.zeros(1), **super().trace(micro, step)}

    for makers in ((Traced, More), (More, Traced)):
        result, *_ = compared(*makers)
        assert result.same and "logits" in {p.name for p in result.places}
        name = "one" if makers[0] is More else "two"
        assert result.left_out == (f"mine: {name} alone has it",)


@pytest.mark.parametrize(
    ("makers", "referee"),
    [
        ((Traced, Traced, None, Traced), "two"),
        ((Traced, Traced, None, None), None),
        ((Traced, Traced), None),
    ],
)
def test_a_referee_that_is_not_there(compared, makers, referee):
    result, comparison, _ = compared(*makers)
    assert result.same and comparison.referee == referee
    assert all((p.first is None) == (referee is None) for p in result.places)
    assert all(p.fp64 is None for p in result.places)


def test_the_loss_scale_backs_off_until_neither_overflows(compared):
    makers = Traced, wrong(largest=2.0**10), Traced, Traced
    _, comparison, engines = compared(*makers, precision="fp16")
    assert comparison.loss_scale == 2.0**10
    assert engines[0].scales == engines[1].scales == [2.0**n for n in range(16, 9, -1)]
    assert engines[2].scales == [1.0]


def test_a_gradient_that_never_is_finite_is_over(compared):
    result, comparison, _ = compared(Traced, wrong(largest=0.0), precision="fp16")
    assert comparison.loss_scale == 1.0
    assert not result.same and result.first.name == "norm"


# ---- the batch and the weights


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_the_batch_has_two_micro_batches_with_other_weights(rows):
    config = make_config({"model": {"context": 16, "width": 16, "heads": 2}}, "test")

    class Stream:
        def __len__(self):
            return 200

        def read(self, start, count):
            return np.arange(start, start + count, dtype=np.int32)

    class Prepared:
        train = Stream()
        tokenizer = None

    micros = batch(config, Prepared, rows)
    assert len(micros) == 2
    sums = [float(m.losses[0].weights.sum()) for m in micros]
    assert sums[0] != sums[1] and all(sums)
    assert all(m.losses[0].normaliser == sum(sums) for m in micros)
    assert {0.0, 0.5, 1.0} == set(np.unique(micros[0].losses[0].weights).tolist())
    assert [r for m in micros for r in m.rows.tolist()][:rows] == list(range(rows))
    again = batch(config, Prepared, rows)
    assert np.array_equal(again[1].losses[0].weights, micros[1].losses[0].weights)


def test_a_batch_has_what_each_kind_of_model_takes():
    tokens = np.arange(24, dtype=np.int32).reshape(3, 8)

    def more(**fields):
        found = dict(more_inputs(ModelSpec(width=16, heads=2, **fields), {"tokens": tokens}))
        assert np.array_equal(found.pop("tokens"), tokens)
        assert all(a.dtype == np.int32 and a.shape == (3, 8) for a in found.values())
        return {name: array[0].tolist() for name, array in found.items()}

    segments, padded = [0] * 4 + [1] * 4, [1] * 6 + [0] * 2
    assert more() == {}
    assert more(segments=1) == {"segments": [0] * 8}
    assert more(kind="encoder", segments=2) == {"blocks": padded, "segments": segments}
    assert more(kind="encoder-decoder") == {
        "source": [7, 6, 5, 4, 3, 2, 1, 0],
        "source_blocks": padded,
    }
    both = more(kind="encoder-decoder", segments=3)
    assert both["source_segments"] == both["segments"] == segments


def test_no_weight_is_where_it_started():
    spec = ModelSpec(vocabulary=64, width=16, heads=2, layers=1, key_bias=True)
    weights = moved_weights(spec, 1)
    assert list(weights) == [p.name for p in spec.parameters]
    for name, array in weights.items():
        assert array.dtype == np.float32
        assert abs(array).min() > 0 and array.std() > 0.05, name
    down = weights["decoder.0.feed_forward.down.kernel"]
    assert down.std() == pytest.approx(64**-0.5, rel=0.2)
    assert weights["embeddings.tokens"].std() == pytest.approx(0.25, rel=0.2)


# ---- mistakes


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["torch"], '--backends "torch" does not name two different backends'),
        (["torch", "torch"], "does not name two different backends"),
        (["torch", "tensorflow", "torch"], "does not name two different backends"),
        (["torch", "tensorflwo"], '"tensorflwo" is not a backend; installed are: tensorflow'),
    ],
)
def test_backends_that_are_not_two(names, said):
    with pytest.raises(UserError, match=said):
        check(names)


def test_a_framework_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None if name == "tensorflow" else name)
    monkeypatch.setattr(backend, "require_horovod", lambda name: None)
    with pytest.raises(UserError, match=r"needs tensorflow, which is missing; pip install"):
        check(["torch", "tensorflow"])


def test_several_ranks_are_refused(monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: name)
    monkeypatch.setattr(backend, "require_horovod", lambda name: None)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started on 2; start it without mpirun"):
        check(["torch", "tensorflow"])
