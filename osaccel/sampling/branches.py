# SPDX-License-Identifier: Apache-2.0
"""Conditional-only steps are put right at the next full one: by then what guidance added there is known better.

Let d_k be the difference of the branches, the conditional output less the unconditional one; guidance of scale w adds
(w - 1) d_k to the conditional output. A conditional-only step was told a forecast f_k of d_k. Once a full step e knows
d again, as the full step p before did, d is taken to have moved evenly in log s between the two, and in the notation
of `osaccel.sampling.standin` x at e is moved by

    s_e^q (w - 1) sum of (d_k - f_k) dD_k/doutput w_k,        w_k = s_(k+1)^-q - s_k^-q,

over the conditional-only steps between them, damped as the corrector is (`osaccel.sampling.corrected`, `persistence`).
What D_k stands for at skipped steps beside k is part of w_k.
"""

import bisect
import math
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Union

import torch

from osaccel.clock import Clock
from osaccel.interceptors import Interceptor, StepCall
from osaccel.network.forwards import prediction_of
from osaccel.network.halves import slope_on
from osaccel.plan import Plan
from osaccel.sampling.corrected import mean_share, persistence
from osaccel.sampling.levels import NoiseLevels
from osaccel.sampling.means import evenly
from osaccel.sampling.powers import known_power
from osaccel.sampling.standin import leaning
from osaccel.schedule import refusal


class _Full(NamedTuple):
    """A full step: the difference of the branches as the network gave it, D, and its change since the full step before.

    Tensors are (N, C, ...).
    """

    step: int
    difference: torch.Tensor
    denoised: torch.Tensor
    change: Optional[torch.Tensor]


class _Taken(NamedTuple):
    """What the difference of the branches was taken to be since the newest full step.

    Attributes:
        difference: its sum by weight.
        begun, ended: how much of the weight is the earlier full step's, and the later one's.
    """

    difference: Union[float, torch.Tensor] = 0.0
    begun: float = 0.0
    ended: float = 0.0


class CorrectedBranches(Interceptor):
    """Follows the difference of the branches; the outermost, as it must see the forecasts. Keeps four latents, float32.

    Does nothing where a step of the sampler does not freeze D or guidance does not run in one batch, nor at a step that
    computed both branches though the plan did not ask for it.
    """

    def __init__(self, plan: Plan, clock: Clock):
        self.plan, self.clock = plan, clock
        self._half, self._skip = frozenset(plan.conditional_only), frozenset(plan.skip)
        self._called = [step for step in range(plan.steps or 0) if step not in self._skip]
        self._full = [step for step in self._called if step not in self._half]
        self.close()

    def close(self) -> None:
        self._output: Optional[torch.Tensor] = None
        self._newest: Optional[_Full] = None
        self._taken = _Taken()
        self._weights: Dict[int, float] = {}

    def begin(self, scheduler: Any) -> None:
        self.close()
        self.scheduler, self._is_able = scheduler, refusal(scheduler) is None
        self._starts_without_signal = bool(scheduler.config.get("rescale_betas_zero_snr"))
        if self._is_able:
            self.levels = NoiseLevels(scheduler)
            self.sigmas = self.levels.of_steps()

    def network(self, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        output = proceed(*args, **kwargs)
        self._output = prediction_of(output).detach() if self._is_able else None
        return output

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        step = self.clock.step
        if step in self._skip or not self._is_able:
            return proceed(call)
        power, branches = known_power(self.scheduler, call), self._branches(call)
        if power is None or branches is None or not self._has_signal(step):
            self._newest, self._taken = None, _Taken()
        elif self.clock.was_half:
            self._take(step, branches[1], power)
        elif step not in self._half:
            call = self._put_right(step, *branches, power, call)
        return proceed(call)

    def _branches(self, call: StepCall) -> Optional[Tuple[torch.Tensor, torch.Tensor]]:
        """The unconditional output and the difference of the branches; None where the network gave no two halves."""
        output, self._output, guided = self._output, None, call.model_output
        if output is None or len(output) != 2 * len(guided):
            return None
        # Behind a prediction's channels are learned variances, where there are any.
        output = output[:, : guided.shape[1]]
        if output.shape[1:] != guided.shape[1:]:
            return None
        unconditional, conditional = output.float().chunk(2)
        return unconditional, conditional - unconditional

    def _own(self, step: int) -> float:
        """How much larger a change of the network's own output is than as it is said, where it was asked elsewhere."""
        asked = self.clock.asked_level
        return 1.0 if asked is None else self.levels.slope(self.sigmas[step]) / self.levels.slope(asked)

    def _has_signal(self, step: int) -> bool:
        """Whether x holds more than noise; with zero terminal SNR the first one does not."""
        return step > 0 or not self._starts_without_signal

    def _take(self, step: int, difference: torch.Tensor, power: float) -> None:
        place = bisect.bisect(self._full, step)
        if self._newest is None or place == len(self._full):
            return  # nothing before it is known, or nothing will put it right
        if not self._weights:
            self._weights = self._leaning(power)
        own = self._own(step)
        difference, weight = own * difference, self.levels.slope(self.sigmas[step]) / own * self._weights[step]
        share = self._share(self._newest.step, step, self._full[place])
        taken, begun, ended = self._taken
        self._taken = _Taken(taken + weight * difference, begun + weight * (1 - share), ended + weight * share)

    def _put_right(
        self, step: int, unconditional: torch.Tensor, difference: torch.Tensor, power: float, call: StepCall
    ) -> StepCall:
        """The call of a full step with the same D, at an x that has what it lacks."""
        sigma, last, taken = self.sigmas[step], self._newest, self._taken
        denoised = self.levels.denoised(call.model_output, sigma, call.sample)
        change = None if last is None else denoised - last.denoised
        own = self._own(step)
        self._newest, self._taken = _Full(step, own * difference, denoised, change), _Taken()
        if last is None or change is None or not isinstance(taken.difference, torch.Tensor):
            return call
        scale = slope_on(difference, call.model_output.float() - unconditional)
        strength = persistence(change, last.change) * (scale - 1)
        lost = strength * (taken.begun * last.difference + taken.ended * own * difference - taken.difference)
        return self.levels.moved(call, denoised, sigma, power, lost)

    def _leaning(self, power: float) -> Dict[int, float]:
        """What an error of D at a called step makes of x / s^q."""

        def share(start: int, step: int, end: int) -> float:
            if not self._skip:
                of = self._mean_share(start, end, power)
            elif self.clock.has_means and self.sigmas[end + 1] > 0:
                of = float(step > start)
            else:
                of = self._share(start, step, end)
            return self.plan.correction.at(end).corrector * of

        return leaning(self._called, share, lambda k: self.sigmas[k + 1] ** -power - self.sigmas[k] ** -power)

    def _share(self, start: int, step: int, end: int) -> float:
        """How far something has moved at `step` that moves evenly in log s; without a signal it stands still."""
        before, now, behind = (self.sigmas[place] for place in (start, step, end))
        return evenly(before, now, behind) if self._has_signal(start) else 0.0

    def _mean_share(self, start: int, end: int, power: float) -> float:
        """How much of a step the corrector takes to be the later D's where no step is skipped."""
        if not self._has_signal(start):
            return 0.0
        return mean_share(math.log(self.sigmas[start] / self.sigmas[end]), power)
