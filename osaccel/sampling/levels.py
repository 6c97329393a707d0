# SPDX-License-Identifier: Apache-2.0
"""Noise levels at fractional timesteps, by the interpolation the diffusers schedulers use themselves.

s(t) = sqrt((1 - abar(t)) / abar(t)) is tabulated at the training timesteps and linear in between
(diffusers ``EulerDiscreteScheduler.set_timesteps``; s is the sigma of Karras et al., arXiv 2206.00364).
"""

import math
from typing import Any, List, Sequence

import numpy as np
import torch

from osaccel.interceptors import StepCall


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


class NoiseLevels:
    """s(t) of a scheduler's training schedule, and how its samples and model outputs say x = x0 + s z and D(x, s).

    A sample is x itself where the scheduler explodes the variance, x / sqrt(1 + s^2) where it preserves it.
    """

    def __init__(self, scheduler: Any):
        self.scheduler = scheduler
        self.table = sigma_table(scheduler.alphas_cumprod.double())

    def sigma(self, timestep: Any) -> float:
        return float(np.interp(float(timestep), np.arange(len(self.table)), self.table))

    def timestep(self, sigma: float) -> float:
        """The inverse of `sigma`, within the table."""
        return float(np.interp(sigma, self.table, np.arange(len(self.table))))

    def of_steps(self) -> List[float]:
        """s at every step of the timesteps that are set, and the 0 it ends with."""
        sigmas, count = getattr(self.scheduler, "sigmas", None), len(self.scheduler.timesteps)
        if isinstance(sigmas, torch.Tensor) and len(sigmas) == count + 1:
            return sigmas.double().tolist()
        return [self.sigma(time) for time in self.scheduler.timesteps.tolist()] + [0.0]

    def scale(self, sigma: float) -> float:
        """What a sample of this scheduler is multiplied with to be x0 + s z."""
        return 1.0 if self.explodes else math.sqrt(1.0 + sigma * sigma)

    @property
    def explodes(self) -> bool:
        """Whether samples are x0 + s z as they are."""
        return float(self.scheduler.init_noise_sigma) > 1.5

    def denoised(self, model_output: torch.Tensor, sigma: float, sample: torch.Tensor) -> torch.Tensor:
        """D(x, s), float32; for predictions of v also at zero signal, where s is infinite."""
        output = model_output.float()
        if self._kind == "epsilon":
            return sample.float() * self.scale(sigma) - sigma * output
        if self._kind == "v_prediction":
            signal = 1 / math.sqrt(1 + sigma * sigma)
            return self.preserved(sample, sigma) * signal - output * math.sqrt(1 - signal * signal)
        return output

    def model_output(self, denoised: torch.Tensor, sigma: float, sample: torch.Tensor) -> torch.Tensor:
        """The model output whose D(x, s) is `denoised`, float32: the inverse of `denoised`, at a finite s > 0."""
        if self._kind == "epsilon":
            return (sample.float() * self.scale(sigma) - denoised) / sigma
        if self._kind == "v_prediction":
            signal = 1 / math.sqrt(1 + sigma * sigma)
            return (self.preserved(sample, sigma) * signal - denoised) / math.sqrt(1 - signal * signal)
        return denoised

    def moved(self, call: StepCall, denoised: torch.Tensor, sigma: float, power: float, lost: torch.Tensor) -> StepCall:
        """The call of a step at level `sigma` with the same D, at an x that has what x / s^q lost, (N, C, ...)."""
        sample = (call.sample.float() + sigma**power / self.scale(sigma) * lost).to(call.sample.dtype)
        return call.replaced(self.model_output(denoised, sigma, sample).to(call.model_output.dtype), sample)

    def slope(self, sigma: float) -> float:
        """How far D moves with the model output at a noise level."""
        return float(self.denoised(torch.ones(1), sigma, torch.zeros(1)))

    def preserved(self, sample: torch.Tensor, sigma: float) -> torch.Tensor:
        """(x0 + s z) / sqrt(1 + s^2)."""
        return sample.float() / (math.sqrt(1 + sigma * sigma) if self.explodes else 1.0)

    @property
    def _kind(self) -> str:
        return self.scheduler.config.get("prediction_type", "epsilon")
