# SPDX-License-Identifier: Apache-2.0
"""What an action does to the latents within its window, from one recorded plain generation and without the network.

In the notation of `osaccel.sampling.standin`: a step that takes e_k more for D_k than the plain run leaves
x / s^q too large by e_k (s_(k+1)^-q - s_k^-q). Summed over a window these are the change of x at its end, the network's
own answer to it left out; what becomes of it until the end of the generation is measured (`osaccel.search.plan.gains`).
"""

import math
from typing import Dict, List, NamedTuple, Sequence, Tuple

import torch

from osaccel.plan import forecast
from osaccel.sampling.standin import FLOW
from osaccel.search.plan.actions import FORECAST, FULL, HALF, SKIP, Action, Windows, kinds


class Record(NamedTuple):
    """What a plain generation showed at every step; tensors on the host, float32, flat.

    Attributes:
        denoised: D at every step, (steps, entries).
        guidance: how D would move, were the difference of the two branches to grow by itself, (steps, entries); empty
            where guidance is off.
        sigmas: noise level of every step and the last one, 0.
        gram: inner products of the blocks' deltas of any two steps, see `osaccel.search.plan.deltas`.
        slopes: how far D moves with the network's output, (steps,).
        power: q of the sampler's step.
    """

    denoised: torch.Tensor
    guidance: torch.Tensor
    sigmas: Sequence[float]
    gram: torch.Tensor
    slopes: Sequence[float]
    power: float = FLOW


def squared_sizes(record: Record, action: Action, windows: Windows) -> List[Dict[str, float]]:
    """For every window and family of actions, the squared change of x at the window's end, in this rank's entries."""
    found = []
    for window in range(windows.count):
        by_step = kinds(action, windows, window)
        found.append({HALF: _squared(record, _of_halves(record, by_step), by_step),
                      SKIP: _squared(record, _of_skips(record, by_step), by_step),
                      FORECAST: _square_of_forecasts(record, by_step)})  # fmt: skip
    return found


def _squared(record: Record, errors: Dict[int, torch.Tensor], by_step: Dict[int, str]) -> float:
    """The squared norm of what errors of D at some steps add up to at the end of the window."""
    if not errors:
        return 0.0
    end = record.sigmas[max(by_step) + 1]
    total = torch.zeros_like(record.denoised[0])
    for step, error in errors.items():
        total += _weight(record, step, end) * error
    return float(total.double().square().sum())


def _weight(record: Record, step: int, end: float) -> float:
    """s_end^q (s_(k+1)^-q - s_k^-q); the last step of all replaces x by D."""
    following, now = record.sigmas[step + 1], record.sigmas[step]
    if following <= 0:
        return 1.0
    # A window that ends the generation is judged one step before its end, where D takes over.
    end = end if end > 0 else following
    return (end / following) ** record.power - (end / now) ** record.power


def _of_halves(record: Record, by_step: Dict[int, str]) -> Dict[int, torch.Tensor]:
    """Errors of D from forecasting the difference of the branches at conditional-only steps."""
    errors = {}
    for step, kind in by_step.items():
        if kind == HALF:
            full = _before(step, by_step, (FULL,))
            guess = _line(record.guidance, step, *full[:2])
            errors[step] = guess - record.guidance[step]
    return errors


def _line(values: torch.Tensor, step: int, newest: int, before: int) -> torch.Tensor:
    return values[newest] + forecast(step, newest, before) * (values[newest] - values[before])


def _before(step: int, by_step: Dict[int, str], wanted: Tuple[str, ...]) -> List[int]:
    """The steps of some kinds before `step`, newest first; before the window every step is taken for full."""
    begin = min(by_step)
    inside = [earlier for earlier in range(step - 1, begin - 1, -1) if by_step[earlier] in wanted]
    return [*inside, begin - 1, begin - 2]


def _of_skips(record: Record, by_step: Dict[int, str]) -> Dict[int, torch.Tensor]:
    """Errors of D that the corrector leaves: between computed steps it takes D to move evenly in log s."""
    errors: Dict[int, torch.Tensor] = {}
    computed = [step for step, kind in by_step.items() if kind != SKIP] + [max(by_step) + 1]
    for start, end in zip(computed, computed[1:]):
        # Behind the generation's last step nothing is known; there it never skips.
        if end - start < 2 or end >= len(record.denoised):
            continue
        whole = math.log(record.sigmas[start] / record.sigmas[end])
        for step in range(start + 1, end):
            share = math.log(record.sigmas[start] / record.sigmas[step]) / whole
            errors[step] = torch.lerp(record.denoised[start], record.denoised[end], share) - record.denoised[step]
    return errors


def _square_of_forecasts(record: Record, by_step: Dict[int, str]) -> float:
    """The squared norm of what forecasting the blocks' deltas adds up to, in units of hidden states.

    D answers to the hidden states through the last layers, which change little within a window; what that answer is
    belongs to what is measured.
    """
    if FORECAST not in by_step.values():
        return 0.0
    end = record.sigmas[max(by_step) + 1]
    # What is put in place of what, in terms of the steps' deltas.
    total = torch.zeros(len(record.slopes), dtype=torch.float64)
    for step, kind in by_step.items():
        if kind == FORECAST:
            amount = _weight(record, step, end) * record.slopes[step]
            newest, before = _before(step, by_step, (FULL,))[:2]
            ahead = forecast(step, newest, before)
            total[newest] += amount * (1 + ahead)
            total[before] -= amount * ahead
            total[step] -= amount
    return max(0.0, float(total @ record.gram @ total))
