# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sourced by the scripts beside it: a virtual environment with the package installed, and `python` on the PATH.
#
# Uses the active virtual environment, or makes .venv in the repository. torch is installed first and pinned for
# everything after it, so that no dependency replaces it. Set TORCH_INDEX_URL to the package index of the torch
# build you want (without a GPU: PyTorch's CPU index saves gigabytes), TORCH_VERSION for another version.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $*" >&2
    exit 2
}

find_python() {
    local candidate
    for candidate in python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 with venv found; install one (Debian and Ubuntu: apt install python3 python3-venv)"
}

# ensure_installed EXTRA: install the package, with [EXTRA] unless empty, once per state of pyproject.toml.
ensure_installed() {
    local extra="$1" target stamp state
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            local base
            base="$(find_python)"
            echo "creating a virtual environment in .venv with $base"
            "$base" -m venv .venv || fail "cannot create .venv; free some space or install python3-venv"
        fi
        # shellcheck disable=SC1091
        source .venv/bin/activate
    fi
    python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
        fail "the active virtual environment has $(python --version); this package needs Python 3.11 or 3.12"
    target=".${extra:+[$extra]}"
    stamp="$VIRTUAL_ENV/.sparsek-megatron${extra:+-$extra}"
    state="$(pwd) $(cksum <pyproject.toml)"
    [ "$(cat "$stamp" 2>/dev/null || true)" = "$state" ] && return
    echo "installing into $VIRTUAL_ENV (minutes, mostly downloads)"
    if ! python -W ignore -c 'import torch' 2>/dev/null; then
        python -m pip install -qq ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
            "torch==${TORCH_VERSION:-2.13.0}" || fail "pip could not install torch; see its message above"
    fi
    python -W ignore -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' >"$VIRTUAL_ENV/constraints.txt"
    python -m pip install -qq -c "$VIRTUAL_ENV/constraints.txt" -e "$target" ||
        fail "pip could not install the package; see its message above"
    echo "$state" >"$stamp"
}
