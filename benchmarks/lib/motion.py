# SPDX-License-Identifier: Apache-2.0
"""The noise of coupled samplings: every arm of one video follows the Brownian motion of its plain run.

In y = x / s^2 EulerAncestral is Euler-Maruyama with increments of one motion W(lam), lam = 1 / s^2: the noise of a step
is the normalised sum of the increments it passes, so arms differ by their steps alone.
"""

import contextlib
import math
import sys
import zlib
from typing import Any, Callable, Iterable, Iterator, List, Optional, Sequence

import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as euler_ancestral

from osaccel.sampling.levels import NoiseLevels


def is_ancestral(scheduler: Any) -> bool:
    """Whether runs with other steps can follow the same motion."""
    return isinstance(scheduler, euler_ancestral.EulerAncestralDiscreteScheduler)


@contextlib.contextmanager
def drawing(module: Any, draw: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Let the scheduler in `module` take its noise from `draw`."""
    original = getattr(module, "randn_tensor", None)
    if original is None:  # a scheduler that never draws
        yield
        return

    def randn_tensor(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> Any:
        return draw().to(device, dtype)

    module.randn_tensor = randn_tensor
    try:
        yield
    finally:
        module.randn_tensor = original


class Motion:
    """One Brownian motion W(lam), lam = 1 / s^2, drawn again from its seed.

    Args:
        sigmas: the noise levels between which increments are drawn, one after the other: those of the plain run, or of
            all arms. Drawn for the plain run alone, they are what its scheduler draws after `torch.manual_seed(seed)`.
        shape: of the latents.
        between: further levels, of arms that came later. Brownian bridges fill them in; the plain run stays as it is.
    """

    def __init__(self, sigmas: Iterable[float], shape: Sequence[int], seed: int, between: Iterable[float] = ()):
        drawn = {snr_of(sigma) for sigma in sigmas}
        self.snrs = sorted(drawn.union(snr_of(sigma) for sigma in between))
        if not min(drawn) == self.snrs[0] <= self.snrs[-1] == max(drawn):
            raise ValueError("levels to fill in must lie between those that are drawn")
        self.shape, self.seed = tuple(shape), seed
        self._drawn = sorted(drawn)
        self._generator = torch.Generator().manual_seed(seed)
        # Of a seed only 32 bits count.
        self._bridges = torch.Generator().manual_seed(zlib.crc32(f"bridges {seed}".encode()))
        self._first = torch.randn(self.shape, generator=self._generator)
        self._place, self._whole = 0, 0
        self._rest = torch.zeros(0)  # what is left of the drawn increment

    def initial(self) -> torch.Tensor:
        return self._first

    def until(self, snr: float) -> torch.Tensor:
        """Unit noise of the step that ends at `snr`."""
        total, width = torch.zeros(self.shape), 0.0
        while self.snrs[self._place] < snr * (1 - 1e-9):
            width += self.snrs[self._place + 1] - self.snrs[self._place]
            total += self._increment()
        return total / math.sqrt(max(width, 1e-30))

    def _increment(self) -> torch.Tensor:
        begin, end = self.snrs[self._place : self._place + 2]
        if begin == self._drawn[self._whole]:
            whole = self._drawn[self._whole + 1] - begin
            self._rest = math.sqrt(whole) * torch.randn(self.shape, generator=self._generator)
            self._whole += 1
        self._place += 1
        width, whole = end - begin, self._drawn[self._whole] - begin
        if width == whole:
            return self._rest
        bridge = math.sqrt(width * (whole - width) / whole) * torch.randn(self.shape, generator=self._bridges)
        part = self._rest * (width / whole) + bridge
        self._rest = self._rest - part
        return part

    def patched(self, module: Any, levels: NoiseLevels, times: Sequence[float]) -> contextlib.AbstractContextManager:
        """Let the scheduler in `module` draw its noise from this motion while it follows `times`."""
        return drawing(module, Steps([self], levels, times).draw)


def snr_of(sigma: float) -> float:
    return round(1 / sigma**2, 12)


class Steps:
    """The noise that some motions, one video each, give to the steps between `times`, one after the other."""

    def __init__(self, motions: Sequence[Motion], levels: NoiseLevels, times: Sequence[float]):
        self.motions = motions
        self._ends = iter([snr_of(levels.sigma(time)) for time in times[1:]])

    def draw(self) -> torch.Tensor:
        end = next(self._ends, None)
        if end is None:  # the last step ends at s = 0 and its noise has no weight
            return torch.cat([torch.zeros(motion.shape) for motion in self.motions])
        return torch.cat([motion.until(end) for motion in self.motions])


class Noise:
    """Initial and scheduler's noise of some videos sampled together, each from a seed of its own.

    A video of the plain run's number of steps draws what `torch.manual_seed(seed)` before a call for it alone draws;
    one of another number follows the same motion.

    Args:
        scheduler: with deterministic ones only the initial noise matters.
        plain_steps: the steps of the plain run; steps: those of this one.
    """

    def __init__(self, scheduler: Any, shape: Sequence[int], seeds: Sequence[int], plain_steps: int, steps: int):
        self.scheduler, self.shape = scheduler, (1, *shape)
        self.is_plain = steps == plain_steps
        self._steps: Optional[Steps] = None
        if is_ancestral(scheduler) and not self.is_plain:
            levels, times = NoiseLevels(scheduler), timesteps_of(scheduler, steps)
            plain, between = (
                [levels.sigma(time) for time in kept] for kept in (timesteps_of(scheduler, plain_steps), times)
            )
            motions = [Motion(plain, self.shape, seed, between) for seed in seeds]
            self._steps = Steps(motions, levels, times)
            self._first = [motion.initial() for motion in motions]
        else:
            self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            self._first = [torch.randn(self.shape, generator=generator) for generator in self._generators]

    def initial(self) -> torch.Tensor:
        return torch.cat(self._first)

    def attached(self) -> contextlib.AbstractContextManager:
        """The scheduler draws this noise and no other."""
        return drawing(sys.modules[type(self.scheduler).__module__], self._draw)

    def _draw(self) -> torch.Tensor:
        if self._steps is not None:
            return self._steps.draw()
        if not self.is_plain:
            name = type(self.scheduler).__name__
            raise ValueError(f"{name} draws noise, and there is no telling what it would be with fewer steps")
        return torch.cat([torch.randn(self.shape, generator=generator) for generator in self._generators])


def timesteps_of(scheduler: Any, count: int) -> List[float]:
    scheduler.set_timesteps(count)
    return scheduler.timesteps.tolist()
