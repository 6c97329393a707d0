# SPDX-License-Identifier: Apache-2.0
"""What a window of steps may do, and the plan that a choice for every window makes; pure, no torch.

An action is a cycle of step kinds that repeats through a window. Windows are as long as all cycles fit into, so every
window begins with a full step and its error depends little on what its neighbours do.
"""

from dataclasses import dataclass
from typing import Container, Dict, List, NamedTuple, Sequence, Tuple

from osaccel.plan import UNDER_SKIP, Correction, Plan, Region
from osaccel.search.limits import SHORTEST_WINDOW
from osaccel.search.places import even_places
from osaccel.search.planned import settling

FULL, HALF, SKIP, FORECAST, REUSE = "full", "half", "skip", "forecast", "reuse"
# What an action may save with; each has its own kind of error. A plan has one of the last two.
FAMILIES = (HALF, SKIP, FORECAST, REUSE)
# Steps that an even plan computes at least: the first and the last.
FEWEST = 2
# Where blocks are forecast or reused the first is computed: through it the latents of now come in.
COMPUTED_BLOCKS = 1


class Action(NamedTuple):
    """A cycle of step kinds, by a name that says it."""

    name: str
    cycle: Tuple[str, ...]


def _halves(length: int) -> Action:
    return Action(f"c{length}", (FULL, *(HALF,) * (length - 1)))


def _skips(length: int) -> Action:
    return Action(f"s{length}", (FULL, *(SKIP,) * (length - 1)))


def _regions(kind: str, length: int) -> Action:
    return Action(f"{kind[0]}{length}", (FULL, *(kind,) * (length - 1)))


def _skips_with_halves(length: int, halves: int = 1) -> Action:
    skips = (SKIP,) * (length - 1)
    return Action(f"s{length}c{halves + 1}", (FULL, *skips, *(HALF, *skips) * halves))


def _skips_with_regions(kind: str, length: int, times: int = 1) -> Action:
    skips = (SKIP,) * (length - 1)
    return Action(f"s{length}{kind[0]}{times + 1}", (FULL, *skips, *(kind, *skips) * times))


PLAIN = Action("full", (FULL,))
ACTIONS = (
    PLAIN,
    *(_halves(length) for length in (2, 3, 4, 6, 12)),
    *(_skips(length) for length in (2, 3, 4, 6)),
    *(_regions(kind, length) for kind in (FORECAST, REUSE) for length in (2, 3, 4, 6)),
    *(_skips_with_regions(kind, length) for kind in (FORECAST, REUSE) for length in (2, 3)),
    *(_skips_with_regions(kind, 2, times=2) for kind in (FORECAST, REUSE)),
    *(_skips_with_halves(length) for length in (2, 3, 6)),
    *(_skips_with_halves(length, halves=2) for length in (2, 4)),
    *(_skips_with_halves(length, halves=3) for length in (3,)),
    _skips_with_halves(2, halves=5),
)
BY_NAME = {action.name: action for action in ACTIONS}
# The mildest action of each family: errors add up while they are small.
REFERENCES = {HALF: "c2", SKIP: "s2", FORECAST: "f2", REUSE: "r2"}
# The least length that holds every cycle a whole number of times, and one for short schedules.
LENGTHS = (12, SHORTEST_WINDOW)
FEWEST_WINDOWS = 4


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of `length` steps through `blocks` blocks; before the first one see `leading`.

    early: how many of them begin among the steps that settle a video.
    """

    first: int
    length: int
    count: int
    blocks: int
    early: int = 0

    @classmethod
    def of(cls, steps: int, blocks: int) -> "Windows":
        """As many as fit behind the first step, of the longest length that gives enough of them."""
        for length in LENGTHS:
            count = (steps - 1) // length
            if count >= FEWEST_WINDOWS:
                break
        first = steps - length * count
        early = sum(begin < settling(steps) for begin in range(first, steps, length))
        return cls(first, length, count, blocks, early)

    @property
    def total(self) -> int:
        """Steps of the generation."""
        return self.first + self.length * self.count

    @property
    def settled(self) -> int:
        """The first step behind the early windows."""
        return self.first + self.length * self.early

    def steps(self, window: int) -> range:
        begin = self.first + window * self.length
        return range(begin, begin + self.length)


def actions_for(length: int, kinds: Container[str]) -> List[Action]:
    """The actions whose cycle fits a window and that save only in these ways."""
    return [
        action
        for action in ACTIONS
        if length % len(action.cycle) == 0 and all(kind == FULL or kind in kinds for kind in action.cycle)
    ]


def alone(actions: Sequence[Action], family: str) -> List[int]:
    """The places of the actions that save in no other way."""
    return [place for place, action in enumerate(actions) if saves_only(action, family)]


def saves_only(action: Action, family: str) -> bool:
    """Whether an action saves in no other way; the plain one saves in none."""
    return {FULL, family}.issuperset(action.cycle)


def kinds(action: Action, windows: Windows, window: int) -> Dict[int, str]:
    """What each step of a window is under an action; the generation's last step is always computed in full."""
    steps = windows.steps(window)
    found = {step: action.cycle[place % len(action.cycle)] for place, step in enumerate(steps)}
    return {step: FULL if step == windows.total - 1 else kind for step, kind in found.items()}


def leading(action: Action, windows: Windows) -> List[int]:
    """The steps before the first window that are skipped where it takes this action; the very first one never is.

    The cycle of an early window that only skips goes on backwards; so little is left of these steps' changes at the
    window's end that they are not predicted.
    """
    if not windows.early or not saves_only(action, SKIP):
        return []
    places = range(1 - windows.first, 0)
    return [windows.first + place for place in places if action.cycle[place % len(action.cycle)] == SKIP]


def units(action: Action, windows: Windows, window: int) -> int:
    """Network work of a window under an action, in halves of one block; of the first, with all before but one step."""
    each = {FULL: 2 * windows.blocks, HALF: windows.blocks, SKIP: 0}
    each.update(dict.fromkeys((FORECAST, REUSE), 2 * COMPUTED_BLOCKS))
    before = windows.first - 1 - len(leading(action, windows)) if window == 0 else 0
    return before * each[FULL] + sum(each[kind] for kind in kinds(action, windows, window).values())


def plan_of(chosen: Sequence[Action], windows: Windows) -> Plan:
    """The plan in which every window takes its action; what is skipped is corrected."""
    by_step = dict.fromkeys(leading(chosen[0], windows), SKIP)
    for window, action in enumerate(chosen):
        by_step.update(kinds(action, windows, window))
    steps = {family: tuple(step for step, kind in by_step.items() if kind == family) for family in FAMILIES}
    by_order = {1: steps[FORECAST], 0: steps[REUSE]}
    regions = (Region(COMPUTED_BLOCKS, windows.blocks, reuse, order) for order, reuse in by_order.items() if reuse)
    return Plan(
        steps=windows.total,
        skip=steps[SKIP],
        conditional_only=steps[HALF],
        regions=tuple(regions),
        correction=UNDER_SKIP if steps[SKIP] else Correction(),
    )


def even_plan(steps: int, work: float) -> Plan:
    """The plan of at most this work that knows no windows: steps are skipped evenly, from the first on."""
    computed = even_places(steps, max(FEWEST, int(work * steps + 1e-9)))
    skip = tuple(step for step in range(steps) if step not in computed)
    return Plan(steps=steps, skip=skip, correction=UNDER_SKIP if skip else Correction())
