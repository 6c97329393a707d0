# SPDX-License-Identifier: Apache-2.0
"""The demo as a first-time user runs it."""

import re
import subprocess
import sys


def test_fast_demo_prints_its_table_and_writes_its_pictures(tmp_path):
    command = [sys.executable, "-m", "osaccel.demo", "--fast", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if re.search(r"\d+\.\d+x", line)]
    assert [row.split("  ")[0] for row in rows] == [
        "plain, 100 steps",
        "DiT cache",
        "50 searched steps",
        "cache + 50 steps",
    ]
    computed, total = map(int, re.search(r"(\d+) of (\d+)", rows[1]).groups())
    assert 0 < computed < total == 1200
    decibels = float(rows[1].split(str(total))[1].split()[0])
    # Far from equal noise (about 10 dB), not bit-identical (infinite).
    assert 15 < decibels < 100
    assert (tmp_path / "side_by_side.mp4").stat().st_size > 1000
    assert (tmp_path / "side_by_side.png").read_bytes().startswith(b"\x89PNG")
