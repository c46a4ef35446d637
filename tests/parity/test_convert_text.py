"""Runs of ours in `transformers`, from text to text: the same ids, answers that end alike."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import tokenizers

from horovod_lm import checkpoint, environment
from horovod_lm.backend import EngineState
from horovod_lm.config import make_config, to_toml
from horovod_lm.convert.run import export_run, import_run
from horovod_lm.convert.saved_model import export_saved_model
from horovod_lm.data.tokenizer import Tokenizer
from horovod_lm.decode import generate
from horovod_lm.errors import UserError
from horovod_lm.randomness import normals
from horovod_lm.restored import restore
from tests.parity.conftest import starting_weights

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a network
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install .[test]")

pytestmark = pytest.mark.usefixtures("backends")  # which end both jobs in their order
CONTEXT = 24
TEXTS = [f"The river {number} runs past a mill, doesn't it?" for number in range(200)]
ENCODER = {
    "kind": "encoder", "norm_placement": "post", "norm_epsilon": 1e-12, "head_transform": True,
    "head_bias": True, "segments": 2, "key_bias": True,
}  # fmt: skip
ROBERTA = {**ENCODER, "segments": 1, "position_offset": 2, "norm_epsilon": 1e-5}
T5 = {
    "kind": "encoder-decoder", "norm": "rms_norm", "bias": False, "activation": "relu",
    "positions": "relative", "scale_attention": False, "scale_output": True,
}  # fmt: skip
LLAMA = {
    "norm": "rms_norm", "bias": False, "activation": "silu", "gated": True, "positions": "rotary",
    "tied": False,
}  # fmt: skip
MASKED = ["padding", "mask", "classify", "separate"]
# By name: model, kind of tokenizer, its special tokens and number of sentinels.
CASES = {
    "bert, wordpiece": (ENCODER, "wordpiece", [], 0),
    "bert, unigram": (ENCODER, "unigram", MASKED, 0),
    "roberta, bpe": (ROBERTA, "bpe", MASKED, 0),
    "bert, characters, no separators": (ENCODER, "characters", ["mask"], 0),
    "gpt2, bpe": ({}, "bpe", [], 0),
    "gpt2, unigram": ({}, "unigram", ["begin", "padding"], 0),
    "gpt2, wordpiece": ({}, "wordpiece", [], 0),
    "llama, characters": (LLAMA, "characters", [], 0),
    "t5, unigram": (T5, "unigram", [], 10),
    "t5, bpe": (T5, "bpe", ["padding"], 10),
    "t5, wordpiece": (T5, "wordpiece", ["begin"], 10),
}  # fmt: skip
TRICKY = [
    *TEXTS[:3], "", "a", "  two  blanks\n\nand a line\t", "naïve café 日本語 🙂", "don't . , ?",
    "[ MASK ]",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """TensorFlow takes a number of threads once in a process, and other tests have taken one."""
    monkeypatch.setattr(environment, "apply", lambda config: 1)


def trained(tokenizer: Tokenizer, fields, run, weights=None, **sections):
    """The folder of a run with weights that all count; returns its weights."""
    model = {"width": 16, "layers": 2, "heads": 2, "context": CONTEXT, "dropout": 0.0, **fields}
    size = max(257, tokenizer.vocabulary + 3)  # some ids idle
    config = make_config({"model": model, "data": {"vocabulary": size}, **sections}, "test")
    weights = starting_weights(config.model) if weights is None else weights
    run.mkdir()
    (run / "config.toml").write_text(to_toml(config))
    tokenizer.save(run / "tokenizer.json")
    state = checkpoint.RunState(3, 3, {}, EngineState(weights))
    checkpoint.save(run / "checkpoints", state, config, keep=1)
    return weights


@pytest.mark.parametrize("name", CASES)
def test_its_tokenizer_gives_the_same_ids_there(name, tmp_path):
    fields, kind, special, sentinels = CASES[name]
    ours = Tokenizer.train(TEXTS, 330, kind, special=special, sentinels=sentinels)
    trained(ours, fields, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.model_max_length == CONTEXT and theirs.eos_token_id == ours.end
    for key, use in (
        ("pad", "padding"), ("mask", "mask"), ("cls", "classify"), ("sep", "separate"),
        ("bos", "begin"), ("unk", "unknown"),
    ):  # fmt: skip
        if use in ours.special:
            assert getattr(theirs, f"{key}_token_id") == ours.special[use], key
    first, last, second = [], [], 1
    if {"classify", "separate"} <= ours.special.keys() and fields.get("kind") == "encoder":
        first, last, second = (
            [ours.special["classify"]],
            [ours.special["separate"]],
            fields["segments"] - 1,
        )
    elif fields.get("kind") == "encoder-decoder":
        last, second = [ours.end], 0
    for text in TRICKY:
        ids = ours.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert theirs.decode(ids) == ours.decode(np.array(ids, np.int64)), text
        assert theirs(text)["input_ids"] == [*first, *ids, *last], text
    if last:
        a, b = (ours.encode(text).tolist() for text in TEXTS[:2])
        both = theirs(TEXTS[0], TEXTS[1], return_token_type_ids=True)
        assert both["input_ids"] == [*first, *a, *last, *b, *last]
        begun = len(first) + len(a) + len(last)
        assert both["token_type_ids"] == [0] * begun + [second] * (len(b) + len(last))
    # GPT-2 would add token types to the words, and others refuse them.
    given = set(theirs(TEXTS[0]))
    types = {"token_type_ids"} if fields.get("segments", 0) > 1 else set()
    assert given == {"input_ids", "attention_mask"} | types


def answers_that_end(run, weights, text):
    """Weights whose greedy answer to `text` ends after some tokens: a later one and the end of a
    text change places in an output layer that says something new each time."""
    restored = restore(run, "torch", data=False)
    begun, source = restored.prompt(text)
    for seed in range(50):
        drawn = {"heads.lm.kernel": normals(seed, "lm", weights["heads.lm.kernel"].shape, 1.0)}
        restored.engine.load_state(EngineState({**weights, **drawn}))
        out = generate(restored.engine, begun, 16, context=CONTEXT, source=source)[0].tolist()
        later = [token for token in out[4:] if token not in out[:4]]
        if later and restored.tokenizer.end not in out:
            break
    else:
        raise AssertionError("no answer has anything new in it")
    ends, kernel = [restored.tokenizer.end, later[0]], drawn["heads.lm.kernel"]
    kernel[:, ends] = kernel[:, ends[::-1]]
    return {**weights, **drawn}


@pytest.mark.parametrize("batching", ["windows", "packed"])
@pytest.mark.parametrize("name", [name for name in CASES if "bert" not in name])
def test_it_answers_and_ends_there_as_here(name, batching, tmp_path):
    """Packed: a decoder has seen texts from their beginning, and a token before it."""
    more = {"batching": {"kind": batching}}
    fields, kind, special, sentinels = CASES[name]
    ours = Tokenizer.train(TEXTS, 330, kind, special=special, sentinels=sentinels)
    text, fields = "The mill", {**fields, "tied": False, "scale_output": False}
    weights = trained(ours, fields, tmp_path / "first", **more)
    weights = answers_that_end(tmp_path / "first", weights, text)
    trained(ours, fields, tmp_path / "run", weights, **more)
    export_run(tmp_path / "run", tmp_path / "hf")
    decoder = "t5" not in name
    auto = "AutoModelForCausalLM" if decoder else "AutoModelForSeq2SeqLM"
    model = getattr(transformers, auto).from_pretrained(tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    # Nothing is given but the text.
    found = model.generate(**tokenizer(text, return_tensors="pt"))[0].numpy()
    for backend in ("torch", "tensorflow"):
        restored = restore(tmp_path / "run", backend, data=False)
        begun, source = restored.prompt(text)
        out = generate(
            restored.engine, begun, CONTEXT, context=CONTEXT, source=source, end=restored.ends
        )[0]
        assert 3 < len(out) < CONTEXT - begun.shape[1] and out[-1] == ours.end
        assert np.array_equal(found, [*begun[0], *out]), backend
        first = [ours.special.get("begin", ours.end)] if batching == "packed" else []
        assert not decoder or begun[0].tolist() == [*first, *ours.encode(text)], backend
    import_run(tmp_path / "hf", tmp_path / "again")
    again = restore(tmp_path / "again", "torch", data=False)
    assert np.array_equal(again.prompt(text)[0], begun), "as before the way there and back"
    if decoder:
        pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
        said = pipeline(text)[0]["generated_text"]
        kept = [number for number in out if number not in ours.special.values()]
        assert said == text + ours.decode(np.array(kept)), "as the command prints it"
        begin = model.generate(max_new_tokens=1)[0, 0]
        assert begin == ours.special.get("begin", ours.end), "what a text begins with"


def test_a_loaded_tokenizer_puts_what_training_did(tmp_path):
    """Not what its own post-processor says, which training does not ask."""
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing

    trained_here = Tokenizer.train(TEXTS, 330, special=["begin"])
    trained_here.save(tmp_path / "plain.json")
    begin = trained_here.special["begin"]
    own = TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", begin)])
    trims = ByteLevel(trim_offsets=True)
    for number, (fields, processor) in enumerate(
        [(T5, trims), (T5, own), (T5, Sequence([trims, own])), ({}, trims), ({}, own)]
    ):
        loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "plain.json"))
        loaded.post_processor = processor
        loaded.save(str(tmp_path / "given.json"))
        ours = Tokenizer.load(tmp_path / "given.json", "")
        run, there = tmp_path / f"run{number}", tmp_path / f"hf{number}"
        trained(ours, fields, run)
        export_run(run, there)
        theirs = transformers.AutoTokenizer.from_pretrained(there)
        last = [ours.end] if fields else []
        for text in TRICKY:
            assert theirs(text)["input_ids"] == [*ours.encode(text).tolist(), *last], number
        kept = json.loads((there / "tokenizer.json").read_text())["post_processor"]
        assert ("ByteLevel" in json.dumps(kept)) == (processor is not own), number


def test_an_export_says_that_prompts_are_not_seen_whole_there(tmp_path):
    ours, said = Tokenizer.train(TEXTS, 330), []
    trained(ours, {}, tmp_path / "run", objective=[{"name": "prefix_lm"}])
    export_run(tmp_path / "run", tmp_path / "hf", said.append)
    assert any(line.startswith("prompts were seen from both sides") for line in said)
    export_saved_model(tmp_path / "run", tmp_path / "saved")
    import tensorflow as tf

    restored = restore(tmp_path / "run", "tensorflow", data=False)
    tokens = np.zeros((1, CONTEXT), np.int32)
    prompt = restored.prompt("The mill")[0]
    tokens[:, : prompt.shape[1]] = prompt
    inputs = {"tokens": tokens, "prefix": (tokens > 0).astype(np.int32)}
    inputs["blocks"] = inputs["prefix"]
    serve = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    found = serve(**{name: tf.constant(array) for name, array in inputs.items()})["logits"]
    expected = restored.engine.logits(inputs)
    count = prompt.shape[1]
    assert np.abs(found[0, :count] - expected[0, :count]).max() < 1e-5
    causal = restored.engine.logits({"tokens": prompt})
    assert np.abs(causal[0, 0] - expected[0, 0]).max() > 1e-3


def test_an_imported_model_begins_and_ends_a_text_as_there(tmp_path):
    """Its tokenizer puts a token before each prompt, and any of two ends an answer."""
    import torch
    from tokenizers.processors import TemplateProcessing

    ours = Tokenizer.train(TEXTS, 330, special=["begin"])
    ours.save(tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.post_processor = TemplateProcessing("<s> $A", None, [("<s>", ours.special["begin"])])
    torch.manual_seed(3)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=ours.vocabulary, num_attention_heads=2, max_position_embeddings=CONTEXT,
        initializer_range=0.5, bos_token_id=ours.special["begin"], eos_token_id=ours.end, **size,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    begun = {
        "input_ids": torch.tensor([[ours.special["begin"], *ours.encode("The mill").tolist()]])
    }
    said = model.generate(**begun, do_sample=False, max_new_tokens=12)[0, -12:].tolist()
    model.generation_config.eos_token_id = [ours.end, said[4]]
    model.save_pretrained(tmp_path / "hf")
    inner.save(str(tmp_path / "hf" / "tokenizer.json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    found = again.generate(**tokenizer("The mill", return_tensors="pt"), do_sample=False)[0]
    import_run(tmp_path / "hf", tmp_path / "run")
    for backend in ("torch", "tensorflow"):
        restored = restore(tmp_path / "run", backend, data=False)
        prompt, _ = restored.prompt("The mill")
        out = generate(restored.engine, prompt, 12, context=CONTEXT, end=restored.ends)[0]
        assert len(out) <= 5 and out[-1] == said[4]
        assert [*prompt[0], *out] == found.tolist(), backend


def test_another_model_with_the_imported_tokenizer_begins_and_ends_as_that_did(tmp_path):
    from tokenizers.processors import TemplateProcessing

    ours = Tokenizer.train(TEXTS, 330, special=["begin"])
    text, fields = "The mill", {**LLAMA, "scale_output": False}
    weights = trained(ours, fields, tmp_path / "first")
    weights = answers_that_end(tmp_path / "first", weights, text)
    trained(ours, fields, tmp_path / "trained", weights)
    export_run(tmp_path / "trained", tmp_path / "hf")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    inner.post_processor = TemplateProcessing("<s> $A", None, [("<s>", ours.special["begin"])])
    inner.save(str(tmp_path / "hf" / "tokenizer.json"))
    ends = [ours.end, *ours.encode(" runs").tolist()]
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "hf" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ends}))
    import_run(tmp_path / "hf", tmp_path / "run")
    path = tmp_path / "run" / "config.toml"
    path.write_text(re.sub(r"norm_epsilon = .*", "norm_epsilon = 1e-4", path.read_text()))
    said = []
    export_run(tmp_path / "run", tmp_path / "again", said.append)
    assert any("the model is not the imported one" in line for line in said)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    found = model.generate(**tokenizer(text, return_tensors="pt"))[0].tolist()
    restored = restore(tmp_path / "run", "torch", data=False)
    begun, _ = restored.prompt(text)
    out = generate(restored.engine, begun, CONTEXT, context=CONTEXT, end=restored.ends)[0]
    assert begun[0, 0] == ours.special["begin"] and restored.ends == tuple(ends)
    assert [*begun[0], *out] == found


def test_a_text_that_does_not_end_fills_the_context_there_too(tmp_path):
    ours = Tokenizer.train(TEXTS, 330)
    trained(ours, {}, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "hf")
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    prompt, _ = restore(tmp_path / "run", "torch", data=False).prompt("The mill")
    out = pipeline("The mill", return_tensors=True)[0]["generated_token_ids"]
    assert len(out) == CONTEXT and out[: prompt.shape[1]] == prompt[0].tolist()


@pytest.mark.parametrize("name", ["bert, wordpiece", "roberta, bpe"])
def test_masks_are_filled_as_in_training(name, tmp_path):
    """The blank before a word belongs to it, so a mask stands for both."""
    fields, kind, special, _ = CASES[name]
    ours = Tokenizer.train(TEXTS, 330, kind, special=special)
    trained(ours, fields, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "hf")
    pipeline = transformers.pipeline("fill-mask", model=str(tmp_path / "hf"))
    mask = pipeline.tokenizer.mask_token
    ids = ours.encode("The river runs").tolist()
    place = ids.index(int(ours.encode("The river")[-1]))
    ids[place] = ours.special["mask"]
    begun = [ours.special["classify"], *ids, ours.special["separate"]]
    found = pipeline.tokenizer(f"The {mask} runs")["input_ids"]
    assert found == begun
    restored = restore(tmp_path / "run", "tensorflow", data=False)
    logits = restored.engine.logits({"tokens": np.array([begun], np.int32)})[0, place + 1]
    chances = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = pipeline(f"The {mask} runs")
    assert [row["token"] for row in best] == np.argsort(-logits)[:5].tolist()
    assert [row["score"] for row in best] == pytest.approx(np.sort(-chances)[:5] * -1, rel=1e-4)


def test_roberta_without_padding_where_it_counts_from_is_refused(tmp_path):
    ours = Tokenizer.train(TEXTS, 330, special=["mask"])
    trained(ours, ROBERTA, tmp_path / "run")
    with pytest.raises(UserError, match=r"the id of padding is 1, and .* it does not exist; train"):
        export_run(tmp_path / "run", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_without_a_tokenizer_no_token_is_one_of_anothers(tmp_path):
    ours = Tokenizer.train(TEXTS, 330)
    trained(ours, {}, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    path = tmp_path / "run" / "config.toml"
    path.write_text(path.read_text().replace("corpus:wikipedia-introductions", "gone.txt"))
    said = []
    export_run(tmp_path / "run", tmp_path / "hf", said.append)
    assert any(line.startswith("without a tokenizer: ") for line in said)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["eos_token_id"] is config["bos_token_id"] is None
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip


def test_a_saved_model_has_the_tokenizer_of_its_run(tmp_path):
    ours = Tokenizer.train(TEXTS, 330)
    trained(ours, {}, tmp_path / "run")
    export_saved_model(tmp_path / "run", tmp_path / "saved")
    text = (tmp_path / "saved" / "assets.extra" / "tokenizer.json").read_bytes()
    assert text == (tmp_path / "run" / "tokenizer.json").read_bytes()
