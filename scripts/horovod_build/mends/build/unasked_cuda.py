"""Build for the CPU where CUDA was not asked for and is not whole.

The torch that PyPI serves is a CUDA build. Horovod then compiles for CUDA as soon as an nvcc is
found, and fails where the toolkit's headers or its runtime library are not there. CUDA that was
asked for (HOROVOD_GPU_OPERATIONS) is still required.

See https://github.com/horovod/horovod/issues/3607.
"""


def mend(source):
    anchor = 'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n'
    source.edit(
        "cmake/Modules/FindPytorch.cmake",
        anchor,
        anchor + "if(Pytorch_CUDA AND NOT HAVE_CUDA)\n"
        "    find_package(CUDAToolkit QUIET)\n"
        "    if(NOT CUDAToolkit_FOUND)\n"
        '        message(STATUS "No CUDA toolkit: building PyTorch\'s side for the CPU")\n'
        "        set(Pytorch_CUDA FALSE)\n"
        "    endif()\n"
        "endif()\n",
    )
