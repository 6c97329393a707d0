# SPDX-License-Identifier: Apache-2.0
"""Skipped steps: what goes to the unmodified `scheduler.step` there, and what the next computed step makes good.

Notation (variance-exploding, Karras et al. arXiv 2206.00364): s_k the noise level of step k, D_k the guided denoised
prediction there, x = x0 + s z. One step of the samplers below freezes D over [s_k, s_(k+1)]:

    x_(k+1) / s_(k+1)^q = x_k / s_k^q + D_k (s_(k+1)^-q - s_k^-q) + noise

with q = 2 for ancestral sampling (Euler ancestral, DDPM, DDIM at eta 1) and q = 1, no noise, for the probability flow
(Euler, DDIM at eta 0). Hence a step that is told to see D_i again continues the step from i exactly, with the merged
noise; and whatever D should have been over steps that are past can be made good by moving x: docs/correction.md.
"""

import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from osaccel.clock import Clock
from osaccel.interceptors import StepCall
from osaccel.network.forwards import Inputs, inputs_of, prediction_of, rows_of, with_inputs, with_prediction
from osaccel.plan import Correction, Plan
from osaccel.sampling.corrected import Computed, OfPlan, allowed
from osaccel.sampling.means import Mean, Skipped
from osaccel.sampling.powers import power_of
from osaccel.sampling.response import Response
from osaccel.schedule import ANCESTRAL

# The agreement of successive changes of D from which on means of a swinging D are no more stable.
UNSTABLE_MEANS = -1.0


class StandIn(OfPlan):
    """Keeps the network from being called at skipped steps, and asks it at their mean at the computed step behind them.

    Keeps up to nine latents, float32, while the network runs at a mean: the newest D and its change, three sums, the
    mean and its noise, and two of the response.
    """

    def __init__(self, plan: Plan, clock: Clock):
        super().__init__(plan, clock)
        self._skip = frozenset(plan.skip)

    def close(self) -> None:
        self._newest: Optional[Computed] = None
        # Its level, and that of the known D before.
        self._level = self._earlier = 0.0
        self._skipped: Optional[Skipped] = None
        self._mean: Optional[Mean] = None
        self._response: Optional[Response] = None
        # All that the network got at a step at which its batch had other rows than before, until the sample is known.
        self._shown: List[Inputs] = []
        self._shown_rows = 0
        self._blank: Any = None
        self._rows: Optional[int] = None

    def begin(self, scheduler: Any) -> None:
        super().begin(scheduler)
        self._response = Response(self.sigmas) if self.plan.correction.responds else None

    # The network

    def network(self, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        if self.clock.step in self._skip:
            # As many rows as come in: some pipelines guide at some of the steps only.
            blank = prediction_of(self._blank)
            rows = len(blank) * (rows_of(args, kwargs) or 1) // (self._rows or 1)
            return with_prediction(self._blank, blank[:1].expand(rows, *blank.shape[1:]))
        inputs = inputs_of(proceed, args, kwargs)
        if inputs is not None and (self._shown or len(inputs.hidden_states) != self._shown_rows):
            self._shown, self._shown_rows = [*self._shown, inputs], len(inputs.hidden_states)
        if inputs is not None and not self._shown and self._asks_at_mean():
            output = self._at_mean(proceed, args, kwargs, inputs)
        else:
            output = proceed(*args, **kwargs)
        if self._blank is None:
            prediction = prediction_of(output)
            # Never read: the step replaces it. It takes no memory.
            self._blank = with_prediction(output, prediction.new_zeros(()).expand(prediction.shape))
            self._rows = rows_of(args, kwargs)
        return output

    def _asks_at_mean(self) -> bool:
        step = self.clock.step
        is_last = self.sigmas[step + 1] <= 0  # D takes over from x, so none before it counts
        is_wanted = self._skipped is not None and not is_last and self.plan.correction.at(step).corrector
        return bool(self.clock.has_means and is_wanted)

    def _at_mean(self, proceed: Callable, args: tuple, kwargs: dict, inputs: Inputs) -> Any:
        """The network's answer at the mean, said as if it had been asked at x."""
        assert self._skipped is not None and self._newest is not None
        step, hidden = self.clock.step, inputs.hidden_states
        videos, sigma = len(self._newest.denoised), self.sigmas[step]
        copies, x = len(hidden) // videos, hidden[:videos].float() * math.sqrt(1 + sigma**2)
        noise = 0.0 if self._response is None else self._response.noise(step, x)
        mean = self._skipped.with_step(sigma, self.sigmas[step + 1], x, noise, self._newest.denoised)
        time = self._time(mean.sigma, inputs)
        mean = mean.scaled(self.levels.sigma(time), self._newest.denoised)
        self._mean, self.clock.asked_level = mean, mean.sigma
        shown = (mean.x / math.sqrt(1 + mean.sigma**2)).to(hidden.dtype)
        told_time = torch.full_like(inputs.timestep, time)
        args, kwargs = with_inputs(proceed, args, kwargs, Inputs(_copied(shown, copies), told_time))
        output = proceed(*args, **kwargs)
        prediction = prediction_of(output)
        # Behind a prediction's channels are learned variances, where there are any.
        told, rest = prediction[:, : hidden.shape[1]], prediction[:, hidden.shape[1] :]
        denoised = self.levels.denoised(told, mean.sigma, _copied(mean.x / self.levels.scale(mean.sigma), copies))
        told = self.levels.model_output(denoised, sigma, _copied(x / self.levels.scale(sigma), copies)).to(told.dtype)
        return with_prediction(output, torch.cat([told, rest], 1))

    def _time(self, sigma: float, inputs: Inputs) -> float:
        """Of a level, in whole numbers where the network gets such."""
        time = self.levels.timestep(sigma)
        return time if inputs.timestep.is_floating_point() else round(time)

    # The scheduler

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        step, power = self.clock.step, power_of(self.scheduler, call)
        if self._shown:
            # Without noise D is smooth along the run, and nothing is hidden from a line.
            self.clock.has_means = power == ANCESTRAL and all(self._is_shown(one, step, call) for one in self._shown)
            self._shown = []
        if power != ANCESTRAL:
            self._response = None  # no noise is added
        x = call.sample.float() * self.levels.scale(self.sigmas[step])
        has_signal = step > 0 or not self._starts_without_signal
        noise = self._response.noise(step, x) if self._response is not None and has_signal else None
        if step in self._skip:
            call, denoised = self._skip_step(step, x, noise, power, call)
        else:
            call, denoised = self._computed_step(step, x, noise, power, call)
        if self._response is not None and noise is not None:
            self._response.passed(step, denoised)
        return proceed(call)

    def _is_shown(self, inputs: Inputs, step: int, call: StepCall) -> bool:
        """Whether the network got the step's time and its sample, once or, for guidance, several times."""
        shown, sample = inputs.hidden_states, call.sample
        if shown.shape[1:] != sample.shape[1:] or len(shown) % len(sample):
            return False
        times, sigma = inputs.timestep.float(), self.sigmas[step]
        time = self.levels.timestep(sigma) if math.isfinite(sigma) else float(call.timestep)
        # Of a time in half precision only the leading digits are there.
        if not torch.allclose(times, torch.full_like(times, time), rtol=1e-2, atol=1.0):
            return False
        expected = _copied(self.levels.preserved(sample, self.sigmas[step]), len(shown) // len(sample))
        rounding = 4 * max(torch.finfo(tensor.dtype).eps for tensor in (shown, sample, expected))
        return torch.allclose(shown.float(), expected, rounding, rounding)

    def _skip_step(
        self, step: int, x: torch.Tensor, noise: Optional[torch.Tensor], power: float, call: StepCall
    ) -> Tuple[StepCall, torch.Tensor]:
        """The call with what stands for D, and that."""
        assert self._newest is not None
        newest, (sigma, following) = self._newest, self.sigmas[step : step + 2]
        told, led = newest.denoised, self._led(step)
        foreseen = self._foreseen(step, step, noise)
        if foreseen is not None:
            told = told + foreseen
        if led and newest.change is not None:
            told = told + led * newest.persists * newest.change
        if following > 0:
            if self._skipped is None:
                self._skipped = Skipped(power)
            self._skipped.add(sigma, following, x, told, led, 0.0 if noise is None else noise)
        output = self.levels.model_output(told, sigma, call.sample)
        return call.replaced(output.to(call.model_output.dtype)), told

    def _led(self, step: int) -> float:
        """How far the newest change is followed at a skipped step."""
        strength = self.plan.correction.at(step).predictor
        if not strength or self._newest is None or self._newest.change is None:
            return 0.0
        return strength * followed(self._earlier, self._level, self.sigmas[step])

    def _foreseen(self, asking: int, step: int, noise: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        """What the noise has done to D until `step`, as skipped step `asking` wants it; None where nothing is known."""
        strength = self.plan.correction.at(asking).response
        if self._response is None or noise is None or not strength:
            return None
        foreseen = self._response.foreseen(step, noise)
        return None if foreseen is None else strength * foreseen

    def _computed_step(
        self, step: int, x: torch.Tensor, noise: Optional[torch.Tensor], power: float, call: StepCall
    ) -> Tuple[StepCall, torch.Tensor]:
        """The call with a sample that has what the skipped steps before it lacked, and D."""
        sigma, mean = self.sigmas[step], self._mean
        denoised = self.levels.denoised(call.model_output, sigma, call.sample)
        follows = self._newest is not None and self.plan.correction != Correction()
        newest = self._newest.then(step, denoised) if self._newest and follows else Computed(step, denoised)
        lost = self._lost(newest, noise)
        if lost is not None:
            if self._response is not None:
                self._response.moved(lost)
            call = self.levels.moved(call, denoised, sigma, power, lost)
        if self._response is not None and noise is not None:
            # The slope is asked for at skipped steps only, which begin behind the computed step that measures it.
            change = newest.change if step + 1 in self._skip else None
            known_at, noise = (mean.sigma, mean.noise) if mean else (sigma, noise)
            self._response.known(known_at, noise, change)
        self._earlier, self._level = self._level, mean.sigma if mean else sigma
        self._newest, self._skipped, self._mean = newest, None, None
        return call, denoised

    def _lost(self, newest: Computed, noise: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
        """What x / s^q lacks since the last computed step, (N, C, ...); None where nothing is made good."""
        skipped, last, step = self._skipped, self._newest, newest.step
        strength = self.plan.correction.at(step).corrector
        if skipped is None or last is None or not strength or newest.change is None:
            return None
        if self._mean is not None:
            allows = allowed(newest.agreement, UNSTABLE_MEANS)
            return strength * allows * (skipped.mass * newest.denoised - skipped.told)
        if last.step == 0 and self._starts_without_signal:
            return None
        # D is taken to have moved evenly in log s, where that was not foreseen.
        foreseen = self._foreseen(step - 1, step, noise)
        unforeseen = newest.change if foreseen is None else newest.change - foreseen
        lost = skipped.moved(self._level, self.sigmas[step]) * unforeseen
        if skipped.led and last.change is not None:
            lost = lost - skipped.led * last.persists * last.change
        return strength * newest.persists * lost


def _copied(latents: torch.Tensor, copies: int) -> torch.Tensor:
    """One behind another, as guidance runs in one batch."""
    return torch.cat([latents] * copies)


def leaning(
    called: Sequence[int], share: Callable[[int, int, int], float], weight: Callable[[int], float]
) -> Dict[int, float]:
    """By called step, what an error of D there makes of x, with the skipped steps that lean on it.

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


def followed(earlier: float, start: float, sigma: float) -> float:
    """How far D has moved on at a skipped step, in units of D_s - D_p: linear in s, no farther than an even ratio."""
    return min((start - sigma) / (earlier - start), start / earlier)
