# SPDX-License-Identifier: Apache-2.0
"""Where the demo's package and checkpoint lie; importing this makes the miniature importable as `opensora`."""

import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "osaccel" / "demo"
CHECKPOINT = DEMO / "checkpoint"

if str(DEMO) not in sys.path:
    sys.path.insert(0, str(DEMO))
