#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install what the tests need and run every test that needs no GPU. Arguments go to pytest.
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_installed dev
exec python -m pytest "$@"
