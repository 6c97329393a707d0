# SPDX-License-Identifier: Apache-2.0
"""Timestep lists from the denoised predictions of a teacher run; pure NumPy, the same inputs give the same list.

Notation, in variance-exploding coordinates: s is sigma, lam = 1 / s^2 the signal-to-noise ratio, D_k the guided
denoised prediction at the teacher's k-th timestep (k = 0 is the noisiest). With y = x / s^2 the Euler ancestral sampler
is the Euler-Maruyama scheme of dy = D dlam + dW(lam): between two timesteps it freezes D. A list's cost is what the
frozen D misses, summed over its intervals, so it is a path length in a graph of pair costs C[i][j] and the best list of
every length comes from one dynamic programme.

An error e of y at some lam moves the final sample by V e, V the covariance that the clean latents still have there (it
is dD/dy). Two kinds of loss follow, and the objective weighs them against each other, each in units of what even
spacing loses:

* detail: with v the variance V has per band, the sum of v |D_lam - D_i|^2 dlam is the variance the final sample lacks,
  counted as a part of the band's own, so that fine detail, which has little of it, is not sold for coarse.
* decisions: where the noise still hides what the video shows, V is large for the few videos that are undecided and
  small for the others, so its mean understates the harm; v to a power above 1 finds these noise levels. There the list
  should step where the teacher stepped, so this part counts differences to the teacher's own steps.
"""

import math
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from osaccel.search.places import even_places

METHODS = ("wdp", "klub", "arctan")


class Parameters(NamedTuple):
    """What shapes the search. Defaults and what was tried: benchmarks/results/timesteps.md.

    Attributes:
        decisions: 0 to 1, the weight of the decisions against the detail. Larger: more steps at high noise, closer to
            the teacher's own videos; smaller: more steps at low noise, finer detail.
        detail: how much of the gap between even spacing and the teacher a list is to close in predicted detail at
            least; where it does not, the weight of the decisions is lowered until it does. A little more than nothing,
            because the prediction is not exact and detail is not to be lost.
        exponent: g of the decisions' weight v^g, v as in `undecided_variances`. Larger: more of the steps go where the
            most is undecided.
        max_gap: the largest gap between neighbouring timesteps, in units of even spacing over the same steps. It bounds
            what an error in the logged predictions can do: no region of noise levels is left without steps.
        corrector: 0 to 1, the strength with which the generations that will follow the list are corrected. An interval
            then costs what is left after that.
        evenness: 0 to 1, the weight of the mean squared gap, against the two losses together. It draws the list to even
            spacing where the predictions do not say otherwise, so that lists found on other videos differ less.
    """

    decisions: float = 0.7
    detail: float = 0.03
    exponent: float = 1.5
    max_gap: float = 2.0
    evenness: float = 0.6
    corrector: float = 0.0


DEFAULTS = Parameters()


class Statistics(NamedTuple):
    """Second moments of the denoised predictions along the teacher's timesteps.

    Attributes:
        timesteps: descending, shape (K,).
        sigmas: s at each of them, shape (K,).
        distances: mean (D_i - D_j)^2 over the latent entries of each of B bands, shape (B, K, K), float64.
        shares: the part of all latent entries that each band has, shape (B,), sum 1.
        powers: mean D_k^2 in each band, shape (B, K); None where unknown.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    distances: np.ndarray
    shares: np.ndarray
    powers: Optional[np.ndarray] = None

    @property
    def variance(self) -> float:
        """c^2 of the clean latents around what the prompt says of them."""
        return float(self.shares @ remaining_variances(self)[:, 0])


def snr(sigmas: np.ndarray) -> np.ndarray:
    """lam = 1 / s^2."""
    return 1.0 / np.asarray(sigmas, dtype=np.float64) ** 2


def remaining_variances(statistics: Statistics) -> np.ndarray:
    """v: the variance the clean latents have given the k-th noisy ones, per band, shape (B, K); falls with k.

    D is a martingale in lam, so v_k is mean (D_last - D_k)^2, and as well mean D_last (D_last - D_k). At high noise a
    network's own error, s times that of its noise prediction, would be counted by the first form; by the second it is
    not, because the final sample does not know it. Never above the noise s^2, nor above the first form.
    """
    variances = statistics.distances[:, :, -1].copy()
    if statistics.powers is not None:
        products = 0.5 * (variances + statistics.powers[:, -1:] - statistics.powers)
        variances = np.clip(products, 0.0, variances)
    return _falling(variances, statistics.sigmas)


def undecided_variances(statistics: Statistics) -> np.ndarray:
    """How far the k-th prediction is from the last one, per band, shape (B, K); falls with k.

    The first form of `remaining_variances`, and all there is to know of what single videos have not decided yet: with
    guidance the predictions are no martingale, and the product form, a mean over all directions, loses sight of the few
    in which a video can still turn into another one.
    """
    return _falling(statistics.distances[:, :, -1].copy(), statistics.sigmas)


def _falling(variances: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    # The last prediction has no error against itself; what was left one step before is the honest bound.
    variances[:, -1] = variances[:, -2]
    falling = np.maximum.accumulate(variances[:, ::-1], axis=1)[:, ::-1]
    return np.minimum(falling, sigmas**2)


def pair_costs(
    statistics: Statistics, exponent: float, against_teacher: bool = False, corrector: float = 0.0
) -> np.ndarray:
    """C[i][j]: the integral over lam_i .. lam_j of v^g mean |D_lam - D_i|^2; inf for j <= i.

    By trapezoids, or `against_teacher` with the teacher's own frozen predictions, so that its own steps cost nothing.

    corrector: its strength; what stands for D_lam is then no longer D_i but moves evenly in log s towards D_j.
    """
    steps = np.diff(snr(statistics.sigmas))
    variances = undecided_variances(statistics) if against_teacher else remaining_variances(statistics)
    weights = (0.5 * (variances[:, 1:] + variances[:, :-1])) ** exponent * steps * statistics.shares[:, None]
    if corrector:
        return _corrected_costs(statistics, weights, against_teacher, corrector)
    missed = statistics.distances[:, :, :-1]
    if not against_teacher:
        missed = 0.5 * (missed + statistics.distances[:, :, 1:])
    return _cumulative(np.einsum("bik,bk->ik", missed, weights))


def _corrected_costs(
    statistics: Statistics, weights: np.ndarray, against_teacher: bool, corrector: float
) -> np.ndarray:
    """`pair_costs` with mean |D_k - (1 - f) D_i - f D_j|^2 in place of mean |D_k - D_i|^2; weights: (B, K - 1)."""
    logs, size = np.log(statistics.sigmas), len(statistics.sigmas)
    distances, costs = statistics.distances, np.full((size, size), np.inf)
    for i in range(size - 1):
        for j in range(i + 1, size):
            part = slice(i, j + 1)
            share = corrector * (logs[i] - logs[part]) / (logs[i] - logs[j])
            missed = (1 - share) * distances[:, i, part] + share * distances[:, j, part]
            missed = np.maximum(missed - share * (1 - share) * distances[:, i, j, None], 0.0)
            left, right = missed[:, :-1], missed[:, 1:]
            costs[i, j] = float(np.sum(weights[:, i:j] * (left if against_teacher else 0.5 * (left + right))))
    return costs


def _cumulative(integrand: np.ndarray) -> np.ndarray:
    """C[i][j] = the sum of integrand[i][k] over i <= k < j; inf for j <= i."""
    size = integrand.shape[1]
    costs = np.full((size + 1, size + 1), np.inf)
    for i in range(size):
        costs[i, i + 1 :] = np.cumsum(integrand[i, i:])
    return costs


def gap_costs(timesteps: np.ndarray) -> np.ndarray:
    """C[i][j]: the squared gap; inf for j <= i."""
    gaps = np.asarray(timesteps, dtype=np.float64)[:, None] - np.asarray(timesteps, dtype=np.float64)[None]
    return np.where(np.triu(np.ones(gaps.shape, dtype=bool), 1), gaps**2, np.inf)


class Objective:
    """What `wdp` minimises: the two losses and the gaps, each divided by what even spacing of the same length has."""

    def __init__(self, statistics: Statistics, parameters: Parameters = DEFAULTS):
        clean = remaining_variances(statistics)[:, 0]
        # A band that hardly exists is not worth steps.
        relative = statistics.shares / np.maximum(clean, max(1e-3 * clean.max(), 1e-12))
        corrector = parameters.corrector
        self.detail = pair_costs(statistics._replace(shares=relative), 1.0, corrector=corrector)
        self.decisions = pair_costs(statistics, parameters.exponent, against_teacher=True, corrector=corrector)
        gaps = gap_costs(statistics.timesteps)
        self.gaps, self.timesteps, self.parameters = gaps, statistics.timesteps, parameters

    def costs(self, points: int, decisions: float) -> np.ndarray:
        """(K, K); even spacing with `points` timesteps has the path cost 1. decisions: their weight."""
        even, losses = even_places(len(self.detail), points), 1.0 - self.parameters.evenness
        parts = (
            (losses * (1.0 - decisions), self.detail),
            (losses * decisions, self.decisions),
            (self.parameters.evenness, self.gaps),
        )
        total, weights = np.zeros_like(self.detail), 0.0
        for weight, costs in parts:
            reference = path_cost(costs, even)
            # Nothing to lose at the teacher's own steps, nor to weigh.
            if weight > 0 and reference > 0:
                total, weights = total + weight / reference * costs, weights + weight
        return np.where(np.isfinite(self.detail), total / max(weights, 1e-12), np.inf)

    def best(self, points: int) -> Tuple[int, ...]:
        """The places of the cheapest list, with the largest weight of the decisions that leaves enough detail.

        Raises ValueError when there are fewer places than points.
        """
        allowed = gap_mask(self.timesteps, points, self.parameters.max_gap)
        places: Tuple[int, ...] = ()
        for part in np.linspace(1.0, 0.0, 11):
            costs = self.costs(points, float(part) * self.parameters.decisions)
            places = shortest_paths(costs, [points], allowed).indices[points]
            if self.detail_gained(places) >= self.parameters.detail:
                break
        return places

    def detail_gained(self, places: Sequence[int]) -> float:
        """The part of the gap between even spacing and the teacher that a list closes in predicted detail."""
        size = len(self.detail)
        even, teacher = (path_cost(self.detail, even_places(size, points)) for points in (len(places), size))
        return (even - path_cost(self.detail, places)) / (even - teacher) if even > teacher else 1.0


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


def path_cost(costs: np.ndarray, places: Sequence[int]) -> float:
    """The sum over a list's intervals."""
    return float(sum(costs[i, j] for i, j in zip(places[:-1], places[1:])))


def wdp(statistics: Statistics, counts: Sequence[int], parameters: Parameters = DEFAULTS) -> Dict[int, np.ndarray]:
    """The cheapest list of each length under the gap limit, on the teacher's grid.

    Raises ValueError when the teacher has fewer timesteps than are asked for.
    """
    objective = Objective(statistics, parameters)
    return {points: statistics.timesteps[list(objective.best(points))] for points in counts}


def arctan(timesteps: np.ndarray, sigmas: np.ndarray, points: int, scale: float = 1.0) -> np.ndarray:
    """Even spacing in arctan(s / c), for latents of standard deviation `scale`.

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
