# SPDX-License-Identifier: Apache-2.0
"""Timestep lists from the denoised predictions of a teacher run; pure NumPy, the same inputs give the same list.

Notation, in variance-exploding coordinates: s is sigma, lam = 1 / s^2 the signal-to-noise ratio, D_k the guided
denoised prediction at the teacher's k-th timestep (k = 0 is the noisiest). With y = x / s^2 the Euler ancestral sampler
is the Euler-Maruyama scheme of dy = D dlam + dW(lam): between two timesteps it freezes D. A list's cost is what the
frozen D misses of the teacher's D, summed over its intervals, so it is a path length in the graph of pair costs
C[i][j] and the best list of every length comes from one dynamic programme.
"""

import math
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

METHODS = ("wdp", "klub", "arctan")


class Parameters(NamedTuple):
    """What shapes the search.

    Attributes:
        exponent: g of the weight v^g on an error made at some noise level, v the variance the clean latents still have
            there, measured per band of spatial frequencies and channel. For a Gaussian band of variance c^2 that is
            (lam + 1 / c^2)^-g. 0 is the path-space bound of Align Your Steps, which spends its steps where the noise is
            already invisible; 1 is the variance missing in the final sample; 2 counts only the most uncertain
            directions. Larger: more steps at high noise.
        max_gap: the largest gap between neighbouring timesteps, in units of even spacing over the same steps. It bounds
            what an error in the logged predictions can do: no region of noise levels is left without steps.
    """

    exponent: float = 1.25
    max_gap: float = 3.0


DEFAULTS = Parameters()


class Statistics(NamedTuple):
    """Second moments of the denoised predictions along the teacher's timesteps.

    Attributes:
        timesteps: descending, shape (K,).
        sigmas: s at each of them, shape (K,).
        distances: mean (D_i - D_j)^2 over the latent entries of each of B bands, shape (B, K, K), float64.
        shares: the part of all latent entries that each band has, shape (B,), sum 1.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    distances: np.ndarray
    shares: np.ndarray

    @property
    def variance(self) -> float:
        """c^2 of the clean latents: how far the last prediction is from the first, which knows only the prompt."""
        return float(self.shares @ self.distances[:, 0, -1])


def snr(sigmas: np.ndarray) -> np.ndarray:
    """lam = 1 / s^2."""
    return 1.0 / np.asarray(sigmas, dtype=np.float64) ** 2


def remaining_variances(statistics: Statistics) -> np.ndarray:
    """v: mean (D_last - D_k)^2 per band, shape (B, K), falling with k and never above the noise s^2.

    The prediction is a martingale in lam, so this is the variance of the clean latents given the k-th noisy ones.
    """
    variances = statistics.distances[:, :, -1].copy()
    # The last prediction has no error against itself; what was left one step before is the honest bound.
    variances[:, -1] = variances[:, -2]
    falling = np.maximum.accumulate(variances[:, ::-1], axis=1)[:, ::-1]
    return np.minimum(falling, statistics.sigmas**2)


def pair_costs(statistics: Statistics, exponent: float) -> np.ndarray:
    """C[i][j]: the integral over lam_i .. lam_j of v^g mean |D_lam - D_i|^2 (trapezoids); inf for j <= i."""
    steps = np.diff(snr(statistics.sigmas))
    variances = remaining_variances(statistics)
    weights = (0.5 * (variances[:, 1:] + variances[:, :-1])) ** exponent * steps * statistics.shares[:, None]
    middle = 0.5 * (statistics.distances[:, :, :-1] + statistics.distances[:, :, 1:])
    integrand = np.einsum("bik,bk->ik", middle, weights)
    costs = np.full((len(steps) + 1, len(steps) + 1), np.inf)
    for i in range(len(steps)):
        costs[i, i + 1 :] = np.cumsum(integrand[i, i:])
    return costs


class Schedules(NamedTuple):
    """The best lists by length: `indices[n]` are places on the teacher's grid, `costs[n]` what they cost."""

    indices: Dict[int, Tuple[int, ...]]
    costs: Dict[int, float]


def shortest_paths(costs: np.ndarray, lengths: Sequence[int], allowed: Optional[np.ndarray] = None) -> Schedules:
    """Exact minimum, for every requested number of points at once, over lists from the first to the last place.

    costs: (K, K), only j > i is read; allowed: boolean (K, K), the jumps i -> j that may be taken.
    Raises ValueError when a length cannot be reached with the allowed jumps.
    """
    size = len(costs)
    jumps = np.where(np.triu(np.ones((size, size), dtype=bool), 1), costs, np.inf)
    if allowed is not None:
        jumps = np.where(allowed, jumps, np.inf)
    longest = max(lengths)
    best = np.full(size, np.inf)
    best[0] = 0.0
    previous = np.zeros((longest + 1, size), dtype=np.int64)
    indices: Dict[int, Tuple[int, ...]] = {}
    totals: Dict[int, float] = {}
    for points in range(2, longest + 1):
        through = best[:, None] + jumps
        previous[points] = through.argmin(axis=0)
        best = through.min(axis=0)
        if points in lengths:
            if not math.isfinite(best[-1]):
                raise ValueError(f"no list of {points} timesteps fits on a grid of {size} with the allowed gaps")
            totals[points] = float(best[-1])
            indices[points] = _walk_back(previous, points, size - 1)
    return Schedules(indices, totals)


def _walk_back(previous: np.ndarray, points: int, last: int) -> Tuple[int, ...]:
    path = [last]
    for length in range(points, 1, -1):
        path.append(int(previous[length, path[-1]]))
    return tuple(reversed(path))


def gap_mask(timesteps: np.ndarray, points: int, max_gap: float) -> np.ndarray:
    """The jumps whose gap is within the limit, in units of even spacing with `points` timesteps.

    A neighbour on the teacher's grid is always allowed: the teacher itself made that step.
    """
    times = np.asarray(timesteps, dtype=np.float64)
    gaps = times[:, None] - times[None, :]
    even = (times[0] - times[-1]) / (points - 1)
    allowed = gaps <= max_gap * even * (1 + 1e-6)
    neighbours = np.arange(len(times) - 1)
    allowed[neighbours, neighbours + 1] = True
    return allowed


def even_places(size: int, points: int) -> Tuple[int, ...]:
    """Evenly spaced places on a grid of `size`, the first and the last among them."""
    return tuple(int(place) for place in np.round(np.linspace(0, size - 1, points)))


def path_cost(costs: np.ndarray, places: Sequence[int]) -> float:
    """The sum over a list's intervals."""
    return float(sum(costs[i, j] for i, j in zip(places[:-1], places[1:])))


def wdp(statistics: Statistics, counts: Sequence[int], parameters: Parameters = DEFAULTS) -> Dict[int, np.ndarray]:
    """The cheapest list of each length under the gap limit, on the teacher's grid.

    Raises ValueError when the teacher has fewer timesteps than are asked for.
    """
    costs = pair_costs(statistics, parameters.exponent)
    found = {}
    for points in counts:
        allowed = gap_mask(statistics.timesteps, points, parameters.max_gap)
        found[points] = statistics.timesteps[list(shortest_paths(costs, [points], allowed).indices[points])]
    return found


def arctan(timesteps: np.ndarray, sigmas: np.ndarray, points: int, scale: float = 1.0) -> np.ndarray:
    """Even spacing in arctan(s / c): what wdp with g = 1 tends to for a Gaussian of standard deviation `scale`.

    timesteps, sigmas: any table of the noise schedule, descending, whose ends the list keeps. No model is called.
    """
    angles = np.linspace(math.atan(sigmas[0] / scale), math.atan(sigmas[-1] / scale), points)
    found = np.interp(np.tan(angles) * scale, np.asarray(sigmas)[::-1], np.asarray(timesteps)[::-1])
    found[0], found[-1] = timesteps[0], timesteps[-1]
    return found


def klub(statistics: Statistics, counts: Sequence[int], sweeps: int = 10) -> Dict[int, np.ndarray]:
    """The published Align Your Steps search (arXiv 2404.14507, appendix B), on the teacher's grid.

    Ten points are improved one after the other, 11 candidates between the neighbours each; then every interval is
    halved in log s, twice, with one further sweep per level, and the list of the wanted length is read off in log s.

    sweeps: after how many the first level is stopped. The paper stops by eye, because the converged bound is harmful.
    """
    costs = pair_costs(statistics, 0.0)
    logs = np.log(statistics.sigmas)
    places = list(even_places(len(costs), min(10, len(costs))))
    _sweep(costs, places, sweeps)
    for _ in range(2):
        halves = [int(np.abs(logs - 0.5 * (logs[i] + logs[j])).argmin()) for i, j in zip(places[:-1], places[1:])]
        places = sorted(set(places + halves))
        _sweep(costs, places, 1)
    found = {}
    for points in counts:
        wanted = np.interp(np.linspace(0, 1, points), np.linspace(0, 1, len(places)), logs[places])
        found[points] = np.interp(wanted, logs[::-1], statistics.timesteps[::-1])
    return found


def _sweep(costs: np.ndarray, places: List[int], sweeps: int) -> None:
    for _ in range(sweeps):
        for number in range(1, len(places) - 1):
            left, right = places[number - 1], places[number + 1]
            candidates = sorted({int(place) for place in np.round(np.linspace(left + 1, right - 1, 11))})
            places[number] = min(candidates, key=lambda place: costs[left, place] + costs[place, right])


def search(
    statistics: Statistics, counts: Sequence[int], method: str = "wdp", parameters: Parameters = DEFAULTS
) -> Dict[int, np.ndarray]:
    """Descending timesteps for every count, by one of METHODS.

    Raises ValueError for an unknown method or a count that the teacher's steps do not allow.
    """
    if method == "wdp":
        return wdp(statistics, counts, parameters)
    if method == "klub":
        return klub(statistics, counts)
    if method == "arctan":
        scale = math.sqrt(max(statistics.variance, 1e-12))
        return {points: arctan(statistics.timesteps, statistics.sigmas, points, scale) for points in counts}
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
