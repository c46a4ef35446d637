"""Let the distributed tapes take Keras 3 variables.

`DistributedGradientTape.gradient`, `register_local_source` (with it
`PartialDistributedGradientTape`) and `get_local_and_global_gradients` call `.ref()`, which a Keras
3 variable does not have; its `value` is the tf.Variable, which has. What the caller gets back is
paired with the sources as they were given.
"""


def mend(source):
    path = "horovod/tensorflow/__init__.py"
    source.edit(
        path,
        "from horovod.tensorflow import elastic\n",
        "from horovod import _keras3\nfrom horovod.tensorflow import elastic\n",
    )
    source.edit(
        path,
        "            gradients = super(self.__class__, self).gradient(target, sources, output_gradients)\n",
        "            sources = [_keras3.tf_variable(s) for s in sources]\n"
        "            gradients = super(self.__class__, self).gradient(target, sources, output_gradients)\n",
    )
    source.edit(
        path,
        '            gradient."""\n            if _IS_TF2:\n                self._local_sources.add(source.ref())\n',
        '            gradient."""\n            if _IS_TF2:\n'
        "                self._local_sources.add(_keras3.tf_variable(source).ref())\n",
    )
    source.edit(
        path,
        "is_local_source = s.ref() in self._local_sources",
        "is_local_source = _keras3.tf_variable(s).ref() in self._local_sources",
    )
