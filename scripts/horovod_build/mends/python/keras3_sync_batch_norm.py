"""Give Keras 3 a SyncBatchNormalization that is exact.

Horovod's passes `fused`, which Keras 3 does not take, and overrides `_moments`, which has another
signature there. Its `call(*args, **kwargs)` hides `training` and `mask` from Keras 3, so that it
would never train; all layers have the same name, so that a model could have only one. Under every
Keras it averages the ranks' moments, whatever their batches' sizes and masks, and loses small
variances of large means in the difference of squares. With a number of ranks fixed in the traced
step it is wrong after an elastic reset.

https://github.com/horovod/horovod/issues/2066
https://github.com/horovod/horovod/issues/2100
"""

from horovod_build.mending import ADDED

CHOICE = """

if _keras3.of_keras3(tf.keras.layers.BatchNormalization):
  from horovod._keras3_sync_batch_norm import SyncBatchNormalization
"""


def mend(source):
    name = "_keras3_sync_batch_norm.py"
    source.add(f"horovod/{name}", (ADDED / name).read_text(encoding="utf-8"))
    path = "horovod/tensorflow/sync_batch_norm.py"
    source.edit(
        path, "import tensorflow as tf\n", "import tensorflow as tf\nfrom horovod import _keras3\n"
    )
    anchor = "    except AttributeError:\n      pass\n    return outputs"
    source.edit(path, anchor, anchor + CHOICE)
