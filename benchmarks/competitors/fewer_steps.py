# SPDX-License-Identifier: Apache-2.0
"""Fewer plain steps, on the Brownian motion of the plain run: what every other way to save work has to beat."""

from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration, Competitor

NAME = "fewer steps"


def of(count: int, plain: int) -> Arm:
    """`count` steps instead of `plain`."""
    return Arm(steps=count, name=f"plain {count}", family=NAME, work=count / plain, key=f"{NAME}, {count}")


def at(calibration: Calibration, work: float) -> Arm:
    count = calibration.budget(work) // calibration.num_blocks
    if count < 2:
        raise ValueError(f"{work:g} of {calibration.steps} steps are not two steps")
    return of(count, calibration.steps)


COMPETITOR = Competitor(NAME, at)
