"""`TensorFlowState.sync` sends the variables of rank 0 where TensorFlow runs eagerly.

It broadcast them once, when the state was made, and `sync` did nothing but save: a worker that
joined went on with its own start, and the collective in its constructor met others of the ranks that
had been there before (https://github.com/horovod/horovod/issues/2550). In TensorFlow 2 the default,
the global variables, is an empty list: then the variables must be given.
"""


def mend(source):
    path = "horovod/tensorflow/elastic.py"
    source.edit(
        path,
        "        self.variables = variables or _global_variables()\n",
        "        if variables is None and _executing_eagerly():\n"
        "            raise ValueError('Name the variables: TensorFlow 2 keeps no list of them. '\n"
        "                             'For a Keras model use TensorFlowKerasState.')\n"
        "        self.variables = variables or _global_variables()\n",
    )
    source.edit(
        path,
        "        self._bcast_op = broadcast_variables(self.variables, root_rank=0)\n",
        "        self._bcast_op = (None if _executing_eagerly()\n"
        "                          else broadcast_variables(self.variables, root_rank=0))\n",
    )
    source.edit(
        path,
        "        if self.session is not None:\n            self.session.run(self._bcast_op)\n",
        "        if _executing_eagerly():\n"
        "            _elastic_variables.broadcast_from_rank_0(self.variables)\n"
        "        elif self.session is not None:\n"
        "            self.session.run(self._bcast_op)\n",
    )
    # numpy() of a tf.Variable may share its memory, and the next step then changes what was saved.
    source.edit(
        path,
        "    def _to_numpy(self, var):\n        return var.numpy()\n",
        "    def _to_numpy(self, var):\n        return var.numpy().copy()\n",
    )
