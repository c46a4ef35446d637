"""BERT, RoBERTa and DistilBERT."""

from __future__ import annotations

from horovod_lm.convert.family import (
    THEIRS,
    Json,
    Row,
    Shapes,
    Values,
    is_tied,
    labels,
    linear,
    norm,
    output,
    task_head,
)
from horovod_lm.spec import Kind, ModelSpec

_ENCODER = {"kind": "encoder", "norm_placement": "post", "key_bias": True}


def _classifier(config: Values, shapes: Shapes, beside: str) -> list[Json]:
    """The classifier. Where no architecture is named, one over sequences is known by the layer
    `beside` it."""
    what = config.architecture
    token = what.endswith("ForTokenClassification") if what else f"{beside}.weight" not in shapes
    return task_head(shapes, "classifier", "classifier", "token" if token else "sequence")


def _architecture(spec: ModelSpec, family: str) -> str:
    heads = {head.name: head.over for head in spec.task_heads}
    if "classifier" in heads:
        what = "Token" if heads["classifier"] == "token" else "Sequence"
        return f"{family}For{what}Classification"
    if "qa_outputs" in heads:
        return f"{family}ForQuestionAnswering"
    if not spec.head_transform:
        return f"{family}Model"
    if family == "Bert" and spec.pooler and "next_sentence" in heads:
        return "BertForPreTraining"
    return f"{family}ForMaskedLM"


def _faults(spec: ModelSpec) -> list[str]:
    """Heads over sequences stand on a pooler, the output layer behind a transform, and some heads
    have two outputs."""
    found = [
        f"{head.outputs} outputs of the head {head.name}, which has 2 there"
        for head in spec.task_heads
        if head.name in ("next_sentence", "qa_outputs") and head.outputs != 2
    ]
    if not spec.pooler and any(head.over == "sequence" for head in spec.task_heads):
        found.append("pooler = False under a head over sequences")
    if not spec.head_transform and (spec.head_bias or not spec.tied):
        found.append(
            f"head_transform = False with {'head_bias = True' if spec.tied else 'tied = False'}"
        )
    return found


def _output(theirs: str, bias: str, spec: ModelSpec) -> list[Row]:
    """The output layer, with its bias under two names. Where it is not tied they are two tensors,
    and the layer's own is read."""
    own = Row(f"{theirs}.bias", ("heads.lm.bias",), copy=spec.tied)
    return [
        output(f"{theirs}.weight", spec.tied),
        *([] if spec.tied else [own]),
        Row(bias, ("heads.lm.bias",), unread=not spec.tied),
        *([own] if spec.tied else []),
    ]


class Bert:
    """Devlin et al. (2019): `BertModel` and those with heads on it."""

    name = "bert"
    kind: Kind = "encoder"
    prefix = "bert."
    kept: tuple[str, ...] = (r"bert\.embeddings\.(position_ids|token_type_ids)",)
    old: tuple[tuple[str, str], ...] = (
        (".LayerNorm.gamma", ".LayerNorm.weight"),
        (".LayerNorm.beta", ".LayerNorm.bias"),
    )
    head = "cls.predictions.decoder"
    vocabulary = 30522  # where config.json does not say

    def fields(self, config: Values, shapes: Shapes) -> Json:
        """The fields of the spec."""
        config.only("position_embedding_type", "absolute", None)
        for key in ("is_decoder", "add_cross_attention"):
            config.only(key, False)
        offset = self.offset(config)
        return {
            **_ENCODER,
            "vocabulary": config.number("vocab_size", self.vocabulary),
            "context": config.number("max_position_embeddings", 512) - offset,
            "width": config.number("hidden_size", 768),
            "layers": config.number("num_hidden_layers", 12),
            "heads": config.number("num_attention_heads", 12),
            "feed_forward": config.number("intermediate_size", 3072),
            "activation": config.activation("hidden_act", "gelu"),
            "norm_epsilon": config.real("layer_norm_eps", 1e-12),
            "segments": config.number("type_vocab_size", 2),
            "position_offset": offset,
            "dropout": config.real("hidden_dropout_prob", 0.1),
            "attention_dropout": config.real("attention_probs_dropout_prob", 0.1),
            "initial_std": config.real("initializer_range", 0.02),
            "tied": is_tied(config, shapes, f"{self.head}.weight", True),
            **self.heads(config, shapes),
        }

    def offset(self, config: Values) -> int:
        """Rows of the position table before the first position."""
        return 0

    def heads(self, config: Values, shapes: Shapes) -> Json:
        """The fields of what stands on the stack."""
        return {
            "pooler": "bert.pooler.dense.weight" in shapes,
            "head_transform": "cls.predictions.transform.dense.weight" in shapes,
            "head_bias": "cls.predictions.bias" in shapes or f"{self.head}.bias" in shapes,
            "task_heads": [
                *task_head(shapes, "cls.seq_relationship", "next_sentence", "sequence"),
                *_classifier(config, shapes, "bert.pooler.dense"),
                *task_head(shapes, "qa_outputs", "qa_outputs", "token"),
            ],
        }

    def config(self, spec: ModelSpec) -> Json:
        """A config.json of `spec`."""
        return {
            "architectures": [_architecture(spec, "Bert")],
            "model_type": self.name,
            "vocab_size": spec.vocabulary,
            "max_position_embeddings": spec.context + spec.position_offset,
            "hidden_size": spec.width,
            "num_hidden_layers": spec.stacks.get("encoder", spec.layers),
            "num_attention_heads": spec.heads,
            "intermediate_size": spec.inner_width,
            "hidden_act": THEIRS[spec.activation],
            "layer_norm_eps": spec.norm_epsilon,
            "type_vocab_size": spec.segments or 1,
            "hidden_dropout_prob": spec.dropout,
            "attention_probs_dropout_prob": spec.attention_dropout,
            "initializer_range": spec.initial_std,
            "position_embedding_type": "absolute",
            "tie_word_embeddings": spec.tied,
            **labels(spec, "classifier", "qa_outputs"),
        }

    def rows(self, spec: ModelSpec) -> list[Row]:
        """Every tensor."""
        prefix = self.prefix
        rows = [
            Row(f"{prefix}embeddings.word_embeddings.weight", ("embeddings.tokens",)),
            Row(f"{prefix}embeddings.position_embeddings.weight", ("embeddings.positions",)),
            Row(f"{prefix}embeddings.token_type_embeddings.weight", ("embeddings.segments",)),
            *norm(f"{prefix}embeddings.LayerNorm", "embeddings.norm"),
        ]
        for index in range(spec.stacks["encoder"]):
            theirs, ours = f"{prefix}encoder.layer.{index}", f"encoder.{index}"
            for part in ("query", "key", "value"):
                rows += linear(f"{theirs}.attention.self.{part}", f"{ours}.attention.{part}")
            rows += [
                *linear(f"{theirs}.attention.output.dense", f"{ours}.attention.output"),
                *norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm"),
                *linear(f"{theirs}.intermediate.dense", f"{ours}.feed_forward.up"),
                *linear(f"{theirs}.output.dense", f"{ours}.feed_forward.down"),
                *norm(f"{theirs}.output.LayerNorm", f"{ours}.feed_forward_norm"),
            ]
        return rows + self.head_rows(spec)

    def faults(self, spec: ModelSpec) -> list[str]:
        """What makes it another model."""
        return _faults(spec)

    def head_rows(self, spec: ModelSpec) -> list[Row]:
        """The tensors of what stands on the stack."""
        theirs = "cls.predictions"
        return [
            *linear("bert.pooler.dense", "pooler"),
            *linear(f"{theirs}.transform.dense", "heads.lm.transform"),
            *norm(f"{theirs}.transform.LayerNorm", "heads.lm.norm"),
            *_output(self.head, f"{theirs}.bias", spec),
            *linear("cls.seq_relationship", "heads.next_sentence"),
            *linear("classifier", "heads.classifier"),
            *linear("qa_outputs", "heads.qa_outputs"),
        ]


class Roberta(Bert):
    """Liu et al. (2019): positions begin behind the row of padding."""

    name = "roberta"
    kind: Kind = "encoder"
    prefix = "roberta."
    kept: tuple[str, ...] = (r"roberta\.embeddings\.(position_ids|token_type_ids)",)
    head = "lm_head.decoder"
    vocabulary = 50265

    def offset(self, config: Values) -> int:
        """The id of padding is a row of the table too."""
        return config.index("pad_token_id", 1) + 1

    def heads(self, config: Values, shapes: Shapes) -> Json:
        """The fields of what stands on the stack."""
        transform = "lm_head.dense.weight" in shapes
        if transform:
            config.only("hidden_act", "gelu")  # the head's is fixed, and ours is the blocks'
        dense, over = "classifier.dense.weight" in shapes, "sequence"
        if dense:
            found = task_head(shapes, "classifier.out_proj", "classifier", over)
        else:
            found = _classifier(config, shapes, "roberta.pooler.dense")
        return {
            "pooler": "roberta.pooler.dense.weight" in shapes or dense,
            "head_transform": transform,
            "head_bias": "lm_head.bias" in shapes or f"{self.head}.bias" in shapes,
            "task_heads": [*found, *task_head(shapes, "qa_outputs", "qa_outputs", "token")],
        }

    def config(self, spec: ModelSpec) -> Json:
        """A config.json of `spec`."""
        return {
            **super().config(spec),
            "architectures": [_architecture(spec, "Roberta")],
            "pad_token_id": max(spec.position_offset - 1, 0),
        }

    def head_rows(self, spec: ModelSpec) -> list[Row]:
        """The tensors of what stands on the stack."""
        heads = {head.name: head.over for head in spec.task_heads}
        # Its classifier over sequences has a dense layer and tanh of its own, which is a pooler.
        dense = heads.get("classifier") == "sequence"
        return [
            *linear("classifier.dense" if dense else "roberta.pooler.dense", "pooler"),
            *linear("lm_head.dense", "heads.lm.transform"),
            *norm("lm_head.layer_norm", "heads.lm.norm"),
            *_output(self.head, "lm_head.bias", spec),
            *linear("classifier.out_proj" if dense else "classifier", "heads.classifier"),
            *linear("qa_outputs", "heads.qa_outputs"),
        ]


class DistilBert:
    """Sanh et al. (2019): no segments, no pooler."""

    name = "distilbert"
    kind: Kind = "encoder"
    prefix = "distilbert."
    kept: tuple[str, ...] = (r"distilbert\.embeddings\.position_ids",)
    old: tuple[tuple[str, str], ...] = ()
    head = "vocab_projector"

    def fields(self, config: Values, shapes: Shapes) -> Json:
        """The fields of the spec."""
        return {
            **_ENCODER,
            "vocabulary": config.number("vocab_size", 30522),
            "context": config.number("max_position_embeddings", 512),
            "width": config.number("dim", 768),
            "layers": config.number("n_layers", 6),
            "heads": config.number("n_heads", 12),
            "feed_forward": config.number("hidden_dim", 3072),
            "activation": config.activation("activation", "gelu"),
            "norm_epsilon": 1e-12,
            "dropout": config.real("dropout", 0.1),
            "attention_dropout": config.real("attention_dropout", 0.1),
            "initial_std": config.real("initializer_range", 0.02),
            "tied": is_tied(config, shapes, f"{self.head}.weight", True),
            "head_transform": "vocab_transform.weight" in shapes,
            "head_bias": f"{self.head}.bias" in shapes,
            "task_heads": [
                *_classifier(config, shapes, "pre_classifier"),
                *task_head(shapes, "qa_outputs", "qa_outputs", "token"),
            ],
        }

    def config(self, spec: ModelSpec) -> Json:
        """A config.json of `spec`."""
        return {
            "architectures": [_architecture(spec, "DistilBert")],
            "model_type": self.name,
            "vocab_size": spec.vocabulary,
            "max_position_embeddings": spec.context,
            "dim": spec.width,
            "n_layers": spec.stacks.get("encoder", spec.layers),
            "n_heads": spec.heads,
            "hidden_dim": spec.inner_width,
            "activation": THEIRS[spec.activation],
            "dropout": spec.dropout,
            "attention_dropout": spec.attention_dropout,
            "initializer_range": spec.initial_std,
            "sinusoidal_pos_embds": False,
            "tie_word_embeddings": spec.tied,
            **labels(spec, "classifier", "qa_outputs"),
        }

    def rows(self, spec: ModelSpec) -> list[Row]:
        """Every tensor."""
        prefix = self.prefix
        rows = [
            Row(f"{prefix}embeddings.word_embeddings.weight", ("embeddings.tokens",)),
            Row(f"{prefix}embeddings.position_embeddings.weight", ("embeddings.positions",)),
            *norm(f"{prefix}embeddings.LayerNorm", "embeddings.norm"),
        ]
        names = {"q": "query", "k": "key", "v": "value", "out": "output"}
        for index in range(spec.stacks["encoder"]):
            theirs, ours = f"{prefix}transformer.layer.{index}", f"encoder.{index}"
            for short, part in names.items():
                rows += linear(f"{theirs}.attention.{short}_lin", f"{ours}.attention.{part}")
            rows += [
                *norm(f"{theirs}.sa_layer_norm", f"{ours}.attention_norm"),
                *linear(f"{theirs}.ffn.lin1", f"{ours}.feed_forward.up"),
                *linear(f"{theirs}.ffn.lin2", f"{ours}.feed_forward.down"),
                *norm(f"{theirs}.output_layer_norm", f"{ours}.feed_forward_norm"),
            ]
        return [
            *rows,
            *linear("vocab_transform", "heads.lm.transform"),
            *norm("vocab_layer_norm", "heads.lm.norm"),
            output(f"{self.head}.weight", spec.tied),
            Row(f"{self.head}.bias", ("heads.lm.bias",)),
            *linear("classifier", "heads.classifier"),
            *linear("qa_outputs", "heads.qa_outputs"),
        ]

    def faults(self, spec: ModelSpec) -> list[str]:
        """What makes it another model."""
        return _faults(spec)
