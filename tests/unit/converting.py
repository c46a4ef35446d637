"""Models of transformers in small, for the tests of conversion."""

from __future__ import annotations

import json

import numpy as np
import pytest

from horovod_lm.convert import hf, tensors
from horovod_lm.spec import ModelSpec

SMALL = {"vocabulary": 300, "context": 12, "width": 8, "layers": 2, "heads": 2}
ENCODER = {
    **SMALL, "kind": "encoder", "norm_placement": "post", "norm_epsilon": 1e-12, "key_bias": True,
    "head_transform": True, "head_bias": True,
}  # fmt: skip
T5 = {
    **SMALL, "kind": "encoder-decoder", "encoder_layers": 3, "head_size": 6, "feed_forward": 20,
    "norm": "rms_norm", "bias": False, "activation": "relu", "positions": "relative",
    "scale_attention": False, "scale_output": True,
}  # fmt: skip
NEXT = {"name": "next_sentence", "outputs": 2}
SPECS = {
    "bert": {**ENCODER, "segments": 2, "pooler": True, "task_heads": [NEXT]},
    "bert untied": {**ENCODER, "segments": 2, "tied": False},
    "bert bare": {
        **ENCODER, "segments": 2, "pooler": True, "head_transform": False, "head_bias": False,
    },
    "bert tokens": {
        **ENCODER, "segments": 2,
        "task_heads": [{"name": "classifier", "outputs": 5, "over": "token"}],
    },
    "roberta": {**ENCODER, "segments": 1, "position_offset": 2, "norm_epsilon": 1e-5},
    "roberta classifier": {
        **ENCODER, "segments": 1, "position_offset": 2, "norm_epsilon": 1e-5, "pooler": True,
        "head_transform": False, "head_bias": False,
        "task_heads": [{"name": "classifier", "outputs": 3}],
    },
    "distilbert": ENCODER,
    "gpt2": {**SMALL, "activation": "gelu_tanh", "key_bias": True},
    "gpt2 without key bias": SMALL,
    "t5": T5,
    "t5 v1.1": {
        **T5, "gated": True, "activation": "gelu_tanh", "tied": False, "scale_output": False,
    },
    "llama": {
        **SMALL, "norm": "rms_norm", "bias": False, "activation": "silu", "gated": True,
        "positions": "rotary", "key_value_heads": 1, "tied": False, "rotary_base": 5e5,
    },
    "llama biased": {
        **SMALL, "norm": "rms_norm", "activation": "silu", "gated": True, "positions": "rotary",
    },
}  # fmt: skip


def weights_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {p.name: generator.normal(size=p.shape).astype(np.float32) for p in spec.parameters}


def write(folder, spec: ModelSpec, weights=None) -> hf.Plan:
    """A folder as transformers would have it."""
    plan = hf.plan(spec)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(plan.config)
    hf.write_weights(folder, plan.family, spec, weights or weights_of(spec), plan.headers, {})
    return plan


def rewrite(folder, change):
    """Change the table of tensors in model.safetensors: name -> (type, array of bytes, shape)."""
    path = folder / "model.safetensors"
    table = {
        name: (t.dtype, np.array(t.data), t.shape) for name, t in tensors.read(path).tensors.items()
    }
    table = change(table) or table
    header = tensors.header_of({n: (dtype, shape) for n, (dtype, _, shape) in table.items()})
    tensors.write(path, header, lambda name, _: table[name][1])


def content(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def shard(folder, count=3):
    """Cut model.safetensors into shards with an index."""
    path = folder / "model.safetensors"
    table = tensors.read(path).tensors
    names, index = sorted(table), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        own = names[number::count]
        header = tensors.header_of({n: (table[n].dtype, table[n].shape) for n in own})
        tensors.write(folder / file, header, lambda name, _: table[name].data)
        index |= dict.fromkeys(own, file)
    path.unlink()
    total = sum(t.data.nbytes for t in table.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return index


def set_config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.fixture
def bert(tmp_path):
    write(tmp_path / "hf", ModelSpec(**SPECS["bert"]))
    return tmp_path / "hf"
