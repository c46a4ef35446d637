#!/usr/bin/env bash
# Finds a Python that serves and lets set_up.py make .venv with it: what quickstart.sh and test.sh
# begin with. PYTHON=/path/to/python chooses another one.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

serves() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

if [[ -n "${PYTHON:-}" ]]; then
    if ! serves "$PYTHON"; then
        echo "PYTHON=$PYTHON is not a Python 3.11, 3.12 or 3.13 that runs. Give the path of one." >&2
        exit 2
    fi
    exec "$PYTHON" "$here/set_up.py" --choose "$@"
fi
for python in "$here/../.venv/bin/python" python3 python3.13 python3.12 python3.11; do
    if serves "$python"; then
        exec "$python" "$here/set_up.py" "$@"
    fi
done
cat >&2 <<'MESSAGE'
There is no Python 3.11, 3.12 or 3.13 on the PATH. Install one, for example with
  apt-get install python3 python3-venv python3-dev    (Debian 12, Ubuntu 24.04)
  dnf install python3.12 python3.12-devel             (Fedora, RHEL)
or name yours: PYTHON=/path/to/python3.12 scripts/quickstart.sh
MESSAGE
exit 2
