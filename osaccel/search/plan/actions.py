# SPDX-License-Identifier: Apache-2.0
"""What a window of steps may do, and the plan that a choice for every window makes; pure, no torch.

An action is a cycle of step kinds that repeats through a window. Windows are as long as all cycles fit into, so every
window begins with a full step and its error depends little on what its neighbours do.
"""

import math
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Sequence, Tuple

from osaccel.plan import Correction, Plan

FULL, HALF, SKIP = "full", "half", "skip"
# Network work of a step, in halves of one forward.
UNITS = {FULL: 2, HALF: 1, SKIP: 0}


class Action(NamedTuple):
    """A cycle of step kinds, by a name that says it."""

    name: str
    cycle: Tuple[str, ...]


def _halves(length: int) -> Action:
    return Action(f"c{length}", (FULL, *(HALF,) * (length - 1)))


def _skips(length: int) -> Action:
    return Action(f"s{length}", (FULL, *(SKIP,) * (length - 1)))


def _skips_with_halves(length: int, halves: int = 1) -> Action:
    skips = (SKIP,) * (length - 1)
    return Action(f"s{length}c{halves + 1}", (FULL, *skips, *(HALF, *skips) * halves))


PLAIN = Action("full", (FULL,))
ACTIONS = (
    PLAIN,
    *(_halves(length) for length in (2, 3, 4, 6, 12)),
    *(_skips(length) for length in (2, 3, 4, 6)),
    *(_skips_with_halves(length) for length in (2, 3, 6)),
    *(_skips_with_halves(length, halves=2) for length in (2, 4)),
    *(_skips_with_halves(length, halves=3) for length in (3,)),
    _skips_with_halves(2, halves=5),
)
# The least length that holds every cycle a whole number of times, and one for short schedules.
LENGTHS = (12, 6)
FEWEST_WINDOWS = 4
# The share of the steps, the noisiest, that is always computed in full. There a stand-in leaves nearly every video as
# it is and turns one in some dozens into another, which a search that sees a few calls cannot see.
SETTLING = 0.1


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of `length` steps; what is before the first is computed in full."""

    first: int
    length: int
    count: int

    @classmethod
    def of(cls, steps: int) -> "Windows":
        """As many as fit behind the steps that settle a video, of the longest length that gives enough of them."""
        for length in LENGTHS:
            count = (steps - max(1, math.ceil(SETTLING * steps))) // length
            if count >= FEWEST_WINDOWS:
                break
        return cls(steps - length * count, length, count)

    def steps(self, window: int) -> range:
        begin = self.first + window * self.length
        return range(begin, begin + self.length)


def actions_for(length: int, guided: bool, can_skip: bool) -> List[Action]:
    """The actions whose cycle fits a window and that this run can take."""
    return [
        action
        for action in ACTIONS
        if length % len(action.cycle) == 0
        and (guided or HALF not in action.cycle)
        and (can_skip or SKIP not in action.cycle)
    ]


def kinds(action: Action, windows: Windows, window: int) -> Dict[int, str]:
    """What each step of a window is under an action; the generation's last step is always computed in full."""
    steps = windows.steps(window)
    found = {step: action.cycle[place % len(action.cycle)] for place, step in enumerate(steps)}
    last = windows.first + windows.count * windows.length - 1
    return {step: FULL if step == last else kind for step, kind in found.items()}


def units(action: Action, windows: Windows, window: int) -> int:
    """Network work of a window under an action."""
    return sum(UNITS[kind] for kind in kinds(action, windows, window).values())


def plan_of(chosen: Sequence[Action], windows: Windows, corrector: float = 1.0) -> Plan:
    """The plan in which every window takes its action."""
    steps = windows.first + windows.count * windows.length
    by_step: Dict[int, str] = {}
    for window, action in enumerate(chosen):
        by_step.update(kinds(action, windows, window))
    skip = tuple(step for step, kind in by_step.items() if kind == SKIP)
    return Plan(
        steps=steps,
        skip=skip,
        conditional_only=tuple(step for step, kind in by_step.items() if kind == HALF),
        correction=Correction(corrector=corrector if skip else 0.0),
    )
