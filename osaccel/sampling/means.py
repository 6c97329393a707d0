# SPDX-License-Identifier: Apache-2.0
"""Where the network is asked for a computed step and the skipped steps before it together: at their mean.

For samplers that add noise. In y = x / s^2 and lam = s^-2 the plain run adds D_k m_k to y, m_k = lam_(k+1) - lam_k
(`osaccel.sampling.standin` for the letters). D is smooth in (y, lam), whatever noise has moved y. So, in means by the
masses m of the steps,

    sum of D_k m_k = D(mean of y, mean of lam) sum of m

but for second derivatives of D: the noise, of which no line through some of the D_k knows, is in the mean of y. Here
y = lam x0 + W(lam), W of variance lam, and the mean of W has less than the mean of lam, v = sum of
m_i m_j min(lam_i, lam_j) / (sum of m)^2. What the second derivatives come to is made good by scaling the noise, x less
the newest D, to the deviation of its level, so that the network sees what it was trained on (docs/correction.md).
"""

import math
from typing import Any, List, NamedTuple

import torch


def evenly(start: float, sigma: float, end: float) -> float:
    """How far something has moved at `sigma` that moves evenly in log s from `start` to `end`."""
    return 0.0 if sigma == start else math.log(start / sigma) / math.log(start / end)


class Mean(NamedTuple):
    """A point at which D is asked for.

    Attributes:
        x: x0 + s z, (N, C, ...), float32.
        sigma: its level s.
        noise: as `Skipped.add` got it, the mean.
    """

    x: torch.Tensor
    sigma: float
    noise: Any

    def scaled(self, sigma: float, denoised: torch.Tensor) -> "Mean":
        """The same with the noise of another level, near by; denoised: the newest D."""
        return self._replace(x=torch.lerp(denoised, self.x, sigma / self.sigma), sigma=sigma)


class Skipped:
    """The steps skipped since the newest computed one; sums of three latents, float32.

    Attributes:
        mass: of all of them, the sum of m.
        told: what the scheduler was told that D is, summed by mass.
        led: how far it was told that D follows its last change, summed by mass.
    """

    def __init__(self, power: float):
        self.power = power
        self._masses: List[float] = []
        self._places: List[float] = []
        self._y: Any = 0.0
        self._noise: Any = 0.0
        self.told: Any = 0.0
        self.led = 0.0

    @property
    def mass(self) -> float:
        return sum(self._masses)

    def add(self, sigma: float, following: float, x: torch.Tensor, told: torch.Tensor, led: float, noise: Any) -> None:
        """A step from level `sigma` to `following` > 0; noise: as x / s^2 has it, or 0."""
        mass = following**-self.power - sigma**-self.power
        self._masses.append(mass)
        self._places.append(sigma**-self.power)
        self._y = self._y + mass * self._places[-1] * x
        self._noise = self._noise + mass * noise
        self.told, self.led = self.told + mass * told, self.led + mass * led

    def moved(self, start: float, end: float) -> float:
        """What moves evenly in log s from level `start` to `end`, by mass, in units of the whole way."""
        levels = (place ** (-1 / self.power) for place in self._places)
        return sum(mass * evenly(start, sigma, end) for mass, sigma in zip(self._masses, levels))

    def with_step(self, sigma: float, following: float, x: torch.Tensor, noise: Any, denoised: torch.Tensor) -> Mean:
        """The mean with one more step, from level `sigma` to `following` > 0; denoised: the newest D."""
        place = sigma**-self.power
        mass = following**-self.power - place
        masses, places = [*self._masses, mass], [*self._places, place]
        total = sum(masses)
        mean = sum(m * lam for m, lam in zip(masses, places)) / total
        at = (self._y + mass * place * x) / (total * mean)
        left = sum(m * n * min(a, b) for m, a in zip(masses, places) for n, b in zip(masses, places)) / total**2
        at = torch.lerp(denoised, at, math.sqrt(mean / left))
        return Mean(at, mean ** (-1 / self.power), (self._noise + mass * noise) / total)
