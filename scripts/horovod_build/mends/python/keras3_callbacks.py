"""Refuse Horovod's Keras callbacks under Keras 3 when they are made.

They use `optimizer.lr`, `optimizer.variables()`, `variable.ref()` and `keras.backend.constant`,
none of which Keras 3 has. The broadcast would fail after the first batch, half done; the average of
metrics after the first epoch; the learning rate at the first batch; a changed momentum is not seen
by the compiled step at all.
"""

PATH = "horovod/_keras/callbacks.py"
REFUSALS = (
    (
        "BroadcastGlobalVariablesCallback",
        "BroadcastGlobalVariablesCallbackImpl, self).__init__(*args)\n",
        "it would fail after the first batch",
        "BROADCAST",
    ),
    (
        "MetricAverageCallback",
        "MetricAverageCallbackImpl, self).__init__(*args)\n",
        "it would fail after the first epoch",
        "AVERAGE",
    ),
    (
        "LearningRateScheduleCallback",
        "LearningRateScheduleCallbackImpl, self).__init__(*args)\n",
        "optimizer.lr is gone and a changed momentum is not seen",
        "LEARNING_RATE",
    ),
)


def mend(source):
    source.edit(
        PATH,
        "import horovod.tensorflow as hvd\n",
        "import horovod.tensorflow as hvd\nfrom horovod import _keras3\n",
    )
    for name, anchor, why, instead in REFUSALS:
        call = f"        _keras3.refuse('{name}', '{why}', _keras3.{instead}, self)\n"
        source.edit(PATH, "super(" + anchor, "super(" + anchor + call)
