# SPDX-License-Identifier: Apache-2.0
"""What an action does to the latents within its window, from one recorded plain generation and without the network.

In the notation of `osaccel.sampling.standin`: a step that takes e_k more for D_k than the plain run leaves
x / s^q too large by e_k (s_(k+1)^-q - s_k^-q). Summed over a window these are the change of x at its end, the network's
own answer to it left out; what becomes of it until the end of the generation is measured (`osaccel.search.plan.gains`).
"""

import functools
import math
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch

from osaccel.network.halves import KEPT, ahead_of
from osaccel.plan import forecast
from osaccel.sampling.corrected import persistence
from osaccel.sampling.means import evenly
from osaccel.sampling.response import answer, slope_behind
from osaccel.sampling.standin import followed, leaning
from osaccel.schedule import ANCESTRAL, FLOW
from osaccel.search.plan.actions import BY_NAME, FORECAST, FULL, HALF, REFERENCES, REUSE, SKIP, Action, Windows, kinds


class Record(NamedTuple):
    """What a plain generation showed at every step; tensors on the host, float32.

    Attributes:
        denoised: D at every step, (steps, N, C, ...).
        guidance: how D would move, were the difference of the two branches to grow by itself, (steps, entries); empty
            where guidance is off.
        sigmas: noise level of every step and the last one, 0.
        gram: inner products of the blocks' deltas of any two steps, see `osaccel.search.plan.deltas`.
        forecast: for every window, the squared change of x at its end when every other step's blocks are forecast, as
            the network's own answers say (`osaccel.search.plan.aside`); none where there is no gram.
        slopes: how far D moves with the network's output, (steps,).
        power: q of the sampler's step.
        noise: what an ancestral sampler added behind every step, in units of x / s^2, as `denoised`; else empty.
        is_corrected: whether a step of the sampler freezes D, so that conditional-only steps can be put right.
    """

    denoised: torch.Tensor
    guidance: torch.Tensor
    sigmas: Sequence[float]
    gram: torch.Tensor
    slopes: Sequence[float]
    power: float = FLOW
    forecast: Sequence[float] = ()
    noise: torch.Tensor = torch.zeros(0)
    is_corrected: bool = True

    def guided(self, step: int) -> torch.Tensor:
        """What guidance adds to the model's output at a step, (N, C, ...)."""
        return self.guidance[step].view_as(self.denoised[step]) / self.slopes[step]


def squared_sizes(record: Record, action: Action, windows: Windows) -> List[Dict[str, float]]:
    """For every window and family of actions, the squared change of x at the window's end, in this rank's entries."""
    found = []
    for window in range(windows.count):
        by_step = kinds(action, windows, window)
        weights = _weights(record, by_step)
        answer = _answer(record, windows, window)
        found.append({HALF: _square_of_halves(record, by_step, weights),
                      SKIP: _square_of_skips(record, by_step),
                      FORECAST: answer * _square_of_regions(record, by_step, weights, FORECAST),
                      REUSE: answer * _square_of_regions(record, by_step, weights, REUSE)})  # fmt: skip
    return found


def forecast_squares(record: Record, errors: Mapping[int, torch.Tensor], windows: Windows) -> List[float]:
    """For every window, the squared change of x at its end when D is wrong by `errors` where blocks are forecast."""
    found = []
    for window in range(windows.count):
        by_step = kinds(BY_NAME[REFERENCES[FORECAST]], windows, window)
        weights = _weights(record, by_step)
        found.append(_square({step: weights[step] * errors[step] for step in by_step if step in errors}))
    return found


def _answer(record: Record, windows: Windows, window: int) -> float:
    """What D makes of a squared change of the hidden states in a window."""
    if not record.forecast:
        return 0.0
    by_step = kinds(BY_NAME[REFERENCES[FORECAST]], windows, window)
    hidden = _square_of_regions(record, by_step, _weights(record, by_step), FORECAST)
    answered = record.forecast[window]
    return answered / hidden if hidden > 0 and math.isfinite(answered) else 0.0


def _weight(record: Record, step: int, end: float) -> float:
    """s_end^q (s_(k+1)^-q - s_k^-q); the last step of all replaces x by D."""
    following, now = record.sigmas[step + 1], record.sigmas[step]
    if following <= 0:
        return 1.0
    # A window that ends the generation is judged one step before its end, where D takes over.
    end = end if end > 0 else following
    return (end / following) ** record.power - (end / now) ** record.power


def _called(by_step: Dict[int, str]) -> List[int]:
    """The window's computed steps and the one behind it; behind the generation's last nothing is skipped."""
    return [step for step, kind in by_step.items() if kind != SKIP] + [max(by_step) + 1]


def _skipping(record: Record, by_step: Dict[int, str]) -> List[Tuple[int, int, int]]:
    """Where steps are skipped: the two computed steps before them, and the next one."""
    called = _called(by_step)
    before = [min(by_step) - 1, *called]
    return [(p, start, end) for p, start, end in zip(before, called, called[1:]) if end > start + 1]


def _share(record: Record, start: int, step: int, end: int) -> float:
    """How far D is taken to have moved at `step` on its way between two computed steps: evenly in log s."""
    return evenly(record.sigmas[start], record.sigmas[step], record.sigmas[end])


def _weights(record: Record, by_step: Dict[int, str]) -> Dict[int, float]:
    """What an error of D at a computed step makes of x at the window's end: skipped steps lean on it too."""

    def share(start: int, step: int, end: int) -> float:
        is_mean = record.power == ANCESTRAL and end + 1 < len(record.sigmas) and record.sigmas[end + 1] > 0
        return float(step > start) if is_mean else _share(record, start, step, end)

    return leaning(_called(by_step), share, functools.partial(_weight, record, end=record.sigmas[max(by_step) + 1]))


def _square_of_halves(record: Record, by_step: Dict[int, str], weights: Dict[int, float]) -> float:
    """Of what is not known of what guidance adds at conditional-only steps, when they are put right."""
    full = [step for step, kind in by_step.items() if kind == FULL] + [max(by_step) + 1]
    errors = {}
    for step, kind in by_step.items():
        if kind == HALF:
            after = min(later for later in full if later > step)
            guess = _guidance(record, full_before(step, by_step, KEPT), step, after)
            errors[step] = (weights[step] * record.slopes[step] * (guess - record.guided(step))).flatten()
    return _square(errors)


def _guidance(record: Record, known: List[int], step: int, after: int) -> torch.Tensor:
    """What guidance is taken to add in the end: forecast from the full steps `known`, put right at the one `after`."""
    ahead = ahead_of([(earlier, record.guided(earlier)) for earlier in known], step)
    if not record.is_corrected:
        return ahead
    newest, *earlier = known
    evenly = torch.lerp(record.guided(newest), record.guided(after), _share(record, newest, step, after))
    denoised = record.denoised
    change = denoised[newest] - denoised[earlier[0]] if earlier else None
    persists = persistence(denoised[after] - denoised[newest], change)
    return ahead + persists * (evenly - ahead)


def full_before(step: int, by_step: Dict[int, str], count: int = 2) -> List[int]:
    """The newest full steps before `step`, as many or as there are; before the window every step is taken for one."""
    begin = min(by_step)
    inside = [earlier for earlier in range(step - 1, begin - 1, -1) if by_step[earlier] == FULL]
    return [*inside, *range(begin - 1, -1, -1)][:count]


def _square_of_skips(record: Record, by_step: Dict[int, str]) -> float:
    """Of what response and a line leave at skipped steps; of that, means leave a share that the gain holds."""
    errors, end = {}, record.sigmas[max(by_step) + 1]
    for before, start, following in _skipping(record, by_step):
        foreseen = Foreseen(record, before, start)
        unforeseen = record.denoised[following] - foreseen.at(following)
        for step in range(start + 1, following):
            guess = foreseen.at(step) + _share(record, start, step, following) * unforeseen
            errors[step] = _weight(record, step, end) * (guess - record.denoised[step])
    return _square(errors)


class Foreseen:
    """D as it is foreseen behind a computed step `start`, by what it made of the noise since the one `before`."""

    def __init__(self, record: Record, before: int, start: int):
        self.record, self.start = record, start
        self.slope: Optional[torch.Tensor] = None
        # Behind a first step without signal nothing is measured.
        if len(record.noise) and record.noise[before].any():
            change = record.denoised[start] - record.denoised[before]
            noise = self._noise(before, start)
            self.slope = slope_behind(change, noise, record.sigmas[before], record.sigmas[start])

    def at(self, step: int) -> torch.Tensor:
        """D at a later step."""
        newest, sigmas = self.record.denoised[self.start], self.record.sigmas
        if self.slope is None:
            return newest
        return newest + answer(self.slope, self._noise(self.start, step), sigmas[self.start], sigmas[step])

    def _noise(self, start: int, end: int) -> torch.Tensor:
        return self.record.sigmas[end] ** 2 * self.record.noise[start:end].sum(0)


def predictor_moments(record: Record, action: Action, windows: Windows) -> Tuple[float, float]:
    """How the predictor meets what x lacks at computed steps, in this rank's entries: products to fit its strength by.

    A stand-in that repeats D_i leaves x wrong by u until the next computed step, one that follows the newest change by
    u + g v. The squares' sum is least at g = -(u, v) / (v, v); here are (u, v) and (v, v), summed over the generation.
    """
    against = along = 0.0
    for window in range(windows.count):
        for before, start, following in _skipping(record, kinds(action, windows, window)):
            held, led = _stand_ins(record, before, start, following)
            against += float((held * led).double().sum())
            along += float(led.double().square().sum())
    return against, along


def _stand_ins(record: Record, before: int, start: int, end: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """What x is wrong by at `end` when D stands still from `start` on, and what following its last change adds."""
    denoised, sigmas = record.denoised, record.sigmas
    held, led = torch.zeros_like(denoised[0]), 0.0
    for step in range(start + 1, end):
        weight = _weight(record, step, sigmas[end])
        held += weight * (denoised[start] - denoised[step])
        led += weight * followed(sigmas[before], sigmas[start], sigmas[step])
    return held, led * (denoised[start] - denoised[before])


def _square(errors: Dict[int, torch.Tensor]) -> float:
    """The squared norm of the sum."""
    return float(torch.stack(list(errors.values())).sum(0).double().square().sum()) if errors else 0.0


def _square_of_regions(record: Record, by_step: Dict[int, str], weights: Dict[int, float], family: str) -> float:
    """Of forecasting or reusing the blocks' deltas, in units of hidden states."""
    if not len(record.gram):
        return 0.0
    # What is put in place of what, in terms of the steps' deltas.
    total = torch.zeros(len(record.slopes), dtype=torch.float64)
    for step, kind in by_step.items():
        if kind == family:
            amount = weights[step] * record.slopes[step]
            newest, before = full_before(step, by_step)
            ahead = forecast(step, newest, before) if family == FORECAST else 0.0
            total[newest] += amount * (1 + ahead)
            total[before] -= amount * ahead
            total[step] -= amount
    return max(0.0, float(total @ record.gram @ total)) if total.any() else 0.0
