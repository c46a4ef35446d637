"""Decoding over an engine whose logits are known."""

import numpy as np
import pytest

from horovod_lm.config import make_config, to_toml
from horovod_lm.decode import generate
from horovod_lm.errors import UserError
from horovod_lm.restored import restore_to_generate
from tests.helpers import on_ranks
from tests.numpy_backend import NumpyEngine


@pytest.fixture
def engine():
    """After token t, token t + 1 (of 5) is likeliest, and t + 2 second."""
    engine = NumpyEngine(communicator=None, vocabulary=5)
    for token in range(5):
        engine.table[token, (token + 1) % 5] = 2.0
        engine.table[token, (token + 2) % 5] = 1.0
    return engine


def prompts(*rows):
    return np.array(rows, dtype=np.int32)


def test_greedy_takes_the_likeliest_token_of_each_row(engine):
    out = generate(engine, prompts([0, 1], [2, 4]), 4, context=16)
    assert out.dtype == np.int32
    assert out.tolist() == [[2, 3, 4, 0], [0, 1, 2, 3]]


def test_rows_stop_at_the_end_token_and_all_at_the_last_one(engine):
    out = generate(engine, prompts([0, 1], [2, 4]), 9, context=16, end=3)
    assert out.tolist() == [[2, 3, 3, 3], [0, 1, 2, 3]]


def test_rows_stop_at_any_of_several_ends_and_go_on_with_the_first(engine):
    out = generate(engine, prompts([0, 1], [2, 4]), 9, context=16, end=(3, 2))
    assert out.tolist() == [[2, 3, 3], [0, 1, 2]]


def test_the_context_is_filled_and_no_more(engine):
    assert generate(engine, prompts([0, 1, 2]), 50, context=8).shape == (1, 5)
    assert generate(engine, prompts([0] * 7), 50, context=8).shape == (1, 1)


@pytest.mark.parametrize("length", [0, 8, 9])
def test_a_prompt_that_is_empty_or_fills_the_context_is_refused(engine, length):
    with pytest.raises(UserError, match=f"has {length} tokens; allowed are 1 to 7"):
        generate(engine, np.zeros((1, length), np.int32), 1, context=8)


def test_a_source_longer_than_the_context_is_refused(engine):
    with pytest.raises(UserError, match="the prompt has 9 tokens, with the one that ends it"):
        generate(engine, prompts([0]), 1, context=8, source=np.zeros((1, 9), np.int32))
    assert generate(engine, prompts([0]), 1, context=8, source=np.zeros((1, 8), np.int32)).size


def test_the_engine_is_told_of_a_prefix(engine):
    seen = []
    engine.start = lambda inputs: (seen.append(inputs), NumpyEngine.start(engine, inputs))[1]
    for prefix in (False, True):
        generate(engine, prompts([0, 1], [2, 4]), 2, context=8, prefix=prefix)
    assert [sorted(inputs) for inputs in seen] == [["tokens"], ["prefix", "tokens"]]
    assert seen[1]["prefix"].tolist() == [[1, 1], [1, 1]]
    assert seen[1]["prefix"].dtype == np.int32


def test_an_encoder_alone_is_refused_before_any_work(tmp_path):
    config = make_config({"model": {"kind": "encoder"}}, "test")
    (tmp_path / "config.toml").write_text(to_toml(config))
    with pytest.raises(UserError, match='of kind "encoder", which has no decoder to generate'):
        restore_to_generate(tmp_path, None)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_from_the_softmax_of_logits_over_temperature(engine, temperature):
    drawn = generate(engine, prompts(*[[0]] * 20_000), 1, context=4, temperature=temperature)
    weights = np.exp(np.array([0, 2, 1, 0, 0]) / temperature)
    expected = weights / weights.sum()
    seen = np.bincount(drawn[:, 0], minlength=5) / drawn.size
    # 5 standard deviations of a share
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected / drawn.size)).all()


def test_draws_depend_on_the_seed_alone(engine):
    def draw(seed):
        return generate(
            engine, prompts([0], [0]), 10, context=16, temperature=1.0, seed=seed
        ).tolist()

    first = draw(1)
    assert draw(1) == first != draw(2)
    assert first[0] != first[1], "rows draw numbers of their own"


def test_a_temperature_near_zero_is_greedy(engine):
    greedy = generate(engine, prompts([0, 1]), 4, context=16)
    cold = generate(engine, prompts([0, 1]), 4, context=16, temperature=1e-4)
    assert cold.tolist() == greedy.tolist()


def test_ranks_draw_the_same(engine):
    def draw(communicator):
        return generate(engine, prompts([0]), 10, context=16, temperature=1.0).tolist()

    first, second = on_ranks(2, draw)
    assert first == second
