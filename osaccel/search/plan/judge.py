# SPDX-License-Identifier: Apache-2.0
"""Which of the measured plans is taken for a goal; pure."""

import math
from dataclasses import replace
from typing import NamedTuple, Optional, Sequence

import numpy as np

from osaccel.plan import Plan
from osaccel.search.evaluation import Evaluation
from osaccel.search.plan.choice import Choice
from osaccel.search.planned import TOLERANCE
from osaccel.settings import Goal


class Found(NamedTuple):
    """A goal, the choice that was made for it, and what was measured of its plan."""

    goal: Goal
    choice: Choice
    plan: Plan
    evaluation: Evaluation

    @property
    def error(self) -> float:
        """Infinite, never to be taken, where latents are not finite."""
        return math.inf if self.evaluation.error is None else self.evaluation.error

    @property
    def keeps(self) -> bool:
        """Whether it is as good as its goal asks for."""
        if self.goal.kind == "psnr":
            return self.evaluation.psnr is not None and self.evaluation.psnr >= self.goal.value
        return self.goal.kind == "speed" or self.error <= self.goal.value

    @property
    def shortfall(self) -> float:
        """How far from its goal it is where it misses it; only to be compared."""
        psnr = self.evaluation.psnr
        return self.error if self.goal.kind != "psnr" or psnr is None else -psnr


def best(tried: Sequence[Found], settled: int) -> Found:
    """The first, which all probes speak for, unless a later one is clearly better; what saves early comes last.

    Of plans that keep an error the one of least work.

    Args:
        tried: at least one, all for the same goal.
        settled: the first step behind the early windows.
    """
    keeping = [found for found in tried if found.keeps]
    if not keeping:
        return min(tried, key=lambda found: found.shortfall)
    if keeping[0].goal.kind != "speed":
        return min(keeping, key=lambda found: (found.choice.work, found.error))
    taken, *others = sorted(keeping, key=lambda found: saves_early(found.plan, settled))
    for found in others:
        taken = found if _is_better(found, taken, settled) else taken
    return taken


def nearest_kept(goal: Goal, measured: Sequence[Found]) -> Optional[Goal]:
    """The goal nearest to a missed one that a measured plan keeps which saves work; for a speed-up None."""
    saving = [found for found in measured if found.plan.touches_network]
    if not saving or goal.kind == "speed":
        return None
    nearest = min(saving, key=lambda found: found.shortfall)
    if goal.kind == "psnr":
        kept = math.floor(10 * (nearest.evaluation.psnr or 0.0)) / 10
    else:
        # Two digits, rounded up.
        unit = 10.0 ** (math.floor(math.log10(nearest.error)) - 1)
        kept = float(f"{math.ceil(nearest.error / unit) * unit:.2g}")
    nearest_goal = Goal(goal.kind, kept)
    return nearest_goal if nearest_goal.is_allowed else None


def saves_early(plan: Plan, settled: int) -> bool:
    """Whether it computes less before or in the early windows."""
    return any(step < settled for _, steps in plan.named_steps() for step in steps)


def is_far_less(error: float, other: float) -> bool:
    """Whether an error is less by TOLERANCE, as that of what saves early must be, or one that a single call showed."""
    return TOLERANCE * error < other


def _is_better(one: Found, other: Found, settled: int) -> bool:
    if _without_predictor(one.plan) == _without_predictor(other.plan):
        return one.error < other.error
    if saves_early(one.plan, settled) and not saves_early(other.plan, settled):
        return is_far_less(one.error, other.error)
    return is_clearly_better(one.evaluation, other.evaluation)


def _without_predictor(plan: Plan) -> Plan:
    return replace(plan, correction=replace(plan.correction, predictor=0.0))


def is_clearly_better(one: Evaluation, other: Evaluation) -> bool:
    """Whether the mean error is less by more than the standard error of the calls' differences.

    One call says nothing of that; there it must be less by TOLERANCE.
    """
    errors, others = (np.array(evaluation.details["errors"]) for evaluation in (one, other))
    if len(errors) == 1:
        return is_far_less(float(errors[0]), float(others[0]))
    gained = others - errors
    return bool(gained.mean() > gained.std(ddof=1) / math.sqrt(len(gained)))
