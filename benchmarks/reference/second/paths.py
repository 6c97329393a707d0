# SPDX-License-Identifier: Apache-2.0
"""Where the second model's checkpoint lies; importing this makes the pipeline importable as `opensora`."""

from pathlib import Path

from ..paths import DEMO  # noqa: F401  (puts the pipeline on sys.path)

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"
