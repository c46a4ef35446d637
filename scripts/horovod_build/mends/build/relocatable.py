"""Look for MPI relative to the wheel, not at the build's own path.

The linker writes the build environment's absolute paths into the libraries. The wheel outlives that
environment in a cache and is installed into others, so that it must find their libmpi.
HOROVOD_LM_RPATH, set by the build, is the whole search path; torch and TensorFlow are in memory
before Horovod's libraries are loaded.
"""


def mend(source):
    source.edit(
        "CMakeLists.txt",
        "set(CMAKE_CXX_EXTENSIONS OFF)\n",
        "set(CMAKE_CXX_EXTENSIONS OFF)\n"
        "set(CMAKE_BUILD_WITH_INSTALL_RPATH TRUE)\n"
        "set(CMAKE_INSTALL_RPATH $ENV{HOROVOD_LM_RPATH})\n",
    )
