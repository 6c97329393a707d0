# SPDX-License-Identifier: Apache-2.0
"""The second-order correction where every step is computed, in the notation of `osaccel.sampling.standin`."""

import math
from typing import Any, Callable, NamedTuple, Optional, Union

import torch

from osaccel.clock import Clock
from osaccel.interceptors import Interceptor, StepCall
from osaccel.plan import Plan
from osaccel.sampling.levels import NoiseLevels
from osaccel.sampling.powers import check_scheduler, power_of
from osaccel.schedule import ANCESTRAL

# The agreement of successive changes of D from which on the plain step itself swings over.
UNSTABLE = -0.5


class Computed(NamedTuple):
    """A step at which the network was called.

    Attributes:
        denoised: D there, (N, ...), float32.
        change: D less that of the computed step before; None where there is none.
        agreement: of that change with the one before, see `agreement_of`; None where there is no other.
    """

    step: int
    denoised: torch.Tensor
    change: Optional[torch.Tensor] = None
    agreement: Optional[torch.Tensor] = None

    def then(self, step: int, denoised: torch.Tensor) -> "Computed":
        """The computed step that follows."""
        change = denoised - self.denoised
        return Computed(step, denoised, change, agreement_of(change, self.change))

    @property
    def persists(self) -> Union[float, torch.Tensor]:
        return allowed(self.agreement, UNSTABLE)


class OfPlan(Interceptor):
    """What a plan does to the calls of a scheduler whose step freezes D; the base of those that do it.

    Args:
        plan: its `skip` and `correction` say what.
        clock: of the generation.

    Raises:
        UnsupportedScheduler: `begin`: the scheduler's step does not freeze D, or not with these options.
    """

    def __init__(self, plan: Plan, clock: Clock):
        self.plan, self.clock = plan, clock
        self.close()

    def begin(self, scheduler: Any) -> None:
        self.close()
        check_scheduler(scheduler)
        self.scheduler, self.levels = scheduler, NoiseLevels(scheduler)
        self.sigmas = self.levels.of_steps()
        self._starts_without_signal = bool(scheduler.config.get("rescale_betas_zero_snr"))


class Corrected(OfPlan):
    """Corrects what goes to the scheduler; keeps a denoised prediction and its last change, float32."""

    def close(self) -> None:
        self._newest: Optional[Computed] = None
        # How far the newest step was told that D follows its change, before `persists`.
        self._followed = 0.0

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        step, power = self.clock.step, power_of(self.scheduler, call)
        denoised = self.levels.denoised(call.model_output, self.sigmas[step], call.sample)
        newest = Computed(step, denoised) if self._newest is None else self._newest.then(step, denoised)
        sample, followed = self._corrected(call.sample, newest, power), self._follow(newest, power)
        self._newest, self._followed = newest, followed
        if sample is call.sample and not followed:
            return proceed(call)
        assumed = denoised if newest.change is None else denoised + followed * newest.persists * newest.change
        output = self.levels.model_output(assumed, self.sigmas[step], sample)
        return proceed(call.replaced(output.to(call.model_output.dtype), sample))

    def _follow(self, newest: Computed, power: float) -> float:
        """How far D is taken to move on within a step, in units of the newest change."""
        strength, step = self.plan.correction.at(newest.step).predictor, newest.step
        if not strength or newest.change is None:
            return 0.0
        earlier, start, end = self.sigmas[step - 1 : step + 2]
        return strength * reach(earlier, start, end, power)

    def _corrected(self, sample: torch.Tensor, newest: Computed, power: float) -> torch.Tensor:
        """The sample where it would be, had D moved evenly in log s from the step before to this one."""
        step, last = newest.step, self._newest
        strength = self.plan.correction.at(step).corrector
        if not strength or last is None or newest.change is None or (last.step == 0 and self._starts_without_signal):
            return sample
        before, now = self.sigmas[step - 1 : step + 1]
        weight = now**power * (now**-power - before**-power)
        missed = weight * mean_share(math.log(before / now), power) * newest.change
        if self._followed and last.change is not None:
            missed = missed - weight * self._followed * last.persists * last.change
        missed = (strength / self.levels.scale(now)) * newest.persists * missed
        return (sample.float() + missed).to(sample.dtype)


def agreement_of(change: torch.Tensor, before: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """r, the correlation of two changes of D, video by video; (N, 1, ...), no synchronisation."""
    if before is None:
        return None
    axes = tuple(range(1, change.dim()))
    product, one, other = (
        (a * b).sum(axes, keepdim=True) for a, b in ((change, before), (change, change), (before, before))
    )
    return product / (one * other).sqrt().clamp_min(1e-30)


def allowed(agreement: Optional[torch.Tensor], bound: float) -> Union[float, torch.Tensor]:
    """How much of a correction a video gets, in [0, 1]; (N, 1, ...) or 1.

    All of it half way down, nothing at the bound: 2 - 2 r / bound.
    """
    return 1.0 if agreement is None else (2.0 - 2.0 / bound * agreement).clamp(0.0, 1.0)


def persistence(change: torch.Tensor, before: Optional[torch.Tensor]) -> Union[float, torch.Tensor]:
    """How much of a correction a video's own last two changes of D allow, in [0, 1]; (N, 1, ...), no synchronisation.

    Where D answers to x as D = a x, a frozen step of relative size w multiplies the deviations of x by 1 + z,
    z = w (a - 1), and its noise makes successive changes of D correlate by r = z / 2. The exact prediction of an
    unguided model is a martingale, r = 0; guidance towards a narrow mode makes z very negative. Corrected steps are
    stable to z = -1/2, and from z = -1 on the plain step itself swings over: all down to r = -1/4, none from -1/2.
    """
    return allowed(agreement_of(change, before), UNSTABLE)


def mean_share(whole: float, power: float) -> float:
    """The mean over an interval, by the weight of s^-power, of ln(p/s) / ln(p/t), for ln(p/t) = `whole` > 0."""
    grown = power * whole
    return 1 / -math.expm1(-grown) - 1 / grown


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
