"""Compile PyTorch's side as C++20 where torch asks for it.

The headers of torch 2.14 and later refuse to be compiled as anything older. What both frameworks
share stays C++17.

The same with the step before it: https://github.com/horovod/horovod/issues/4014
"""


def mend(source):
    anchor = "# PyTorch SOURCES\n"
    source.edit(
        "horovod/torch/CMakeLists.txt",
        anchor,
        'if(NOT Pytorch_VERSION VERSION_LESS "2.14")\n'
        "    set(CMAKE_CXX_STANDARD 20)\n"
        "endif()\n\n" + anchor,
    )
