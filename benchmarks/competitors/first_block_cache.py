# SPDX-License-Identifier: Apache-2.0
"""First-Block-Cache (ParaAttention), as diffusers has it: the change of block 0's residual decides."""

from typing import Any

from benchmarks.competitors import diffusers_hooks
from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration, Competitor, tuned

NAME = "diffusers FirstBlockCache"


def attach(pipeline: Any, steps: int, warmup: int, threshold: float) -> Any:
    """It has no warm-up of its own, so it is switched on after that many steps."""
    from diffusers.hooks import FirstBlockCacheConfig

    return diffusers_hooks.attach(pipeline, FirstBlockCacheConfig(threshold), steps, enable_at=warmup)


def at(calibration: Calibration, work: float) -> Arm:
    given = (calibration.steps, calibration.warmup)
    return tuned(calibration, NAME, lambda own, value: attach(own, *given, value), work)


COMPETITOR = Competitor(NAME, at, "diffusers")
