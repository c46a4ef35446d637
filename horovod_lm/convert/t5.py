"""T5 and T5 v1.1."""

from __future__ import annotations

from horovod_lm.convert.family import THEIRS, Json, Row, Shapes, Values, linear, norm, output
from horovod_lm.spec import Kind, ModelSpec


class T5:
    """Raffel et al. (2020). The table of distances stands in each stack's first block."""

    name = "t5"
    kind: Kind = "encoder-decoder"
    prefix = ""
    # An early release has a table for cross-attention, which no code has ever read.
    kept: tuple[str, ...] = (
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    )
    old: tuple[tuple[str, str], ...] = ()

    def fields(self, config: Values, shapes: Shapes) -> Json:
        """The fields of the spec."""
        layers = config.number("num_layers", 6)
        projection = config.values.get("feed_forward_proj", "relu")
        gated = projection.startswith("gated-") if isinstance(projection, str) else False
        word = projection.removeprefix("gated-") if isinstance(projection, str) else "?"
        if gated and word == "gelu":
            word = "gelu_new"  # so it was released, and so it is read
        # As transformers reads it: it tells which of the two models this is. Whether weights are
        # tied, the tensors say.
        first = config.flag("tie_word_embeddings", True)
        return {
            "kind": "encoder-decoder",
            "vocabulary": config.number("vocab_size", 32128),
            "context": config.number("n_positions", 512),
            "width": config.number("d_model", 512),
            "layers": config.maybe("num_decoder_layers") or layers,
            "encoder_layers": layers,
            "heads": config.number("num_heads", 8),
            "head_size": config.number("d_kv", 64),
            "feed_forward": config.number("d_ff", 2048),
            "gated": gated,
            "activation": config.activation("feed_forward_proj", "relu", word),
            "norm": "rms_norm",
            "norm_epsilon": config.real("layer_norm_epsilon", 1e-6),
            "bias": False,
            "positions": "relative",
            "relative_buckets": config.number("relative_attention_num_buckets", 32),
            "relative_distance": config.number("relative_attention_max_distance", 128),
            "scale_attention": False,
            "scale_output": config.flag("scale_decoder_outputs", first),
            "dropout": config.real("dropout_rate", 0.1),
            "attention_dropout": config.real("dropout_rate", 0.1),
            "tied": "lm_head.weight" not in shapes
            or shapes.same("lm_head.weight", "shared.weight"),
        }

    def config(self, spec: ModelSpec) -> Json:
        """A config.json of `spec`."""
        word = THEIRS[spec.activation]
        if spec.gated:
            word = "gated-gelu" if spec.activation == "gelu_tanh" else f"gated-{word}"
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": self.name,
            "is_encoder_decoder": True,
            "vocab_size": spec.vocabulary,
            "n_positions": spec.context,
            "d_model": spec.width,
            "d_kv": spec.head_width,
            "d_ff": spec.inner_width,
            "num_layers": spec.encoder_layers or spec.layers,
            "num_decoder_layers": spec.layers,
            "num_heads": spec.heads,
            "feed_forward_proj": word,
            "layer_norm_epsilon": spec.norm_epsilon,
            "relative_attention_num_buckets": spec.relative_buckets,
            "relative_attention_max_distance": spec.relative_distance,
            "dropout_rate": spec.dropout,
            "tie_word_embeddings": spec.scale_output,
        }

    def rows(self, spec: ModelSpec) -> list[Row]:
        """Every tensor."""
        rows = [Row("shared.weight", ("embeddings.tokens",))]
        parts = {"q": "query", "k": "key", "v": "value", "o": "output"}
        for stack, layers in spec.stacks.items():
            rows.append(Row(f"{stack}.embed_tokens.weight", ("embeddings.tokens",), copy=True))
            table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            rows.append(Row(table, (f"{stack}.relative_bias",)))
            sites = [("SelfAttention", "attention"), ("EncDecAttention", "cross_attention")]
            for index in range(layers):
                theirs, ours = f"{stack}.block.{index}.layer", f"{stack}.{index}"
                number = 0
                for word, site in sites[: 1 + (stack == "decoder")]:
                    for short, part in parts.items():
                        name = f"{theirs}.{number}.{word}.{short}"
                        rows += linear(name, f"{ours}.{site}.{part}", False)
                    rows += norm(f"{theirs}.{number}.layer_norm", f"{ours}.{site}_norm", False)
                    number += 1
                dense = f"{theirs}.{number}.DenseReluDense"
                if spec.gated:
                    rows += linear(f"{dense}.wi_0", f"{ours}.feed_forward.gate", False)
                up = "wi_1" if spec.gated else "wi"
                rows += [
                    *linear(f"{dense}.{up}", f"{ours}.feed_forward.up", False),
                    *linear(f"{dense}.wo", f"{ours}.feed_forward.down", False),
                    *norm(f"{theirs}.{number}.layer_norm", f"{ours}.feed_forward_norm", False),
                ]
            rows += norm(f"{stack}.final_layer_norm", f"{stack}.norm", False)
        return [*rows, output("lm_head.weight", spec.tied)]

    def faults(self, spec: ModelSpec) -> list[str]:
        """Nothing."""
        return []
