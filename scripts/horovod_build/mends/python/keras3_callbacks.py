"""Refuse Horovod's Keras callbacks under Keras 3 when they are made.

They use `optimizer.lr`, `optimizer.variables()`, `variable.ref()` and `keras.backend.constant`,
none of which Keras 3 has. The broadcast would fail after the first batch, half done; the average of
metrics after the first epoch; the learning rate at the first batch, and a changed momentum is not
seen by the compiled step. `UpdateBatchStateCallback` shortens the first epoch after a reset by way
of `params['steps']`, which Keras 3 does not read: it would repeat batches.
"""

REFUSALS = (
    ("callbacks", "BroadcastGlobalVariables", "it would fail after a batch", "BROADCAST"),
    ("callbacks", "MetricAverage", "it would fail after an epoch", "AVERAGE"),
    ("callbacks", "LearningRateSchedule", "optimizer.lr is gone", "LEARNING_RATE"),
    ("elastic", "UpdateBatchState", "it would repeat batches after a reset", "ELASTIC"),
)


def mend(source):
    source.edit(
        "horovod/_keras/callbacks.py",
        "import horovod.tensorflow as hvd\n",
        "import horovod.tensorflow as hvd\nfrom horovod import _keras3\n",
    )
    source.edit(
        "horovod/_keras/elastic.py",
        "class CommitStateCallbackImpl(object):\n",
        "from horovod import _keras3\n\n\nclass CommitStateCallbackImpl(object):\n",
    )
    for file, name, why, instead in REFUSALS:
        anchor = f"        super({name}CallbackImpl, self).__init__(*args)\n"
        refusal = f"        _keras3.refuse(type(self).__name__, '{why}', _keras3.{instead}, self)\n"
        source.edit(f"horovod/_keras/{file}.py", anchor, anchor + refusal)
