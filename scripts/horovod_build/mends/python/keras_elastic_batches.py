"""Count the batches of an interrupted epoch right: `UpdateBatchStateCallback`.

`state.batch` was the number of the last batch, not how many were done, and began again at 0 in an
epoch that went on after a reset; and that epoch was to be shortened by way of `params['steps']`,
which Keras does not read. So batches were trained twice after each reset. With Keras 3 on
TensorFlow `fit` stops an epoch early by `model.stop_training`, which this sets for a moment.

Other counts of these callbacks were wrong after a reset before:
https://github.com/horovod/horovod/issues/2285.
"""

from horovod_build.mending import ADDED


def mend(source):
    name = "_keras_elastic_batches.py"
    source.add(f"horovod/{name}", (ADDED / name).read_text(encoding="utf-8"))
    source.edit(
        "horovod/_keras/elastic.py",
        "class UpdateEpochStateCallbackImpl(object):\n",
        "from horovod._keras_elastic_batches import UpdateBatchStateCallbackImpl\n\n\n"
        "class UpdateEpochStateCallbackImpl(object):\n",
    )
