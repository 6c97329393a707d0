# SPDX-License-Identifier: Apache-2.0
"""How D answers to the noise that an ancestral sampler adds: what is known of D at a skipped step without a call.

In the notation of `osaccel.sampling.standin`, with r = (s_k / s_p)^2,

    x_k = r x_p + s_k^2 (sum of D_i (s_(i+1)^-2 - s_i^-2)) + n,        n the noise that was added since level s_p.

Were the data near x_p Gaussian with variance P, D would have moved by

    D_k - D_p = P / ((1 - r) P + s_k^2) n = a / (r + (1 - r) a) n,        a = P / s_p^2, the slope of D at p.

a is different from place to place, near 0 where everything is settled and near 1 where x is taken for what it is. It is
measured where two known D show what D made of the noise between them, and carried on as that of a Gaussian
(docs/correction.md, *Response*; second order in the sense of Analytic-DPM, arXiv 2201.06503).
"""

from typing import Any, Optional, Sequence

import torch

# Neighbours on each side of a place, in a frame, that its slope is measured on too.
NEAR = 1


class Response:
    """Follows the noise of one generation, and how D answers; two latents and a slope.

    Tensors are x, D and changes of D, (N, C, ...), float32; noise is x / s^2 less all that D has
    moved it by, of use in differences.
    """

    def __init__(self, sigmas: Sequence[float]):
        self._sigmas = sigmas
        self._drift: Any = 0.0
        self._level = 0.0
        self._noise: Optional[torch.Tensor] = None
        self._slope: Optional[torch.Tensor] = None

    def noise(self, step: int, x: torch.Tensor) -> torch.Tensor:
        """The noise until `step`, where x is before anything moves it."""
        return x / self._sigmas[step] ** 2 - self._drift

    def passed(self, step: int, denoised: torch.Tensor) -> None:
        """What the scheduler is told that D is at `step`."""
        following, now = self._sigmas[step + 1], self._sigmas[step]
        if following > 0:
            self._drift = self._drift + denoised * (following**-2 - now**-2)

    def moved(self, change: torch.Tensor) -> None:
        """x / s^2 is moved by this, which is no noise."""
        self._drift = self._drift + change

    def foreseen(self, step: int, noise: torch.Tensor) -> Optional[torch.Tensor]:
        """By how much D has moved since the newest known one; None while nothing was measured."""
        if self._slope is None or self._noise is None:
            return None
        sigma = self._sigmas[step]
        return answer(self._slope, sigma**2 * (noise - self._noise), self._level, sigma)

    def known(self, sigma: float, noise: torch.Tensor, change: Optional[torch.Tensor]) -> None:
        """D is known at level `sigma`, where the noise was this; with its change the slope is measured."""
        if self._noise is not None and change is not None:
            self._slope = slope_behind(change, sigma**2 * (noise - self._noise), self._level, sigma)
        self._level, self._noise = sigma, noise


def answer(slope: torch.Tensor, noise: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """What D, of a slope (N, 1, ...) at level `start`, makes of the noise (N, C, ...) that was added down to `end`."""
    return gain(slope, _kept(start, end)) * noise


def slope_behind(change: torch.Tensor, noise: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """The slope (N, 1, ...) at level `end`, by what D made of the noise since `start`, both (N, C, ...)."""
    return carried(slope_of(change, noise, _kept(start, end)), start, end)


def _kept(start: float, end: float) -> float:
    """r, the share of x at level `start` that is left at `end`."""
    return (end / start) ** 2


def gain(slope: torch.Tensor, kept: float) -> torch.Tensor:
    """What D makes of noise (N, C, ...), to be multiplied with it; slope: (N, 1, ...); kept: r, see above."""
    return slope / (kept + (1 - kept) * slope)


def slope_of(change: torch.Tensor, noise: torch.Tensor, kept: float) -> torch.Tensor:
    """The slope (N, 1, ...) in [0, 1] whose `gain` makes `change` of noise, both (N, C, ...), by least squares."""
    made = (_near(change * noise) / _near(noise * noise).clamp_min(1e-30)).clamp(0.0, 1.0)
    return kept * made / (kept * made + (1 - made))


def carried(slope: torch.Tensor, start: float, end: float) -> torch.Tensor:
    """The slope at a lower noise level `end`, for Gaussian data of the variance that makes it `slope` at `start`."""
    return slope * start**2 / (slope * start**2 + (1 - slope) * end**2)


def _near(values: torch.Tensor) -> torch.Tensor:
    """In proportion to sums over channels and nearby places of a frame, (N, 1, ...); without frames, over all."""
    if values.dim() < 4:
        return values.sum(tuple(range(1, values.dim())), keepdim=True)
    summed = values.sum(1, keepdim=True)
    frames = summed.reshape(-1, 1, *summed.shape[-2:])
    return torch.nn.functional.avg_pool2d(frames, 2 * NEAR + 1, stride=1, padding=NEAR).reshape(summed.shape)
