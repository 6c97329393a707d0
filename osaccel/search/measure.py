# SPDX-License-Identifier: Apache-2.0
"""Runs plans on the recorded calls, from the first step that they change, and says how far the final latents move."""

import time
from typing import Any, Callable, List, Mapping, Optional, Sequence

import numpy as np
import torch

from osaccel import formats
from osaccel.binding import digest_of
from osaccel.plan import Plan, Schedule, for_steps
from osaccel.search.evaluation import Evaluation
from osaccel.search.frames import mean_psnr
from osaccel.search.journal import Journal
from osaccel.search.recording.replay import Abandoned, Replay
from osaccel.search.reference import Reference
from osaccel.search.team import Team

# Of a job: the numbers of the calls that its plan is run on.
CALLS = "calls"


class Measure:
    """Evaluates plans on recorded calls.

    Args:
        replays: the calls, recorded with what the network returned.
        team: whose shards are summed.
        journal: keeps the first call's final latents under every plan, for the report's frames.
        decode: also measure the PSNR of the decoded frames.
        on_step: called after every computed step.
    """

    def __init__(
        self,
        replays: Sequence[Replay],
        team: Team,
        journal: Optional[Journal] = None,
        decode: bool = False,
        on_step: Callable[[], None] = lambda: None,
    ):
        self.replays, self.team, self.journal, self.decode, self.on_step = list(replays), team, journal, decode, on_step
        self.reference = Reference(self.replays, team)

    def __call__(self, job: Mapping[str, Any], shared: Any = None) -> Evaluation:
        """Evaluate a job, see `plan_of_job` and `calls_of_job`; `details` holds the relative error of every call."""
        started = time.perf_counter()
        plan = plan_of_job(job, self.replays[0].recording.steps)
        resume = first_change(plan)
        squares, work, psnrs, curves = [], 0.0, [], []
        for number in calls_of_job(job, len(self.replays)):
            replay = self.replays[number]
            run = _Run(replay, self.team, self.on_step)
            output = run.go(plan, resume, self.decode)
            squares.append(run.square)
            curves.append(tuple(run.curve))
            work += replay.cache.computed_blocks if replay.cache else 0.0
            if run.square is None:
                break
            if number == 0 and self.journal is not None:
                self.journal.save(self._final_name(job), run.last)
            if self.decode:
                psnrs.append(self.reference.psnr(number, output))
        return self._evaluation(job, squares, work, psnrs, curves, resume, time.perf_counter() - started)

    def final(self, job: Mapping[str, Any]) -> Optional[torch.Tensor]:
        """This rank's final latents of the first call under a plan that was evaluated, by whichever process."""
        return self.journal.load(self._final_name(job)) if self.journal is not None else None

    def _final_name(self, job: Mapping[str, Any]) -> str:
        return f"final-{digest_of(dict(job))}-{self.team.member}"

    def _evaluation(
        self, job: Any, squares: Any, work: float, psnrs: Any, curves: Any, resume: int, seconds: float
    ) -> Evaluation:
        numbers = calls_of_job(job, len(self.replays))
        is_finite = len(squares) == len(numbers) and None not in squares
        references = [self.reference.squares()[number] for number in numbers]
        errors = [(s / r) ** 0.5 if r > 0 else 0.0 for s, r in zip(squares, references)] if is_finite else []
        return Evaluation(
            config=job,
            error=sum(errors) / len(errors) if is_finite else None,
            block_forwards=work,
            psnr=mean_psnr(psnrs) if psnrs and is_finite else None,
            resumed_at=resume,
            seconds=seconds,
            curves=tuple(curves),
            details={"errors": errors},
        )


def plan_of_job(job: Mapping[str, Any], steps: int) -> Plan:
    """The plan whose content `job` is but for the calls it names, or whose four keys; every step named."""
    content = {key: value for key, value in job.items() if key != CALLS}
    return for_steps(formats.parse_plan(content, "the plan under test"), steps)


def calls_of_job(job: Mapping[str, Any], count: int) -> Sequence[int]:
    """The numbers of the calls that the plan is run on; all `count` where the job names none."""
    return job.get(CALLS, range(count))


def first_change(plan: Plan) -> int:
    """The first step that must be computed anew: one that is not the plain run's, or whose deltas are used later."""
    steps = [*plan.skip, *plan.conditional_only]
    for region in plan.regions:
        schedule = Schedule.of(region, plan)
        steps += [step for step in range(plan.steps or 0) if schedule.reuses(step) or schedule.stores(step)]
    return min(steps, default=plan.steps or 0)


def price_of(plan: Plan, num_blocks: int) -> float:
    """Plain generations' worth of replaying a plan: nothing before its first change is computed."""
    return plan.work(num_blocks) - first_change(plan) / (plan.steps or 1)


class _Run:
    """One call under one plan; given up when its latents are not finite."""

    def __init__(self, replay: Replay, team: Team, on_step: Callable[[], None]):
        self.replay, self.team, self.on_step = replay, team, on_step
        self.square: Optional[float] = 0.0
        self.curve: List[Optional[float]] = []
        self.last: Optional[torch.Tensor] = None

    def go(self, plan: Plan, resume: int, decode: bool) -> Any:
        try:
            return self.replay.run(plan, resume, self._watch, decode=decode)
        except Abandoned:
            self.square = None
            return None

    def _watch(self, step: int, latents: torch.Tensor) -> None:
        before = self.replay.recording.latents[step].to(latents.device).double()
        change = (latents.detach().double() - before).square().sum()
        square, whole = self.team.sum(torch.stack([change, before.square().sum()])).tolist()
        self.on_step()
        if not np.isfinite(square):
            self.curve.append(None)
            raise Abandoned
        self.curve.append((square / whole) ** 0.5 if whole > 0 else None)
        self.square, self.last = square, latents.detach().cpu().clone()
