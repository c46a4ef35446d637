#!/usr/bin/env bash
# Sets up whatever is missing, then checks everything: lint, types, scripts, tests.
#   scripts/test.sh [--system] [arguments for pytest]
# It touches only .venv and the project's caches. --system, as root on Debian or Ubuntu, also
# installs system packages and tests Slurm and several hosts, with daemons in namespaces of their
# own that are ended and removed afterwards.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$here"

# Two files at a time, in this order: jobs of several ranks often wait, and what is left for the end
# should be short.
folders=(tests/ranks tests/browser tests/parity tests/unit)
side_by_side=(-n 2 --dist loadfile --no-loadscope-reorder)
stages=5
if [[ "${1:-}" == --system ]]; then
    shift
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        echo "--system installs Debian packages: run it as root where apt-get is." >&2
        exit 2
    fi
    folders=(tests/cluster "${folders[@]}")
    system=yes
    stages=6
fi

number=0
check() {
    local what=$1 begun=$SECONDS
    shift
    number=$((number + 1))
    echo "[$number/$stages] $what"
    if ! "$@"; then
        echo "[$number/$stages] $what: failed; the lines above say where." >&2
        exit 1
    fi
    echo "      done in $((SECONDS - begun)) s"
}

install_system_packages() {
    local policy=/usr/sbin/policy-rc.d wanted=() package
    for package in slurm-wlm munge libpmix2 libpmix-dev iproute2 openssh-server chromium; do
        dpkg -s "$package" >/dev/null 2>&1 || wanted+=("$package")
    done
    [[ ${#wanted[@]} -gt 0 ]] || return 0
    echo "      installing ${wanted[*]}"
    apt-get update -qq || return 1
    (
        if [[ ! -e $policy ]]; then
            # Keeps the packages from starting their daemons on this machine.
            trap 'rm -f "$policy"' EXIT
            printf '#!/bin/sh\nexit 101\n' >$policy
            chmod +x $policy
        fi
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "${wanted[@]}" >/dev/null
    )
}

lint_scripts() {
    shellcheck scripts/*.sh scripts/cluster/* docker/*.sh .ci/run && hadolint docker/Dockerfile
}

scripts/set_up.sh --test
export PATH="$here/.venv/bin:$PATH"
[[ -z "${system:-}" ]] || check "System packages" install_system_packages
check "Lint" ruff check .
check "Format" ruff format --check .
check "Types" mypy
check "Scripts and Dockerfile" lint_scripts
# Last, so that pytest's summary is the last line; its exit status is this script's.
echo "[$((number + 1))/$stages] Tests: ${folders[*]}"
exec python -m pytest -q "${side_by_side[@]}" "${folders[@]}" "$@"
