"""Refuse `hvd.SyncBatchNormalization` under Keras 3.

Keras 3 takes no `fused`, and its `_moments` has another signature: without the refusal the layer
could not be made, and with `fused` merely dropped it would normalise each rank by its own batch.
"""


def mend(source):
    path = "horovod/tensorflow/sync_batch_norm.py"
    source.edit(
        path, "import tensorflow as tf\n", "import tensorflow as tf\nfrom horovod import _keras3\n"
    )
    source.edit(
        path,
        "  def __init__(self, fused=False, **kwargs):\n",
        "  def __init__(self, fused=False, **kwargs):\n"
        "    _keras3.refuse('hvd.SyncBatchNormalization', 'each rank would be normalised by its own batch',\n"
        "                   'Use LayerNormalization, or BatchNormalization with a large batch on each rank.',\n"
        "                   self)\n",
    )
