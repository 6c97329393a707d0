# SPDX-License-Identifier: Apache-2.0
"""How much of a change of the network's output at one step is left in the final latents, as far as the sampler says."""

from typing import Any

import numpy as np

from osaccel.sampling.levels import NoiseLevels
from osaccel.sampling.powers import usual_power


def step_weights(scheduler: Any, num_steps: int, variance: float) -> np.ndarray:
    """(step,), for a generation that `scheduler` has just run.

    A step that takes e more for D_k leaves x too large by e (1 - (s_(k+1) / s_k)^q) (`osaccel.search.plan.local`). The
    network answers: were the latents Gaussian of variance v, D would move by v / (v + s^2) times the change of x, and
    of a change at level s (v / (v + s^2))^(q / 2) would be left at s = 0.

    Args:
        variance: of the final latents.

    Where nothing is known of the scheduler's noise levels, every step counts the same.
    """
    try:
        levels = NoiseLevels(scheduler)
        sigmas = np.array(levels.of_steps())
        slopes = np.array([levels.slope(float(sigma)) for sigma in sigmas[:-1]])
    except (AttributeError, TypeError, ValueError):
        return np.ones(num_steps)
    if len(slopes) != num_steps or not np.isfinite([*slopes, *sigmas]).all() or (sigmas[:-1] <= 0).any():
        return np.ones(num_steps)
    power, now, then = usual_power(scheduler), sigmas[:-1], sigmas[1:]
    return np.abs(slopes * (1 - (then / now) ** power)) * (variance / (variance + then**2)) ** (power / 2)
