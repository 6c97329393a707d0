# SPDX-License-Identifier: Apache-2.0
"""Installing into the upstream's environment, with its pins, brings osaccel and wrapt and changes nothing."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_a_dry_run_of_pip_would_install_nothing_else():
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-build-isolation", str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    (line,) = re.findall(r"^Would install (.*)", result.stdout, re.MULTILINE)
    assert {name.split("-")[0] for name in line.split()} - {"wrapt"} == {"osaccel"}
