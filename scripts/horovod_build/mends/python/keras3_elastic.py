"""Refuse the elastic state of a Keras 3 model.

`TensorFlowKerasState` (the base of both `KerasState`) calls `optimizer.variables()`, a list in
Keras 3.
"""


def mend(source):
    path = "horovod/tensorflow/elastic.py"
    source.edit(
        path,
        "from horovod.common.elastic import run_fn, ObjectState\n",
        "from horovod import _keras3\nfrom horovod.common.elastic import run_fn, ObjectState\n",
    )
    source.edit(
        path,
        "    def __init__(self, model, optimizer=None, backend=None, **kwargs):\n",
        "    def __init__(self, model, optimizer=None, backend=None, **kwargs):\n"
        "        _keras3.refuse('KerasState', 'it would fail at the first commit', _keras3.ELASTIC, model)\n",
    )
