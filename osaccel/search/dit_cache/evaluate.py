# SPDX-License-Identifier: Apache-2.0
"""What a cache configuration does to the final latents of the recorded calls, measured by real resumed generations."""

import math
import time
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch

from osaccel.plan import of_dit_cache
from osaccel.search.dit_cache.candidates import Candidate, projected
from osaccel.search.evaluation import Curve, Evaluation
from osaccel.search.frames import mean_psnr
from osaccel.search.recording.replay import Abandoned, Replay
from osaccel.search.reference import Reference
from osaccel.search.team import Team

# A candidate is given up when the error it is heading for is larger than the best one's by this factor.
MARGIN = 1.2


class Evaluator:
    """Runs candidates on all recorded calls.

    Args:
        replays: the recorded calls.
        team: whose shards are summed.
        decode: also measure the PSNR of the decoded frames.
        on_step: called after every computed step.
    """

    def __init__(
        self, replays: Sequence[Replay], team: Team, decode: bool = False, on_step: Callable[[], None] = lambda: None
    ):
        self.replays, self.team, self.decode, self.on_step = list(replays), team, decode, on_step
        self.reference = Reference(self.replays, team)
        self.final: Optional[torch.Tensor] = None

    def __call__(self, candidate: Candidate, best: Optional[Evaluation] = None) -> Evaluation:
        """Evaluate one candidate; stops early when it cannot beat `best`, an earlier evaluation."""
        started = time.perf_counter()
        rival = _Rival(best, self.references()) if best else None
        curves: List[Curve] = []
        squares, blocks, steps_run, abandoned, psnrs = 0.0, 0, 0, False, []
        for number, replay in enumerate(self.replays):
            run = _Run(replay, candidate, self.team, rival.on_call(number, squares) if rival else None, self.on_step)
            output = run.go(decode=self.decode)
            curves.append(tuple(_json(value) for value in run.curve))
            blocks += int(replay.cache.computed_blocks) if replay.cache else 0
            steps_run = len(run.curve)
            abandoned = run.abandoned
            if number == 0:
                self.final = run.last
            if abandoned:
                break
            squares += run.square
            if self.decode:
                psnrs.append(self.reference.psnr(number, output))
        reference = sum(self.references())
        error = math.sqrt(squares / reference) if reference > 0 and squares >= 0 else math.nan
        return Evaluation(
            config=candidate.config.to_dict(),
            error=None if abandoned else _json(error),
            block_forwards=blocks,
            abandoned=abandoned,
            projected=_json(rival.heading_for(curves, squares)) if rival and abandoned else None,
            psnr=mean_psnr(psnrs) if psnrs and not abandoned else None,
            resumed_at=self.replays[0].resumed_at(candidate.first),
            steps_run=steps_run,
            seconds=time.perf_counter() - started,
            curves=tuple(curves),
        )

    def references(self) -> List[float]:
        """The sum of squares of each call's plain final latents, over the team's shards."""
        return self.reference.squares()


class _Rival:
    """The best candidate so far, as the measure for another one's running errors over all calls."""

    def __init__(self, best: Evaluation, references: Sequence[float]):
        self.curves, self.references = best.curves, references
        self.error = math.inf if best.error is None else best.error

    def on_call(self, number: int, squares: float) -> Callable[[int, float], bool]:
        """Whether a running error (step, error) on a call is hopeless, after calls with these squared errors in all."""
        most = (MARGIN * self.error) ** 2 * sum(self.references) - squares
        limit = math.sqrt(max(0.0, most) / self.references[number]) if self.references[number] > 0 else math.inf
        return lambda step, error: projected(step, error, self.curves[number]) > limit

    def heading_for(self, curves: Sequence[Sequence[Optional[float]]], squares: float) -> float:
        """The error over all calls of one given up in the last of `curves`: as much over the rival's as so far."""
        *finished, last = curves
        if not last or last[-1] is None:
            return math.nan
        number = len(finished)
        squares += projected(len(last) - 1, last[-1], self.curves[number]) ** 2 * self.references[number]
        finals = [curve[-1] or 0.0 for curve in self.curves[: number + 1]]
        same = sum(final**2 * reference for final, reference in zip(finals, self.references))
        return self.error * math.sqrt(squares / same) if same > 0 else math.nan


class _Run:
    """One call under one candidate, resumed where the first delta is there or is stored."""

    def __init__(
        self,
        replay: Replay,
        candidate: Candidate,
        team: Team,
        is_hopeless: Optional[Callable[[int, float], bool]],
        on_step: Callable[[], None],
    ):
        self.replay, self.candidate, self.team = replay, candidate, team
        self.is_hopeless, self.on_step = is_hopeless, on_step
        self.curve: List[float] = [0.0] * replay.resumed_at(candidate.first)
        self.square = 0.0
        self.abandoned = False
        self.last: Optional[torch.Tensor] = None

    def go(self, decode: bool) -> Any:
        policy = of_dit_cache(self.candidate.config)
        try:
            return self.replay.run_cached(policy, self.candidate.first, self._watch, decode=decode)
        except Abandoned:
            self.abandoned = True
            return None

    def _watch(self, step: int, latents: torch.Tensor) -> None:
        error, self.square = relative_error(self.team, latents, self.replay.recording.latents[step])
        self.curve.append(error)
        self.last = latents.detach().cpu().clone()
        self.on_step()
        if not math.isfinite(error):
            raise Abandoned
        if self.is_hopeless and step > self.candidate.first and self.is_hopeless(step, error):
            raise Abandoned


def relative_error(team: Team, latents: torch.Tensor, plain: torch.Tensor) -> Tuple[float, float]:
    """Relative L2 distance over the team's shards, NaN for a zero reference; and the sum of squares of the change."""
    before = plain.to(latents.device).double()
    return relative_size(team, latents.detach().double() - before, before)


def relative_size(team: Team, change: torch.Tensor, plain: torch.Tensor) -> Tuple[float, float]:
    """The same for a change of the latents; both in float64 on one device."""
    square, reference = team.sum(torch.stack([(change**2).sum(), (plain**2).sum()])).tolist()
    return math.sqrt(square / reference) if reference > 0 else math.nan, square


def _json(value: float) -> Optional[float]:
    return value if math.isfinite(value) else None
