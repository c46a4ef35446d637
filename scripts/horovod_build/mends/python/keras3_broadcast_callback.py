"""Broadcast a Keras 3 model and its optimizer before the first step.

`BroadcastGlobalVariablesCallback` calls `variable.ref()` and `optimizer.variables()`, which Keras 3
does not have, and broadcasts only after the first batch, from which ranks with other weights have
taken gradients already; only then, too, is the optimizer of a rank that has not resumed built. It
broadcasts `model.variables`, among them the state of random seeds, after which dropout leaves out
the same on every rank. Where ranks have other variables, they wait for each other for ever. And
nothing tells a user of GPUs that `compile`, which asks XLA by default, must not do so here.

https://github.com/horovod/horovod/pull/1238 (asks why it is done so late)
"""

FILES = ("horovod/keras/callbacks.py", "horovod/tensorflow/keras/callbacks.py")


def mend(source):
    for path in FILES:
        source.edit(
            path,
            "_impl.BroadcastGlobalVariablesCallbackImpl, keras.callbacks.Callback):\n",
            "_keras3_callbacks.for_keras(keras, _impl.BroadcastGlobalVariablesCallbackImpl),\n"
            "                                       keras.callbacks.Callback):\n",
        )
        anchor = "        if local_variables is None:\n"
        source.edit(
            path,
            anchor,
            "        local_variables = _keras3_callbacks.tf_variables(local_variables)\n" + anchor,
        )
