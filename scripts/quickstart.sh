#!/usr/bin/env bash
# Sets everything up in .venv, then trains the same small model in PyTorch and in TensorFlow, each
# on two ranks over Horovod, and compares them. Arguments go to `horovod-lm compare`.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

"$here/scripts/set_up.sh"
echo "[5/5] Comparing PyTorch with TensorFlow on two ranks: configs/quickstart.toml"
exec "$here/.venv/bin/horovod-lm" compare "$here/configs/quickstart.toml" -np 2 "$@"
