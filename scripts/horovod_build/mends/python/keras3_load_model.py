"""Refuse `hvd.load_model` for Keras 3.

It registers wrapped optimizers under lower-case names, which Keras 3 never looks up: the model
comes back with a plain optimizer, and nothing is reduced.
"""


def mend(source):
    source.edit(
        "horovod/_keras/__init__.py",
        "custom_optimizers, custom_objects, legacy_opts=False):\n",
        "custom_optimizers, custom_objects, legacy_opts=False):\n"
        "    _keras3.refuse('hvd.load_model', 'the optimizer would not be distributed',\n"
        "                   'Load with keras.models.load_model. ' + _keras3.CUSTOM_LOOP,\n"
        "                   keras.optimizers.Optimizer)\n",
    )
