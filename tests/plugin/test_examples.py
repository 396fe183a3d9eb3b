# SPDX-License-Identifier: Apache-2.0
"""The examples of the plug-in run as they are written."""

from __future__ import annotations

import re
import subprocess
import sys

from programs import REPOSITORY, environment

EXAMPLES = REPOSITORY / "examples"


def test_minimal_layer_runs_on_cpu_and_stays_minimal() -> None:
    script = EXAMPLES / "minimal_layer.py"
    assert len(script.read_text().splitlines()) <= 30
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    found = re.search(r"output \(1024, 1, 512\), scorer gradient norm (\S+)", done.stdout)
    assert found and float(found.group(1)) > 0
