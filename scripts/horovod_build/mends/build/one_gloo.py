"""Compile Gloo once.

Horovod compiles a second Gloo as C++17 for TensorFlow; the first is C++11, and nothing in Gloo's
headers depends on the standard, so that both frameworks can link the same one.

The second came with https://github.com/horovod/horovod/pull/3558.
"""


def mend(source):
    source.edit("horovod/tensorflow/CMakeLists.txt", "compatible17_gloo", "gloo")
    source.edit("CMakeLists.txt", "(DEFINED Tensorflow_CXX17 AND Tensorflow_CXX17)", "FALSE")
