"""A run's tokenizer for transformers: how text becomes what the model was trained on, and where its
answers end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from horovod_lm.config import Config
from horovod_lm.convert import folder as files
from horovod_lm.data.tokenizer import Tokenizer
from horovod_lm.errors import UserError
from horovod_lm.objectives.registry import prompt_begin
from horovod_lm.objectives.words import decoder_start
from horovod_lm.spec import ModelSpec

SETTINGS, GENERATION = "tokenizer_config.json", "generation_config.json"
_KEYS = {
    "eos_token": "end", "bos_token": "begin", "pad_token": "padding", "mask_token": "mask",
    "cls_token": "classify", "sep_token": "separate", "unk_token": "unknown",
}  # fmt: skip
# What a config.json says of tokens.
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


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


def export_tokenizer(text: bytes, config: Config) -> Exported:
    """The tokenizer in `text`, a tokenizer.json, for the model of a run with `config`. Raises
    `UserError` if transformers would count positions otherwise."""
    spec = config.model
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
    text = _with_template(text, tokenizer, config)
    companions = {files.TOKENIZER: text, SETTINGS: _json(settings)}
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


def _with_template(text: bytes, tokenizer: Tokenizer, config: Config) -> bytes:
    """The tokenizer with the special tokens around a text that the objectives put there, in place
    of its own, which no objective puts: encoders see a classify and a separate token, the source of
    an encoder-decoder ends with the end-of-text token, and a decoder that was trained on whole
    documents begins with what stood before them."""
    values, spec = json.loads(text), config.model
    first, last = (tokenizer.special.get(name) for name in ("classify", "separate"))
    start = prompt_begin(config, tokenizer) if spec.kind == "decoder" else None
    template = None
    if spec.kind == "encoder" and first is not None and last is not None:
        begin, end, second = tokenizer.token(first), tokenizer.token(last), int(spec.segments > 1)
        single, pair = [begin, "$A", end], [begin, "$A", end, f"$B:{second}", f"{end}:{second}"]
        template = TemplateProcessing(single, pair, [(begin, first), (end, last)])
    elif spec.kind == "encoder-decoder":
        end = tokenizer.token(tokenizer.end)
        template = TemplateProcessing(["$A", end], ["$A", end, "$B", end], [(end, tokenizer.end)])
    elif start is not None:
        begin = tokenizer.token(start)
        template = TemplateProcessing([begin, "$A"], [begin, "$A", "$B"], [(begin, start)])
    own = values.get("post_processor")
    if template is None and own is None:
        return text
    if template is not None and (values.get("pre_tokenizer") or {}).get("type") == "ByteLevel":
        # A blank belongs to the word behind it, and so to the mask in its place.
        for token in values["added_tokens"]:
            token["lstrip"] |= token["id"] == tokenizer.special.get("mask")
    # What trims the places of tokens, and puts none, remains.
    parts = [part for part in _parts(own) if part["type"] == "ByteLevel"]
    if template is not None:
        made = tokenizers.Tokenizer.from_str(text.decode("utf-8"))
        made.post_processor = template
        parts.append(json.loads(made.to_str())["post_processor"])
    several = {"type": "Sequence", "processors": parts}
    values["post_processor"] = parts[0] if len(parts) == 1 else several if parts else None
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _parts(processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A post-processor's own ones."""
    if processor is None:
        return []
    if processor["type"] == "Sequence":
        return [part for inner in processor["processors"] for part in _parts(inner)]
    return [processor]
