# SPDX-License-Identifier: Apache-2.0
"""Logs the guided denoised prediction at every step of a generation; calls nothing, changes nothing.

Predictions are kept as a fixed, seeded subset of spatial-frequency coefficients, so memory is bounded by steps x
`entries` and every video and every rank (each with its own frames) contributes the same coefficients.
"""

import math
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch

from osaccel.interceptors import Interceptor, StepCall
from osaccel.sampling.levels import NoiseLevels
from osaccel.search.team import Team
from osaccel.search.timesteps.lists import Statistics

_RINGS = 6


def cosine_matrix(size: int) -> torch.Tensor:
    """The orthonormal DCT-II, shape (size, size)."""
    places, orders = torch.arange(size).double() + 0.5, torch.arange(size).double()
    matrix = torch.cos(math.pi / size * orders[:, None] * places[None, :]) * math.sqrt(2.0 / size)
    matrix[0] /= math.sqrt(2.0)
    return matrix.float()


class _Coefficients:
    """The chosen entries of latents of one shape: per band (channel and ring of spatial frequencies) an index set."""

    def __init__(self, shape: torch.Size, entries: int, seed: int):
        self.is_spatial = len(shape) >= 4
        bands = torch.zeros(shape, dtype=torch.long)
        if self.is_spatial:
            self.rows, self.columns = cosine_matrix(shape[-2]), cosine_matrix(shape[-1])
            high = torch.arange(shape[-2])[:, None] / shape[-2], torch.arange(shape[-1])[None, :] / shape[-1]
            radius = (high[0] ** 2 + high[1] ** 2).sqrt() / math.sqrt(2.0)
            rings = (radius * _RINGS).long().clamp(max=_RINGS - 1)
            channels = torch.arange(shape[1]).reshape(1, -1, *([1] * (len(shape) - 2)))
            bands = (channels * _RINGS + rings).expand(shape)
        self.indices, sizes = [], []
        flat = bands.reshape(-1)
        generator = torch.Generator().manual_seed(seed)
        names = [int(name) for name in flat.unique()]
        for name in names:
            members = (flat == name).nonzero().reshape(-1)
            kept = min(len(members), max(16, entries // len(names)))
            self.indices.append(members[torch.randperm(len(members), generator=generator)[:kept]].sort().values)
            sizes.append(len(members))
        self.shares = np.array(sizes, dtype=np.float64) / len(flat)
        self.chosen = torch.cat(self.indices)

    def of(self, denoised: torch.Tensor) -> torch.Tensor:
        if self.is_spatial:
            rows, columns = self.rows.to(denoised.device), self.columns.to(denoised.device)
            denoised = rows @ denoised @ columns.T
        return denoised.reshape(-1)[self.chosen.to(denoised.device)].cpu()


class DenoiserLog(Interceptor):
    """An interceptor, one log for any number of generations on one scheduler.

    Args:
        scheduler: the pipeline's.
        entries: coefficients kept per step; 65,536 at 100 steps are 26 MB.
        seed: chooses them.
    """

    def __init__(self, scheduler: Any, entries: int = 65536, seed: int = 0):
        self.levels, self.entries, self.seed = NoiseLevels(scheduler), entries, seed
        self.generations: List[Tuple[np.ndarray, np.ndarray]] = []
        self.timesteps: List[float] = []
        self._coefficients: Optional[_Coefficients] = None
        self._rows: Dict[float, torch.Tensor] = {}

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        self.observe(call.model_output, call.timestep, call.sample)
        return proceed(call)

    def observe(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor) -> None:
        time = float(timestep)
        # Two-stage samplers come back to a timestep; only the first prediction there belongs to the path.
        if self._rows and time >= min(self._rows):
            return
        if self._coefficients is None:
            self._coefficients = _Coefficients(sample.shape, self.entries, self.seed)
        denoised = self.levels.denoised(model_output.detach(), self.levels.sigma(time), sample.detach())
        self._rows[time] = self._coefficients.of(denoised)

    def end_generation(self) -> None:
        """Reduce what was logged to its distances, (B, K, K), and powers, (B, K); the predictions are forgotten."""
        times, rows = list(self._rows), torch.stack(list(self._rows.values())).double()
        self._rows = {}
        if self.timesteps and times != self.timesteps:
            raise ValueError("all generations of one search must use the same timesteps")
        self.timesteps = times
        assert self._coefficients is not None
        distances, powers, begin = [], [], 0
        for indices in self._coefficients.indices:
            band = rows[:, begin : begin + len(indices)]
            begin += len(indices)
            gram = band @ band.T / band.shape[1]
            diagonal = gram.diagonal()
            distances.append((diagonal[:, None] + diagonal[None] - 2 * gram).clamp_min(0))
            powers.append(diagonal)
        self.generations.append((torch.stack(distances).numpy(), torch.stack(powers).numpy()))

    def statistics(self, team: Optional[Team] = None) -> Statistics:
        """The mean over the generations and over the ranks of the team, the same on every rank."""
        assert self._coefficients is not None and self.generations
        distances, powers = (np.mean([values[part] for values in self.generations], axis=0) for part in (0, 1))
        if team is not None and team.size > 1:
            distances, powers = (team.sum(torch.from_numpy(part)).numpy() / team.size for part in (distances, powers))
        times = np.array(self.timesteps)
        sigmas = np.array([self.levels.sigma(time) for time in times])
        return Statistics(times, sigmas, distances, self._coefficients.shares, powers)
