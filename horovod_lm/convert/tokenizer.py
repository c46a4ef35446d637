"""A run's tokenizer for transformers: how text becomes what the model was trained on, and where its
answers end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from horovod_lm.convert import folder as files
from horovod_lm.data.tokenizer import Tokenizer
from horovod_lm.errors import UserError
from horovod_lm.objectives.words import decoder_start
from horovod_lm.spec import ModelSpec

SETTINGS, GENERATION = "tokenizer_config.json", "generation_config.json"
_KEYS = {
    "eos_token": "end", "bos_token": "begin", "pad_token": "padding", "mask_token": "mask",
    "cls_token": "classify", "sep_token": "separate", "unk_token": "unknown",
}  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """`companions` are the files beside the weights, `ids` what config.json says of them."""

    companions: dict[str, bytes]
    ids: dict[str, Any]


def nothing(spec: ModelSpec) -> Exported:
    """Of a model without a tokenizer: no ids, and none of transformers' defaults either."""
    ids: dict[str, Any] = {"eos_token_id": None, "bos_token_id": None}
    if spec.kind == "encoder-decoder":
        ids |= {"pad_token_id": 0, "decoder_start_token_id": 0}
    return Exported({}, ids)


def export_tokenizer(text: bytes, spec: ModelSpec) -> Exported:
    """The tokenizer in `text`, a tokenizer.json, for a model of `spec`. Raises `UserError` if
    transformers would count positions otherwise."""
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(text.decode("utf-8")))
    special = tokenizer.special
    _check_positions(tokenizer, spec)
    names = {key: special[use] for key, use in _KEYS.items() if use in special}
    padding = tokenizer.special.get("padding")
    if padding is None and spec.kind == "encoder-decoder":
        padding = names["pad_token"] = tokenizer.end  # batches of answers need one
    segments = ["token_type_ids"] if spec.segments > 1 else []
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: tokenizer.token(number) for key, number in names.items()},
        "model_max_length": spec.context,
        "model_input_names": ["input_ids", *segments, "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.sentinels:
        sentinels = [tokenizer.token(number) for number in tokenizer.sentinels]
        settings["additional_special_tokens"] = sentinels
    companions = {files.TOKENIZER: _with_template(text, tokenizer, spec), SETTINGS: _json(settings)}
    if spec.kind == "encoder":
        first, last = (special.get(use, tokenizer.end) for use in ("classify", "separate"))
        ids: dict[str, Any] = {"bos_token_id": first, "eos_token_id": last}
    else:
        ids = {"bos_token_id": special.get("begin", tokenizer.end), "eos_token_id": tokenizer.end}
    if spec.kind == "encoder-decoder":
        ids["decoder_start_token_id"] = decoder_start(tokenizer)
    if spec.kind != "encoder":
        # As `generate` does here: the likeliest token, to the end of the text or of the context.
        ends = {"pad_token_id": tokenizer.end if padding is None else padding}
        ends |= {"max_length": spec.context, "do_sample": False}
        companions[GENERATION] = _json({**ids, **ends})
    if padding is not None and not spec.position_offset:  # RoBERTa's is given by its positions
        ids["pad_token_id"] = padding
    return Exported(companions, ids)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _check_positions(tokenizer: Tokenizer, spec: ModelSpec) -> None:
    """RoBERTa knows padding by its id, which is one less than the row of the first position, and
    counts no position for it: were that another token, it would be passed over."""
    first, padding = spec.position_offset, tokenizer.special.get("padding")
    if first and padding != first - 1:
        has = "does not exist" if padding is None else f"is {padding}"
        raise UserError(
            f"transformers counts positions from {first} (model.position_offset) where the id of "
            f"padding is {first - 1}, and in this run's tokenizer it {has}; train with "
            'data.special = ["padding", …], or with position_offset = 0'
        )


def _with_template(text: bytes, tokenizer: Tokenizer, spec: ModelSpec) -> bytes:
    """The tokenizer with the special tokens around a text that the objectives put there, unless it
    has a way of its own: encoders see a classify and a separate token, and the source of an
    encoder-decoder ends with the end-of-text token."""
    values = json.loads(text)
    if values.get("post_processor") is not None:
        return text
    first, last = (tokenizer.special.get(name) for name in ("classify", "separate"))
    if spec.kind == "encoder" and first is not None and last is not None:
        begin, end, second = tokenizer.token(first), tokenizer.token(last), int(spec.segments > 1)
        single, pair = [begin, "$A", end], [begin, "$A", end, f"$B:{second}", f"{end}:{second}"]
        used = {begin: first, end: last}
    elif spec.kind == "encoder-decoder":
        end = tokenizer.token(tokenizer.end)
        single, pair, used = ["$A", end], ["$A", end, "$B", end], {end: tokenizer.end}
    else:
        return text
    if (values.get("pre_tokenizer") or {}).get("type") == "ByteLevel":
        # A blank belongs to the word behind it, and so to the mask in its place.
        for token in values["added_tokens"]:
            token["lstrip"] |= token["id"] == tokenizer.special.get("mask")
    own = tokenizers.Tokenizer.from_str(text.decode("utf-8"))
    own.post_processor = TemplateProcessing(single, pair, list(used.items()))
    values["post_processor"] = json.loads(own.to_str())["post_processor"]
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
