"""Compile as C++17.

torch since 2.1 and TensorFlow since 2.10 need C++17 in whatever includes their headers; Horovod
asks for C++14 at its top and again for torch.

See https://github.com/horovod/horovod/issues/3996 and
https://github.com/horovod/horovod/issues/3941.
"""


def mend(source):
    old, new = "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)"
    source.edit("CMakeLists.txt", old, new)
    source.edit("horovod/torch/CMakeLists.txt", old, new)
