"""Let the distributed tapes take Keras 3 variables.

`DistributedGradientTape.gradient`, `register_local_source` (with it
`PartialDistributedGradientTape`) and `get_local_and_global_gradients` call `.ref()`, which a Keras
3 variable does not have; its `value` is the tf.Variable, which has. Sources may be one variable or
nested, as those of tf.GradientTape: gradients come back in that structure, and are paired with the
sources as they were given.

See https://github.com/horovod/horovod/issues/4290.
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
        "            given = sources\n"
        "            sources = [_keras3.tf_variable(s) for s in tf.nest.flatten(sources)]\n"
        "            gradients = super(self.__class__, self).gradient(target, sources, output_gradients)\n",
    )
    source.edit(
        path,
        "                return [s2g[s.ref()] for s in sources]\n",
        "                return tf.nest.pack_sequence_as(given, [s2g[s.ref()] for s in sources])\n",
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
