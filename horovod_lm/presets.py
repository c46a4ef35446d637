"""Well-known Transformers as specs: a family is nothing but values of `ModelSpec`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from horovod_lm.errors import UserError
from horovod_lm.spec import ModelSpec


@dataclass(frozen=True)
class Preset:
    """`fields` of a spec; `parameters` as `published`, which names where, and whether that number
    is exact or rounded."""

    fields: dict[str, Any]
    parameters: int
    published: str

    @property
    def spec(self) -> ModelSpec:
        """The validated spec."""
        return ModelSpec(**self.fields)


def _transformer(width: int, heads: int, feed_forward: int, dropout: float) -> dict[str, Any]:
    # The shared vocabulary of about 37,000 byte pairs is that of English to German.
    return {
        "kind": "encoder-decoder", "vocabulary": 37000, "context": 512, "width": width,
        "layers": 6, "heads": heads, "feed_forward": feed_forward, "norm_placement": "post",
        "norm_epsilon": 1e-6, "embedding_norm": False, "activation": "relu",
        "positions": "sinusoidal", "dropout": dropout, "attention_dropout": dropout,
    }  # fmt: skip


def _bert(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "kind": "encoder", "vocabulary": 30522, "context": 512, "width": width, "layers": layers,
        "heads": heads, "norm_placement": "post", "norm_epsilon": 1e-12, "segments": 2,
        "key_bias": True, "pooler": True, "head_transform": True, "head_bias": True,
    }  # fmt: skip


def _gpt2(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "vocabulary": 50257, "context": 1024, "width": width, "layers": layers, "heads": heads,
        "activation": "gelu_tanh", "key_bias": True,
    }  # fmt: skip


def _t5(width: int, layers: int, heads: int, feed_forward: int) -> dict[str, Any]:
    return {
        "kind": "encoder-decoder", "vocabulary": 32128, "context": 512, "width": width,
        "layers": layers, "heads": heads, "head_size": 64, "feed_forward": feed_forward,
        "norm": "rms_norm", "norm_epsilon": 1e-6, "bias": False, "activation": "relu",
        "positions": "relative", "scale_attention": False, "scale_output": True,
    }  # fmt: skip


def _t5_v1_1(width: int, layers: int, heads: int, feed_forward: int) -> dict[str, Any]:
    return {
        **_t5(width, layers, heads, feed_forward),
        "activation": "gelu_tanh", "gated": True, "tied": False, "scale_output": False,
    }  # fmt: skip


_ROBERTA = {
    **_bert(768, 12, 12), "vocabulary": 50265, "norm_epsilon": 1e-5, "segments": 1,
    "position_offset": 2, "pooler": False,
}  # fmt: skip

_LLAMA = {
    "norm": "rms_norm", "norm_epsilon": 1e-5, "bias": False, "activation": "silu", "gated": True,
    "positions": "rotary", "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip

_VASWANI = "Vaswani et al. (2017), table 3"
_DEVLIN = "Devlin et al. (2019), section 3; with the head of masked words"
_RADFORD = "the released weights of GPT-2, openai/gpt-2"
_RAFFEL = "the released weights of T5, google-research/text-to-text-transfer-transformer"

PRESETS = {
    "transformer-base": Preset(_transformer(512, 8, 2048, 0.1), 65_000_000, _VASWANI),
    "transformer-big": Preset(_transformer(1024, 16, 4096, 0.3), 213_000_000, _VASWANI),
    "bert-tiny": Preset(_bert(128, 2, 2), 4_400_000, "Turc et al. (2019), table 1"),
    "bert-base": Preset(_bert(768, 12, 12), 110_000_000, _DEVLIN),
    "bert-large": Preset(_bert(1024, 24, 16), 340_000_000, _DEVLIN),
    "roberta-base": Preset(_ROBERTA, 125_000_000, "Liu et al. (2019), the released weights"),
    "gpt2": Preset(_gpt2(768, 12, 12), 124_439_808, _RADFORD),
    "gpt2-medium": Preset(_gpt2(1024, 24, 16), 354_823_168, _RADFORD),
    "gpt2-large": Preset(_gpt2(1280, 36, 20), 774_030_080, _RADFORD),
    "gpt2-xl": Preset(_gpt2(1600, 48, 25), 1_557_611_200, _RADFORD),
    "t5-small": Preset(_t5(512, 6, 8, 2048), 60_506_624, _RAFFEL),
    "t5-base": Preset(_t5(768, 12, 12, 3072), 222_903_552, _RAFFEL),
    "t5-v1.1-small": Preset(_t5_v1_1(512, 8, 6, 1024), 76_961_152, _RAFFEL),
    "t5-v1.1-base": Preset(_t5_v1_1(768, 12, 12, 2048), 247_577_856, _RAFFEL),
    "llama-small": Preset(
        {
            **_LLAMA, "vocabulary": 49152, "context": 2048, "width": 576, "layers": 30,
            "heads": 9, "key_value_heads": 3, "feed_forward": 1536,
        },
        134_515_008,
        "the released weights of SmolLM-135M",
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset `name`. Raises `UserError` if there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f'there is no preset "{name}"; known: {", ".join(PRESETS)}{hint}')
    return PRESETS[name]
