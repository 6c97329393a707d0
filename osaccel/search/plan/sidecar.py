# SPDX-License-Identifier: Apache-2.0
"""The sidecar report of a plan search: everything that was predicted and measured, for whoever wants to look again."""

import math
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from osaccel import binding, formats
from osaccel.search.measure import CALLS
from osaccel.search.plan.actions import FORECAST, HALF, REUSE, SKIP, alone
from osaccel.search.plan.choice import Choice
from osaccel.settings import Goal

# Of the families, as people read them.
NAMES = {HALF: "conditional only", SKIP: "skipped", FORECAST: "forecast", REUSE: "reused"}


# (work, predicted error), by what may be chosen among.
Curves = Dict[str, List[List[float]]]


def report(runner: Any, found: Any, milder: Optional[Goal], curves: Curves, seconds: float) -> Dict[str, Any]:
    """The JSON-able report of one found plan.

    Args:
        runner: the PlanRunner; found: its Found; curves: see `curves`.
        milder: a goal that could be asked for where nothing was found that saves work.
        seconds: of the search, without the plain generations.
    """
    replays = runner.replays
    return {
        "kind": "plan",
        **binding.occasion([replay.call for replay in replays]),
        "goal": str(found.goal),
        "keeps": found.keeps,
        "milder": None if milder is None else str(milder),
        "plan": formats.plan_content(found.plan),
        "work": found.choice.work,
        "error": found.evaluation.error,
        "predicted_error": predicted(found),
        "psnr": found.evaluation.psnr,
        "fingerprint": runner.fingerprint,
        "versions": binding.versions(),
        "cost": runner.cost(seconds),
        "windows": {
            "first": runner.windows.first, "length": runner.windows.length,
            "actions": [action.name for action in found.choice.actions],
        },
        "gains": {family: np.sqrt(values.mean(axis=0)).tolist() for family, values in runner.expectation.gain.items()},
        "curves": curves,
        "evaluations": [_row(evaluation) for evaluation in runner.asked.values()],
    }  # fmt: skip


def predicted(found: Any) -> Optional[float]:
    """The error that was expected of a plan; None for one that does not come from the windows."""
    return None if math.isnan(found.choice.error) else found.choice.error


def _row(evaluation: Any) -> Dict[str, Any]:
    """What was measured; with the numbers of the calls where these are not all that were recorded."""
    content = evaluation.to_json()
    del content["curves"]
    plan = dict(content["config"])
    calls = {CALLS: plan.pop(CALLS)} if CALLS in plan else {}
    return {**content, "config": plan, **calls}


def curves(runner: Any) -> Curves:
    """Of the best choices, all families together and each alone."""
    found = {"together": _points(runner.choices())}
    for family, name in NAMES.items():
        places = alone(runner.actions, family)
        if 1 < len(places) < len(runner.actions):
            found[name] = _points(runner.choices(places))
    return found


def _points(choices: Sequence[Choice]) -> List[List[float]]:
    return [[choice.work, choice.error] for choice in choices]
