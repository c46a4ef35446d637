"""A run's model for TensorFlow alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from horovod_lm.convert.folder import TOKENIZER
from horovod_lm.convert.run import own_tokenizer, read_run, tools
from horovod_lm.convert.target import claim_new, new_folder
from horovod_lm.objectives.registry import prompt_is_prefix


def export_saved_model(
    run: Path, target: Path, backend: str = "tensorflow", log: Callable[[str], None] = print
) -> None:
    """Write the newest checkpoint of a run as a TensorFlow SavedModel, which runs without this
    package, with the run's tokenizer in its `assets.extra`.

    Its signature takes `tokens` (B, context) int32 and `blocks` of the same, 1 for tokens and 0 for
    padding, with `source` and `source_blocks` for an encoder-decoder, `segments` where there are
    some, and `prefix`, 1 for tokens that all see, where prompts were seen so in training. It gives
    hidden states by stack, `logits`, and those of task heads as `NAME_logits`.
    """
    claim_new(target)
    config, weights = read_run(run)
    text = own_tokenizer(run, config, log)
    with new_folder(target, "saved_model.pb") as partial:
        tools(backend).saved_model(config.model, weights, partial, prompt_is_prefix(config))
        if text is not None:
            extra = partial / "assets.extra"
            extra.mkdir()
            (extra / TOKENIZER).write_bytes(text)
