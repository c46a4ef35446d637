"""Let `hvd.allreduce` and `hvd.grouped_allreduce` take Keras 3 variables.

The dtype of a Keras 3 variable is a string, of which compression asks whether it `is_floating`.

TensorFlow's own functions fail on it alike: see
https://github.com/tensorflow/tensorflow/issues/79523 and
https://github.com/tensorflow/tensorflow/issues/76771.
"""


def mend(source):
    path = "horovod/tensorflow/__init__.py"
    anchor = "from horovod.tensorflow.compression import Compression\n"
    source.edit(path, anchor, "from horovod import _keras3\n" + anchor)
    anchor = "    if isinstance(tensor, tf.IndexedSlices):\n        # TODO"
    source.edit(path, anchor, "    tensor = _keras3.tf_variable(tensor)\n" + anchor)
    anchor = "    # Split list of tensors into indexed slices and normal tensors"
    source.edit(path, anchor, "    tensors = [_keras3.tf_variable(t) for t in tensors]\n" + anchor)
