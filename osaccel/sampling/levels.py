# SPDX-License-Identifier: Apache-2.0
"""Noise levels at fractional timesteps, by the interpolation the diffusers schedulers use themselves.

s(t) = sqrt((1 - abar(t)) / abar(t)) is tabulated at the training timesteps and linear in between
(diffusers ``EulerDiscreteScheduler.set_timesteps``; s is the sigma of Karras et al., arXiv 2206.00364).
"""

from typing import Sequence

import numpy as np
import torch


def checked_timesteps(timesteps: Sequence[float], num_train_timesteps: int, minimum: int = 1) -> np.ndarray:
    """The list as the schedulers store it: float32, clipped to [0, num_train_timesteps - 1], strictly descending.

    Strictness is checked after clipping and rounding: schedulers find their place by comparing timesteps, and take
    the *second* match, so an entry that becomes equal to its neighbour would shift every step by one.
    Raises ValueError naming the first offending pair.
    """
    given = np.asarray(list(timesteps), dtype=np.float64)
    if len(given) < minimum:
        raise ValueError(f"The timestep list has {len(given)} entries, but this sampler needs at least {minimum}.")
    if not np.isfinite(given).all():
        raise ValueError("The timestep list holds a value that is not finite; every timestep must be a number.")
    last = num_train_timesteps - 1
    stored = np.clip(given, 0, last).astype(np.float32)
    for i in range(len(stored) - 1):
        if not stored[i] > stored[i + 1]:
            raise ValueError(
                f"Timesteps {i} and {i + 1} of the list, {given[i]:.10g} and {given[i + 1]:.10g}, become "
                f"{stored[i]:.10g} and {stored[i + 1]:.10g} after clipping to [0, {last}] in float32; "
                "the list must be strictly descending."
            )
    return stored


def sigma_table(alphas_cumprod: torch.Tensor) -> np.ndarray:
    """s at every training timestep, shape (num_train_timesteps,), computed in the dtype of ``alphas_cumprod``."""
    return (((1 - alphas_cumprod) / alphas_cumprod) ** 0.5).cpu().numpy()


def sigmas_at(alphas_cumprod: torch.Tensor, timesteps: np.ndarray) -> np.ndarray:
    """s(t), float32, rounded where the sigma schedulers round, so that equal timesteps give equal bits."""
    table = sigma_table(alphas_cumprod)
    return np.interp(timesteps, np.arange(len(table)), table).astype(np.float32)


def alphas_cumprod_at(alphas_cumprod: torch.Tensor, timesteps: np.ndarray) -> torch.Tensor:
    """abar(t) = 1 / (1 + s(t)^2), in the dtype and on the device of ``alphas_cumprod``.

    The way through s is made in float64, so that an integer timestep gives back the tabulated value to the last bit.
    """
    table = sigma_table(alphas_cumprod.double())
    sigmas = np.interp(timesteps, np.arange(len(table)), table)
    return torch.from_numpy(1 / (1 + sigmas**2)).to(alphas_cumprod)
