"""Compile what both frameworks share once.

Horovod compiles its core (some 30 files) for each framework. Nothing in it depends on the framework
where both have the same C++ ABI and no GPU is involved: there both libraries take the objects of
one common library, compiled with the bundled Eigen. With a GPU each framework still compiles its
own.

Why it is compiled for each: https://github.com/horovod/horovod/pull/1199.
"""

SHARED = """# Shared by the frameworks whose flags agree
add_library(horovod_shared OBJECT EXCLUDE_FROM_ALL ${SOURCES})
target_include_directories(horovod_shared PRIVATE
    "${EIGEN_INCLUDE_PATH}" "${FLATBUFFERS_INCLUDE_PATH}")
target_compile_definitions(horovod_shared PRIVATE _GLIBCXX_USE_CXX11_ABI=1)

# TF
"""

TAKE = """if(NOT HAVE_CUDA AND NOT HAVE_ROCM AND {abi})
    set(SOURCES $<TARGET_OBJECTS:horovod_shared>)
endif()

# Create library
"""


def mend(source):
    source.edit("CMakeLists.txt", "# TF\n", SHARED)
    for framework, abi in (("tensorflow", "Tensorflow_CXX11"), ("torch", "Pytorch_CXX11")):
        source.edit(
            f"horovod/{framework}/CMakeLists.txt",
            "# Create library\n",
            TAKE.replace("{abi}", abi),
        )
