# SPDX-License-Identifier: Apache-2.0
"""Conditional-only steps are put right at the next full one: by then what guidance added there is known better.

Let g_k be what guidance adds to the model's output, the guided one less the conditional branch's. A conditional-only
step was told a forecast f_k of it. Once a full step e knows g again, as the full step p before did, g is taken to have
moved evenly in log s between the two, and in the notation of `osaccel.sampling.standin` x at e is moved by

    s_e^q sum of (g_k - f_k) dD_k/doutput w_k,        w_k = s_(k+1)^-q - s_k^-q,

over the conditional-only steps between them, damped as the corrector is (`osaccel.sampling.standin.persistence`). What
D_k stands for at skipped steps beside k is part of w_k.
"""

import bisect
import math
from typing import Any, Callable, Dict, NamedTuple, Optional, Union

import torch

from osaccel.clock import Clock
from osaccel.interceptors import Interceptor, StepCall
from osaccel.network.forwards import prediction_of
from osaccel.plan import Plan
from osaccel.sampling.levels import NoiseLevels
from osaccel.sampling.lists import UnsupportedScheduler
from osaccel.sampling.standin import persistence, power_of
from osaccel.schedule import refusal


class _Full(NamedTuple):
    """A full step: what guidance adds there, D, and the change of D since the full step before it; (N, C, ...)."""

    step: int
    added: torch.Tensor
    denoised: torch.Tensor
    change: Optional[torch.Tensor]


class _Taken(NamedTuple):
    """What guidance was taken to add since the newest full step.

    Attributes:
        added: its sum by weight.
        begun, ended: how much of the weight is the earlier full step's, and the later one's.
    """

    added: Union[float, torch.Tensor] = 0.0
    begun: float = 0.0
    ended: float = 0.0


class CorrectedBranches(Interceptor):
    """Follows what guidance adds; outside of all that replaces predictions. Keeps four latents, float32.

    Does nothing where a step of the sampler does not freeze D, or guidance does not run in one batch.
    """

    def __init__(self, plan: Plan, clock: Clock):
        self.plan, self.clock = plan, clock
        self._half, self._skip = frozenset(plan.conditional_only), frozenset(plan.skip)
        self._called = [step for step in range(plan.steps or 0) if step not in self._skip]
        self._full = [step for step in self._called if step not in self._half]
        self.close()

    def close(self) -> None:
        self._conditional: Optional[torch.Tensor] = None
        self._newest: Optional[_Full] = None
        self._taken = _Taken()
        self._weights: Dict[int, float] = {}

    def begin(self, scheduler: Any) -> None:
        self.close()
        self.scheduler, self._is_able = scheduler, refusal(scheduler) is None
        if self._is_able:
            self.levels = NoiseLevels(scheduler)
            self.sigmas = self.levels.of_steps()

    def network(self, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        output = proceed(*args, **kwargs)
        prediction = prediction_of(output)
        self._conditional = prediction[len(prediction) // 2 :] if len(prediction) % 2 == 0 else None
        return output

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        step = self.clock.step
        if step in self._skip or not self._is_able:
            return proceed(call)
        power, added = self._power(call), self._added(call)
        self._conditional = None
        if power is None or added is None or not math.isfinite(self.sigmas[step]):
            self._newest, self._taken = None, _Taken()
        elif step in self._half:
            self._take(step, added, power)
        else:
            call = self._put_right(step, added, power, call)
        return proceed(call)

    def _power(self, call: StepCall) -> Optional[float]:
        try:
            return power_of(self.scheduler, call)
        except UnsupportedScheduler:
            return None

    def _added(self, call: StepCall) -> Optional[torch.Tensor]:
        """What guidance adds to the model's output, (N, C, ...), float32."""
        conditional, output = self._conditional, call.model_output
        if conditional is None or len(conditional) != len(output):
            return None
        # Behind a prediction's channels are learned variances, where there are any.
        return output.float() - conditional[:, : output.shape[1]].float()

    def _take(self, step: int, added: torch.Tensor, power: float) -> None:
        place = bisect.bisect(self._full, step)
        if self._newest is None or place == len(self._full):
            return  # nothing before it is known, or nothing will put it right
        if not self._weights:
            self._weights = self._leaning(power)
        weight = self.levels.slope(self.sigmas[step]) * self._weights[step]
        share = self._share(self._newest.step, step, self._full[place])
        taken, begun, ended = self._taken
        self._taken = _Taken(taken + weight * added, begun + weight * (1 - share), ended + weight * share)

    def _put_right(self, step: int, added: torch.Tensor, power: float, call: StepCall) -> StepCall:
        """The call of a full step with the same D, at an x that has what it lacks."""
        sigma, sample, last, taken = self.sigmas[step], call.sample, self._newest, self._taken
        denoised = self.levels.denoised(call.model_output, sigma, sample)
        change = None if last is None else denoised - last.denoised
        self._newest, self._taken = _Full(step, added, denoised, change), _Taken()
        if last is None or change is None or not isinstance(taken.added, torch.Tensor):
            return call
        lost = persistence(change, last.change) * (taken.begun * last.added + taken.ended * added - taken.added)
        sample = (sample.float() + sigma**power / self.levels.scale(sigma) * lost).to(sample.dtype)
        return call.replaced(self.levels.model_output(denoised, sigma, sample).to(call.model_output.dtype), sample)

    def _leaning(self, power: float) -> Dict[int, float]:
        """What an error of D at a called step makes of x / s^q: skipped steps beside it lean on it, if corrected."""
        weights = dict.fromkeys(self._called, 0.0)
        for start, end in zip(self._called, self._called[1:]):
            strength = self.plan.correction.at(end).corrector
            for step in range(start, end):
                share = strength * self._share(start, step, end)
                weight = self.sigmas[step + 1] ** -power - self.sigmas[step] ** -power
                weights[start] += (1 - share) * weight
                weights[end] += share * weight
        return weights

    def _share(self, start: int, step: int, end: int) -> float:
        """How far something has moved at `step` that moves evenly in log s; behind an infinite s it stands still."""
        before, now, behind = (self.sigmas[place] for place in (start, step, end))
        return math.log(before / now) / math.log(before / behind) if math.isfinite(before) and step > start else 0.0
