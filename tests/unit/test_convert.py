"""Conversion without frameworks: names, shapes, bytes, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models

from horovod_lm import checkpoint
from horovod_lm.cli import group
from horovod_lm.config import load_config, make_config, to_toml
from horovod_lm.convert import hf, progress, tensors
from horovod_lm.convert.run import export_run, import_run, read_imported
from horovod_lm.convert.tensors import Tensor
from horovod_lm.data.prepare import prepare
from horovod_lm.errors import RunFailed, UserError
from horovod_lm.randomness import initial_weights
from horovod_lm.run_folder import carry_over, claim, tokenizer_file
from horovod_lm.spec import ModelSpec
from tests.helpers import full_disk
from tests.unit.converting import (
    NEXT,
    SMALL,
    SPECS,
    content,
    rewrite,
    set_config,
    shard,
    weights_of,
    write,
)


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_is_written_and_read_again(name, tmp_path):
    spec = ModelSpec(**SPECS[name])
    weights = weights_of(spec)
    plan = write(tmp_path / "hf", spec, weights)
    assert plan.family.name == name.split()[0]
    model = hf.read_model(tmp_path / "hf")
    keys = [n for n in model.weights if n.endswith(".key.bias")]
    assert set(model.weights) - set(keys) == set(weights) - set(keys)
    for key, array in model.weights.items():
        expected = weights.get(key, np.zeros(array.shape))
        assert np.array_equal(array, expected), key
        assert array.dtype == np.float32 and array.flags["C_CONTIGUOUS"]
    assert hf.fits(plan.family, model.spec, plan.config, plan.headers)


@pytest.mark.parametrize("name", SPECS)
def test_a_round_trip_gives_the_same_bytes(name, tmp_path):
    write(tmp_path / "hf", ModelSpec(**SPECS[name]))
    import_run(tmp_path / "hf", tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "back") == name.split()[0]
    assert content(tmp_path / "back") == content(tmp_path / "hf")


def test_gpt2_has_queries_keys_and_values_in_one(tmp_path):
    spec = ModelSpec(**SPECS["gpt2"])
    weights = weights_of(spec)
    write(tmp_path / "hf", spec, weights)
    file = load_file(tmp_path / "hf" / "model.safetensors")
    fused = file["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (8, 24)
    assert np.array_equal(fused[:, 8:16], weights["decoder.1.attention.key.kernel"])
    biases = [weights[f"decoder.0.attention.{part}.bias"] for part in ("query", "key", "value")]
    assert np.array_equal(file["transformer.h.0.attn.c_attn.bias"], np.concatenate(biases))


def test_linear_layers_of_torch_are_transposed(tmp_path):
    spec = ModelSpec(**SPECS["llama"])
    weights = weights_of(spec)
    write(tmp_path / "hf", spec, weights)
    file = load_file(tmp_path / "hf" / "model.safetensors")
    key = file["model.layers.0.self_attn.k_proj.weight"]
    assert key.shape == (4, 8)
    assert np.array_equal(key.T, weights["decoder.0.attention.key.kernel"])
    assert np.array_equal(file["lm_head.weight"].T, weights["heads.lm.kernel"])


def test_robertas_positions_begin_behind_padding(tmp_path):
    spec = ModelSpec(**SPECS["roberta"])
    write(tmp_path / "hf", spec)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 14 and config["pad_token_id"] == 1
    assert hf.read_model(tmp_path / "hf").spec.context == 12


def test_names_of_old_files_and_of_bare_models(bert, tmp_path):
    def old(table):
        renamed = {}
        for name, value in table.items():
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            renamed[name.replace("LayerNorm.bias", "LayerNorm.beta")] = value
        return renamed

    before = hf.read_model(bert).weights
    rewrite(bert, old)
    after = hf.read_model(bert).weights
    assert all(np.array_equal(before[name], after[name]) for name in before)

    def bare(table):
        return {
            name.removeprefix("bert."): value
            for name, value in table.items()
            if name.startswith("bert.")
        }

    rewrite(bert, bare)
    import_run(bert, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "back")
    assert content(tmp_path / "back") == content(bert)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_halves_come_back_as_they_were(dtype, bert, tmp_path):
    def halve(table):
        for name, (_, data, shape) in table.items():
            half = tensors.encode(data.view("<f4").reshape(shape), dtype)
            table[name] = (dtype, half, shape)

    rewrite(bert, halve)
    import_run(bert, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "back")
    assert content(tmp_path / "back") == content(bert)


def test_rounding_to_bf16_is_to_the_nearest_even():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.7, 3e38, np.inf, -np.inf], np.float32)
    back = Tensor("BF16", (7,), tensors.encode(values, "BF16")).fp32()
    assert back[:3].tolist() == [1.0, 1.0, 1 + 4 * 2**-8]
    assert abs(back[3] + 2.7) < 0.01 and back[4] == pytest.approx(3e38, rel=4e-3)
    assert np.isposinf(back[5]) and np.isneginf(back[6])
    assert np.isnan(Tensor("BF16", (1,), tensors.encode(np.array([np.nan]), "BF16")).fp32())


def test_shards(bert, tmp_path):
    whole = hf.read_model(bert).weights
    shard(bert)
    parts = hf.read_model(bert).weights
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    import_run(bert, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "back")
    assert content(tmp_path / "back") == content(bert)


def test_what_has_no_place_is_kept(bert, tmp_path):
    positions = np.arange(12, dtype="<i8")

    def add(table):
        name = "bert.embeddings.position_ids"
        return {name: ("I64", positions.view(np.uint8), (1, 12)), **table}

    rewrite(bert, add)
    (bert / "vocab.txt").write_text("[PAD]\n")
    import_run(bert, tmp_path / "run")
    kept = read_imported(tmp_path / "run")
    assert list(kept.extra) == ["bert.embeddings.position_ids"]
    export_run(tmp_path / "run", tmp_path / "back")
    assert content(tmp_path / "back") == content(bert)


def test_copies_of_tied_tensors_are_written_again(bert, tmp_path):
    def add(table):
        table["cls.predictions.decoder.weight"] = table["bert.embeddings.word_embeddings.weight"]
        table["cls.predictions.decoder.bias"] = table["cls.predictions.bias"]

    rewrite(bert, add)
    import_run(bert, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "back")
    assert content(tmp_path / "back") == content(bert)


def test_the_run_is_one(bert, tmp_path):
    config = import_run(bert, tmp_path / "run")
    run = tmp_path / "run"
    assert load_config(run / "config.toml").model == config.model
    path = checkpoint.newest(run / "checkpoints")
    checkpoint.check_model(path, config.model)
    checkpoint.check_same_run(path, load_config(run / "config.toml"), "digest")
    state = checkpoint.load(path)
    assert state.step == 0 and state.engine.moments == {}
    assert json.loads((run / "run.json").read_text())["state"] == "finished"


def test_trained_weights_go_into_the_same_files(bert, tmp_path):
    config = import_run(bert, tmp_path / "run")
    weights = {n: a + 1 for n, a in hf.read_model(bert).weights.items()}
    state = checkpoint.RunState(5, 5, {}, checkpoint.EngineState(weights))
    checkpoint.save(tmp_path / "run" / "checkpoints", state, config, keep=2)
    export_run(tmp_path / "run", tmp_path / "back")
    again = hf.read_model(tmp_path / "back").weights
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


def test_trained_weights_beyond_the_imported_type_are_refused(bert, tmp_path):
    """They would be infinite."""

    def halve(table):
        for name, (_, data, shape) in table.items():
            half = tensors.encode(data.view("<f4").reshape(shape), "F16")
            table[name] = ("F16", half, shape)

    rewrite(bert, halve)
    config = import_run(bert, tmp_path / "run")
    weights = hf.read_model(bert).weights
    for number, (value, fits) in enumerate(((65519.0, True), (-7e4, False)), 1):
        weights["pooler.bias"][3] = value
        state = checkpoint.RunState(number, number, {}, checkpoint.EngineState(weights))
        checkpoint.save(tmp_path / "run" / "checkpoints", state, config, keep=2)
        if fits:
            export_run(tmp_path / "run", tmp_path / "back")
            again = hf.read_model(tmp_path / "back").weights["pooler.bias"]
            assert again[3] == 65504 and np.isfinite(again).all()
            continue
        with pytest.raises(
            UserError, match=r"dense\.bias has weights beyond 65504, the largest of"
        ):
            export_run(tmp_path / "run", tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_run_starts_with_the_weights_of_another(bert, tmp_path):
    config = import_run(bert, tmp_path / "run")
    spec = config.model
    more = ModelSpec(**{**SPECS["bert"], "task_heads": [{"name": "topic", "outputs": 7}]})
    new = initial_weights(more, 1)
    mixed = checkpoint.start_weights(tmp_path / "run", more, new)
    old = hf.read_model(bert).weights
    for name, array in mixed.items():
        expected = new[name] if name.startswith("heads.topic.") else old[name]
        assert np.array_equal(array, expected), name
    wider = spec.model_copy(update={"width": 16})
    with pytest.raises(UserError, match=r"embeddings\.tokens has shape"):
        checkpoint.check_start(tmp_path / "run", ModelSpec(**wider.model_dump(exclude={"layers"})))
    with pytest.raises(UserError, match="no valid checkpoint"):
        checkpoint.check_start(tmp_path / "nowhere", spec)


def save_tokenizer(folder, size=300):
    words = {"</s>": 0, **{f"w{i}": i for i in range(1, size)}}
    Tokenizer(models.WordLevel(words, unk_token="</s>")).save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("name", "objectives"),
    [
        ("bert", [("masked_lm", "next_sentence"), ("next_sentence", None)]),
        ("bert untied", [("masked_lm", None)]),
        ("bert bare", []),
        ("roberta", [("masked_lm", None)]),
        ("roberta classifier", []),
        ("t5", [("span_corruption", None)]),
        ("gpt2", []),
    ],
)
def test_an_imported_run_has_the_objectives_of_its_outputs(name, objectives, tmp_path):
    """So that it can be evaluated, and trained further, as it is."""
    write(tmp_path / "hf", ModelSpec(**SPECS[name]))
    config = import_run(tmp_path / "hf", tmp_path / "run")
    assert [(table.name, table.on) for table in config.objective] == objectives
    assert load_config(tmp_path / "run" / "config.toml").objective == config.objective


def test_an_imported_run_may_be_moved(bert, tmp_path):
    save_tokenizer(bert)
    import_run(bert, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "other")
    config = load_config(tmp_path / "other" / "config.toml")
    own = tmp_path / "other" / "imported" / "tokenizer.json"
    assert config.data.tokenizer == str(own) == str(tokenizer_file(tmp_path / "other", config))
    export_run(tmp_path / "other", tmp_path / "back")
    assert content(tmp_path / "back") == content(bert)


def test_a_missing_tokenizer_is_said_and_none_is_made_up(bert, tmp_path):
    said = []
    config = import_run(bert, tmp_path / "run", log=said.append)
    (line,) = (
        line for line in said if "there is no tokenizer.json: put the model's own at" in line
    )
    assert config.data.tokenizer in line and tokenizer_file(tmp_path / "run", config) is None
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist; give the path"):
        prepare(config)


def continued(run, folder, text, **data):
    """A run that began with the weights of `run`, and kept a tokenizer with this text."""
    config = load_config(
        run / "config.toml", [f"data.{k}={json.dumps(v)}" for k, v in data.items()]
    )
    carry_over(run, folder)
    state = checkpoint.RunState(
        5, 5, {}, checkpoint.load(checkpoint.newest(run / "checkpoints")).engine
    )
    checkpoint.save(folder / "checkpoints", state, config, keep=2)
    (folder / "config.toml").write_text(to_toml(config))
    (folder / "tokenizer.json").write_bytes(text)
    return folder


def test_what_is_kept_of_an_imported_model_is_carried_over_whole_or_not_at_all(
    tmp_path, monkeypatch
):
    kept, folder = tmp_path / "run" / "imported", tmp_path / "next"
    kept.mkdir(parents=True)
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (kept / name).write_text(name)
    full, copy, copied = OSError(28, "No space left on device"), shutil.copy2, []

    def fill(source, target, **options):
        if copied:
            raise full
        copied.append(copy(source, target, **options))
        return copied[0]

    # copytree has taken its default in already
    monkeypatch.setattr(shutil, "copytree", partial(shutil.copytree, copy_function=fill))
    with pytest.raises(RunFailed, match=r"can't be copied to .*next: .*No space left on device;"):
        carry_over(tmp_path / "run", folder)
    assert copied and not list(folder.iterdir())
    copied.clear()
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)  # as after a kill
    with pytest.raises(RunFailed):
        carry_over(tmp_path / "run", folder)
    assert [path.name for path in folder.iterdir()] == ["imported.partial"]
    monkeypatch.undo()
    carry_over(tmp_path / "run", folder)
    (whole,) = folder.iterdir()
    assert whole.name == "imported" and len(list(whole.iterdir())) == 2


def test_another_tokenizer_makes_another_model(bert, tmp_path):
    """A run that starts with an imported one's weights is exported with what it reads text by."""
    save_tokenizer(bert)
    run, own = tmp_path / "run", bert / "tokenizer.json"
    import_run(bert, run)
    same = continued(run, tmp_path / "same", own.read_bytes())
    export_run(same, tmp_path / "back")
    assert content(tmp_path / "back") == content(bert)
    (tmp_path / "text").mkdir()
    save_tokenizer(tmp_path / "text", 299)
    text = (tmp_path / "text" / "tokenizer.json").read_bytes()
    said = []
    other = continued(run, tmp_path / "other", text, tokenizer="wordpiece")
    assert export_run(other, tmp_path / "new", said.append) == "bert"
    assert "the tokenizer is not the imported one any more: it is written anew" in said
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == text
    settings = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "</s>"
    weights, before = (hf.read_model(f).weights for f in (tmp_path / "new", bert))
    assert all(np.array_equal(weights[name], before[name]) for name in before)


@pytest.mark.parametrize("resume", [False, True])
def test_an_imported_model_is_not_trained_in_its_place(resume, bert, tmp_path):
    run = tmp_path / "run"
    import_run(bert, run)
    with pytest.raises(UserError, match=f"stays as it is; .*--set train.start_from={run}, and an"):
        claim(run, resume)


@pytest.mark.parametrize(
    ("config", "generation", "start"),
    [
        ({"pad_token_id": 0}, None, 0),
        ({"pad_token_id": 0, "decoder_start_token_id": 3}, {"max_length": 9}, 3),
        (
            {"pad_token_id": 0, "decoder_start_token_id": 3},
            {"decoder_start_token_id": 250},
            250,
        ),
        ({"pad_token_id": None, "decoder_start_token_id": None}, None, None),
    ],
)
def test_an_imported_decoder_begins_as_transformers_begins_it(config, generation, start, tmp_path):
    write(tmp_path / "hf", ModelSpec(**SPECS["t5"]))
    set_config(**config)(tmp_path / "hf")
    if generation is not None:
        (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(generation))
    import_run(tmp_path / "hf", tmp_path / "run")
    assert read_imported(tmp_path / "run").decoder_start == start


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": 7}, None, (7,)),
        ({"eos_token_id": 7}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": [1, 2]}, {"max_length": 9}, (1, 2)),
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": "x"}, None, ()),
    ],
)
def test_an_imported_model_ends_where_its_configs_say(config, generation, ends, bert, tmp_path):
    set_config(**config)(bert)
    if generation is not None:
        (bert / "generation_config.json").write_text(json.dumps(generation))
    import_run(bert, tmp_path / "run")
    assert read_imported(tmp_path / "run").ends == ends


def test_a_model_that_no_family_has(tmp_path):
    spec = ModelSpec(**{**SMALL, "positions": "alibi"})
    with pytest.raises(UserError, match=r"nearest is \w+, which does not go with .*positions"):
        hf.plan(spec)


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        (
            "bert",
            {"pooler": False},
            "bert, which does not go with pooler = False under a head over",
        ),
        ("bert bare", {"head_bias": True}, "head_transform = False with head_bias = True"),
        ("bert bare", {"tied": False}, "head_transform = False with tied = False"),
        ("distilbert", {"task_heads": [{"name": "classifier", "outputs": 3}]}, "pooler = False"),
        ("bert", {"task_heads": [{**NEXT, "outputs": 3}]}, "3 outputs of the head next_sentence"),
        (
            "distilbert",
            {"task_heads": [{"name": "qa_outputs", "outputs": 3, "over": "token"}]},
            "3 outputs of the head qa_outputs, which has 2 there",
        ),
        ("llama", {"width": 9, "head_size": 4}, "heads = 2 does not divide width = 9"),
    ],
)
def test_a_head_that_transformers_has_otherwise_is_refused(name, changes, fault):
    """It would open there, with layers of its own in between."""
    with pytest.raises(UserError, match=fault):
        hf.plan(ModelSpec(**{**SPECS[name], **changes}))


@pytest.mark.parametrize("heads", list(permutations(["next_sentence", "classifier"])))
def test_the_order_of_heads_makes_no_other_model(heads):
    table = [{"name": name, "outputs": 2} for name in heads]
    assert hf.plan(ModelSpec(**{**SPECS["bert"], "task_heads": table})).family.name == "bert"


@pytest.mark.parametrize("name", ["bert tokens", "bert", "roberta classifier"])
@pytest.mark.parametrize(
    "changes", [{"architectures": None}, {"tie_word_embeddings": False}], ids=["unnamed", "untied"]
)
def test_a_classifier_has_no_output_layer_of_its_own(name, changes, tmp_path):
    """Nor needs `config.json` say what it is."""
    heads = [{"name": "classifier", "outputs": 5, "over": "token"}]
    fields = {**SPECS[name], "head_transform": False, "head_bias": False}
    if name != "roberta classifier":
        over = "token" if name == "bert tokens" else "sequence"
        fields["task_heads"] = [{**heads[0], "over": over}]
    spec = ModelSpec(**fields)
    write(tmp_path / "hf", spec)
    set_config(**changes)(tmp_path / "hf")
    read = hf.read_model(tmp_path / "hf").spec
    assert (read.task_heads, read.tied) == (spec.task_heads, True)


def test_a_model_of_few_tokens_becomes_a_run(tmp_path):
    """As one over amino acids, with its own tokenizer."""
    write(tmp_path / "hf", ModelSpec(**{**SPECS["bert"], "vocabulary": 30}))
    config = import_run(tmp_path / "hf", tmp_path / "run")
    assert config.model.vocabulary == load_config(tmp_path / "run" / "config.toml").model.vocabulary
    assert config.model.vocabulary == 30


def test_an_encoder_without_a_transform_says_that_it_goes_without_its_output(tmp_path):
    fields = {**SPECS["bert bare"], "vocabulary": 300}
    config = make_config({"model": fields, "data": {"vocabulary": 300}}, "test")
    state = checkpoint.RunState(1, 1, {}, checkpoint.EngineState(weights_of(config.model)))
    run = tmp_path / "run"
    checkpoint.save(run / "checkpoints", state, config, keep=1)
    (run / "config.toml").write_text(to_toml(config))
    save_tokenizer(run)
    said = []
    assert export_run(run, tmp_path / "hf", said.append) == "bert"
    assert any(
        line.startswith("the output layer is left out: that of bert stands") for line in said
    )


def test_two_biases_of_an_output_layer_that_is_not_tied(tmp_path):
    """transformers reads the layer's own; the other one comes back as it was."""
    write(tmp_path / "hf", ModelSpec(**SPECS["bert untied"]))

    def differ(table):
        dtype, data, shape = table["cls.predictions.bias"]
        table["cls.predictions.bias"] = (dtype, np.zeros_like(data), shape)

    own = hf.read_model(tmp_path / "hf").weights["heads.lm.bias"]
    rewrite(tmp_path / "hf", differ)
    model = hf.read_model(tmp_path / "hf")
    assert np.array_equal(model.weights["heads.lm.bias"], own)
    import_run(tmp_path / "hf", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "hf")


def test_a_damaged_layout_is_refused(bert, tmp_path):
    import_run(bert, tmp_path / "run")
    path = tmp_path / "run" / "imported" / "layout.json"
    layout = json.loads(path.read_text())
    layout["companions"].append("../config.toml")
    path.write_text(json.dumps(layout))
    with pytest.raises(UserError, match=r"layout\.json is damaged: '\.\./config\.toml' is no pl"):
        export_run(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_nothing_is_overwritten(bert, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").touch()
    with pytest.raises(UserError, match="is not empty"):
        import_run(bert, tmp_path / "run")
    with pytest.raises(UserError, match="is not the folder of a run"):
        export_run(tmp_path / "run", tmp_path / "back")


@pytest.fixture
def imported(bert, tmp_path):
    import_run(bert, tmp_path / "imported")
    return tmp_path / "imported"


DIRECTIONS = ["import", "export"]


def convert(direction, bert, imported, target):
    if direction == "import":
        import_run(bert, target)
    else:
        export_run(imported, target)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_an_empty_folder_is_filled_even_where_one_stands(
    direction, bert, imported, tmp_path, monkeypatch
):
    convert(direction, bert, imported, tmp_path / "new")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    convert(direction, bert, imported, Path("."))
    assert tree(Path(".")) == tree(tmp_path / "new")
    assert {p.name for p in tmp_path.iterdir()} == {"hf", "imported", "new", "empty"}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("place", ["new", "a/b/new", "empty"])
def test_a_conversion_that_ends_early_leaves_nothing(
    direction, place, bert, imported, tmp_path, monkeypatch
):
    (tmp_path / "empty").mkdir()
    before, target = tree(tmp_path), tmp_path / place
    real = tensors.write

    def interrupt(path, *arguments):
        real(path, *arguments)
        # A kill at this moment would leave nothing under the name either.
        assert not target.exists() or tree(target)[0] == ".partial"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tensors, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(direction, bert, imported, target)
    assert tree(tmp_path) == before
    # What a kill leaves beside it is no hindrance.
    for left in (tmp_path / ".new.partial", tmp_path / "empty" / ".partial"):
        left.mkdir()
        (left / "config.json").touch()
    convert(direction, bert, imported, target)
    assert ".partial" not in tree(target)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", [500, 8000])
def test_a_full_disk_is_a_failed_run(direction, size, bert, imported, tmp_path):
    before = tree(tmp_path)
    message = "new can't be written: file too large; nothing is left there"
    with full_disk(size), pytest.raises(RunFailed, match=message):
        convert(direction, bert, imported, tmp_path / "new")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_place_that_cannot_be_written_is_refused(direction, bert, imported, tmp_path):
    (tmp_path / "file").touch()
    for place, message in (
        (tmp_path / "file", "is there already; give another path"),
        (tmp_path / "file" / "new", "new can't be made: .*file is not a folder; give another"),
        (Path("/proc/new"), "/proc/new can't be made: .*; give another path"),
    ):
        with pytest.raises(UserError, match=message):
            convert(direction, bert, imported, place)


def test_a_long_conversion_says_how_far_it_is(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    said = []
    import_run(bert, tmp_path / "run", log=said.append)
    export_run(tmp_path / "run", tmp_path / "back", said.append)
    assert [line for line in said if line.startswith("reading: 0 of 0 MB")]
    assert [line for line in said if line.startswith("writing: 0 of 0 MB")]


def test_memory_stays_near_the_size_of_the_model(tmp_path):
    """Of each direction, beyond what a small model takes."""
    spec = ModelSpec(**{**SPECS["gpt2"], "width": 1024, "vocabulary": 8000, "layers": 4})
    for name, made in (("small", ModelSpec(**SPECS["gpt2"])), ("large", spec)):
        write(tmp_path / name, made)
    code = """
import resource, sys
from pathlib import Path
from horovod_lm.convert.run import export_run, import_run
{"import": import_run, "export": export_run}[sys.argv[1]](*map(Path, sys.argv[2:]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""

    def peak(*words):
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return int(done.stdout.split()[-1])

    for direction, source, target in (("import", "", ".run"), ("export", ".run", ".back")):
        small, large = (
            peak(direction, tmp_path / f"{name}{source}", tmp_path / f"{name}{target}")
            for name in ("small", "large")
        )
        assert 4 * spec.size > 2e8
        assert large - small < 1.5 * 4 * spec.size, direction


def test_the_command(bert, tmp_path, capsys):
    def call(*arguments):
        return group.main([*map(str, arguments)], standalone_mode=False)

    call("convert", "--from", "hf", bert, "--to", "run", tmp_path / "run")
    call("convert", "--from", "run", tmp_path / "run", "--to", "hf", tmp_path / "back")
    assert content(tmp_path / "back") == content(bert)
    assert "bert: " in capsys.readouterr().out
    with pytest.raises(UserError, match="--from hf --to hf does nothing"):
        call("convert", "--from", "hf", bert, "--to", "hf", tmp_path / "other")
    with pytest.raises(UserError, match="go with --from hf alone"):
        call("convert", "--from", "run", tmp_path / "run", "--to", "hf", tmp_path / "x", "--legacy")
