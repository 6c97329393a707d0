# SPDX-License-Identifier: Apache-2.0
"""OSACCEL_SEARCH=plan: records the calls, measures what windows of steps bear, chooses exactly, verifies, writes.

Everything finished is in the journal beside the output, so a killed search goes on where it stopped. How it decides is
in `gains`, `choice` and `judge`, and what is tried for a goal in `aim`; here is what all of it stands on.
"""

import logging
import math
import os
import time
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from osaccel import binding, formats
from osaccel.generation import find_blocks
from osaccel.plan import Plan
from osaccel.schedule import ANCESTRAL, refusal
from osaccel.search import frames as pictures
from osaccel.search import limits, outputs
from osaccel.search.errors import SearchError
from osaccel.search.measure import CALLS, calls_of_job
from osaccel.search.plan import observation, sidecar
from osaccel.search.plan.actions import (
    BY_NAME,
    COMPUTED_BLOCKS,
    FAMILIES,
    FEWEST,
    FORECAST,
    HALF,
    REFERENCES,
    REUSE,
    SKIP,
    Action,
    Windows,
    actions_for,
    alone,
    plan_of,
    units,
)
from osaccel.search.plan.aim import Aim, said
from osaccel.search.plan.choice import Choice, curve, least
from osaccel.search.plan.gains import GROUPS, Expectation, Probe, Sizes, gains, probes
from osaccel.search.plan.judge import Found
from osaccel.search.plan.local import predictor_moments, squared_sizes
from osaccel.search.plan.sample import sample
from osaccel.search.planned import BUDGET, PlannedRunner
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.session import Session
from osaccel.search.workers import Job
from osaccel.settings import Goal

logger = logging.getLogger("osaccel")

# What each target after the first may take, in plain generations.
FURTHER = 1.0


class PlanRunner(PlannedRunner):
    """OSACCEL_SEARCH=plan."""

    def __init__(self, session: Session):
        super().__init__(session, session.settings.plan_output)
        self.settings = session.settings
        self.observed: List[Dict[str, Any]] = []

    # Recording

    def record(self, call: Call) -> Any:
        blocks = list(find_blocks(call.pipeline, call.target.block_path))
        self.num_blocks = len(blocks)
        self.open_journal(
            call,
            self.decodes,
            search="plan",
            observed="forecasts aside from the first steps on, noise; conditional-only steps put right",
        )
        output, observed = self.recorded(call, lambda replay: self._record_anew(replay, blocks))
        self.observed.append(observed)
        if len(self.observed) == 1:
            # So that a target out of reach ends the search before further calls are recorded.
            self.prepare()
        return output

    def _record_anew(self, replay: Replay, blocks: List[torch.nn.Module]) -> Tuple[Any, Dict[str, Any]]:
        # What was measured belongs to the calls it was measured on.
        self.forget("evaluations-", "final-")
        output, observed = observation.record(replay, blocks)
        self.check_finite(replay)
        return output, observed

    @property
    def decodes(self) -> bool:
        return any(goal.kind == "psnr" for goal in self.settings.target)

    @property
    def beside(self) -> float:
        return float(COMPUTED_BLOCKS * sum(one["passes"] for one in self.observed))

    # Searching

    def prepare(self) -> None:
        """What is known without a replay: the windows, what they may do, and how far that goes."""
        self.windows = Windows.of(self.steps, self.num_blocks)
        too_short = limits.too_short(self.steps)
        if too_short:
            raise SearchError(too_short)
        self.actions = self._actions()
        self._refuse_unreachable()

    def search(self) -> Dict[str, Any]:
        started = time.time()
        self.begin("plan search")
        self.prepare()
        self.expectation = self._measured_gains(self._sizes())
        goals = self.settings.target
        aims = [Aim(self, goal, goals[n + 1 :], BUDGET + FURTHER * n) for n, goal in enumerate(goals)]
        for aim in aims:
            aim.reach()
        self.progress.close()
        first, *_ = self._conclude(aims, time.time() - started)
        self.crew.finish({"plan": formats.plan_content(first.plan)}, remove=self.session.is_delivered)
        return {"plan": first.plan}

    def _actions(self) -> List[Action]:
        observed = self.observed
        can = {
            HALF: all(len(one["guidance"]) for one in observed),
            SKIP: all(one["power"] > 0 for one in observed),
            self._kind_of_region(): all(one["forecast"] and np.isfinite(one["forecast"]).all() for one in observed),
        }
        # One decision: what one rank cannot do, none does.
        families = [family for family in FAMILIES if self.team.all_agree(can.get(family, False))]
        actions = actions_for(self.windows.length, families)
        if len(actions) == 1:
            scheduler = self.replays[0].call.pipeline.scheduler
            reason = refusal(scheduler) or f"{type(scheduler).__name__} cannot skip steps as it was called."
            raise SearchError(
                f"Nothing can be saved: guidance is off, or not in one batch at every step; {reason} No blocks can be "
                "forecast: that takes one forward a step, the same batch at every step, more than one block and finite "
                "answers. Sample with guidance, or with EulerAncestralDiscrete, EulerDiscrete, DDIM or DDPM."
            )
        return actions

    def _refuse_unreachable(self) -> None:
        """Speed-ups that no plan has are known before anything is replayed."""
        for goal in self.settings.target:
            if goal.kind == "speed" and goal.value > self._farthest() + 1e-9:
                raise SearchError(
                    f"No plan reaches {goal}: at most {self._farthest():.2f}x can be reached. Ask for less "
                    "(OSACCEL_TARGET), or sample more steps."
                )

    def _farthest(self) -> float:
        """The largest speed-up: the cheapest action in every window or, where steps are skipped, the fewest steps."""
        each = [
            min(self.actions, key=lambda action: units(action, self.windows, window))
            for window in range(self.windows.count)
        ]
        farthest = 1 / plan_of(each, self.windows).work(self.num_blocks)
        return max(farthest, self.windows.total / FEWEST) if self.can(SKIP) else farthest

    def _kind_of_region(self) -> str:
        """Forecast or reuse: what changes less where every other step does it."""
        local = torch.zeros(2, dtype=torch.float64)
        for place, kind in enumerate((FORECAST, REUSE)):
            for one in self.observed:
                windows = squared_sizes(observation.record_of(one), BY_NAME[REFERENCES[kind]], self.windows)
                local[place] += sum(window[kind] for window in windows)
        forecast, reuse = self.team.sum(local).tolist()
        return FORECAST if forecast <= reuse else REUSE

    def _measured_gains(self, sizes: Sizes) -> Expectation:
        self.fitted = self._fitted_predictor()
        # One decision: the ranks' machines may round differently.
        self.sample = self.team.share(sample(sizes, self.windows, self.settings.search_probed))
        probes = self._probes()
        jobs = [self._job_of(probe) for probe in probes]
        self.expect(jobs, self.settings.target)
        measured = {}
        for probe, job, evaluation in zip(probes, jobs, self.evaluated(jobs)):
            errors = evaluation.details["errors"] or [math.inf] * len(calls_of_job(job, len(self.replays)))
            measured[probe] = self.sample.of_all(errors, probe.changes(sizes)) if CALLS in job else errors
        return Expectation(sizes, gains(measured, sizes, self.windows))

    def plan(self, chosen: Sequence[Action]) -> Plan:
        """The plan in which every window takes its action, and skipped steps have the predictor that was fitted."""
        return self.with_predictor(plan_of(chosen, self.windows), self.fitted)

    def with_predictor(self, plan: Plan, strength: float) -> Plan:
        """The plan with a predictor of this strength, where it skips steps."""
        return replace(plan, correction=replace(plan.correction, predictor=strength)) if plan.skip else plan

    def choices(self, places: Optional[Sequence[int]] = None, early: bool = True) -> List[Choice]:
        """The curve of best choices as far as is known, among all actions or those at some places.

        early: whether the early windows may save.
        """
        actions = self._among(places)
        return curve(actions, self._squares(actions, early), self.windows)

    def choice_at(self, work: float, places: Optional[Sequence[int]] = None) -> Optional[Choice]:
        """The choice of least mean error within this work, among the same; None where nothing saves as much.

        The early windows save only where the others do not save enough.
        """
        return self.least(work, False, places) or self.least(work, True, places)

    def least(self, work: float, early: bool, places: Optional[Sequence[int]] = None) -> Optional[Choice]:
        """The choice of least mean error within this work, see `choices`; None where nothing saves as much."""
        actions = self._among(places)
        return least(actions, self._squares(actions, early), self.windows, work)

    def _squares(self, actions: Sequence[Action], early: bool) -> np.ndarray:
        """What the actions are expected to do, (call, window, action); the first is the plain one."""
        squares = self.expectation.squares(actions)
        if not early:
            squares[:, : self.windows.early, 1:] = math.inf
        return squares

    def alone(self, family: str) -> List[int]:
        """The places of the actions that save in no other way."""
        return alone(self.actions, family)

    def learn(self, actions: Sequence[Action], errors: Sequence[float]) -> None:
        """These actions, one for every window, were measured to make these errors, by call."""
        self.expectation = self.expectation.told(actions, errors)

    def _among(self, places: Optional[Sequence[int]]) -> List[Action]:
        return self.actions if places is None else [self.actions[place] for place in places]

    def _probes(self) -> List[Probe]:
        """Replays of as many groups as the budget allows beside the recorded generations and the first plans."""
        families = [family for family in FAMILIES if self.can(family)]
        rest = BUDGET - self.spent - self._price_of_choices(self.settings.target[0])
        for groups in range(GROUPS, 0, -1):
            found = probes(families, self.windows, groups)
            if groups == 1 or sum(self.price(self._job_of(probe)) for probe in found) <= rest:
                break
        return found

    def _price_of_choices(self, goal: Goal) -> float:
        """What replaying a goal's first two plans takes; for a speed-up the second may save in early windows."""
        if goal.kind != "speed":
            return 2 * (1 - self.windows.settled / self.steps)
        return sum(max(0.0, 1 / goal.value - first / self.steps) for first in (self.windows.settled, 1))

    def _job_of(self, probe: Probe) -> Job:
        """A probe's plan, to be run on the sampled calls; of the last window, where it costs least, on all."""
        job = formats.plan_content(self.plan(probe.chosen(self.windows.count)))
        is_whole = len(self.sample.calls) == len(self.replays) or probe.windows[0] == self.windows.count - 1
        return job if is_whole else {**job, CALLS: list(self.sample.calls)}

    def expect(self, jobs: Sequence[Job], goals: Sequence[Goal], more: float = 0.0) -> None:
        """Tell the progress: these jobs are to be run, `more` work behind them, and what is usual for further goals."""
        ahead = more + sum(self.share(job) * self.price(job) for job in jobs if not self.is_known(job))
        for goal in goals:
            ahead += self._price_of_choices(goal)
            if goal.kind == "speed":
                ahead += 1 / goal.value if self.can(SKIP) else 0.0
                ahead += 1 / goal.value if self.fitted else 0.0
        most = BUDGET - 1 + FURTHER * (len(self.settings.target) - 1)
        self.progress.expected = min(self.progress.done + ahead, most)

    def _sizes(self) -> Dict[str, np.ndarray]:
        """By action: squared local changes relative to the final latents, (call, window, family)."""
        reference, found = np.array(self.measure.reference.squares()), {}
        for action in self.actions:
            by_call = [squared_sizes(observation.record_of(one), action, self.windows) for one in self.observed]
            sizes = [[[size[family] for family in FAMILIES] for size in windows] for windows in by_call]
            total = self.team.sum(torch.tensor(sizes, dtype=torch.float64)).numpy()
            found[action.name] = total / reference[:, None, None]
        return found

    def _fitted_predictor(self) -> float:
        """The strength that fits the recorded predictions best where every other step is skipped.

        Beside skipped steps the aim is the plain run's own latents, so least squares is the right criterion. The
        predictions of ancestral samplers are a martingale: no move of theirs says anything of the next.
        """
        if not self.can(SKIP) or any(one["power"] == ANCESTRAL for one in self.observed):
            return 0.0
        skips = BY_NAME[REFERENCES[SKIP]]
        moments = [
            predictor_moments(observation.record_of(observed), skips, self.windows) for observed in self.observed
        ]
        against, along = self.team.sum(torch.tensor(moments, dtype=torch.float64).sum(0)).tolist()
        return round(float(np.clip(-against / along, 0.0, 1.0)), 3) if along > 0 else 0.0

    def can(self, family: str) -> bool:
        return any(family in action.cycle for action in self.actions)

    # Results

    def _conclude(self, aims: Sequence[Aim], seconds: float) -> List[Found]:
        """What was found for each goal, written and said; what was measured for one may be what another asks for."""
        paths = [path_of(self.output, self.settings.target, number) for number in range(len(aims))]
        curves, found = sidecar.curves(self) if self.team.is_first else {}, [aim.found() for aim in aims]
        for aim, one, path in zip(aims, found, paths):
            if not one.keeps:
                self.say("%s was not reached within the budget: measured %s", one.goal, said(one.evaluation))
            plan = self.team.share(self._finished(one))
            if self.team.is_first:
                milder = None if plan.touches_network else aim.milder()
                self._deliver(path, plan, sidecar.report(self, one, milder, curves, seconds))
                self.say(
                    "%s; %d replays, %.2f plain generations; written to %s", _outcome(one, milder), len(self.asked),
                    self.plain_generations, path if self.session.is_delivered else "no file",
                )  # fmt: skip
        self._write_frames(found, paths)
        self.team.barrier()
        return found

    def _deliver(self, path: str, plan: Plan, report: Dict[str, Any]) -> None:
        """The report first, as the page is drawn from it."""
        beside = formats.report_path(path)
        outputs.deliver(beside, dict(plan.measured), lambda: formats.write_json(beside, report))
        self.session.deliver(path, formats.plan_content(plan), lambda: formats.write_plan(path, plan))

    def _finished(self, found: Found) -> Plan:
        """The plan with what it is bound to and what was measured."""
        call = self.replays[0].call
        bound = binding.of_call(call.pipeline, call.arguments, self.num_blocks, self.timesteps)
        bound = {**bound, "model": self.fingerprint["model"]}
        evaluation = found.evaluation
        measured = {
            "work": found.choice.work,
            "error": evaluation.error,
            "predicted_error": sidecar.predicted(found),
            "psnr": evaluation.psnr,
            "errors_of_calls": list(evaluation.details["errors"]),
            "plain_generations": self.plain_generations,
        }
        return replace(found.plan, made_for=bound, measured=measured)

    def _write_frames(self, found: Sequence[Found], paths: Sequence[str]) -> None:
        """Frames of the first call, plain and under each plan, beside its file; the plain ones are decoded once."""
        plain = None
        for one, path in zip(found, paths):
            content = self.frames(one.evaluation, "plan", plain)
            if self.team.is_first:
                pictures.replace_frames(formats.frames_path(path), content)
            # Decoding may be split over the ranks, so all of them decode the plain ones again or none does.
            if self.team.all_agree(content is not None) and content is not None:
                plain = content["plain"]

    def settings_of(self, found: Any) -> Dict[str, Any]:
        return {"plan": formats.parse_plan(found["plan"], "rank 0's plan")}


def path_of(output: str, goals: Sequence[Goal], number: int) -> str:
    """The file of a goal: the first is `output` itself, the others have their goal before the ending."""
    if number == 0:
        return output
    stem, ending = os.path.splitext(output)
    return f"{stem}.{str(goals[number]).replace(':', '')}{ending}"


def _outcome(found: Found, milder: Optional[Goal]) -> str:
    if found.plan.touches_network:
        return f"found a plan for {found.goal}: network work {100 * found.choice.work:.1f} %, {said(found.evaluation)}"
    return (
        f"nothing that saves work keeps {found.goal}, so its plan computes every step in full; search again with a "
        f"milder target{'' if milder is None else f', such as OSACCEL_TARGET={milder}'}"
    )
