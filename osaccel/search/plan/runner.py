# SPDX-License-Identifier: Apache-2.0
"""OSACCEL_SEARCH=plan: records the calls, measures what windows of steps bear, chooses exactly, verifies, writes.

Everything finished is in the journal beside the output, so a killed search goes on where it stopped. How it decides is
in `gains` and `choice`; here is what it is decided on, and in which order.
"""

import logging
import os
import time
from dataclasses import replace
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from osaccel import binding, formats
from osaccel.generation import find_blocks
from osaccel.plan import Plan
from osaccel.search import frames as pictures
from osaccel.search import outputs, recordings
from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation, key_of
from osaccel.search.journal import Journal
from osaccel.search.journalled import JournalledRunner
from osaccel.search.plan import observation, sidecar
from osaccel.search.plan.actions import (
    FAMILIES,
    FEWEST,
    FORECAST,
    HALF,
    SKIP,
    Action,
    Windows,
    actions_for,
    alone,
    even_plan,
    plan_of,
)
from osaccel.search.plan.choice import Choice, at_error, at_work, curve
from osaccel.search.plan.gains import GROUPS, REFERENCES, Expectation, Probe, expected_square, gains, probes
from osaccel.search.plan.local import predictor_moments, squared_sizes
from osaccel.search.plan.measure import Measure
from osaccel.search.plan.progress import PlanProgress, price_of
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.session import Session
from osaccel.search.workers import Evaluate, Helper, Workers
from osaccel.settings import Goal

logger = logging.getLogger("osaccel")

# Network work a search may take for its first target, in plain generations of the recorded calls, which are counted
# in; and for each further one.
BUDGET, FURTHER = 6.0, 1.0
# Errors of calls to come are known within about a quarter. A plan that does so much worse than predicted is followed by
# another; one that skips among the first steps, where few calls do not show what turns a video, must be so much better.
TOLERANCE = 1.25


class Found(NamedTuple):
    """A goal, the choice that the knapsack made for it, and what was measured of it."""

    goal: Goal
    choice: Choice
    plan: Plan
    evaluation: Evaluation

    @property
    def square(self) -> float:
        """The mean squared error of the calls."""
        return float(np.mean(np.square(self.evaluation.details["errors"])))

    @property
    def expected(self) -> float:
        """The same as the probes' were taken."""
        return expected_square(self.evaluation.details["errors"])


class PlanRunner(JournalledRunner):
    """OSACCEL_SEARCH=plan."""

    def __init__(self, session: Session):
        super().__init__(session, session.settings.plan_output)
        self.settings = session.settings
        self.observed: List[Dict[str, Any]] = []
        self.asked: Dict[str, Evaluation] = {}

    # Recording

    def record(self, call: Call) -> Any:
        blocks = list(find_blocks(call.pipeline, call.target.block_path))
        self.num_blocks = len(blocks)
        self.open_journal(call, self._decodes, search="plan")
        output, observed = self.recorded(call, lambda replay: self._record_anew(replay, blocks))
        self.observed.append(observed)
        return output

    def _record_anew(self, replay: Replay, blocks: List[torch.nn.Module]) -> Tuple[Any, Dict[str, Any]]:
        # What was measured belongs to the calls it was measured on.
        self.forget("evaluations-", "final-")
        output, observed = observation.record(replay, blocks)
        self.check_finite(replay)
        return output, observed

    @property
    def _decodes(self) -> bool:
        return any(goal.kind == "psnr" for goal in self.settings.target)

    # Searching

    def search(self) -> Dict[str, Any]:
        started = time.time()
        steps = self.replays[0].recording.steps
        if any(replay.recording.steps != steps for replay in self.replays):
            raise SearchError("The recorded calls have different numbers of steps; one plan cannot fit them.")
        self.windows = Windows.of(steps, self.num_blocks)
        self.actions = self._actions()
        crew = Workers(self.team, self.journal)
        crew.publish(recordings.shared(self.replays))
        self.measure = Measure(self.replays, self.team, self.journal, self._decodes, self._on_step)
        self.known = {evaluation.key: evaluation for evaluation in self.team.share(self.journal.evaluations())}
        self.expectation = self._measured_gains(crew)
        found = [self._reach(goal, crew) for goal in self.settings.target]
        self.progress.close()
        self._conclude(found, time.time() - started)
        crew.finish({"plan": formats.plan_content(found[0].plan)}, remove=self.session.is_delivered)
        return {"plan": found[0].plan}

    def _actions(self) -> List[Action]:
        observed = self.observed
        can = {
            HALF: all(len(one["guidance"]) for one in observed),
            SKIP: all(one["power"] > 0 for one in observed),
            FORECAST: all(len(one["gram"]) for one in observed),
        }
        # One decision: what one rank cannot do, none does.
        actions = actions_for(self.windows.length, [family for family in FAMILIES if self.team.all_agree(can[family])])
        if len(actions) == 1:
            raise SearchError(
                f"Nothing can be saved: guidance is off, {type(self.replays[0].call.pipeline.scheduler).__name__} "
                "cannot skip steps, and there are no blocks to forecast (one forward a step, two blocks). Sample "
                "with guidance, or with EulerAncestralDiscrete, EulerDiscrete, DDIM or DDPM."
            )
        return actions

    def _measured_gains(self, crew: Workers) -> Expectation:
        sizes = self._sizes()
        self.fitted = self._fitted_predictor()
        probes = self._probes()
        plans = [self._plan_of(probe) for probe in probes]
        self.progress = self._progress(plans)
        measured = {}
        for probe, evaluation in zip(probes, self._run(plans, crew)):
            # What is not finite is not to be touched there.
            is_finite = evaluation.error is not None
            measured[probe] = expected_square(evaluation.details["errors"]) if is_finite else np.inf
        return Expectation(sizes, gains(measured, sizes, self.windows))

    def choices(self, places: Optional[Sequence[int]] = None) -> List[Choice]:
        """The curve of best choices as far as is known, among all actions or those at some places."""
        actions = self.actions if places is None else [self.actions[place] for place in places]
        return curve(actions, self.expectation.squares(actions), self.windows)

    def _probes(self) -> List[Probe]:
        """Replays of as many groups as the budget allows beside the recorded generations and the first plans."""
        families = [family for family in FAMILIES if self._can(family)]
        goal = self.settings.target[0]
        rest = BUDGET - 1 - (2 / goal.value if goal.kind == "speed" else 1.0)
        for groups in range(GROUPS, 0, -1):
            found = probes(families, self.windows, groups)
            if groups == 1 or sum(map(self._price, found)) <= rest:
                break
        return found

    def _plan_of(self, probe: Probe) -> Plan:
        by_name = {action.name: action for action in self.actions}
        return plan_of(probe.chosen(by_name, self.windows.count), self.windows)

    def _price(self, probe: Probe) -> float:
        """Plain generations' worth of replaying a probe."""
        return price_of(self._plan_of(probe), self.num_blocks)

    def _progress(self, plans: Sequence[Plan]) -> PlanProgress:
        """Of the probes that are not known yet, and of what each target's choice and plainer plans may take."""
        missing = [plan for plan in plans if key_of(formats.plan_content(plan)) not in self.known]
        expected = sum(price_of(plan, self.num_blocks) for plan in missing)
        for goal in self.settings.target:
            work = 1 / goal.value if goal.kind == "speed" else 1.0
            behind = max(0.0, work - self.windows.first / self.windows.total)
            expected += 2 * behind + work if goal.kind == "speed" and self._can(SKIP) else behind
        most = BUDGET - 1 + FURTHER * (len(self.settings.target) - 1)
        return PlanProgress(min(expected, most), self.num_blocks, len(self.replays), self.team.is_first)

    def _on_step(self) -> None:
        self.progress.step()

    def _sizes(self) -> Dict[str, List[Dict[str, float]]]:
        """By action: for every window and family, the squared local change relative to the final latents."""
        reference, found = sum(self.measure.reference.squares()), {}
        for action in self.actions:
            sizes = np.zeros((self.windows.count, len(FAMILIES)))
            for observed in self.observed:
                for window, size in enumerate(squared_sizes(observation.record_of(observed), action, self.windows)):
                    sizes[window] += [size[family] for family in FAMILIES]
            total = (self.team.sum(torch.from_numpy(sizes)) / reference).tolist()
            found[action.name] = [dict(zip(FAMILIES, values)) for values in total]
        return found

    def _fitted_predictor(self) -> float:
        """The strength that fits the recorded predictions best where every other step is skipped.

        Beside skipped steps the aim is the plain run's own latents, so least squares is the right criterion.
        """
        if not self._can(SKIP):
            return 0.0
        skips = next(action for action in self.actions if action.name == REFERENCES[SKIP])
        moments = [
            predictor_moments(observation.record_of(observed), skips, self.windows) for observed in self.observed
        ]
        against, along = self.team.sum(torch.tensor(moments, dtype=torch.float64).sum(0)).tolist()
        return round(float(np.clip(-against / along, 0.0, 1.0)), 3) if along > 0 else 0.0

    def _run(self, plans: Sequence[Plan], crew: Workers) -> List[Evaluation]:
        """The plans' evaluations; what the journal knows is not run again."""
        jobs = [formats.plan_content(plan) for plan in plans]
        missing = [(plan, job) for plan, job in zip(plans, jobs) if key_of(job) not in self.known]
        for start in range(0, len(missing), self.team.workers):
            now = missing[start : start + self.team.workers]
            self.progress.begin([plan for plan, _ in now])
            round_ = crew.run_round([job for _, job in now], self.measure, None)
            self.known.update((evaluation.key, evaluation) for evaluation in round_)
            self.progress.end()
        found = [self.known[key_of(job)] for job in jobs]
        self.asked.update((evaluation.key, evaluation) for evaluation in found)
        return found

    @property
    def spent(self) -> float:
        """Network work so far, in plain generations of the recorded calls.

        What a killed search had run counts when it is asked for again and not before: all decisions stay the same.
        """
        plain = self.num_blocks * sum(replay.recording.forwards for replay in self.replays)
        return 1.0 + sum(evaluation.block_forwards for evaluation in self.asked.values()) / plain

    def _reach(self, goal: Goal, crew: Workers) -> Found:
        """The best verified plan for a goal.

        Every one tells how errors grow with an action's strength; after one that does worse than expected another is
        chosen. Plainer plans are measured too: no choice need be worse than they are.
        """
        choice = self._chosen(goal)
        limit = BUDGET + FURTHER * self.settings.target.index(goal)
        tried: List[Found] = []
        while choice is not None and (not tried or self.spent + choice.work <= limit):
            found = self._verified(goal, choice, crew)
            tried.append(found)
            self.progress.line.best = f"{goal} with {_said(self._best(tried).evaluation)}"
            self.expectation = self.team.share(self.expectation.learned(choice.actions, found.expected))
            if self._keeps(found) and (goal.kind != "speed" or found.expected <= TOLERANCE**2 * choice.square):
                break
            choice = self.team.share(self._another(goal, tried))
        tried += self._plainer(goal, limit, tried, crew)
        tried += self._led(goal, limit, self._best(tried), crew)
        best = self._best(tried)
        if not self._keeps(best):
            self.say("%s was not reached within the budget: measured %s", goal, _said(best.evaluation))
        return best

    def _plainer(self, goal: Goal, limit: float, tried: Sequence[Found], crew: Workers) -> List[Found]:
        """Steps skipped and nothing else, as the windows have it and evenly; as far as the budget allows."""
        if goal.kind != "speed" or not self._can(SKIP):
            return []
        even = even_plan(self.windows.total, 1 / goal.value)
        others = [(Choice((), even.work(self.num_blocks), float("nan")), even)]
        skips = self.team.share(self._within(goal, self.choices(alone(self.actions, SKIP))))
        if skips is not None and all(skips.actions != one.choice.actions for one in tried):
            others.insert(0, (skips, plan_of(skips.actions, self.windows)))
        found: List[Found] = []
        for choice, plan in others:
            if not tried or self.spent + price_of(plan, self.num_blocks) <= limit:
                found += self._measured(goal, choice, plan, crew)
        if not tried and not found:
            raise _not_finite(goal)
        return found

    def _led(self, goal: Goal, limit: float, best: Found, crew: Workers) -> List[Found]:
        """The best so far with the predictor that fits the recorded predictions, where the budget allows it.

        The fit is about what x lacks at computed steps; what the network makes of it can go either way.
        """
        if not best.plan.skip or not self.fitted:
            return []
        plan = replace(best.plan, correction=replace(best.plan.correction, predictor=self.fitted))
        if self.spent + price_of(plan, self.num_blocks) > limit:
            return []
        return self._measured(goal, best.choice, plan, crew)

    def _can(self, family: str) -> bool:
        return any(family in action.cycle for action in self.actions)

    def _best(self, tried: Sequence[Found]) -> Found:
        return min(tried, key=lambda found: (not self._keeps(found), found.square * self._doubt(found)))

    def _doubt(self, found: Found) -> float:
        return TOLERANCE**2 if min(found.plan.skip, default=self.windows.first) < self.windows.first else 1.0

    def _another(self, goal: Goal, tried: Sequence[Found]) -> Optional[Choice]:
        """What is to be tried next; None where there is nothing new."""
        choices, last = self.choices(), tried[-1]
        if goal.kind == "speed":
            choice = self._within(goal, choices)
            return choice if choice is not None and all(choice.actions != one.choice.actions for one in tried) else None
        needed = goal.value
        if goal.kind == "psnr":
            # As the frames' error goes with that of the latents.
            assert last.evaluation.psnr is not None and last.evaluation.error is not None
            needed = last.evaluation.error * 10 ** ((last.evaluation.psnr - goal.value) / 20)
        milder = [choice for choice in choices if choice.work > last.choice.work]
        return at_error(milder, needed) or (milder[-1] if milder else None)

    def _within(self, goal: Goal, choices: Sequence[Choice]) -> Optional[Choice]:
        """What is predicted to reach a goal; None where nothing is."""
        if goal.kind == "speed":
            return at_work(choices, 1 / goal.value)
        # What an error of the latents is in the frames is not known before one was decoded.
        return at_error(choices, goal.value if goal.kind == "error" else 10 ** (-goal.value / 20))

    def _chosen(self, goal: Goal) -> Optional[Choice]:
        """The first choice; None where only skipping evenly goes as far."""
        choices = self.choices()
        chosen = self._within(goal, choices)
        farthest = 1 / choices[0].work
        if goal.kind == "speed" and self._can(SKIP):
            farthest = max(farthest, self.windows.total / FEWEST)
        if chosen is None and (goal.kind != "speed" or goal.value > farthest):
            raise SearchError(
                f"No plan reaches {goal}: at most {farthest:.2f}x can be reached. Ask for less, or sample more steps."
            )
        return self.team.share(chosen)

    def _verified(self, goal: Goal, choice: Choice, crew: Workers) -> Found:
        found = self._measured(goal, choice, plan_of(choice.actions, self.windows), crew)
        if not found:
            raise _not_finite(goal)
        return found[0]

    def _measured(self, goal: Goal, choice: Choice, plan: Plan, crew: Workers) -> List[Found]:
        """A plan with what was measured of it; nothing where its latents are not finite."""
        (evaluation,) = self._run([plan], crew)
        return [Found(goal, choice, plan, evaluation)] if evaluation.error is not None else []

    def _keeps(self, found: Found) -> bool:
        goal, evaluation = found.goal, found.evaluation
        if goal.kind == "speed":
            return True
        if goal.kind == "psnr":
            return evaluation.psnr is not None and evaluation.psnr >= goal.value
        return evaluation.error is not None and evaluation.error <= goal.value

    # Results

    def _conclude(self, found: Sequence[Found], seconds: float) -> None:
        goals = [one.goal for one in found]
        curves = sidecar.curves(self) if self.team.is_first else {}
        for number, one in enumerate(found):
            plan = self.team.share(self._finished(one))
            if self.team.is_first:
                self._deliver(path_of(self.output, goals, number), plan, sidecar.report(self, one, curves, seconds))
                self.say(
                    "found a plan for %s: network work %.1f %%, %s; %d replays, %.2f plain generations; written to %s",
                    one.goal, 100 * one.choice.work, _said(one.evaluation), len(self.asked), self.spent,
                    path_of(self.output, goals, number) if self.session.is_delivered else "no file",
                )  # fmt: skip
        self._write_frames(found[0])
        self.team.barrier()

    def _deliver(self, path: str, plan: Plan, report: Dict[str, Any]) -> None:
        """The report first, as the page is drawn from it."""
        beside = binding.report_path(path)
        outputs.deliver(beside, dict(plan.measured), lambda: formats.write_json(beside, report))
        self.session.deliver(path, formats.plan_content(plan), lambda: formats.write_plan(path, plan))

    def _finished(self, found: Found) -> Plan:
        """The plan with what it is bound to and what was measured."""
        call = self.replays[0].call
        bound = binding.of_call(call.pipeline, call.arguments, self.num_blocks, self.timesteps)
        bound = {**bound, "model": self.fingerprint["model"], "guidance_scale": call.arguments.get("guidance_scale")}
        evaluation = found.evaluation
        measured = {
            "work": found.choice.work,
            "error": evaluation.error,
            "predicted_error": sidecar.predicted(found),
            "psnr": evaluation.psnr,
            "errors_of_calls": list(evaluation.details["errors"]),
            "plain_generations": self.spent,
        }
        return replace(found.plan, made_for=bound, measured=measured)

    def _write_frames(self, found: Found) -> None:
        """Frames of the first call, plain and under the first plan."""
        final = self.measure.final(found.evaluation.config)
        if not self.team.all_agree(final is not None) or final is None:
            return
        content = pictures.frames(self.replays[0], final, "plan")
        if self.team.is_first and content is not None:
            pictures.write_frames(self.output + ".report.npz", content)

    # Other ranks of a script that splits its prompts

    def assist(self, call: Call) -> Dict[str, Any]:
        def prepare(journal: Journal, context: Any) -> Evaluate:
            replays = recordings.adopt(journal, self.team, call, context)
            return Measure(replays, self.team, journal, self._decodes)

        found = Helper(self.team, self.directory).assist(prepare)
        return {"plan": formats.parse_plan(found["plan"], "rank 0's plan")}


def path_of(output: str, goals: Sequence[Goal], number: int) -> str:
    """The file of a goal: the first is `output` itself, the others have their goal before the ending."""
    if number == 0:
        return output
    stem, ending = os.path.splitext(output)
    return f"{stem}.{str(goals[number]).replace(':', '')}{ending}"


def _not_finite(goal: Goal) -> SearchError:
    return SearchError(f"The plan for {goal} gave latents that are not finite.")


def _said(evaluation: Evaluation) -> str:
    psnr = "" if evaluation.psnr is None else f", {evaluation.psnr:.2f} dB"
    return f"error {evaluation.error:.4g}{psnr}"
