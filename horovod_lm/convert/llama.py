"""Llama and models that are stored as Llama is."""

from __future__ import annotations

from horovod_lm.convert.family import (
    THEIRS,
    Json,
    Row,
    Shapes,
    Values,
    is_tied,
    linear,
    norm,
    output,
)
from horovod_lm.spec import Kind, ModelSpec

_MOST = 65536  # our longest context: rotary positions have no table in the file


class Llama:
    """Touvron et al. (2023)."""

    name = "llama"
    kind: Kind = "decoder"
    prefix = "model."
    kept: tuple[str, ...] = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
    old: tuple[tuple[str, str], ...] = ()

    def fields(self, config: Values, shapes: Shapes) -> Json:
        """The fields of the spec."""
        bias = config.flag("attention_bias", False)
        config.only("mlp_bias", bias)
        config.only("pretraining_tp", 1, None)
        config.only("rope_scaling", None)
        rope = config.values.get("rope_parameters") or {}
        if not isinstance(rope, dict):
            raise config.unsupported("rope_parameters", rope, ("a table",))
        Values(rope).only("rope_type", "default")
        Values(rope).only("partial_rotary_factor", 1.0, None)
        width, heads = config.number("hidden_size", 4096), config.number("num_attention_heads", 32)
        return {
            "kind": "decoder",
            "vocabulary": config.number("vocab_size", 32000),
            "context": min(config.number("max_position_embeddings", 2048), _MOST),
            "width": width,
            "layers": config.number("num_hidden_layers", 32),
            "heads": heads,
            "key_value_heads": config.maybe("num_key_value_heads"),
            "head_size": config.maybe("head_dim") or width // heads,
            "feed_forward": config.number("intermediate_size", 11008),
            "gated": True,
            "activation": config.activation("hidden_act", "silu"),
            "norm": "rms_norm",
            "norm_epsilon": config.real("rms_norm_eps", 1e-6),
            "positions": "rotary",
            "rotary_base": Values({**config.values, **rope}).real("rope_theta", 10000.0),
            "bias": bias,
            "key_bias": bias,
            "dropout": 0.0,
            "attention_dropout": config.real("attention_dropout", 0.0),
            "initial_std": config.real("initializer_range", 0.02),
            "tied": is_tied(config, shapes, "lm_head.weight", False),
        }

    def config(self, spec: ModelSpec) -> Json:
        """A config.json of `spec`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": self.name,
            "vocab_size": spec.vocabulary,
            "max_position_embeddings": spec.context,
            "hidden_size": spec.width,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "num_key_value_heads": spec.key_value_count,
            "head_dim": spec.head_width,
            "intermediate_size": spec.inner_width,
            "hidden_act": THEIRS[spec.activation],
            "rms_norm_eps": spec.norm_epsilon,
            # Versions before 5 read the first, later ones the second.
            "rope_theta": spec.rotary_base,
            "rope_parameters": {"rope_theta": spec.rotary_base, "rope_type": "default"},
            "attention_bias": spec.bias,
            "mlp_bias": spec.bias,
            "attention_dropout": spec.attention_dropout,
            "initializer_range": min(spec.initial_std, 1.0),  # more is refused there
            "tie_word_embeddings": spec.tied,
        }

    def rows(self, spec: ModelSpec) -> list[Row]:
        """Every tensor."""
        rows = [Row("model.embed_tokens.weight", ("embeddings.tokens",))]
        attention = {"q": "query", "k": "key", "v": "value", "o": "output"}
        for index in range(spec.layers):
            theirs, ours = f"model.layers.{index}", f"decoder.{index}"
            rows += norm(f"{theirs}.input_layernorm", f"{ours}.attention_norm", False)
            for short, part in attention.items():
                name = f"{ours}.attention.{part}"
                rows += linear(f"{theirs}.self_attn.{short}_proj", name, spec.bias)
            name = f"{theirs}.post_attention_layernorm"
            rows += norm(name, f"{ours}.feed_forward_norm", False)
            for part in ("gate", "up", "down"):
                name = f"{ours}.feed_forward.{part}"
                rows += linear(f"{theirs}.mlp.{part}_proj", name, spec.bias)
        return [
            *rows,
            *norm("model.norm", "decoder.norm", False),
            output("lm_head.weight", spec.tied),
        ]

    def faults(self, spec: ModelSpec) -> list[str]:
        """What makes it another model, or one that its config class refuses."""
        if spec.width % spec.heads:
            return [f"heads = {spec.heads} that do not divide width = {spec.width}"]
        return []
