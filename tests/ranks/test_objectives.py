"""Every pre-training objective on real engines and ranks: both frameworks follow the same curve, on
any number of ranks, for every way in which text fills rows, alone and several in one run.

The jobs run all trainings of a backend and a number of ranks, one after the other.
"""

from __future__ import annotations

import json
import random
import sys

import numpy as np
import pytest

from horovod_lm.config import load_config
from horovod_lm.objectives.registry import factors
from tests.parity.compare import within
from tests.ranks.jobs import BACKENDS, needs_horovod, rows, run_job, run_plan

pytestmark = needs_horovod

STEPS = 30
CONFIG = f"""
[model]
width = 32
layers = 1
heads = 2
feed_forward = 64
context = 32
dropout = 0.1
attention_dropout = 0.1
[data]
vocabulary = 400
special = ["padding", "mask", "classify", "separate", "begin"]
sentinels = 20
[train]
steps = {STEPS}
global_batch_size = 8
[optimizer]
learning_rate = 4e-3
[schedule]
warmup = 5
[evaluation]
every = 15
windows = 16
[checkpoint]
every = 10
keep = 5
[output]
tensorboard = false
[launch]
threads = 1
"""

BERT = ["model.kind=encoder", "model.segments=2", "model.pooler=true", "model.norm_placement=post"]
T5 = [
    "model.kind=encoder-decoder", "model.positions=relative", "model.norm=rms_norm",
    "model.bias=false", "model.activation=relu",
]  # fmt: skip
TEXT = ['data.text=["text.txt"]']
PARALLEL = ['data.text=["text.txt"]', 'data.target=["reversed.txt"]', "data.documents=line"]


def objectives(*tables):
    """The override of `[[objective]]` tables."""
    inner = ", ".join(
        "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"
        for table in tables
    )
    return f"objective=[{inner}]"


MLM, NSP = {"name": "masked_lm"}, {"name": "next_sentence"}
TRAININGS = {
    "gpt2": [objectives({"name": "causal_lm", "z_loss": 1e-4}), "batching.kind=packed"],
    "prefix": [objectives({"name": "prefix_lm"})],
    "bert": [
        *BERT, "data.tokenizer=wordpiece", "data.special=[]", "data.sentinels=0",
        objectives({**MLM, "on": "next_sentence"}, {**NSP, "schedule": [[0, 1.0], [20, 0.2]]}),
    ],
    # In fp64, so that rounding hides nothing.
    "bert-fp64": [
        *BERT, "train.precision=fp64", objectives({**MLM, "on": "next_sentence"}, NSP),
    ],
    "order": [*BERT, objectives({"name": "sentence_order"}), "batching.kind=buckets"],
    "roberta": [
        *BERT, "model.segments=1", "batching.kind=packed",
        objectives({**MLM, "whole_words": True, "smoothing": 0.1}),
    ],
    "t5": [*T5, "data.tokenizer=unigram", objectives({"name": "span_corruption"})],
    "t5-packed": [*T5, objectives({"name": "span_corruption"}), "batching.kind=packed"],
    "bart": [*T5, objectives({"name": "denoising"}), "batching.kind=buckets"],
    "translation": [*T5, *PARALLEL, objectives({"name": "sequence_to_sequence"})],
    "translation-packed": [
        *T5, *PARALLEL, objectives({"name": "sequence_to_sequence"}), "batching.kind=packed",
    ],
    # Rows of two objectives in one batch, and of two corpora with weights and a temperature.
    "mixture": [
        'data.sources=[{name = "a", text = ["text.txt"], weight = 2.0}, '
        '{name = "b", text = ["reversed.txt"]}]',
        "data.temperature=2.0",
        objectives(
            {"name": "causal_lm", "source": ["a", "b"], "share": 2.0},
            {"name": "prefix_lm", "source": ["b"], "weight": 0.5},
        ),
    ],
}  # fmt: skip
# Before the weight of BERT's sentences is at its end.
STOP = [{"kind": "terminate", "rank": 1, "steps": [9]}]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    source = random.Random(1)
    names = ["ship", "river", "house", "bridge", "garden", "winter", "letter", "market"]
    verbs = ["stands by", "leads to", "waits for", "looks like", "comes before"]
    lines = []
    for _ in range(300):
        sentences = []
        for _ in range(source.randint(2, 7)):
            one, other = source.sample(names, 2)
            sentences.append(f"The {one} {source.choice(verbs)} the {other}.")
        lines.append(" ".join(sentences))
    (folder / "text.txt").write_text("\n\n".join(lines))
    backwards = (" ".join(reversed(line.split())) for line in lines)
    (folder / "reversed.txt").write_text("\n\n".join(backwards))
    (folder / "objectives.toml").write_text(CONFIG)
    return folder / "objectives.toml"


@pytest.fixture(scope="module")
def done(config):
    """The folder of the job of a backend on a number of ranks, run when first asked for."""
    folders = {}

    def job(backend, ranks):
        if (backend, ranks) not in folders:
            folder = folders[backend, ranks] = config.parent / f"{backend}-{ranks}"
            plan = [{"name": name, "set": settings(name)} for name in TRAININGS]
            if ranks == 2:
                resumed = {"name": "resumed", "set": settings("bert")}
                plan += [{**resumed, "faults": STOP}, {**resumed, "resume": True}]
            given = run_plan(folder, config, plan, backend, ranks, limit=400.0)
            for entry, answers in zip(plan, given, strict=True):
                kinds = [answer["error"] and answer["kind"] for answer in answers]
                assert kinds == ["Stopped" if "faults" in entry else None] * ranks, answers
        return folders[backend, ranks]

    return job


def settings(training):
    """The overrides of a training, its text among them."""
    changes = TRAININGS[training]
    has_text = any(change.startswith(("data.text", "data.sources")) for change in changes)
    return changes if has_text else [*TEXT, *changes]


def curves(run):
    """By name, the loss of each step, and their weighted sum; a NaN where no row had a target."""
    found = rows(run)
    parts = {
        name: np.array([row["losses"][name] for row in found], dtype=np.float64)
        for name in found[0]["losses"]
    }
    return {"the sum": np.array([row["loss"] for row in found], dtype=np.float64), **parts}


@pytest.mark.parametrize("training", TRAININGS)
def test_frameworks_and_numbers_of_ranks_follow_the_same_curves(training, done):
    expected = curves(done("torch", 1) / training)
    for backend, ranks in (("torch", 2), ("tensorflow", 2)):
        run = done(backend, ranks) / training
        found = curves(run)
        assert list(found) == list(expected)
        limit = 1e-13 if training == "bert-fp64" else 2e-5
        for name, curve in found.items():
            assert len(curve) == STEPS
            assert np.array_equal(np.isnan(curve), np.isnan(expected[name])), name
            apart = float(np.nanmax(np.abs(curve - expected[name])))
            within(f"{training}, {name}, {backend} on {ranks} ranks to torch on 1", apart, limit)
        for key in ("tokens", "efficiency"):
            alone = [row[key] for row in rows(done("torch", 1) / training)]
            assert [row[key] for row in rows(run)] == alone, key
        ends = [rows(one, "evaluation")[-1] for one in (run, done("torch", 1) / training)]
        assert np.isfinite(ends[0]["loss"])
        assert ends[0]["losses"] == pytest.approx(ends[1]["losses"], abs=limit)
        for name, hits in ends[0]["accuracies"].items():
            # One target may fall to the other side where two logits are next to equal.
            assert hits == pytest.approx(
                ends[1]["accuracies"][name], abs=1.01 / ends[1]["targets"][name]
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_loss_over_tokens_falls(backend, done):
    for training in TRAININGS:
        for name, curve in curves(done(backend, 2) / training).items():
            if name not in ("the sum", "next_sentence", "sentence_order"):
                assert np.nanmean(curve[-5:]) < np.nanmean(curve[:5]) - 0.3, (training, name)


def test_the_loss_is_the_sum_of_the_losses_by_their_weights_at_each_step(config, done):
    for training in ("bert", "mixture"):
        made = load_config(config, settings(training))
        for backend, ranks in (("torch", 1), ("torch", 2), ("tensorflow", 2)):
            for row in rows(done(backend, ranks) / training):
                weights = factors(made, row["step"] - 1)
                parts = [weights[name] * loss for name, loss in row["losses"].items()]
                assert row["loss"] == pytest.approx(sum(parts), abs=1e-6), (training, row["step"])
    # By hand: the weight of BERT's sentences falls from 1 to 0.2 within 20 steps.
    for row in rows(done("torch", 1) / "bert"):
        weight = 1 - 0.04 * min(row["step"] - 1, 20)
        assert row["loss"] == pytest.approx(
            row["losses"]["masked_lm"] + weight * row["losses"]["next_sentence"], abs=1e-6
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_goes_on_with_the_weights_of_its_step(backend, done):
    """It stopped while the weight of a loss was falling."""
    whole, resumed = (done(backend, 2) / name for name in ("bert", "resumed"))
    steps = [row["step"] for row in rows(resumed)]
    assert steps == list(range(1, STEPS + 1))
    for key in ("loss", "losses", "norm", "tokens"):
        assert [row[key] for row in rows(resumed)] == [row[key] for row in rows(whole)], key
    ends = [rows(run, "evaluation")[-1] for run in (resumed, whole)]
    assert ends[0]["losses"] == ends[1]["losses"]
    assert "resuming from" in (done(backend, 2) / "job.log").read_text()


def command(config, name, *arguments):
    """What a command prints as JSON."""
    words = [sys.executable, "-m", "horovod_lm", name, *map(str, arguments), "--json"]
    result = run_job(config.parent / f"{name}.log", words, 0)
    assert result.code == 0, result.text
    return json.loads(result.lines[-1])


@pytest.mark.parametrize("training", ["bert", "mixture", "translation"])
def test_a_run_is_evaluated_as_it_was_in_training(training, config, done):
    run = done("torch", 2) / training
    recorded = rows(run, "evaluation")[-1]
    for backend in BACKENDS:
        found = command(config, "evaluate", run, "--backend", backend)
        assert found["loss"] == pytest.approx(recorded["loss"], abs=1e-5)
        assert found["losses"] == pytest.approx(recorded["losses"], abs=1e-5)
        for key in ("accuracies", "targets", "perplexities"):
            assert found[key] == pytest.approx(recorded[key], rel=1e-4), key
        assert list(found["accuracies"]) == list(found["losses"])


def test_an_encoder_decoder_answers_alike_in_both_frameworks(config, done):
    """The answer alone: what is encoded does not stand before it."""
    prompt = "The ship leads to the river."
    arguments = (done("tensorflow", 2) / "translation", "--prompt", prompt, "--tokens", 12)
    torch, tensorflow = (command(config, "generate", *arguments, "--backend", b) for b in BACKENDS)
    assert torch == tensorflow and torch["continuation"]
