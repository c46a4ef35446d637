"""What conversion needs of TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from horovod_lm.errors import UserError
from horovod_lm.spec import ModelSpec
from tf_backend.model import Transformer
from tf_backend.weights import Weights


class ConvertTools:
    """See `horovod_lm.convert.tools.ConvertTools`."""

    def legacy_weights(self, source: Path, target: Path) -> None:
        """Refuse: the file is a pickle of torch's."""
        raise UserError(
            f"{source} is a pickle of PyTorch, which TensorFlow can't read; install the torch "
            "backend, or convert the file to safetensors first"
        )

    def saved_model(
        self, spec: ModelSpec, weights: dict[str, np.ndarray], target: Path, prefix: bool = False
    ) -> None:
        """Write the model as a SavedModel in folder `target`: what it computes is in the graph, so
        TensorFlow alone runs it. Takes the tensors out of `weights`. With `prefix` it takes one:
        1 for tokens that all see."""
        model = Transformer(spec, "fp32")
        model.build()
        variables = Weights(model, spec, None, "/CPU:0")
        variables.write(variables.values, _Taken(weights))
        names = [*_inputs(spec), *(["prefix"] if prefix else [])]
        heads = ["lm", *(head.name for head in spec.task_heads)]

        @tf.function(
            autograph=False,
            input_signature=[
                {name: tf.TensorSpec([None, spec.context], tf.int32, name) for name in names}
            ],
        )
        def serve(inputs):
            if "prefix" not in inputs and _masks(spec) > _MOST_MASKS:
                # An empty prefix has each block take the mask of all, which is made once.
                inputs = {**inputs, "prefix": tf.zeros_like(inputs["tokens"])}
            hidden = model(inputs)
            logits = {
                "logits" if head == "lm" else f"{head}_logits": model.logits(
                    model.features(hidden, head), head
                )
                for head in heads
            }
            return {**hidden, **logits}

        module = tf.Module()
        module.variables_of_model = variables.values
        module.serve = serve
        # The gradients that the layers define would need their code again.
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        try:
            tf.saved_model.save(module, str(target), signatures=serve, options=options)
        except tf.errors.OpError as error:  # a full disk, for one
            raise OSError(None, error.message) from error


_MOST_MASKS = 2**28  # bytes; a graph must stay under 2 GiB


def _masks(spec: ModelSpec) -> int:
    """Bytes of the constants that keep a decoder's blocks from what comes later: half of a square
    in each."""
    return 2 * spec.context**2 * spec.stacks.get("decoder", 0)


class _Taken(Mapping):
    """Tensors that are gone once they have been read, so that they stand in memory once."""

    def __init__(self, tensors: dict[str, np.ndarray]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors.pop(name)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _inputs(spec: ModelSpec) -> list[str]:
    """What a caller gives: tokens, and 1 for tokens that are there and 0 for padding."""
    names = ["tokens", "blocks"]
    if spec.kind == "encoder-decoder":
        names += ["source", "source_blocks"]
    if spec.segments > 1:
        names += ["segments"]
        names += ["source_segments"] if spec.kind == "encoder-decoder" else []
    return names
