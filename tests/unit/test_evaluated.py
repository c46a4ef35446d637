"""What is said of an evaluation: each loss, what it means, and how often the target was first."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from horovod_lm import checkpoint, environment
from horovod_lm.cli.evaluate import lines
from horovod_lm.config import make_config, to_toml
from horovod_lm.console import TrainingConsole
from horovod_lm.errors import UserError
from horovod_lm.hooks import evaluated
from horovod_lm.objectives import LossKind
from horovod_lm.randomness import initial_weights
from horovod_lm.restored import restore
from horovod_lm.run_folder import plain
from horovod_lm.tensorboard_log import TensorBoardLog

MASKED = LossKind("masked_lm", sparse=True)
NEXT = LossKind("next_sentence", "next_sentence", "sequence")
# Sums of nll, of weights, and of the weights of targets that have the largest logit.
TOKENS, SEQUENCES = [40.0, 20.0, 5.0], [4.0, 8.0, 6.0]


def row(kinds, sums, factors=None):
    found = evaluated(kinds, np.array(sums), factors or {})
    return {"kind": "evaluation", "step": 7, **plain(found), "seconds": 1.0, "time": 1.7e9}


def said(made, capsys):
    with TrainingConsole(10, 0, 1) as console:
        console(made)
    return capsys.readouterr().out


def tags(made, folder):
    board = TensorBoardLog(folder)
    board(made)
    board.close()
    events = EventAccumulator(str(folder)).Reload()
    return {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}


def test_several_losses_have_figures_of_their_own(capsys, tmp_path):
    made = row([MASKED, NEXT], [TOKENS, SEQUENCES], {"masked_lm": 0.5, "next_sentence": 2.0})
    assert made["losses"] == {"masked_lm": 2.0, "next_sentence": 0.5}
    assert made["loss"] == 0.5 * 2 + 2 * 0.5
    assert made["accuracies"] == {"masked_lm": 0.25, "next_sentence": 0.75}
    # A choice of two has no perplexity.
    assert made["perplexities"] == {"masked_lm": pytest.approx(math.exp(2))}
    assert made["perplexity"] is None
    assert (made["targets"], made["tokens"]) == ({"masked_lm": 20, "next_sentence": 8}, 28)
    assert said(made, capsys) == (
        "step 7: validation loss 2.0000 nats (masked_lm 2.0000, perplexity 7.4, accuracy 25.0%; "
        "next_sentence 0.5000, accuracy 75.0%)\n"
    )
    assert lines(made) == [
        "step 7: validation loss 2.0000 nats",
        "  masked_lm: 2.0000 nats per token, perplexity 7.39, accuracy 25.0%, over 20 tokens",
        "  next_sentence: 0.5000 nats per sequence, accuracy 75.0%, over 8 sequences",
    ]
    assert tags(made, tmp_path) == {
        "validation/loss": 2.0,
        "validation/loss/masked_lm": 2.0,
        "validation/loss/next_sentence": 0.5,
        "validation/accuracy/masked_lm": 0.25,
        "validation/accuracy/next_sentence": 0.75,
        "validation/perplexity/masked_lm": pytest.approx(math.exp(2)),
    }


def test_one_loss_over_tokens(capsys, tmp_path):
    made = row([LossKind("lm")], [TOKENS], {"lm": 0.5})
    # The factor is of the training's sum: perplexity is the loss's own.
    assert (made["loss"], made["perplexity"]) == (1.0, pytest.approx(math.exp(2)))
    text = "step 7: validation loss 2.0000 nats per token, perplexity 7.4, accuracy 25.0%\n"
    assert said(made, capsys) == text
    (line,) = lines(made)
    assert line.endswith("2.0000 nats per token, perplexity 7.39, accuracy 25.0%, over 20 tokens")
    assert sorted(tags(made, tmp_path)) == [
        "validation/accuracy", "validation/loss", "validation/perplexity",
    ]  # fmt: skip


def test_one_loss_over_sequences_is_none_of_tokens(capsys, tmp_path):
    made = row([NEXT], [SEQUENCES])
    text = "step 7: validation loss 0.5000 nats per sequence, accuracy 75.0%\n"
    assert said(made, capsys) == text
    (line,) = lines(made)
    assert line.endswith("0.5000 nats per sequence, accuracy 75.0%, over 8 sequences")
    assert sorted(tags(made, tmp_path)) == ["validation/accuracy", "validation/loss"]


def test_a_loss_without_a_target_does_not_hide_the_others(capsys):
    made = row([MASKED, NEXT], [[0.0, 0.0, 0.0], SEQUENCES])
    assert made["loss"] is None
    assert said(made, capsys) == (
        "step 7: validation loss (masked_lm nan; next_sentence 0.5000, accuracy 75.0%)\n"
    )
    assert said(row([MASKED], [[0.0, 0.0, 0.0]]), capsys) == ""


def test_what_had_no_target_and_what_is_too_large_is_null_in_json():
    made = row([MASKED, NEXT], [[0.0, 0.0, 0.0], [9000.0, 8.0, 0.0]])
    assert made["losses"] == {"masked_lm": None, "next_sentence": 1125.0}
    assert made["accuracies"] == {"masked_lm": None, "next_sentence": 0.0}
    made = row([LossKind("lm")], [[9000.0, 8.0, 0.0]])
    assert made["perplexities"] == {"lm": None}
    json.dumps(made, allow_nan=False)


@pytest.mark.parametrize(
    ("tokenizer", "damaged", "mend"),
    [
        ("bpe", "run/tokenizer.json", ", or delete it, and it is made of its text"),
        ("given.json", "run/tokenizer.json", ", or delete it, and it is taken from {}/given.json"),
        ("given.json", "given.json", ""),
        ("given.json", "run/imported/tokenizer.json", ""),
    ],
)
def test_the_mend_for_a_damaged_tokenizer_is_one(tokenizer, damaged, mend, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "apply", lambda config: 1)
    given = tokenizer if tokenizer == "bpe" else str(tmp_path / tokenizer)
    values = {"model": {"width": 8, "layers": 1, "heads": 2}, "data": {"tokenizer": given}}
    config, run = make_config(values, "test"), tmp_path / "run"
    engine = checkpoint.EngineState(initial_weights(config.model, 1))
    checkpoint.save(run / "checkpoints", checkpoint.RunState(1, 1, {}, engine), config, keep=1)
    (run / "config.toml").write_text(to_toml(config))
    (run / "imported").mkdir()
    (tmp_path / damaged).write_text("{")
    with pytest.raises(UserError) as caught:
        restore(run, None, data=False)
    assert f"the tokenizer {tmp_path / damaged} can't be read" in str(caught.value)
    put = "put there the one that the run was trained with" + mend.format(tmp_path)
    assert str(caught.value).endswith(put)
