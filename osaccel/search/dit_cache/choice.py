# SPDX-License-Identifier: Apache-2.0
"""Which candidates are measured, and which one is taken; pure, knows nothing of how one is measured.

Every decision is a function of recorded numbers, so equal inputs give equal results, and a search that resumes from its
journal goes on as if it had not been stopped. What is not finite loses.

What a candidate changes in the hidden states is known for all of them from one plain generation (`region_errors`), and
the sampler says how much of a change at each step is left at the end (`weights`). Changes at different steps are taken
to be orthogonal, so their squares add up. What the blocks behind a region make of its change is not known: the gain's
logarithm is taken to be linear in the step, in the region's first block and in its last; where the measured candidates
lie in these, and what they did, gives its slopes (`Expectation`).
"""

import math
from typing import Dict, List, Optional, Sequence

import numpy as np

from osaccel.search.dit_cache.candidates import Candidate, Goal, candidate_of
from osaccel.search.evaluation import Evaluation
from osaccel.search.planned import TOLERANCE, doubt

# A gain may differ by a factor e from the first step to the last, or from the first block to the last, before anything
# contradicts; single errors are off by TOLERANCE. So far a measured one moves the slopes.
STIFFNESS = math.log(TOLERANCE) ** 2


class Expectation:
    """What every candidate of a pool is expected to do.

    Args:
        grams: (gap, step, block, block), see `osaccel.search.dit_cache.region_errors`.
        weights: (step,), see `osaccel.search.dit_cache.weights`.
    """

    def __init__(self, pool: Sequence[Candidate], grams: np.ndarray, weights: np.ndarray):
        num_steps, num_blocks = grams.shape[1:3]
        sums = np.pad(grams.cumsum(2).cumsum(3), ((0, 0), (0, 0), (1, 0), (1, 0)))
        squares, steps = np.array([_square(candidate, sums, weights) for candidate in pool]).T
        usable = np.isfinite(squares) & (squares > 0)
        # No change at all has no logarithm; nothing is better.
        floor = squares[usable].min() if usable.any() else 1.0
        self.log_sizes = np.log(np.where(np.isfinite(squares), np.maximum(squares, floor), np.inf)) / 2
        starts, stops = (np.array([candidate[end] for candidate in pool]) for end in (0, 1))
        self.places = np.column_stack([steps / num_steps, starts / num_blocks, stops / num_blocks]) - 0.5
        self.slopes = np.zeros(self.places.shape[1] + 1)

    def learn(self, rows: Sequence[int], errors: Sequence[float]) -> None:
        """From the errors measured of the candidates in these rows of the pool: least squares, slopes held near 0."""
        design = np.column_stack([np.ones(len(rows)), self.places[rows]])
        held = STIFFNESS * np.diag([0.0] + [1.0] * self.places.shape[1])
        self.slopes = np.linalg.solve(design.T @ design + held, design.T @ (np.log(errors) - self.log_sizes[rows]))

    @property
    def logs(self) -> np.ndarray:
        """(candidate,): the logarithm of the error, in a unit of its own before anything was measured."""
        return self.log_sizes + self.slopes[0] + self.places @ self.slopes[1:]


def _square(candidate: Candidate, sums: np.ndarray, weights: np.ndarray) -> "tuple[float, float]":
    """The squared size of what is left of a candidate's changes, and the step at which they lie on average."""
    start, stop, first, interval = candidate
    steps = np.array([step for step in range(first, sums.shape[1]) if (step - first) % interval], dtype=int)
    corners = sums[(steps - first) % interval - 1, steps]
    squares = corners[:, stop, stop] - corners[:, start, stop] - corners[:, stop, start] + corners[:, start, start]
    squares = np.maximum(squares, 0.0) * weights[steps] ** 2
    total = float(squares.sum())
    return total, float((squares * steps).sum() / total) if total > 0 else float(steps.mean())


class Search:
    """Chooses which candidates are measured next, and which one wins.

    Args:
        pool: the candidates.
        grams, weights: what was observed of the plain generation, see `Expectation`.
        goal: what is searched.
    """

    def __init__(self, pool: Sequence[Candidate], grams: np.ndarray, weights: np.ndarray, goal: Goal):
        self.pool, self.goal = list(pool), goal
        self.num_steps, self.num_blocks = grams.shape[1:3]
        self.expectation = Expectation(pool, grams, weights)
        self.rows = {candidate: row for row, candidate in enumerate(self.pool)}
        self.speed = np.array([candidate.speed_up(self.num_blocks, self.num_steps) for candidate in self.pool])
        # What measuring one takes, in plain generations.
        self.price = float(np.median([candidate.price(self.num_blocks, self.num_steps) for candidate in self.pool]))
        self.doubts = np.log([doubt(candidate.first, self.num_steps) for candidate in self.pool])
        self.done: Dict[Candidate, Evaluation] = {}

    def add(self, evaluation: Evaluation) -> None:
        candidate = candidate_of(evaluation.config)
        self.done[candidate] = evaluation
        known = {c: self._judged(e) for c, e in self.done.items() if self._judged(e) > 0}
        if known:
            self.expectation.learn([self.rows[c] for c in known], list(known.values()))

    def _judged(self, evaluation: Evaluation) -> float:
        """The error; where frames are judged, theirs. 0 where there is none."""
        if evaluation.error is None:
            return 0.0
        if self.goal.min_psnr is not None:
            return 0.0 if evaluation.psnr is None else 10 ** (-evaluation.psnr / 20)
        return evaluation.error

    def order(self, affordable: int) -> List[Candidate]:
        """What is to be measured next, the most promising first.

        Args:
            affordable: how many candidates the whole search is going to measure.
        """
        logs = self.expectation.logs
        if self.goal.min_psnr is None:
            judged = logs + self.doubts
            rows = self._first_look(judged, affordable) + list(np.argsort(judged, kind="stable"))
        else:
            rows = self._for_psnr(logs, -self.goal.min_psnr / 20 * math.log(10))
        found = dict.fromkeys(self.pool[row] for row in rows if np.isfinite(logs[row]))
        return [candidate for candidate in found if candidate not in self.done]

    def _first_look(self, logs: np.ndarray, affordable: int) -> List[int]:
        """The most promising of each part of the family, by step, of which none was measured; a part for each unknown.

        Never more than half of what can be paid: the other half is for what was learned.
        """
        by_step = np.argsort(self.expectation.places[:, 0], kind="stable")
        parts = np.array_split(by_step, max(1, min(len(self.expectation.slopes), affordable // 2)))
        looked = {self.rows[candidate] for candidate in self.done}
        return [int(part[np.argmin(logs[part])]) for part in parts if len(part) and not looked.intersection(part)]

    def _for_psnr(self, logs: np.ndarray, wanted: float) -> List[int]:
        """The fastest first, of those expected to keep the PSNR and faster than the best measured so far."""
        if not self.done:
            # The prediction has no unit yet: start in the middle of its range.
            return list(np.argsort(np.abs(logs - np.median(logs)), kind="stable"))
        best = self.choice()
        floor = self.speed[self.rows[best]] if best is not None else 0.0
        keeps = (logs <= wanted) & (self.speed > floor)
        if not keeps.any():
            # Nothing is expected to: look at the mildest, which decides whether the wish can be met at all.
            return [] if best is not None else list(np.argsort(logs, kind="stable"))
        return [int(row) for row in np.argsort(-self.speed, kind="stable") if keeps[row]]

    def choice(self) -> Optional[Candidate]:
        """The best by what was measured; None when none qualifies."""
        finished = {c: self._judged(e) for c, e in self.done.items() if e.error is not None}
        if self.goal.min_psnr is None:
            return min(finished, key=lambda c: (finished[c] * doubt(c.first, self.num_steps), c), default=None)
        keeping = [c for c in finished if (self.done[c].psnr or -math.inf) >= self.goal.min_psnr]
        return max(keeping, key=lambda c: (self.speed[self.rows[c]], -finished[c]), default=None)

    def expected(self) -> Dict[Candidate, float]:
        """Of every candidate, by all that was measured."""
        return dict(zip(self.pool, np.exp(self.expectation.logs).tolist()))
