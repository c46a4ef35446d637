#!/usr/bin/env bash
# What makes ranks fast, for the job scripts beside this one, which source it. `horovod-lm train`
# sets the rest itself; these must be there before a rank starts, or before MPI does.
# A value that is already set stays.
export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1} # waiting ranks give up cores
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}    # keep freed memory: fewer
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}   # page faults in each step
export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-1}                         # in all threads
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}        # huge pages
