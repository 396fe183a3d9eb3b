#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install what the tests need and run every test that needs no GPU, two at a time. Arguments go to pytest; -n 0 runs them
# one at a time in one process, which tests of a GPU need.
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_installed dev
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two tests at a time, of several processes each
exec python -m pytest -n 2 --dist loadscope --no-loadscope-reorder "$@"
