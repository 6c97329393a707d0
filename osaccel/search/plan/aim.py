# SPDX-License-Identifier: Apache-2.0
"""One goal of a plan search: what is tried for it, in which order, and what is found."""

import math
from typing import Any, Iterator, List, Optional, Sequence

from osaccel import formats
from osaccel.plan import Plan
from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation
from osaccel.search.measure import CALLS, plan_of_job, price_of
from osaccel.search.plan.actions import SKIP, even_plan
from osaccel.search.plan.choice import Choice, at_error
from osaccel.search.plan.judge import Found, best, nearest_kept, saves_early
from osaccel.search.planned import TOLERANCE
from osaccel.settings import Goal


class Aim:
    """Tries choices and plans for a goal, as far as the budget allows; every replay says more of the next.

    Args:
        runner: the PlanRunner, whose knowledge, measurements and budget are used.
        goal: what is aimed at; behind: the goals that come after it.
        limit: network work that the search may have taken in the end, in plain generations.
    """

    def __init__(self, runner: Any, goal: Goal, behind: Sequence[Goal], limit: float):
        self.runner, self.goal, self.behind, self.limit = runner, goal, behind, limit
        self.settled = runner.windows.settled
        self.tried: List[Found] = []
        # Of choices that miss an error, the most work.
        self.missed = 0.0

    def reach(self) -> None:
        """Try what the knapsack chose; for a speed-up others, for an error what comes nearer to it from both sides."""
        choice, is_first = self._first(), True
        while choice is not None and (is_first or self._affords(self._plan(choice))):
            if not is_first:
                self._expect(self._plan(choice))
            found = self._measure(choice, self._plan(choice))
            if found is not None:
                self.runner.progress.line.best = f"{self.goal} with {said(self._best.evaluation)}"
            choice, is_first = self.runner.team.share(self._nearer(choice, found)), False
        if self.goal.kind == "speed":
            self._try_others()
        if not self.tried and not self._measured():
            raise SearchError(f"Every plan tried for {self.goal} gave latents that are not finite.")
        if self.tried:
            self._try_without_predictor()
        self.runner.expect([], self.behind)

    def found(self) -> Found:
        """The best of all that was measured, for other goals too."""
        return best([*self.tried, *self._measured()], self.settled)

    def milder(self) -> Optional[Goal]:
        """The nearest goal of its kind that something which saves work was measured to keep."""
        return nearest_kept(self.goal, self._measured())

    @property
    def _best(self) -> Found:
        return best(self.tried, self.settled)

    def _first(self) -> Optional[Choice]:
        """The first choice; None where only skipping evenly goes as far."""
        if self.goal.kind == "speed":
            choice = self.runner.choice_at(1 / self.goal.value)
        else:
            choice = at_error(self.runner.choices(early=False), self._needed)
        return self.runner.team.share(choice)

    def _nearer(self, last: Choice, found: Optional[Found]) -> Optional[Choice]:
        """What comes nearer to an error that is to be kept: more work where it was missed, else less.

        Every replay scales what is expected. None for a speed-up, and where nothing between the works that missed it
        and that kept it is expected to keep it too; what saves less than one step's work is not worth a replay.

        found: what was measured of the last choice; None where its latents are not finite.
        """
        if self.goal.kind == "speed":
            return None
        if found is None or not found.keeps:
            self.missed = max(self.missed, last.work)
        kept = min((one.choice.work for one in self.tried if one.keeps), default=math.inf)
        between = [
            choice
            for choice in self.runner.choices(early=False)
            if self.missed < choice.work <= kept - 1 / self.runner.steps
        ]
        nearest = at_error(between, self._needed if found is not None else last.error / TOLERANCE)
        return between[-1] if nearest is None and between and kept == math.inf else nearest

    @property
    def _needed(self) -> float:
        """The error of the latents that keeps the goal; for a PSNR by the replay that came nearest to it."""
        if self.goal.kind == "error":
            return self.goal.value
        # Of all calls: a PSNR is made by the extremes, which are not probed.
        whole = [one for one in self.runner.asked.values() if CALLS not in one.config]
        decoded = [one for one in whole if one.error and one.psnr is not None]
        if not decoded:
            return 10 ** (-self.goal.value / 20)
        nearest = min(decoded, key=lambda one: abs(one.psnr - self.goal.value))
        # As the frames' error goes with that of the latents.
        return nearest.error * 10 ** ((nearest.psnr - self.goal.value) / 20)

    def _try_others(self) -> None:
        """What may be better than the first choice.

        What may save in early windows too; steps skipped and nothing else; both choices anew; steps skipped evenly.
        """
        work, skips = 1 / self.goal.value, self.runner.can(SKIP)
        for following, choice in zip((4, 3, 2, 1), self._others(work, skips)):
            self._try(choice, following)
        even = self.runner.with_predictor(even_plan(self.runner.steps, work), self.runner.fitted)
        if skips and (self._affords(even, self._reserve) or not self.tried):
            self._expect(even)
            self._measure(self._choice_of(even), even)

    def _others(self, work: float, skips: bool) -> Iterator[Optional[Choice]]:
        """The choices among them; each is made when its turn has come, as every replay says more."""
        least = self.runner.least
        yield least(work, early=True)
        is_early = not self.tried or saves_early(self._best.plan, self.settled)
        yield least(work, early=is_early, places=self.runner.alone(SKIP)) if skips else None
        yield least(work, early=True)
        yield least(work, early=False)

    def _try(self, choice: Optional[Choice], following: int) -> None:
        """Measure a choice where it is a new one and the budget allows it; the first rank's counts, so all must ask.

        following: how many others may be tried behind it.
        """
        choice = self.runner.team.share(choice)
        if choice is None or any(choice.actions == one.choice.actions for one in self.tried):
            return
        plan = self._plan(choice)
        if self._affords(plan, self._reserve):
            self._expect(plan, following)
            self._measure(choice, plan)

    def _try_without_predictor(self) -> None:
        """The best so far without the predictor that fits the recorded predictions, where the budget allows it.

        The fit is about what x lacks at computed steps; what the network makes of it can go either way.
        """
        found = self._best
        if not found.plan.skip or not self.runner.fitted:
            return
        plan = self.runner.with_predictor(found.plan, 0.0)
        if self._affords(plan):
            self._measure(found.choice, plan)

    @property
    def _reserve(self) -> float:
        """What is kept free for the replay without the predictor."""
        return 1 / self.goal.value - 1 / self.runner.steps if self.runner.fitted else 0.0

    def _expect(self, plan: Plan, following: int = 0) -> None:
        """Tell the progress that a plan is to be run, and that others may be; of those about half are."""
        price = price_of(plan, self.runner.num_blocks)
        left = max(0.0, self.limit - self._reserve - self.runner.spent - price)
        self.runner.expect([formats.plan_content(plan)], self.behind, min(left, following * price) / 2)

    def _affords(self, plan: Plan, reserve: float = 0.0) -> bool:
        return self.runner.spent + price_of(plan, self.runner.num_blocks) <= self.limit - reserve

    def _measure(self, choice: Choice, plan: Plan) -> Optional[Found]:
        """What was measured of a plan is tried; None where its latents are not finite."""
        (evaluation,) = self.runner.evaluated([formats.plan_content(plan)])
        if evaluation.error is None:
            return None
        if choice.actions and plan == self._plan(choice):
            self.runner.learn(choice.actions, evaluation.details["errors"])
        self.tried.append(Found(self.goal, choice, plan, evaluation))
        return self.tried[-1]

    def _measured(self) -> List[Found]:
        """What was measured on all calls and saves enough; for an error what leaves the early windows alone."""
        most, found = (1 / self.goal.value if self.goal.kind == "speed" else 1.0), []
        for evaluation in self.runner.asked.values():
            if CALLS in evaluation.config:
                continue
            plan = plan_of_job(evaluation.config, self.runner.steps)
            choice = self._choice_of(plan)
            is_allowed = self.goal.kind == "speed" or not saves_early(plan, self.settled)
            if evaluation.error is not None and choice.work <= most + 1e-9 and is_allowed:
                found.append(Found(self.goal, choice, plan, evaluation))
        return found

    def _plan(self, choice: Choice) -> Plan:
        return self.runner.plan(choice.actions)

    def _choice_of(self, plan: Plan) -> Choice:
        return Choice((), plan.work(self.runner.num_blocks), ())


def said(evaluation: Evaluation) -> str:
    """An error and a PSNR as people read them."""
    psnr = "" if evaluation.psnr is None else f", {evaluation.psnr:.2f} dB"
    return f"error {evaluation.error:.4g}{psnr}"
