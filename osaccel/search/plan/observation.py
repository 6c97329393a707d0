# SPDX-License-Identifier: Apache-2.0
"""Records a plain generation for the plan search: predictions of every step, both branches, and the blocks' deltas."""

import math
import statistics
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from osaccel.generation import Generation
from osaccel.interceptors import Interceptor, StepCall, latents_of
from osaccel.network.forwards import HiddenStates
from osaccel.sampling.levels import NoiseLevels
from osaccel.sampling.powers import known_power
from osaccel.schedule import ANCESTRAL, FLOW
from osaccel.search.plan.aside import ForecastsAside
from osaccel.search.plan.deltas import DeltaLog
from osaccel.search.plan.local import Record, forecast_squares
from osaccel.search.recording.observe import watch_blocks
from osaccel.search.recording.replay import Replay


def record(replay: Replay, blocks: Sequence[torch.nn.Module]) -> Tuple[Any, Dict[str, Any]]:
    """The pipeline's output, and what was observed: plain values and tensors, for `record_of`."""
    call = replay.call
    denoised, deltas = DenoisedLog(), DeltaLog(len(blocks), call.target.block_batch_dim())
    aside = ForecastsAside(len(blocks))

    def attach(generation: Generation) -> Callable[[], None]:
        states = HiddenStates(call.target.hidden_states)
        return watch_blocks(blocks, generation.clock, states, deltas.observe, aside.observe, aside=aside)

    def before_first_forward() -> None:
        deltas.steps = len(call.pipeline.scheduler.timesteps)

    replay.before_first_forward = before_first_forward
    output = replay.record(attach, keep_outputs=True, watchers=[denoised, aside])
    replay.recording.seconds -= aside.seconds
    return output, _observed(replay, denoised, deltas, aside)


def record_of(observed: Dict[str, Any]) -> Record:
    """What a recorded call showed."""
    shown = {name: observed[name] for name in Record._fields if name != "is_corrected"}
    return Record(**{**shown, "power": observed["power"] or FLOW, "is_corrected": observed["power"] > 0})


class DenoisedLog(Interceptor):
    """Keeps the guided denoised prediction of every step and the noise behind it, float32, on the host."""

    def begin(self, scheduler: Any) -> None:
        self.scheduler, self.levels = scheduler, NoiseLevels(scheduler)
        self.sigmas = self.levels.of_steps()
        self.rows: List[torch.Tensor] = []
        # As `osaccel.search.plan.local.Record` has it; none where the sampler adds none.
        self.noise: List[torch.Tensor] = []
        # q of the sampler's step; None where its steps cannot be skipped.
        self.power: Optional[float] = None

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        if not self.rows:
            self.power = known_power(self.scheduler, call)
        step = len(self.rows)
        denoised = self.levels.denoised(call.model_output, self.sigmas[step], call.sample)
        self.rows.append(denoised.detach().cpu())
        result = proceed(call)
        if self.power == ANCESTRAL:
            self.noise.append(self._noise(step, call.sample, latents_of(result)))
        return result

    def _noise(self, step: int, sample: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        """What the step added to x / s^2 beside D."""
        now, then = self.sigmas[step : step + 2]
        has_signal = step > 0 or not self.scheduler.config.get("rescale_betas_zero_snr")
        if not (has_signal and math.isfinite(now) and then > 0):
            return torch.zeros_like(self.rows[step])
        before, after = (
            tensor.detach().float().cpu() * (self.levels.scale(sigma) / sigma**2)
            for tensor, sigma in ((sample, now), (following, then))
        )
        return after - before - self.rows[step] * (then**-2 - now**-2)


def _observed(replay: Replay, log: DenoisedLog, deltas: DeltaLog, aside: ForecastsAside) -> Dict[str, Any]:
    """What a recorded call showed, as plain values and tensors; see `osaccel.search.plan.local.Record`.

    `passes` are those that ran aside.
    """
    weights, differences = _guidance(replay)
    slopes = [log.levels.slope(sigma) for sigma in log.sigmas[:-1]]
    guidance = [(w - 1) * slope * difference for w, slope, difference in zip(weights, slopes, differences)]
    observed = {
        "denoised": torch.stack(log.rows),
        "noise": torch.stack(log.noise) if log.noise else torch.zeros(0),
        "guidance": torch.stack(guidance) if guidance else torch.zeros(0),
        "sigmas": list(log.sigmas),
        "gram": deltas.gram(statistics.median(weights) if weights else None),
        "slopes": slopes,
        "power": 0.0 if log.power is None else log.power,
        "forecast": [],
        "passes": len(aside.errors),
    }
    if aside.errors:
        errors = {
            step: slopes[step] * _guided(error, weights[step] if weights else None, replay.recording.predictions[step])
            for step, error in aside.errors.items()
        }
        observed["forecast"] = forecast_squares(record_of(observed), errors, aside.windows)
    return observed


def _guided(output: torch.Tensor, weight: Optional[float], prediction: torch.Tensor) -> torch.Tensor:
    """What guidance makes of a change of the network's output, flat."""
    change = _predicted(output, prediction)
    if weight is not None:
        unconditional, conditional = change.chunk(2)
        change = torch.lerp(unconditional, conditional, weight)
    return change.flatten()


def _predicted(output: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
    """The channels of a prediction, float32; behind them are learned variances, where there are any."""
    return output[:, : prediction.shape[1]].float()


def _guidance(replay: Replay) -> Tuple[List[float], List[torch.Tensor]]:
    """The guidance scale and the difference of the branches' outputs, by step; nothing where guidance is off.

    With e = unconditional + w (conditional - unconditional), a difference that is too large by d makes the
    unconditional output too small by d and e too large by (w - 1) d. Here w is read off outputs and predictions.
    """
    recording = replay.recording
    weights, differences = [], []
    for step, forwards in enumerate(recording.outputs):
        prediction = recording.predictions[step]
        if len(forwards) != 1 or forwards[0].shape[0] != 2 * prediction.shape[0]:
            return [], []
        unconditional, conditional = _predicted(forwards[0], prediction).chunk(2)
        difference = conditional - unconditional
        square = difference.square().sum()
        weights.append(float(((prediction.float() - unconditional) * difference).sum() / square) if square > 0 else 1.0)
        differences.append(difference.flatten())
    return weights, differences
