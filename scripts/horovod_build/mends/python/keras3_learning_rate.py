"""Let the learning-rate callbacks work with Keras 3 optimizers.

They use `optimizer.lr`, which Keras 3 does not have. Momentum correction changed
`optimizer.momentum` for one batch, a number that a compiled step has read already. The steps of an
epoch were each rank's own: with uneven shards every rank had another learning rate.

https://github.com/horovod/horovod/issues/1573 (schedules of Keras instead)
"""

FILES = ("horovod/keras/callbacks.py", "horovod/tensorflow/keras/callbacks.py")


def mend(source):
    for path in FILES:
        for name in ("LearningRateSchedule", "LearningRateWarmup"):
            source.edit(
                path,
                f"(_impl.{name}CallbackImpl, keras.callbacks.Callback):\n",
                f"(_keras3_callbacks.for_keras(keras, _impl.{name}CallbackImpl),\n"
                f"{'':{len(f'class {name}Callback(')}}keras.callbacks.Callback):\n",
            )
