"""What a team does with a model of others: import it, measure it, let it speak, train it further on
text of its own, stop, go on, and hand it back; in both frameworks."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from horovod_lm import checkpoint, environment
from horovod_lm.config import load_config
from horovod_lm.convert import hf
from horovod_lm.convert.run import export_run, import_run
from horovod_lm.data.prepare import prepare
from horovod_lm.data.tokenizer import Tokenizer
from horovod_lm.decode import generate
from horovod_lm.inspection import describe
from horovod_lm.restored import evaluate, restore
from horovod_lm.spec import ModelSpec
from horovod_lm.train import Training
from tests.parity.compare import within
from tests.parity.conftest import starting_weights

SMALL = {"vocabulary": 300, "context": 24, "width": 16, "layers": 2, "heads": 2, "key_bias": True}
MODELS = {
    "bert": {
        "kind": "encoder", "norm_placement": "post", "norm_epsilon": 1e-12, "segments": 2,
        "head_transform": True, "head_bias": True, "pooler": True,
        "task_heads": [{"name": "next_sentence", "outputs": 2}],
    },
    "gpt2": {"activation": "gelu_tanh"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """TensorFlow takes a number of threads once in a process, and other tests have taken one."""
    monkeypatch.setattr(environment, "apply", lambda config: 1)


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = random.Random(1)
    words = ["river", "mill", "bridge", "runs", "stands", "by", "the", "old", "and", "waits"]
    texts = [
        " ".join(f"{' '.join(source.choices(words, k=6)).capitalize()}." for _ in range(4))
        for _ in range(200)
    ]
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    return texts


def theirs(name, folder, texts):
    """A folder as transformers writes it, with the tokenizer of the model."""
    spec = ModelSpec(**{**SMALL, **MODELS[name]})
    folder.mkdir()
    plan = hf.plan(spec)
    (folder / "config.json").write_bytes(plan.config)
    hf.write_weights(folder, plan.family, spec, starting_weights(spec), plan.headers, {})
    kind = "wordpiece" if name == "bert" else "bpe"
    Tokenizer.train(texts, 300, kind).save(folder / "tokenizer.json")
    (folder / "vocab.txt").write_text("as it was\n")


def rows(run, kind):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == kind]


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_others_is_trained_further_and_handed_back(name, text, backends, tmp_path):
    given, run = tmp_path / "hf", tmp_path / "run"
    theirs(name, given, text)
    import_run(given, run)
    path = run / "config.toml"
    # Only the text is another one; what the model has learnt is known from its outputs.
    path.write_text(path.read_text().replace("corpus:wikipedia-introductions", "../text.txt"))

    measured = {b.name: evaluate(restore(run, b.name)) for b, _ in backends}
    assert measured["torch"]["tokens"] == measured["tensorflow"]["tokens"] > 50
    for loss, value in measured["torch"]["losses"].items():
        within(
            f"{name} as imported, {loss}", abs(measured["tensorflow"]["losses"][loss] - value), 2e-5
        )
    assert describe(load_config(path))["total"] == load_config(path).model.size
    if name == "gpt2":
        said = []
        for backend, _ in backends:
            ready = restore(run, backend.name, data=False)
            begun, source = ready.prompt("The river")
            said.append(generate(ready.engine, begun, 9, context=24, source=source, end=ready.ends))
        assert np.array_equal(*said)

    def train(backend, communicator, folder, steps, resume=False):
        sets = [
            f"train.steps={steps}", "train.start_from=.", "train.global_batch_size=4",
            "schedule.name=constant", "schedule.warmup=0", "evaluation.windows=8",
            "output.tensorboard=false", "output.weights_every=0", f"launch.backend={backend.name}",
        ]  # fmt: skip
        config = load_config(path, sets)
        Training(
            config, prepare(config), backend, communicator, 1, folder, resume
        ).run()  # fmt: skip

    curves = {}
    for backend, communicator in backends:
        more = tmp_path / backend.name
        train(backend, communicator, more, 3)
        train(backend, communicator, more, 5, resume=True)
        assert [row["step"] for row in rows(more, "step")] == [1, 2, 3, 4, 5]
        curves[backend.name] = np.array([row["loss"] for row in rows(more, "step")])
    apart = float(np.abs(curves["torch"] - curves["tensorflow"]).max())
    within(f"{name} trained further, loss", apart, 2e-5)
    train(*backends[0], tmp_path / "whole", 5)
    weights = {
        folder: checkpoint.load(checkpoint.newest(tmp_path / folder / "checkpoints")).engine.weights
        for folder in ("torch", "tensorflow", "whole")
    }
    for key, array in weights["whole"].items():
        assert np.array_equal(weights["torch"][key], array), "it went on bit for bit"

    for backend, other in (("torch", "tensorflow"), ("tensorflow", "torch")):
        more, back = tmp_path / backend, tmp_path / f"{backend}-hf"
        found, recorded = evaluate(restore(more, other)), rows(more, "evaluation")[-1]
        assert found["step"] == 5 and found["losses"] == pytest.approx(recorded["losses"], abs=1e-5)
        said = []
        assert export_run(more, back, said.append) == name and said == []
        before, after = content(given), content(back)
        assert before.keys() == after.keys()
        assert [n for n in before if before[n] != after[n]] == ["model.safetensors"]
        read, first = hf.read_model(back), hf.read_model(given)
        assert read.headers == first.headers
        for key, array in weights[backend].items():
            assert np.array_equal(read.weights[key], array), key
        moved = [
            not np.array_equal(array, first.weights[key]) for key, array in read.weights.items()
        ]
        assert np.mean(moved) > 0.8  # a bias of keys does not move

    # And by a tokenizer of its own it is another model, which says so and keeps what it reads by.
    changes = ["data.tokenizer=unigram", "train.steps=1", "train.start_from=."]
    changes += ["output.tensorboard=false", "output.weights_every=0", "evaluation.windows=8"]
    if name == "bert":
        changes.append('data.special=["padding", "mask", "classify", "separate"]')
    config = load_config(path, changes)
    own = prepare(config)
    Training(config, own, *backends[0], 1, tmp_path / "own", False).run()
    assert restore(tmp_path / "own", "torch", data=False).tokenizer.encode(
        "The river"
    ).tolist() == (own.tokenizer.encode("The river").tolist())
    said = []
    export_run(tmp_path / "own", tmp_path / "own-hf", said.append)
    assert said == ["the tokenizer is not the imported one any more: it is written anew"]
    exported = Tokenizer.load(tmp_path / "own-hf" / "tokenizer.json")
    for line in text[:5]:
        assert np.array_equal(exported.encode(line), own.tokenizer.encode(line))
