"""GPT-2."""

from __future__ import annotations

from horovod_lm.convert.family import THEIRS, Json, Row, Shapes, Values, is_tied, norm, output
from horovod_lm.spec import Kind, ModelSpec


class Gpt2:
    """Radford et al. (2019): its layers keep kernels as (inputs, outputs), and queries, keys and
    values in one."""

    name = "gpt2"
    kind: Kind = "decoder"
    prefix = "transformer."
    kept: tuple[str, ...] = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)  # masks
    old: tuple[tuple[str, str], ...] = ()

    def fields(self, config: Values, shapes: Shapes) -> Json:
        """The fields of the spec."""
        config.only("scale_attn_weights", True)
        config.only("scale_attn_by_inverse_layer_idx", False)
        config.only("add_cross_attention", False)
        return {
            "kind": "decoder",
            "vocabulary": config.number("vocab_size", 50257),
            "context": config.number("n_positions", 1024),
            "width": config.number("n_embd", 768),
            "layers": config.number("n_layer", 12),
            "heads": config.number("n_head", 12),
            "feed_forward": config.maybe("n_inner"),
            "activation": config.activation("activation_function", "gelu_new"),
            "norm_epsilon": config.real("layer_norm_epsilon", 1e-5),
            "key_bias": True,
            "dropout": config.real("resid_pdrop", 0.1),
            "attention_dropout": config.real("attn_pdrop", 0.1),
            "initial_std": config.real("initializer_range", 0.02),
            "tied": is_tied(config, shapes, "lm_head.weight", True),
        }

    def config(self, spec: ModelSpec) -> Json:
        """A config.json of `spec`."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": self.name,
            "vocab_size": spec.vocabulary,
            "n_positions": spec.context,
            "n_ctx": spec.context,
            "n_embd": spec.width,
            "n_layer": spec.layers,
            "n_head": spec.heads,
            "n_inner": spec.inner_width,
            "activation_function": THEIRS[spec.activation],
            "layer_norm_epsilon": spec.norm_epsilon,
            "resid_pdrop": spec.dropout,
            "embd_pdrop": spec.dropout,
            "attn_pdrop": spec.attention_dropout,
            "initializer_range": spec.initial_std,
            "tie_word_embeddings": spec.tied,
        }

    def rows(self, spec: ModelSpec) -> list[Row]:
        """Every tensor."""
        rows = [
            Row("transformer.wte.weight", ("embeddings.tokens",)),
            Row("transformer.wpe.weight", ("embeddings.positions",)),
        ]
        for index in range(spec.layers):
            theirs, ours = f"transformer.h.{index}", f"decoder.{index}"
            rows += norm(f"{theirs}.ln_1", f"{ours}.attention_norm")
            for kind, end in (("weight", "kernel"), ("bias", "bias")):
                three = tuple(f"{ours}.attention.{p}.{end}" for p in ("query", "key", "value"))
                rows += [
                    Row(f"{theirs}.attn.c_attn.{kind}", three, "joined"),
                    Row(f"{theirs}.attn.c_proj.{kind}", (f"{ours}.attention.output.{end}",)),
                    Row(f"{theirs}.mlp.c_fc.{kind}", (f"{ours}.feed_forward.up.{end}",)),
                    Row(f"{theirs}.mlp.c_proj.{kind}", (f"{ours}.feed_forward.down.{end}",)),
                ]
            rows += norm(f"{theirs}.ln_2", f"{ours}.feed_forward_norm")
        return [
            *rows,
            *norm("transformer.ln_f", "decoder.norm"),
            output("lm_head.weight", spec.tied),
        ]

    def faults(self, spec: ModelSpec) -> list[str]:
        """Nothing."""
        return []
