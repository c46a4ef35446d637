"""Random numbers: the same bits everywhere, and of the right distribution (fixed keys)."""

import hashlib
import math
from statistics import NormalDist

import numpy as np
import pytest

from horovod_lm.randomness import (
    MULTIPLIER,
    DropoutWords,
    _normal_quantile,
    dropout_words,
    initial_weights,
    keep_mask,
    mix,
    normals,
    philox,
    threshold,
    uniforms,
    words,
)
from horovod_lm.spec import ModelSpec

SPEC = ModelSpec(
    vocabulary=300, context=64, width=128, layers=2, heads=4, dropout=0.1, attention_dropout=0.25
)
BOTH = ModelSpec(**{**SPEC.model_dump(), "kind": "encoder-decoder", "encoder_layers": 3})


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


# Bits that may never change: runs, checkpoints and comparisons rest on them


@pytest.mark.parametrize(
    ("seed", "name", "shape", "std", "digest"),
    [
        (
            1,
            "embeddings.tokens",
            (300, 8),
            0.02,
            "5ab6d1e9888599c7c33af80b01e860c128d69c240ab5838a24739a6fa001d899",
        ),
        (
            2**62 + 5,
            "decoder.3.feed_forward.down.kernel",
            (1024, 256),  # longer than one chunk
            0.02 / math.sqrt(8),
            "2f124e4c62c2416da3793b9ed0acda6111207e0796672ac3dbd2f5d11857aa68",
        ),
    ],
)
def test_golden_weights(seed, name, shape, std, digest):
    values = normals(seed, name, shape, std)
    assert (values.dtype, values.shape) == (np.float32, shape)
    assert sha256(values) == digest


def test_golden_dropout_words():
    drawn = decoder_words(SPEC, np.array([0, 5, 2**31]))
    assert {name: sha256(array) for name, array in arrays_of(drawn).items()} == GOLDEN_WORDS
    both = dropout_words(BOTH, 1, 7, np.array([0, 5, 2**31]), {"encoder": 12, "decoder": 16})
    assert {
        f"{stack} {name}": sha256(array)[:16]
        for stack, found in both.items()
        for name, array in arrays_of(found).items()
    } == GOLDEN_WORDS_OF_BOTH


def decoder_words(spec, rows, length=16) -> DropoutWords:
    return dropout_words(spec, 1, 7, rows, {"decoder": length})["decoder"]


def arrays_of(drawn: DropoutWords) -> dict[str, np.ndarray]:
    return {name: array for name, array in vars(drawn).items() if array is not None}


GOLDEN_WORDS = {
    "residual_rows": "7b1e54fc5923f6cc8e01628a2e2d33c0b808cbdf70055925143a13607ad62528",
    "residual_columns": "7857f29447f629744287cc10d6bc54df28d5dae9eeddafba8e736f2c8865c3a1",
    "attention_rows": "4aaf237c1b08ebf1b48ec66cc8a0b1d2e34834828ac726bca1cc192e2b289816",
    "attention_columns": "dffbb591bb4571dc4cfe6ed52ac573a68d3ab4e2e4fb2bd281cda576f09a271c",
}


GOLDEN_WORDS_OF_BOTH = {
    "encoder residual_rows": "172d350cdb5bd960",
    "encoder residual_columns": "2a32bdcb48461ea1",
    "encoder attention_rows": "f264eb75277b4d75",
    "encoder attention_columns": "6bede8725c07ca3d",
    "decoder residual_rows": "9e4d6693c6114d31",
    "decoder residual_columns": "559d7db01fed310c",
    "decoder attention_rows": "9d20458c9a5e9d64",
    "decoder attention_columns": "c18e935ea87aa89c",
    "decoder cross_rows": "d5e4dcd519f0d626",
    "decoder cross_columns": "328ee1dbe9c60e1f",
}


def test_golden_raw_integers():
    # The Philox integers that everything starts from, and the published splitmix64 stream of
    # seed 0 (its state grows by the golden ratio before each mix).
    assert philox(1, "a").random_raw(2).tolist() == GOLDEN_PHILOX
    golden = np.array([0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], dtype=np.uint64)
    assert [hex(x) for x in mix(golden)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


GOLDEN_PHILOX = [1963421079845360585, 6942990346078070183]


# Initial weights


def test_the_quantile_is_that_of_the_standard_library():
    exact = NormalDist().inv_cdf
    p = np.concatenate(
        [
            uniforms(philox(1, "x"), 20_000),
            2.0 ** -np.arange(2, 54),
            1 - 2.0 ** -np.arange(2, 54),
            np.linspace(0.0749, 0.0751, 501),  # where the middle branch begins
            np.exp(-np.linspace(24.9, 25.1, 501)),  # where the far tail begins
        ]
    )
    expected = np.array([exact(x) for x in p])
    error = np.abs(_normal_quantile(p) - expected) / np.where(expected == 0, 1, np.abs(expected))
    assert error.max() < 1e-15


def test_uniforms_lie_strictly_inside():
    class Raw:
        def random_raw(self, count):
            return np.array([0, 2**64 - 1], dtype=np.uint64)

    low, high = uniforms(Raw(), 2)
    assert 0 < low < 1e-15
    assert 1 - 1e-15 < high < 1
    assert np.isfinite(_normal_quantile(np.array([low, high]))).all()


def test_weights_are_normal():
    n, std = 400_000, 0.02
    x = normals(3, "some.kernel", (1000, 400), std).astype(np.float64).ravel() / std
    assert abs(x.mean()) * math.sqrt(n) < 3
    assert abs(x.std() - 1) * math.sqrt(2 * n) < 3
    assert abs((x**3).mean()) / math.sqrt(15 / n) < 3
    assert abs((x**4).mean() - 3) / math.sqrt(96 / n) < 3
    assert abs(np.corrcoef(x[1:], x[:-1])[0, 1]) * math.sqrt(n) < 3
    # Kolmogorov-Smirnov against the standard library's distribution function, on a share
    some = np.sort(x[:20_000])
    cdf = np.array([NormalDist().cdf(value) for value in some])
    steps = np.arange(some.size + 1) / some.size
    distance = max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())
    assert distance * math.sqrt(some.size) < 1.36  # 5% level


def test_a_weight_depends_on_seed_and_name_alone():
    wide = initial_weights(SPEC, 1)
    deep = initial_weights(ModelSpec(**{**SPEC.model_dump(), "vocabulary": 500, "tied": False}), 1)
    for name in wide:
        if name != "embeddings.tokens":
            assert np.array_equal(wide[name], deep[name]), name
    kernel = "decoder.0.attention.query.kernel"
    assert not np.array_equal(wide[kernel], initial_weights(SPEC, 2)[kernel])
    assert not np.array_equal(wide[kernel], wide["decoder.0.attention.value.kernel"])


def test_initial_weights_follow_the_table():
    weights = initial_weights(SPEC, 1)
    assert list(weights) == [p.name for p in SPEC.parameters]
    for p in SPEC.parameters:
        array = weights[p.name]
        assert (array.shape, array.dtype) == (p.shape, np.float32)
        if p.initialiser.kind == "normal":
            assert array.std() == pytest.approx(p.initialiser.std, rel=0.05)
        else:
            assert (array == (p.initialiser.kind == "ones")).all()


# Dropout: test_dropout_masks.py has the statistics


@pytest.mark.parametrize("cuts", [[4], [1, 2, 5], [3]])
def test_masks_do_not_depend_on_how_the_batch_is_cut(cuts):
    rows = np.arange(8)
    whole = decoder_words(SPEC, rows)
    parts = [decoder_words(SPEC, part) for part in np.split(rows, cuts)]
    for name in ("residual_rows", "attention_rows"):
        joined = np.concatenate([getattr(part, name) for part in parts], axis=1)
        assert np.array_equal(joined, getattr(whole, name))
    for name in ("residual_columns", "attention_columns"):
        for part in parts:
            assert np.array_equal(getattr(part, name), getattr(whole, name))


def test_masks_do_not_depend_on_the_length():
    long, short = (decoder_words(SPEC, np.arange(4), length) for length in (32, 20))
    assert np.array_equal(long.residual_rows[:, :, :20], short.residual_rows)
    assert np.array_equal(long.attention_rows[..., :20], short.attention_rows)
    assert np.array_equal(long.attention_columns[:, :20], short.attention_columns)


def test_shapes_and_absent_rates():
    drawn = decoder_words(SPEC, np.arange(3))
    assert {name: (array.shape, array.dtype) for name, array in arrays_of(drawn).items()} == {
        "residual_rows": ((5, 3, 16), np.int32),
        "residual_columns": ((5, 128), np.int32),
        "attention_rows": ((2, 3, 4, 16), np.int32),
        "attention_columns": ((2, 16), np.int32),
    }

    def without(**rates) -> DropoutWords:
        return decoder_words(ModelSpec(**{**SPEC.model_dump(), **rates}), np.arange(3))

    neither = SPEC.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})
    assert dropout_words(neither, 1, 7, np.arange(3), {"decoder": 16}) == {}
    assert without(dropout=0.0).residual_rows is None
    assert without(attention_dropout=0.0).attention_rows is None
    assert np.array_equal(without(dropout=0.0).attention_rows, drawn.attention_rows)


def test_both_stacks_of_an_encoder_decoder_have_words_of_their_own():
    drawn = dropout_words(BOTH, 1, 7, np.arange(3), {"encoder": 12, "decoder": 16})
    assert {
        stack: {name: array.shape for name, array in arrays_of(found).items()}
        for stack, found in drawn.items()
    } == {
        "encoder": {
            "residual_rows": (7, 3, 12),
            "residual_columns": (7, 128),
            "attention_rows": (3, 3, 4, 12),
            "attention_columns": (3, 12),
        },
        "decoder": {
            "residual_rows": (7, 3, 16),  # a third branch in each of two layers
            "residual_columns": (7, 128),
            "attention_rows": (2, 3, 4, 16),
            "attention_columns": (2, 16),
            "cross_rows": (2, 3, 4, 16),
            "cross_columns": (2, 12),
        },
    }
    every = [a.ravel() for found in drawn.values() for a in arrays_of(found).values()]
    every = np.concatenate(every)
    assert len(np.unique(every)) > 0.999 * every.size


def test_a_single_stack_has_the_same_words_whatever_it_is_called():
    encoder = ModelSpec(**{**SPEC.model_dump(), "kind": "encoder"})
    drawn = dropout_words(encoder, 1, 7, np.arange(3), {"encoder": 16})["encoder"]
    for name, array in arrays_of(decoder_words(SPEC, np.arange(3))).items():
        assert np.array_equal(getattr(drawn, name), array), name


def test_words_of_other_keys_differ():
    indices = np.arange(1000)
    keys = [(1, 2), (2, 1), (1, 2, 0), (1,), (0, 1, 2), (1 - 2**64, 2)]
    streams = [words(key, indices) for key in keys]
    assert np.array_equal(streams[0], streams[5])  # keys count modulo 2**64
    for i, one in enumerate(streams[:5]):
        assert len(np.unique(one)) > 990
        for two in streams[:i]:
            assert (one == two).sum() < 3


def test_thresholds_and_one_mask_by_hand():
    assert threshold(0.5) == 0
    assert threshold(0.25) == -(2**30)
    rows, columns = np.array([3, -7], np.int32), np.array([0, 12, -1], np.int32)
    for rate in (0.25, 0.5, 0.75):
        for i, r in enumerate(rows.tolist()):
            for j, c in enumerate(columns.tolist()):
                product = (r ^ c) * MULTIPLIER % 2**32
                signed = product - 2**32 if product >= 2**31 else product
                assert keep_mask(rows, columns, rate)[i, j] == (signed >= threshold(rate))
