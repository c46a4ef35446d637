"""Models that are damaged, or that there is none of here: each its one message."""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from horovod_lm.convert import hf, tensors
from horovod_lm.convert.run import export_run, import_run
from horovod_lm.errors import UserError
from horovod_lm.spec import ModelSpec
from tests.unit.converting import (
    SPECS,
    content,
    rewrite,
    set_config,
    shard,
    write,
)


def without_its_pooler(folder):
    rewrite(folder, lambda table: {n: v for n, v in table.items() if "pooler" not in n})


# Bad input: a change of a good folder, and the one message.
def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def huge_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")


def overlapping(folder):
    header = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "b": {"dtype": "U8", "shape": [4], "data_offsets": [2, 6]},
        }
    ).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(6)
    (folder / "model.safetensors").write_bytes(data)


def missing(folder):
    rewrite(folder, lambda table: table.pop("bert.encoder.layer.1.output.dense.bias") and None)


def extra(folder):
    def add(table):
        table["bert.more.weight"] = ("F32", np.zeros(4, np.uint8), (1,))

    rewrite(folder, add)


def wrong_shape(folder):
    def turn(table):
        dtype, data, shape = table["bert.encoder.layer.0.intermediate.dense.weight"]
        table["bert.encoder.layer.0.intermediate.dense.weight"] = (dtype, data, shape[::-1])

    rewrite(folder, turn)


def wrong_type(folder):
    def widen(table):
        _, data, shape = table["bert.pooler.dense.bias"]
        table["bert.pooler.dense.bias"] = ("F64", data.view("<f4").astype("<f8").view("u1"), shape)

    rewrite(folder, widen)


def untied(folder):
    def differ(table):
        dtype, data, shape = table["bert.embeddings.word_embeddings.weight"]
        table["cls.predictions.decoder.weight"] = (dtype, data[::-1].copy(), shape)

    rewrite(folder, differ)


def lacks(key):
    def change(folder):
        path = folder / "config.json"
        values = json.loads(path.read_text())
        del values[key]
        path.write_text(json.dumps(values))

    return change


def tokenizer_too_large(folder):
    words = {f"w{i}": i for i in range(301)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


def tokenizer_damaged(folder):
    (folder / "tokenizer.json").write_text("{")


def shard_missing(folder):
    shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()


def shard_outside(folder):
    index = shard(folder)
    first = sorted(index)[0]
    text = json.dumps({"weight_map": {**index, first: "../../model.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)


def shard_elsewhere(folder):
    index = shard(folder)
    first = sorted(index)[0]
    other = "model-00002-of-00003.safetensors"
    text = json.dumps({"weight_map": {**index, first: other}})
    (folder / "model.safetensors.index.json").write_text(text)


def link_outside(folder):
    (folder / "tokenizer.json").symlink_to(os.devnull)


def legacy_alone(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def config_is_a_list(folder):
    (folder / "config.json").write_text("[]")


def config_is_deep(folder):
    (folder / "config.json").write_text("[" * 200_000)


BAD = [
    (cut, r"model\.safetensors is not a valid safetensors file: it is cut off: [\d,]+ bytes inst"),
    (cut_in_the_header, "it is cut off: 100 bytes, and its header alone takes"),
    (huge_header, "its header would have 4,611,686,018,427,387,904 bytes"),
    (overlapping, "b begins at byte 2 of the data instead of 4"),
    (missing, r"the tensor bert\.encoder\.layer\.1\.output\.dense\.bias is missing"),
    (extra, r"the tensor bert\.more\.weight has no place in a model of type bert; --keep-extra"),
    (without_its_pooler, "are those of no bert that transformers has: pooler = False under a head"),
    (wrong_shape, r"intermediate\.dense\.weight has shape \[8, 32\], and config\.json asks for"),
    (wrong_type, r"bert\.pooler\.dense\.bias has type F64; allowed: F32, BF16, F16"),
    (untied, r"differs from bert\.embeddings\.word_embeddings\.weight, and config\.json has them"),
    (set_config(model_type="mamba"), 'model_type is "mamba", which is unknown; known: bert, rob'),
    (set_config(model_type=None), "model_type is missing"),
    (set_config(hidden_act="mish"), 'hidden_act = "mish" is not supported; allowed: "gelu" or'),
    (set_config(hidden_act=["gelu"]), r'hidden_act = \["gelu"\] is not supported; allowed: "g'),
    (set_config(hidden_act="a" * 10_000), r'hidden_act = "a{79}… is not supported'),
    (set_config(hidden_act="a\n\ud800"), r'hidden_act = "a\\n\\ud800" is not supported'),
    (set_config(layer_norm_eps=10**400), r"layer_norm_eps = 10{79}… must be a number"),
    (set_config(layer_norm_eps=float("nan")), "norm_epsilon = NaN: Input should be a finite"),
    (set_config(hidden_size=-8), "hidden_size = -8 must be a whole number above 0"),
    (set_config(position_embedding_type="relative_key"), "position_embedding_type"),
    (set_config(is_decoder=True), "is_decoder = true is not supported; allowed: false"),
    (set_config(hidden_size="8"), 'hidden_size = "8" must be a whole number above 0'),
    (set_config(layer_norm_eps="x"), 'layer_norm_eps = "x" must be a number'),
    (set_config(tie_word_embeddings=3), "tie_word_embeddings = 3 must be true or false"),
    (set_config(num_attention_heads=3), "heads = 3 does not divide width = 8"),
    (lacks("vocab_size"), r"word_embeddings\.weight has shape \[300, 8\], .* \[30522, 8\]"),
    (set_config(vocab_size=299), r"word_embeddings\.weight has shape \[300, 8\]"),
    (tokenizer_too_large, "does not fit the model: its token 'w300' has id 300, and the vocabul"),
    (tokenizer_damaged, "tokenizer.json can't be read"),
    (shard_missing, "names the shard model-00002-of-00003.safetensors, which is missing"),
    (shard_outside, r"names the shard '\.\./\.\./model\.safetensors'; allowed are names"),
    (shard_elsewhere, "holds .*, which model.safetensors.index.json has in model-00002"),
    (link_outside, "is a link that leads out of its folder"),
    (legacy_alone, r"has pytorch_model\.bin alone, a pickle of torch; --legacy reads it"),
    (no_weights, "has no weights: neither model.safetensors nor"),
    (no_config, r"has no config\.json; give the folder of a model"),
    (config_is_a_list, "must hold a JSON object, not list"),
    (config_is_deep, "is not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_bad_input_has_one_message(spoil, message, bert, tmp_path):
    spoil(bert)
    with pytest.raises(UserError, match=message) as error:
        import_run(bert, tmp_path / "run")
    assert str(error.value).isprintable()
    assert not (tmp_path / "run").exists()


FULL = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
HEADERS = [
    ({"a": 1}, "a has the unknown type null"),
    ({"a": {"dtype": ["F32"]}}, r'a has the unknown type \["F32"\]'),
    ({"a": {"dtype": "U8"}}, "a has no plain shape and place"),
    ({"a": {**FULL, "shape": [-4]}}, "a has no plain shape and place"),
    ({"a": {**FULL, "shape": "4"}}, "a has no plain shape and place"),
    ({"a": {**FULL, "data_offsets": [4]}}, "a has no plain shape and place"),
    ({"a": {**FULL, "shape": [2**70, 2**70]}}, "a has 4 bytes, which is not"),
    ({"a\n\ud800": FULL}, r"has the name 'a\\n\\ud800', which no tensor has"),
    ({"a" * 2000: FULL}, "has the name 'a{80}', which no tensor has"),
    ([], "its header is no table"),
]


@pytest.mark.parametrize(("header", "message"), HEADERS)
def test_a_header_that_lies(header, message, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(UserError, match=f"not a valid safetensors file: .*{message}") as error:
        tensors.read(path)
    assert str(error.value).isprintable()


def test_a_place_that_holds_something_else_says_where_to_go(bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import_run(bert, tmp_path / "run")
    (tmp_path / "cache" / "snapshots").mkdir(parents=True)
    for source, message in (
        ("bert-base-uncased", "is not a folder; a model is not fetched by its name on the hub: hf"),
        (
            "google/t5-small",
            "hf download google/t5-small --local-dir t5-small, and give that folder",
        ),
        ("/nowhere/bert", "is not a folder; give the one that holds config.json"),
        ("hf/config.json", "is not a folder; give the one that holds config.json"),
        ("run", "run has no config.json; it is a run: --from run"),
        ("cache", "give one of the folders in its snapshots"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            import_run(Path(source), tmp_path / "new")
    with pytest.raises(UserError, match="hf is a model of transformers: --from hf"):
        export_run(bert, tmp_path / "new")
    assert not (tmp_path / "new").exists()


ROPE = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
UNSUPPORTED = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("gpt2", {"activation_function": "quick_gelu"}, "activation_function"),
    ("t5", {"feed_forward_proj": "gated-mish"}, "feed_forward_proj"),
    ("llama", {"rope_parameters": ROPE}, 'rope_type = "llama3" is not supported'),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling"),
    ("llama", {"attention_bias": True}, "mlp_bias = false is not supported; allowed: true"),
    ("roberta", {"hidden_act": "relu"}, "hidden_act"),
    ("roberta", {"vocab_size": None}, "vocab_size = null must be a whole number above 0"),
    ("roberta", {"pad_token_id": -5}, "pad_token_id = -5 must be a whole number, 0 or more"),
    ("roberta", {"pad_token_id": 1.5}, "pad_token_id = 1.5 must be"),
    ("roberta", {"pad_token_id": float("inf")}, "pad_token_id = Infinity must be"),
]


@pytest.mark.parametrize(("name", "values", "message"), UNSUPPORTED)
def test_values_that_a_model_here_cannot_have(name, values, message, tmp_path):
    write(tmp_path / "hf", ModelSpec(**SPECS[name]))
    set_config(**values)(tmp_path / "hf")
    with pytest.raises(UserError, match=message):
        hf.read_model(tmp_path / "hf")


def test_unknown_tensors_are_kept_when_asked(bert, tmp_path):
    extra(bert)
    import_run(bert, tmp_path / "run", keep_extra=True)
    export_run(tmp_path / "run", tmp_path / "back")
    assert content(tmp_path / "back") == content(bert)
