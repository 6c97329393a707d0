# SPDX-License-Identifier: Apache-2.0
"""Skipped steps and the second-order correction: what goes to the unmodified `scheduler.step` in place of what came.

Notation (variance-exploding, Karras et al. arXiv 2206.00364): s_k the noise level of step k, D_k the guided denoised
prediction there, x = x0 + s z. One step of the samplers below freezes D over [s_k, s_(k+1)]:

    x_(k+1) / s_(k+1)^q = x_k / s_k^q + D_k (s_(k+1)^-q - s_k^-q) + noise

with q = 2 for ancestral sampling (Euler ancestral, DDPM, DDIM at eta 1) and q = 1, no noise, for the probability flow
(Euler, DDIM at eta 0). Hence a step that is told to see D_i again continues the step from i exactly, with the merged
noise; and whatever D should have been over steps that are past can be made good by moving x: docs/correction.md.
"""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from osaccel.clock import Clock
from osaccel.interceptors import Interceptor, StepCall
from osaccel.network.forwards import prediction_of, rows_of, with_prediction
from osaccel.plan import Correction, Plan
from osaccel.sampling.levels import NoiseLevels
from osaccel.sampling.lists import UnsupportedScheduler
from osaccel.sampling.response import Response
from osaccel.schedule import ANCESTRAL, FLOW, POWERS, refusal


class _Computed(NamedTuple):
    """A step at which the network was called.

    Attributes:
        denoised: D there, (N, ...), float32.
        change: D less that of the computed step `before`; None where there is none or nothing is corrected.
        persists: of that change, see `persistence`; (N, 1, ...) or 1.
    """

    step: int
    denoised: torch.Tensor
    before: int = -1
    change: Optional[torch.Tensor] = None
    persists: Union[float, torch.Tensor] = 1.0


class Corrected(Interceptor):
    """Corrects what goes to the scheduler; keeps a denoised prediction and its last change, and a response's, float32.

    Args:
        plan: its `skip` and `correction` are what is done here.
        clock: of the generation.

    Raises:
        UnsupportedScheduler: `begin`: the scheduler's step does not freeze D, or not with these options.
    """

    def __init__(self, plan: Plan, clock: Clock):
        self.plan, self.clock = plan, clock
        self._skip = frozenset(plan.skip)
        self.close()

    def close(self) -> None:
        self._newest: Optional[_Computed] = None
        # How far each stand-in since the newest computed step followed its change, by step, before `persists`.
        self._followed: List[float] = []
        self._response: Optional[Response] = None

    def begin(self, scheduler: Any) -> None:
        self.close()
        check_scheduler(scheduler)
        self.scheduler, self.levels = scheduler, NoiseLevels(scheduler)
        self.sigmas = self.levels.of_steps()
        self._starts_without_signal = bool(scheduler.config.get("rescale_betas_zero_snr"))
        self._response = Response(self.sigmas) if self._skip and self.plan.correction.responds else None

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        step, power = self.clock.step, power_of(self.scheduler, call)
        sigma, sample, is_skipped = self.sigmas[step], call.sample, step in self._skip
        if power != ANCESTRAL:
            self._response = None  # no noise is added
        foreseen = self._foreseen(step, sample)
        if not is_skipped:
            newest = self._computed(step, self.levels.denoised(call.model_output, sigma, sample))
            self._learn(sample, newest)
            sample = self._corrected(sample, newest, foreseen, power)
            self._newest, self._followed = newest, []
        assert self._newest is not None
        followed, assumed = self._follow(step, power), self._newest.denoised
        self._followed.append(followed)
        if followed and self._newest.change is not None:
            assumed = assumed + followed * self._newest.persists * self._newest.change
        if is_skipped and foreseen is not None:
            assumed = assumed + foreseen
        self._tell_response(step, sample, assumed)
        if not is_skipped and sample is call.sample and not followed:
            return proceed(call)
        output = self.levels.model_output(assumed, sigma, sample)
        return proceed(call.replaced(output.to(call.model_output.dtype), sample))

    def _foreseen(self, step: int, sample: torch.Tensor) -> Optional[torch.Tensor]:
        """What the noise since the newest computed step has done to D; None where nothing is known or asked for."""
        # At a computed step that is what the skipped one before it was told to answer with.
        told = step if step in self._skip else step - 1
        strength = self.plan.correction.at(told).response if told in self._skip else 0.0
        if self._response is None or not strength:
            return None
        foreseen = self._response.foreseen(step, self._exploded(step, sample))
        return None if foreseen is None else strength * foreseen

    def _learn(self, sample: torch.Tensor, newest: _Computed) -> None:
        """The slope is asked for at skipped steps only, which begin behind the computed step that measures it."""
        if self._response is not None and newest.change is not None and newest.step + 1 in self._skip:
            self._response.learn(newest.step, self._exploded(newest.step, sample), newest.change)

    def _tell_response(self, step: int, sample: torch.Tensor, assumed: torch.Tensor) -> None:
        """`sample` and `assumed` are what the scheduler gets."""
        if self._response is None or (step == 0 and self._starts_without_signal):
            return
        if step not in self._skip:
            self._response.leave(step, self._exploded(step, sample))
        self._response.passed(step, assumed)

    def _exploded(self, step: int, sample: torch.Tensor) -> torch.Tensor:
        """x = x0 + s z."""
        return sample.float() * self.levels.scale(self.sigmas[step])

    def _computed(self, step: int, denoised: torch.Tensor) -> _Computed:
        """What a computed step adds to what is known."""
        last = self._newest
        if last is None or self.plan.correction == Correction():
            return _Computed(step, denoised)
        change = denoised - last.denoised
        return _Computed(step, denoised, last.step, change, persistence(change, last.change))

    def _follow(self, step: int, power: float) -> float:
        """How far D is taken to have moved on at `step`, in units of the newest change."""
        strength, newest = self.plan.correction.at(step).predictor, self._newest
        if not strength or newest is None or newest.change is None:
            return 0.0
        earlier, start = self.sigmas[newest.before], self.sigmas[newest.step]
        if self._skip:
            return strength * followed(earlier, start, self.sigmas[step])
        return strength * reach(earlier, start, self.sigmas[step + 1], power)

    def _corrected(
        self, sample: torch.Tensor, newest: _Computed, foreseen: Optional[torch.Tensor], power: float
    ) -> torch.Tensor:
        """The sample where it would be, had D moved evenly in log s from the computed step before to this one.

        So it is for what was not `foreseen` of the change; the rest the scheduler has been told on the way.
        """
        step, last = newest.step, self._newest
        strength = self.plan.correction.at(step).corrector
        if not strength or last is None or newest.change is None or (last.step == 0 and self._starts_without_signal):
            return sample
        moved, followed = self._missed(last.step, step, power)
        if not moved and not followed:
            return sample
        missed = moved * (newest.change if foreseen is None else newest.change - foreseen)
        if followed and last.change is not None:
            missed = missed - followed * last.persists * last.change
        missed = (strength / self.levels.scale(self.sigmas[step])) * newest.persists * missed
        return (sample.float() + missed).to(sample.dtype)

    def _missed(self, start: int, end: int, power: float) -> Tuple[float, float]:
        """What x lacks at `end`, in units of D_end - D_start; and what it has too much, of the change followed."""
        sigmas = self.sigmas
        last = sigmas[end]
        weights = [last**power * (sigmas[k + 1] ** -power - sigmas[k] ** -power) for k in range(start, end)]
        followed = sum(weight * share for weight, share in zip(weights, self._followed))
        if self._skip:
            # As the plain run would have: D at the left end of every native step.
            shares = [evenly(sigmas[start], sigmas[k], last) for k in range(start, end)]
            return sum(weight * share for weight, share in zip(weights, shares)), followed
        return sum(weights) * mean_share(math.log(sigmas[start] / last), power), followed


class StandIn(Corrected):
    """Feeds the scheduler at skipped steps too, and keeps the network from being called there."""

    def close(self) -> None:
        super().close()
        self._blank: Any = None
        self._rows: Optional[int] = None

    def network(self, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        if self.clock.step in self._skip:
            # As many rows as come in: some pipelines guide at some of the steps only.
            blank = prediction_of(self._blank)
            rows = len(blank) * (rows_of(args, kwargs) or 1) // (self._rows or 1)
            return with_prediction(self._blank, blank[:1].expand(rows, *blank.shape[1:]))
        output = proceed(*args, **kwargs)
        if self._blank is None:
            prediction = prediction_of(output)
            # Never read: the step replaces it. It takes no memory.
            self._blank = with_prediction(output, prediction.new_zeros(()).expand(prediction.shape))
            self._rows = rows_of(args, kwargs)
        return output


def persistence(change: torch.Tensor, before: Optional[torch.Tensor]) -> Union[float, torch.Tensor]:
    """How much of a correction a video's own last two changes of D allow, in [0, 1]; (N, 1, ...), no synchronisation.

    Where D answers to x as D = a x, a frozen step of relative size w multiplies the deviations of x by 1 + z,
    z = w (a - 1), and its noise makes successive changes of D correlate by r = z / 2. The exact prediction of an
    unguided model is a martingale, r = 0; guidance towards a narrow mode makes z very negative. Corrected steps are
    stable to z = -1/2, and from z = -1 on the plain step itself swings over: all down to r = -1/4, none from -1/2.
    """
    if before is None:
        return 1.0
    axes = tuple(range(1, change.dim()))
    product, one, other = (
        (a * b).sum(axes, keepdim=True) for a, b in ((change, before), (change, change), (before, before))
    )
    return (2.0 + 4.0 * product / (one * other).sqrt().clamp_min(1e-30)).clamp(0.0, 1.0)


def evenly(start: float, sigma: float, end: float) -> float:
    """How far something has moved at `sigma` that moves evenly in log s from `start` to `end`."""
    return 0.0 if sigma == start else math.log(start / sigma) / math.log(start / end)


def leaning(
    called: Sequence[int], share: Callable[[int, int, int], float], weight: Callable[[int], float]
) -> Dict[int, float]:
    """By called step, what an error of D there makes of x: skipped steps behind it lean on it and on the next one.

    Args:
        share: of (start, step, end), how far D is taken to have moved at a step between two called ones.
        weight: of a step, what an error of what stands for D there makes of x.
    """
    weights = dict.fromkeys(called, 0.0)
    for start, end in zip(called, called[1:]):
        for step in range(start, end):
            moved = share(start, step, end)
            weights[start] += (1 - moved) * weight(step)
            weights[end] += moved * weight(step)
    return weights


def mean_share(whole: float, power: float) -> float:
    """The mean over an interval, by the weight of s^-power, of ln(p/s) / ln(p/t), for ln(p/t) = `whole` > 0."""
    grown = power * whole
    return 1 / -math.expm1(-grown) - 1 / grown


def followed(earlier: float, start: float, sigma: float) -> float:
    """How far D has moved on at a skipped step, in units of D_s - D_p: linear in s, no farther than an even ratio."""
    return min((start - sigma) / (earlier - start), start / earlier)


def reach(earlier: float, start: float, end: float, power: float) -> float:
    """How far the mean of D over [`start`, `end`] lies beyond D_s, s = `start`, in units of D_s - D_p, p = `earlier`.

    D is taken to be linear in s. On steps of equal ratio that is what keeps the variance of Gaussian data of any
    width (docs/correction.md); towards the end of a run steps grow, and there it would add too much, so it goes no
    farther than it would for a step of the ratio of the one before.
    """
    moved = (start - mean_sigma(start, end, power)) / (earlier - start)
    even = (
        (start - mean_sigma(start, start * start / earlier, power)) / (earlier - start)
        if math.isfinite(earlier)
        else 0.0
    )
    return min(moved, even)


def mean_sigma(start: float, end: float, power: float) -> float:
    """The mean of s over [start, end], by the weight of s^-power; `start` where it ends at 0 (first order)."""
    if end <= 0:
        return start
    if power == ANCESTRAL:
        return 2 * start * end / (start + end)
    return start * end * math.log(start / end) / (start - end)


def check_scheduler(scheduler: Any) -> None:
    """Raise UnsupportedScheduler, with the reason, unless the scheduler's step freezes D as skipping needs it."""
    reason = refusal(scheduler)
    if reason:
        raise UnsupportedScheduler(reason)


def usual_power(scheduler: Any) -> float:
    """q of a scheduler's step with its usual options; that of the probability flow where nothing is known of it."""
    return next((POWERS[base.__name__] for base in type(scheduler).__mro__ if base.__name__ in POWERS), FLOW)


def known_power(scheduler: Any, call: StepCall) -> Optional[float]:
    """q of a step that freezes D; None for others."""
    try:
        check_scheduler(scheduler)
        return power_of(scheduler, call)
    except UnsupportedScheduler:
        return None


def power_of(scheduler: Any, call: StepCall) -> float:
    """q of a known scheduler's step, by its class and the options of this call; UnsupportedScheduler for others."""
    power = usual_power(scheduler)
    args, kwargs = call.others
    if any(base.__name__ == "DDIMScheduler" for base in type(scheduler).__mro__):
        eta = args[0] if args else kwargs.get("eta", 0.0)
        if eta not in (0, 1):
            raise UnsupportedScheduler(f"DDIM cannot skip or correct steps at eta={eta!r}: 0 and 1 are allowed.")
        return ANCESTRAL if eta == 1 else FLOW
    if kwargs.get("s_churn") or (args and power == FLOW and args[0]):
        raise UnsupportedScheduler("EulerDiscreteScheduler cannot skip or correct steps with s_churn; 0 is allowed.")
    return power
