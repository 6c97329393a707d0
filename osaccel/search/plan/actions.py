# SPDX-License-Identifier: Apache-2.0
"""What a window of steps may do, and the plan that a choice for every window makes; pure, no torch.

An action is a cycle of step kinds that repeats through a window. Windows are as long as all cycles fit into, so every
window begins with a full step and its error depends little on what its neighbours do.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Container, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from osaccel.plan import UNDER_SKIP, Correction, Plan, Region
from osaccel.search.limits import SHORTEST_WINDOW
from osaccel.search.places import even_places
from osaccel.search.planned import settling

HALF, SKIP, FORECAST, REUSE = "half", "skip", "forecast", "reuse"
# What an action may save with; each has its own kind of error. A plan has one of the last two.
FAMILIES = (HALF, SKIP, FORECAST, REUSE)
# Steps that an even plan computes at least: the first and the last.
FEWEST = 2
# Where blocks are forecast or reused the first is computed: through it the latents of now come in.
COMPUTED_BLOCKS = 1
# Parts of the blocks behind the first, by quarters of the depth; and which segments they hold: the first two quarters,
# which no part divides, the third and the fourth.
SEGMENTS, WHOLE = 3, "q1234"
PARTS = {WHOLE: (0, 1, 2), "q12": (0,), "q123": (0, 1), "q34": (1, 2), "q4": (2,)}


class Kind(NamedTuple):
    """What one step does.

    Attributes:
        families: the ways in which it saves, the one that names it last; none where it computes everything.
        part: of the blocks, where they are forecast or reused.
    """

    families: Tuple[str, ...] = ()
    part: str = ""

    def is_of(self, family: str) -> bool:
        """Whether this family names it, or nothing is saved."""
        return not self.families or self.families[-1] == family


FULL, HALVED, SKIPPED = Kind(), Kind((HALF,)), Kind((SKIP,))


class Action(NamedTuple):
    """A cycle of steps that repeats, by a name that says it."""

    name: str
    cycle: Tuple[Kind, ...]

    @property
    def has_part(self) -> bool:
        """Whether less than all blocks behind the first are forecast."""
        return any(kind.part not in ("", WHOLE) for kind in self.cycle)


def _halves(length: int) -> Action:
    return Action(f"c{length}", (FULL, *(HALVED,) * (length - 1)))


def _skips(length: int) -> Action:
    return Action(f"s{length}", (FULL, *(SKIPPED,) * (length - 1)))


def _among_skips(length: int, kind: Kind, times: int) -> Tuple[Kind, ...]:
    """Every `length`-th step is computed: one in full, then as many of a kind."""
    skips = (SKIPPED,) * (length - 1)
    return (FULL, *skips, *(kind, *skips) * times)


def _skips_with_halves(length: int, halves: int = 1) -> Action:
    return Action(f"s{length}c{halves + 1}", _among_skips(length, HALVED, halves))


def _with_regions(family: str, is_guided: bool) -> List[Action]:
    """The actions that forecast or reuse blocks; where there is guidance, at conditional-only steps.

    What such steps make of the latents is hardly more than what both branches with forecasts do, for half of the work.
    """
    half, letters = ((HALF,), f"c{{}}{family[0]}") if is_guided else ((), f"{family[0]}{{}}")
    whole, parts = Kind((*half, family), WHOLE), [part for part in PARTS if part != WHOLE and family == FORECAST]
    found = [Action(letters.format(length), (FULL, *(whole,) * (length - 1))) for length in (2, 3, 4, 6)]
    found += [Action(letters.format(2) + part, (FULL, Kind((*half, family), part))) for part in parts]
    for length, times in ((2, 1), (3, 1), (2, 2)):
        found.append(Action(f"s{length}{letters.format(times + 1)}", _among_skips(length, whole, times)))
    return found


PLAIN = Action("full", (FULL,))
ACTIONS = (
    PLAIN,
    *(_halves(length) for length in (2, 3, 4, 6, 12)),
    *(_skips(length) for length in (2, 3, 4, 6)),
    *(
        action
        for is_guided in (True, False)
        for family in (FORECAST, REUSE)
        for action in _with_regions(family, is_guided)
    ),
    *(_skips_with_halves(length) for length in (2, 3, 6)),
    *(_skips_with_halves(length, halves=2) for length in (2, 4)),
    *(_skips_with_halves(length, halves=3) for length in (3,)),
    _skips_with_halves(2, halves=5),
)
BY_NAME = {action.name: action for action in ACTIONS}
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


def edges(blocks: int) -> Tuple[int, ...]:
    """Where the segments begin, and where the last one ends; those of few blocks may be empty."""
    return (COMPUTED_BLOCKS, max(COMPUTED_BLOCKS, blocks - blocks // 2), blocks - blocks // 4, blocks)


def size_of(part: str, blocks: int) -> int:
    """How many blocks a part holds."""
    begins = edges(blocks)
    return sum(begins[segment + 1] - begins[segment] for segment in PARTS[part])


def actions_for(windows: Windows, families: Container[str]) -> List[Action]:
    """The actions whose cycle fits a window and that save only in these ways, every part of the blocks being one."""
    return [
        action
        for action in ACTIONS
        if windows.length % len(action.cycle) == 0 and all(_is_for(kind, windows, families) for kind in action.cycle)
    ]


def _is_for(kind: Kind, windows: Windows, families: Container[str]) -> bool:
    if not all(family in families for family in kind.families):
        return False
    if not kind.part:
        return True
    is_part = 0 < size_of(kind.part, windows.blocks) < size_of(WHOLE, windows.blocks)
    return (HALF in kind.families) == (HALF in families) and (kind.part == WHOLE or is_part)


def references(actions: Sequence[Action]) -> Dict[str, Action]:
    """By family, the mildest action that saves with steps of this family alone: errors add up while they are small."""
    found: Dict[str, Action] = {}
    for action in actions:
        for family in FAMILIES:
            if action != PLAIN and saves_only(action, family):
                found.setdefault(family, action)
    return found


def alone(actions: Sequence[Action], family: str) -> List[int]:
    """The places of the actions that save in no other way; all that forecast at conditional-only steps do."""
    return [place for place, action in enumerate(actions) if saves_only(action, family)]


def saves_only(action: Action, family: str) -> bool:
    """Whether all steps of an action that save are named by this family; the plain one has none."""
    return all(kind.is_of(family) for kind in action.cycle)


def kinds(action: Action, windows: Windows, window: int) -> Dict[int, Kind]:
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
    return [windows.first + place for place in places if action.cycle[place % len(action.cycle)] == SKIPPED]


def units(action: Action, windows: Windows, window: int) -> int:
    """Network work of a window under an action, in halves of one block; of the first, with all before but one step."""
    before = windows.first - 1 - len(leading(action, windows)) if window == 0 else 0
    each = [_units_of(kind, windows.blocks) for kind in kinds(action, windows, window).values()]
    return before * _units_of(FULL, windows.blocks) + sum(each)


def _units_of(kind: Kind, blocks: int) -> int:
    if SKIP in kind.families:
        return 0
    computed = blocks - (size_of(kind.part, blocks) if kind.part else 0)
    return computed if HALF in kind.families else 2 * computed


def plan_of(chosen: Sequence[Action], windows: Windows) -> Plan:
    """The plan in which every window takes its action; what is skipped is corrected."""
    by_step = dict.fromkeys(leading(chosen[0], windows), SKIPPED)
    for window, action in enumerate(chosen):
        by_step.update(kinds(action, windows, window))
    skip, halves = (tuple(step for step, kind in by_step.items() if one in kind.families) for one in (SKIP, HALF))
    return Plan(
        steps=windows.total,
        skip=skip,
        conditional_only=halves,
        regions=tuple(_regions_of(by_step, windows.blocks)),
        correction=UNDER_SKIP if skip else Correction(),
    )


def _regions_of(by_step: Dict[int, Kind], blocks: int) -> Iterator[Region]:
    """Neighbouring segments that stand still at the same steps are one region."""
    begins = edges(blocks)
    for order, family in enumerate((REUSE, FORECAST)):
        steps = [
            tuple(step for step, kind in by_step.items() if family in kind.families and segment in PARTS[kind.part])
            for segment in range(SEGMENTS)
        ]
        filled = [segment for segment in range(SEGMENTS) if begins[segment] < begins[segment + 1]]
        for reuse, group in groupby(filled, key=steps.__getitem__):
            segments = list(group)
            if reuse:
                yield Region(begins[segments[0]], begins[segments[-1] + 1], reuse, order)


def even_plan(steps: int, work: float) -> Plan:
    """The plan of at most this work that knows no windows: steps are skipped evenly, from the first on."""
    computed = even_places(steps, max(FEWEST, int(work * steps + 1e-9)))
    skip = tuple(step for step in range(steps) if step not in computed)
    return Plan(steps=steps, skip=skip, correction=UNDER_SKIP if skip else Correction())
