"""The elastic state of a Keras 3 model: `TensorFlowKerasState` and both `KerasState`.

`optimizer.variables()` is a call of a list in Keras 3: the state failed when it was made. Beyond
that, an optimizer that is not built yet has no slots: a worker that joined had fewer variables than
the others and waited for ever (https://github.com/horovod/horovod/issues/2652, where a step of
training before the state is made was the way around it). So the state builds the optimizer. What is
sent at `sync` is matched by place, since Keras counts names up in a process that makes another
model; the states of seeds are kept by each rank, or dropout would be the same on all.
"""


def mend(source):
    path = "horovod/tensorflow/elastic.py"
    source.edit(
        path,
        "from packaging import version\n",
        "from packaging import version\n\nfrom horovod import _keras3\n",
    )
    source.edit(
        path,
        "        self.optimizer = optimizer or model.optimizer\n",
        "        self.optimizer = optimizer or getattr(model, 'optimizer', None)\n"
        "        if _keras3.of_keras3(model):\n"
        "            _elastic_variables.build(model, self.optimizer)\n",
    )
    source.edit(
        path,
        "def _broadcast_model(model, optimizer, backend):\n    if _executing_eagerly():\n",
        "def _broadcast_model(model, optimizer, backend):\n"
        "    if _keras3.of_keras3(model):\n"
        "        _elastic_variables.broadcast_from_rank_0(\n"
        "            model.weights + _elastic_variables.of_optimizer(optimizer))\n"
        "    elif _executing_eagerly():\n",
    )
    source.edit(
        path,
        "    def _save_model(self):\n        if _executing_eagerly():\n",
        "    def _save_model(self):\n"
        "        if _keras3.of_keras3(self.model):\n"
        "            self._saved_variables = _elastic_variables.copy(\n"
        "                self.model.variables + _elastic_variables.of_optimizer(self.optimizer))\n"
        "        elif _executing_eagerly():\n",
    )
    source.edit(
        path,
        "    def _load_model(self):\n        if _executing_eagerly():\n",
        "    def _load_model(self):\n"
        "        if _keras3.of_keras3(self.model):\n"
        "            _elastic_variables.assign(self._saved_variables)\n"
        "        elif _executing_eagerly():\n",
    )
