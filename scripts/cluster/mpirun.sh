#!/usr/bin/env bash
# Trains on the hosts of a hostfile (lines such as "node1 slots=4") with Open MPI, over ssh without
# a password. The project's folder, its .venv included, and `output` must be at the same path on
# every host. Start it again to go on from the newest checkpoint.
project=/path/to/horovod_lm
config=$project/configs/small.toml
output=$project/runs/small
backend=torch    # or tensorflow
hostfile=$project/hosts
ranks=4
network=         # the interface between the hosts, such as eth0; empty: MPI chooses

set -euo pipefail
# shellcheck source=scripts/cluster/settings.sh
source "$project/scripts/cluster/settings.sh"
options=(-np "$ranks" --hostfile "$hostfile" --map-by slot --bind-to none)
for name in OMPI_MCA_mpi_yield_when_idle \
    MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ MALLOC_ARENA_MAX GLIBC_TUNABLES; do
    options+=(-x "$name")
done
if [[ -n $network ]]; then
    options+=(--mca btl_tcp_if_include "$network" --prtemca prte_if_include "$network")
fi
exec "$project/.venv/bin/mpirun" "${options[@]}" "$project/.venv/bin/horovod-lm" train "$config" \
    --backend "$backend" --output "$output" --resume
