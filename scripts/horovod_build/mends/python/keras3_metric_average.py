"""Add up what Keras 3 metrics have counted instead of averaging their values.

`MetricAverageCallback` calls `keras.backend.constant`, which Keras 3 does not have. What it did
before was a mean of the ranks' means, which is wrong where ranks have different numbers of
examples, and it reached only the callbacks after it. `hvd.allreduce_metrics` does the same after an
`evaluate` or a loop of one's own.

https://github.com/horovod/horovod/issues/1095
https://github.com/horovod/horovod/issues/2440
https://github.com/horovod/horovod/issues/600
"""

FILES = ("horovod/keras/callbacks.py", "horovod/tensorflow/keras/callbacks.py")
EXPORTS = {
    "horovod/keras/__init__.py": "from horovod.keras import callbacks, elastic\n",
    "horovod/tensorflow/keras/__init__.py": (
        "from horovod.tensorflow.keras import callbacks, elastic\n"
    ),
}


def mend(source):
    for path in FILES:
        source.edit(
            path,
            "(_impl.MetricAverageCallbackImpl, keras.callbacks.Callback):\n",
            "(_keras3_callbacks.for_keras(keras, _impl.MetricAverageCallbackImpl),\n"
            "                            keras.callbacks.Callback):\n",
        )
    for path, anchor in EXPORTS.items():
        source.edit(
            path, anchor, anchor + "from horovod._keras3_callbacks import allreduce_metrics\n"
        )
