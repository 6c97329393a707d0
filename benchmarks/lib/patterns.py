# SPDX-License-Identifier: Apache-2.0
"""Each family of savings alone, at its best even pattern: saved steps spread evenly behind a first stretch in full.

How long that stretch is, calibration calls decide, for every family and every work anew.
"""

import math
from typing import Callable, Dict, List

from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration
from benchmarks.lib.own import masked, planned
from benchmarks.lib.quality import errors
from osaccel.plan import UNDER_SKIP, Plan, Region

# The stretches that are tried, as shares of the steps; two steps at least, for forecasts go along two.
STRETCHES = (0.0, 0.05, 0.1, 0.2, 0.3)

# `family(work, num_blocks, steps, first)`: its plan within this work; ValueError where there is none.
Family = Callable[[float, int, int, int], Plan]


def conditional_only(work: float, num_blocks: int, steps: int, first: int) -> Plan:
    return Plan(steps=steps, conditional_only=_saved(2 * (1 - work), steps, first))


def skipped(work: float, num_blocks: int, steps: int, first: int) -> Plan:
    """Corrected."""
    return Plan(steps=steps, skip=_saved(1 - work, steps, first), correction=UNDER_SKIP)


def region_forecast(work: float, num_blocks: int, steps: int, first: int) -> Plan:
    """All blocks but the first, along the two newest deltas."""
    saved = _saved((1 - work) * num_blocks / (num_blocks - 1), steps, first)
    return masked(Region(1, num_blocks), [step not in saved for step in range(steps)], forecast=True)


FAMILIES: Dict[str, Family] = {
    "conditional only": conditional_only, "skipped, corrected": skipped, "region forecast": region_forecast
}  # fmt: skip


def _saved(share: float, steps: int, first: int) -> "tuple[int, ...]":
    """This share of the steps, rounded up, evenly over those behind `first`, the last step not among them."""
    count, room = math.ceil(share * steps - 1e-9), steps - 1 - first
    if count > room:
        raise ValueError(f"{count} of {steps} steps would have to be saved, {room} can be")
    return tuple(first + int((number + 0.5) * room / count) for number in range(count))


def plans(family: Family, work: float, num_blocks: int, steps: int) -> List[Plan]:
    """The family's even patterns of this work, by their first stretch; ValueError where there is none."""
    found, reason = [], ""
    for first in sorted({max(2, round(share * steps)) for share in STRETCHES}):
        try:
            found.append(family(work, num_blocks, steps, first))
        except ValueError as error:
            reason = reason or str(error)
    if not found:
        raise ValueError(reason)
    return found


def best(calibration: Calibration, name: str, work: float) -> Arm:
    """The family's even pattern that errs least on calibration calls."""
    found = plans(FAMILIES[name], work, calibration.num_blocks, calibration.steps)
    squares = [mean_square(calibration, planned(calibration.bench, plan)) for plan in found]
    return planned(calibration.bench, found[squares.index(min(squares))], f"{name}, even", f"{name}, even")


def mean_square(calibration: Calibration, arm: Arm) -> float:
    """Squared relative error of the final latents, the mean over calibration calls; kept by the arm's key."""

    def measure() -> float:
        bench, cases = calibration.bench, calibration.cases
        found = errors(bench.run(arm, cases), bench.plain(cases))
        return sum(error**2 for error in found) / len(found)

    return calibration.learned(arm.key, measure)
