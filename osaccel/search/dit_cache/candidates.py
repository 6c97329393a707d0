# SPDX-License-Identifier: Apache-2.0
"""Finds the four numbers of a cache configuration: ranked from one observed generation, verified by a few real ones.

Every decision is a function of recorded numbers, so equal inputs give equal results, and a search that resumes from its
journal goes on as if it had not been stopped. What is not finite loses.
"""

import math
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from osaccel.dit_cache_config import DitCacheConfig
from osaccel.plan import Interval
from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation

MAX_INTERVAL = 6
# Block forwards a search may spend, in plain generations, the observed one included.
BUDGET = 6.0
# Where candidates are so cheap that the budget would buy far more, they also differ too little to go on.
MAX_VERIFIED = 32
# A candidate is as promising as its expected log error less so many of its standard deviations.
OPTIMISM = 1.0


class Candidate(NamedTuple):
    """A configuration as blocks `start .. stop - 1`, reused from step `first` on at every step but each interval-th."""

    start: int
    stop: int
    first: int
    interval: int

    @property
    def config(self) -> DitCacheConfig:
        return DitCacheConfig(self.first, self.interval, self.start, self.stop - self.start)

    def speed_up(self, num_blocks: int, num_steps: int) -> float:
        """Blocks of a plain generation over blocks computed with this cache."""
        return num_blocks * num_steps / cost(self, num_blocks, num_steps, resume=0)


def reused(num_steps: int, first: int, interval: int) -> int:
    """How many of the steps reuse."""
    after = num_steps - first
    return after - -(-after // interval)


def reachable(num_blocks: int, num_steps: int, max_interval: int = MAX_INTERVAL) -> float:
    """The largest speed-up any configuration has, in blocks."""
    most = max((reused(num_steps, 0, interval) for interval in range(2, max_interval + 1)), default=0)
    return num_steps / (num_steps - most)


def candidates(num_blocks: int, num_steps: int, ratio: float, max_interval: int = MAX_INTERVAL) -> List[Candidate]:
    """Every configuration that reaches `ratio` tightly: with a shorter region or one reuse less it would not.

    Raises:
        SearchError: none reaches it.
    """
    found: List[Candidate] = []
    # A hair less than asked: 1 / ratio is not exact.
    needed = num_blocks * num_steps * (1 - 1 / ratio) - 1e-9
    for interval in range(2, max_interval + 1):
        most = reused(num_steps, 0, interval)
        shorter = most + 1
        for length in range(1, num_blocks + 1):
            count = max(1, math.ceil(needed / length))
            if count > most or count == shorter:
                continue
            shorter = count
            firsts = [first for first in range(num_steps) if reused(num_steps, first, interval) == count]
            found += [
                Candidate(start, start + length, first, interval)
                for first in firsts
                for start in range(num_blocks - length + 1)
            ]
    if not found:
        raise SearchError(
            f"No cache configuration speeds {num_blocks} blocks x {num_steps} steps up by {ratio:g}; at most "
            f"{reachable(num_blocks, num_steps, max_interval):.3f} is reachable. Ask for less, or sample more steps."
        )
    return found


class Variation(NamedTuple):
    """How log errors vary over candidates: a smooth part, alike within `length` in features, and each one's own."""

    smooth: float
    length: float
    own: float

    def covariance(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """(left, right), of candidates with these features (candidate, feature)."""
        distance = ((left[:, None] - right[None]) ** 2).sum(-1)
        return self.smooth**2 * np.exp(-0.5 * distance / self.length**2) + self.own**2 * (distance == 0)


# What is believed before any error is measured: how far predictions are off, and how much the errors of one call differ
# from those on average over prompts and noise. `python -m benchmarks.belief` fits both, each time to a few calls of one
# model; here predictions are trusted less and calls more, which finds better ones in the searches that it replays.
MISSED, CALL = Variation(0.4, 0.4, 0.024), Variation(0.2, 0.6, 0.035)


class Belief:
    """Predicted log errors corrected by the measured ones: a Gaussian process on what the prediction misses.

    Neighbouring candidates share most of what is missed, so a few measurements correct the whole family. What is
    peculiar to the calls these ran on is shared by neighbours, too, and says little of which of them is best.
    """

    def __init__(self, pool: Sequence[Candidate], scores: np.ndarray, num_blocks: int, num_steps: int, calls: int = 1):
        self.pool, self.index = list(pool), {candidate: number for number, candidate in enumerate(pool)}
        usable = np.isfinite(scores) & (scores > 0)
        floor = np.min(scores[usable]) if usable.any() else 1.0
        self.log_scores = np.log(np.where(np.isfinite(scores), np.maximum(scores, floor), np.inf))
        self.features = features(self.pool, num_blocks, num_steps)
        self.calls, self.missed, self.call = calls, MISSED, CALL

    def estimate(self, measured: Dict[Candidate, float]) -> Tuple[np.ndarray, np.ndarray]:
        """Expected log error on average over calls, and its standard deviation, per candidate."""
        known = [(self.index[c], math.log(error)) for c, error in measured.items() if c in self.index and error > 0]
        before = self.missed.smooth**2 + self.missed.own**2
        if not known:
            return self.log_scores, np.full(len(self.pool), math.sqrt(before))
        rows = [index for index, _ in known]
        residual = np.array([log for _, log in known]) - self.log_scores[rows]
        across = self.missed.covariance(self.features, self.features[rows])
        solve = np.linalg.inv(
            across[rows] + self.call.covariance(self.features[rows], self.features[rows]) / self.calls
        )
        # One common offset with a wide prior: the prediction has no unit.
        ones = np.ones(len(rows))
        offset = ones @ solve @ residual / (ones @ solve @ ones)
        mean = self.log_scores + offset + across @ solve @ (residual - offset)
        variance = before - np.einsum("ij,jk,ik->i", across, solve, across)
        return mean, np.sqrt(np.maximum(variance, 0.0))


def features(pool: Sequence[Candidate], num_blocks: int, num_steps: int) -> np.ndarray:
    """(candidate, feature): where candidates with near features err alike."""
    return np.array(
        [(c.start / num_blocks, c.stop / num_blocks, c.first / num_steps, math.log2(c.interval) / 2) for c in pool]
    )


class Goal(NamedTuple):
    """What is searched: the least error at a speed-up of `ratio`, or the fastest that keeps `min_psnr`."""

    ratio: float
    min_psnr: Optional[float] = None


class Search:
    """Chooses which candidate to verify next, and which one wins; knows nothing of how one is verified.

    Args:
        pool, scores: the candidates and their predicted errors.
        plain: block forwards of the plain generations of all calls; by default of one with one forward per step.
        overhead: block forwards that were spent otherwise.
        price: block forwards that verifying a candidate is expected to take, in units of `plain`.
        budget: block forwards to spend, in units of `plain`, the plain generations included.
        workers: how many candidates are verified side by side, in one round.
        calls: how many calls every candidate is verified on.
        turned: the share of videos that each candidate is expected to turn into others; by default none.
    """

    def __init__(
        self,
        pool: Sequence[Candidate],
        scores: np.ndarray,
        num_blocks: int,
        num_steps: int,
        goal: Goal,
        plain: Optional[int] = None,
        overhead: int = 0,
        price: Optional[Callable[[Candidate], float]] = None,
        budget: float = BUDGET,
        workers: int = 1,
        calls: int = 1,
        turned: Optional[np.ndarray] = None,
    ):
        self.goal, self.num_blocks, self.num_steps = goal, num_blocks, num_steps
        self.plain, self.overhead = plain or num_blocks * num_steps, overhead
        self.price = price or (lambda candidate: cost(candidate, num_blocks, num_steps) / (num_blocks * num_steps))
        self.budget, self.workers = budget, workers
        self.belief = Belief(pool, scores, num_blocks, num_steps, calls)
        self.turned = np.zeros(len(pool)) if turned is None else turned
        self.speed = np.array([c.speed_up(num_blocks, num_steps) for c in self.belief.pool])
        self.done: Dict[Candidate, Evaluation] = {}

    def add(self, evaluation: Evaluation) -> None:
        self.done[candidate_of(evaluation.config)] = evaluation

    @property
    def block_forwards(self) -> float:
        """Blocks computed so far, the plain generations included."""
        return self.plain + self.overhead + sum(evaluation.block_forwards for evaluation in self.done.values())

    @property
    def spent(self) -> float:
        """The same in plain generations."""
        return self.block_forwards / self.plain

    def next_round(self) -> List[Candidate]:
        """The candidates to verify now, at most one per worker; empty when the search is over."""
        chosen: List[Candidate] = []
        if len(self.done) >= MAX_VERIFIED:
            return chosen
        spent = self.spent
        for index in self._order():
            candidate = self.belief.pool[index]
            if candidate in self.done or not np.isfinite(self.belief.log_scores[index]):
                continue
            price = self.price(candidate)
            if spent + price > self.budget:
                # A cheaper one further down would be verified only because it is cheap.
                break
            spent += price
            chosen.append(candidate)
            if len(chosen) == self.workers:
                break
        return chosen

    def _order(self) -> List[int]:
        if self.goal.min_psnr is not None:
            return self._order_for_psnr(self.goal.min_psnr)
        mean, deviation = self.belief.estimate(self._measured())
        # Optimistic, so that what is uncertain is looked at once.
        return list(np.argsort(self._losses(mean - OPTIMISM * deviation), kind="stable"))

    def _order_for_psnr(self, wanted: float) -> List[int]:
        """The fastest first, of those expected to keep the PSNR and faster than the best verified so far."""
        measured = {c: 10 ** (-e.psnr / 20) for c, e in self.done.items() if e.psnr is not None}
        mean, deviation = self.belief.estimate(measured)
        if not measured:
            # The prediction has no unit yet: start in the middle of its range.
            return list(np.argsort(np.abs(mean - np.median(mean)), kind="stable"))
        best = self.best()
        floor = self.speed[self.belief.index[best]] if best is not None else 0.0
        # Optimistic, as above.
        keeps = mean - OPTIMISM * deviation <= -wanted / 20 * math.log(10)
        if not (keeps & (self.speed > floor)).any():
            # Nothing is expected to: look at the mildest, which decides whether the wish can be met at all.
            return [] if best is not None else list(np.argsort(mean, kind="stable"))
        return [i for i in np.argsort(-self.speed, kind="stable") if keeps[i] and self.speed[i] > floor]

    def choice(self) -> Optional[Candidate]:
        """The winner: of the finished evaluations the one with the least expected loss; None when none qualifies.

        What was measured on the calls at hand is weighed against what is predicted and measured of neighbours: on other
        calls the winner of near-equal ones by measured error alone is often not the best of them. And of other videos
        some will turn into others.
        """
        if self.goal.min_psnr is not None:
            return self.best()
        mean, _ = self.belief.estimate(self._measured())
        losses, finished = self._losses(mean), self._finished()
        # No error at all has no logarithm to learn from, and nothing is better.
        return min(finished, key=lambda c: (finished[c] > 0, losses[self.belief.index[c]], c), default=None)

    def _losses(self, log_errors: np.ndarray) -> np.ndarray:
        """(candidate,): the mean error over videos; that of one that turned into another is about 1."""
        return np.exp(log_errors) + self.turned

    def expected(self) -> Dict[Candidate, Dict[str, float]]:
        """Of every candidate, by all that was measured: `expected_error` of a video that stays the same, on average
        over calls, and `expected_turned`, the share of videos that do not."""
        mean, _ = self.belief.estimate(self._measured())
        return {
            candidate: {"expected_error": error, "expected_turned": turned}
            for candidate, error, turned in zip(self.belief.pool, np.exp(mean).tolist(), self.turned.tolist())
        }

    def _finished(self) -> Dict[Candidate, float]:
        """Their errors."""
        return {c: e.error for c, e in self.done.items() if e.error is not None and not e.abandoned}

    def best(self) -> Optional[Candidate]:
        """The best by what was measured, what others are compared with while they run; None when none qualifies."""
        finished = self._finished()
        if self.goal.min_psnr is None:
            return min(finished, key=lambda c: (finished[c], c), default=None)
        psnrs = {c: self.done[c].psnr for c in finished}
        keeping = [c for c, psnr in psnrs.items() if psnr is not None and psnr >= self.goal.min_psnr]
        return max(keeping, key=lambda c: (c.speed_up(self.num_blocks, self.num_steps), -finished[c]), default=None)

    def _measured(self) -> Dict[Candidate, float]:
        """The errors to learn from; of an abandoned run, the one it was heading for."""
        errors = {c: e.projected if e.abandoned else e.error for c, e in self.done.items()}
        return {candidate: error for candidate, error in errors.items() if error is not None and error > 0}


def pool_for(goal: Goal, num_blocks: int, num_steps: int) -> List[Candidate]:
    """The candidates of a goal; for a PSNR, those of a ladder of speed-ups."""
    if goal.min_psnr is None:
        return candidates(num_blocks, num_steps, goal.ratio)
    top = reachable(num_blocks, num_steps)
    if top <= 1:
        raise SearchError(f"With {num_steps} steps nothing can be reused. Sample more steps.")
    found: Dict[Candidate, None] = {}
    for step in range(1, 41):
        ratio = top ** (step / 40)
        if ratio - 1e-9 <= top:
            found.update(dict.fromkeys(candidates(num_blocks, num_steps, ratio - 1e-9)))
    return list(found)


def cost(candidate: Candidate, num_blocks: int, num_steps: int, resume: Optional[int] = None) -> int:
    """Blocks a branch computes in a generation with this cache from step `resume` on; by default the storing step."""
    reuse = Interval(candidate.first, candidate.interval)
    start = candidate.first if resume is None else resume
    skipped = sum(step in reuse for step in range(start, num_steps))
    return num_blocks * (num_steps - start) - skipped * (candidate.stop - candidate.start)


def candidate_of(config: Mapping[str, Any]) -> Candidate:
    """The candidate of msModelSlim's four keys."""
    start = config["cache_block_start"]
    return Candidate(
        start, start + config["cache_num_blocks"], config["cache_step_start"], config["cache_step_interval"]
    )


def projected(step: int, error: float, best_curve: Sequence[Optional[float]]) -> float:
    """Where a running error is heading for at the least, if it falls from here on as the best candidate's did.

    A sampler shrinks early errors again, so a running error alone says little of the end.
    """
    ahead = [value for value in best_curve[step:] if value is not None]
    return error * ahead[-1] / max(ahead) if ahead and max(ahead) > 0 else error
