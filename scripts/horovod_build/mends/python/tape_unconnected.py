"""Let the distributed tapes take `unconnected_gradients`, as tf.GradientTape does.

Without it a variable that one rank's loss does not reach has no gradient there, and the other ranks
wait for its part of the sum for ever; tf.UnconnectedGradients.ZERO makes it zero.

See https://github.com/horovod/horovod/issues/2120.
"""


def mend(source):
    path = "horovod/tensorflow/__init__.py"
    source.edit(
        path,
        "def gradient(self, target, sources, output_gradients=None, use_generic_names=False):\n",
        "def gradient(self, target, sources, output_gradients=None, use_generic_names=False,\n"
        "                     unconnected_gradients=tf.UnconnectedGradients.NONE):\n",
    )
    source.edit(
        path,
        "super(self.__class__, self).gradient(target, sources, output_gradients)\n",
        "super(self.__class__, self).gradient(\n"
        "                target, sources, output_gradients, unconnected_gradients)\n",
    )
