"""What may stand in an `[[objective]]` table: the names, and which options each of them reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from horovod_lm.spec import Kind

ObjectiveName = Literal[
    "causal_lm",
    "prefix_lm",
    "masked_lm",
    "next_sentence",
    "sentence_order",
    "span_corruption",
    "denoising",
    "sequence_to_sequence",
]
NAMES: tuple[str, ...] = get_args(ObjectiveName)


@dataclass(frozen=True)
class Needs:
    """What an objective asks of a config: the `kind` of model; `reads`, its options; `loss`, the
    default name of its loss; `outputs` of the head over sequences that it gets, 0 for the language
    model's head; `packed`, whether several of its examples may share a row."""

    kind: Kind
    reads: tuple[str, ...] = ()
    loss: str | None = None
    outputs: int = 0
    packed: bool = True


_TOKENS = ("smoothing", "z_loss")
NEEDS: dict[str, Needs] = {
    "causal_lm": Needs("decoder", _TOKENS, loss="lm"),
    "prefix_lm": Needs("decoder", _TOKENS),
    "masked_lm": Needs(
        "encoder", ("probability", "whole_words", "masked", "randomised", "on", *_TOKENS)
    ),
    "next_sentence": Needs("encoder", outputs=2, packed=False),
    "sentence_order": Needs("encoder", outputs=2, packed=False),
    "span_corruption": Needs("encoder-decoder", ("density", "mean_span", *_TOKENS)),
    "denoising": Needs("encoder-decoder", ("density", "mean_span", "permute", *_TOKENS)),
    "sequence_to_sequence": Needs("encoder-decoder", _TOKENS),
}
COMMON = ("name", "weight", "schedule", "source", "share", "loss")
