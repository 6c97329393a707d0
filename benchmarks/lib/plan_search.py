# SPDX-License-Identifier: Apache-2.0
"""The plan search on calibration calls: what it finds, what it finds of each family alone, and plans to rival it.

Everything found is a plan's content, so that nothing behind this file knows how the search works.
"""

import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Sequence

import numpy as np
import torch

from benchmarks.lib.bench import Bench, NotKept
from benchmarks.lib.kept import digest_of
from benchmarks.lib.models import Case
from benchmarks.lib.own import code
from osaccel import formats
from osaccel.search.errors import SearchError
from osaccel.search.plan.actions import FORECAST, HALF, REUSE, SKIP, Action, Windows, alone, units
from osaccel.search.plan.runner import PlanRunner, path_of
from osaccel.search.session import Session
from osaccel.settings import Goal, Settings
from osaccel.targets import target_of

# The families that the search knows.
FAMILIES = {
    "conditional only": HALF, "skipped, corrected": SKIP, "blocks forecast": FORECAST, "blocks reused": REUSE
}  # fmt: skip
# OSACCEL_SEARCH_PROBED where nothing else is said: osaccel's own default.
PROBED = Settings.search_probed
# How far a rival's work may be from the found plan's, plain = 1.
NEAR = 0.01
# Rivals of every found plan that are drawn; how many of them run is the benchmark's option.
RIVALS = 200
RANDOM, STRUCTURED = "random", "structured"


class Searched(NamedTuple):
    """What one search gave, JSON-able; the lists are in the targets' order.

    Attributes:
        plans: contents, None where the search says that the target is out of reach; families: the same of each alone.
        rivals: for every target, [kind, content] of plans of the found plan's work.
        generations: network work in plain generations of the calls, those included, by the search's own count.
        measured: by the search, on its calls.
    """

    plans: List[Any]
    families: Dict[str, List[Any]]
    rivals: List[List[Any]]
    generations: float
    measured: List[Any]


def search(bench: Bench, cases: Sequence[Case], speeds: Sequence[float], probed: int = PROBED) -> Searched:
    """One search for all speed-ups on these calls, a script's first ones; kept, and resumed where it stopped.

    Args:
        probed: OSACCEL_SEARCH_PROBED.
    """
    asked = [list(speeds), probed]
    return Searched(
        **_kept(bench, cases, asked, lambda output: _farthest(bench, cases, speeds, probed, output)._asdict())
    )


def reached(bench: Bench, cases: Sequence[Case], goal: Goal, probed: int = PROBED) -> Dict[str, Any]:
    """The plan that a search finds for a goal on these calls, and its report, as its files hold them; kept alike."""

    def run(output: str) -> Dict[str, Any]:
        _search_for(bench, cases, [goal], probed, output)
        return {"plan": formats.read_file(output), "report": formats.read_file(formats.report_path(output))}

    return _kept(bench, cases, [str(goal), probed], run)


def _kept(bench: Bench, cases: Sequence[Case], asked: Any, make: Callable[[str], Dict[str, Any]]) -> Dict[str, Any]:
    """What `make(output)` gives after a search for what is asked on these calls, with osaccel's code as it is.

    A folder that is kept keeps the search's journal too, so that the search goes on where it stopped.
    """
    content = [list(map(list, cases)), asked, code("network", "sampling", "search", "plan.py")]
    name = f"search-{digest_of(content)}"

    def run() -> Dict[str, Any]:
        if bench.only_kept:
            raise NotKept("the plan search")
        if bench.kept.folder is not None:
            (bench.kept.folder / name).mkdir(exist_ok=True)
            return make(str(bench.kept.folder / name / "plan.json"))
        with tempfile.TemporaryDirectory() as folder:
            return make(str(Path(folder) / "plan.json"))

    return bench.kept.value(name, run)


def _farthest(bench: Bench, cases: Sequence[Case], speeds: Sequence[float], probed: int, output: str) -> Searched:
    """The search for those speed-ups that it can reach; it goes on where it stopped at one that it cannot."""
    reached = list(speeds)
    while True:
        try:
            found = _search(bench, cases, reached, probed, output)
            break
        except SearchError as error:
            if not str(error).startswith("No plan reaches") or len(reached) == 1:
                raise
            reached.remove(max(reached))

    def placed(values: List[Any]) -> List[Any]:
        return [values[reached.index(speed)] if speed in reached else None for speed in speeds]

    return found._replace(
        plans=placed(found.plans),
        families={name: placed(values) for name, values in found.families.items()},
        rivals=[values or [] for values in placed(found.rivals)],
        measured=placed(found.measured),
    )


def recorded(bench: Bench, cases: Sequence[Case], output: str) -> PlanRunner:
    """A search that has recorded these calls and was not begun."""
    return _fed(bench, cases, Settings(search="plan", plan_output=output, search_prompts=len(cases) + 1))


def _fed(bench: Bench, cases: Sequence[Case], settings: Settings) -> PlanRunner:
    """The search after these calls; it begins with as many as its settings say."""
    pipeline = bench.pipeline
    session = Session(settings, target_of(pipeline))
    runner = session.runner
    assert isinstance(runner, PlanRunner)
    try:
        for case in cases:
            torch.manual_seed(case.seed)
            arguments = {**bench.model.arguments(), "prompt": case.prompt, "num_inference_steps": bench.steps}
            session.on_call(type(pipeline).__call__, pipeline, (pipeline,), arguments)
    finally:
        session.abandon()
    return runner


def _search_for(bench: Bench, cases: Sequence[Case], goals: Sequence[Goal], probed: int, output: str) -> PlanRunner:
    """One search for all goals on these calls, which writes its files at `output` and beside it."""
    settings = Settings(
        search="plan", plan_output=output, search_then="continue", search_prompts=len(cases), target=tuple(goals),
        search_probed=probed,
    )  # fmt: skip
    return _fed(bench, cases, settings)


def _search(bench: Bench, cases: Sequence[Case], speeds: Sequence[float], probed: int, output: str) -> Searched:
    goals = [Goal("speed", speed) for speed in speeds]
    runner = _search_for(bench, cases, goals, probed, output)
    paths = [path_of(output, goals, number) for number in range(len(goals))]
    plans = [formats.read_plan(path) for path in paths]
    reports = [formats.read_file(formats.report_path(path)) for path in paths]
    generator = np.random.default_rng(0)
    return Searched(
        plans=[formats.plan_content(plan) for plan in plans],
        families={name: _alone(runner, family, speeds) for name, family in FAMILIES.items()},
        rivals=[_rivals(runner, plan.work(bench.num_blocks), generator) for plan in plans],
        generations=reports[-1]["cost"]["plain_generations"],
        measured=[{key: report[key] for key in ("work", "error", "predicted_error")} for report in reports],
    )


def _alone(runner: PlanRunner, family: str, speeds: Sequence[float]) -> List[Any]:
    """The same choice among the actions of one family, from the same measurements."""
    places = alone(runner.actions, family)
    found = [runner.choice_at(1 / speed, places) for speed in speeds]
    return [None if one is None else formats.plan_content(runner.plan(one.actions)) for one in found]


# Rivals --------------------------------------------------------------------------------------------------------------


def _rivals(runner: PlanRunner, work: float, generator: np.random.Generator) -> List[Any]:
    """[kind, content] of `RIVALS` plans of this work, structured and random ones in turn."""
    draw = Draw(runner.actions, runner.windows, work)
    structured = draw.structured(RIVALS // 2, generator)
    random = draw.random(RIVALS - len(structured), generator)
    pairs = [pair for both in zip(structured, random) for pair in zip((STRUCTURED, RANDOM), both)]
    pairs += [(RANDOM, chosen) for chosen in random[len(structured) :]]
    return [[kind, formats.plan_content(runner.plan(chosen))] for kind, chosen in pairs]


class Draw:
    """Choices of an action for every window whose work is that of a given plan, or up to `NEAR` less."""

    def __init__(self, actions: Sequence[Action], windows: Windows, work: float):
        self.actions, self.windows = actions, windows
        self.costs = [[units(action, windows, window) for action in actions] for window in range(windows.count)]
        each = 2 * windows.blocks
        whole = each * windows.total
        self.most = work * whole - each + 1e-6
        self.least = self.most - NEAR * whole

    def structured(self, count: int, generator: np.random.Generator) -> List[List[Action]]:
        """One action everywhere, or two: one early and one late, or in turn, in whatever proportion gives the work."""
        places = list(range(self.windows.count))
        orders = [places, places[::-1], sorted(places, key=lambda place: (place * 0.6180339887) % 1)]
        found = set()
        for one in range(len(self.actions)):
            for other in range(len(self.actions)):
                for order in orders:
                    for share in range(1, len(places) + 1):
                        numbers = tuple(one if place in order[:share] else other for place in places)
                        if self._fits(numbers):
                            found.add(numbers)
        every = sorted(found)
        kept = generator.permutation(len(every))[:count]
        return [[self.actions[number] for number in every[place]] for place in kept]

    def random(self, count: int, generator: np.random.Generator) -> List[List[Action]]:
        """Any action in every window; single windows are drawn anew where the work comes nearer, until it fits."""
        found: List[List[Action]] = []
        for _ in range(10 * count):
            if len(found) == count:
                break
            numbers = generator.integers(len(self.actions), size=self.windows.count)
            for _ in range(100 * self.windows.count):
                if self._fits(numbers):
                    found.append([self.actions[number] for number in numbers])
                    break
                changed = numbers.copy()
                changed[generator.integers(len(numbers))] = generator.integers(len(self.actions))
                if self._off(changed) < self._off(numbers):
                    numbers = changed
        return found

    def _cost(self, numbers: Iterable[int]) -> int:
        return sum(row[number] for row, number in zip(self.costs, numbers))

    def _off(self, numbers: Iterable[int]) -> float:
        cost = self._cost(numbers)
        return max(cost - self.most, self.least - cost, 0.0)

    def _fits(self, numbers: Iterable[int]) -> bool:
        return self._off(numbers) == 0
