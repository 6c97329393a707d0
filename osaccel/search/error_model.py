# SPDX-License-Identifier: Apache-2.0
"""How the errors that a cache makes in single steps add up to the error of the final latents.

With e(n) the relative error of the latents after step n, a(n) the share of an error that the sampler carries through
that step, and l(n) what reusing a delta adds in it:

    e(n)^2 = a(n)^2 e(n-1)^2 + 2 r a(n) e(n-1) l(n) + l(n)^2,    l(n) = g(n, stop) * |change of the region's delta|

The changes are known for every region, step and gap from one observed generation (`regions`); g, what a change in the
hidden states at the region's end does to the latents, is measured by single steps of it (`Gains`). What is left are a
smooth a, the correlation r of old and new errors, and slow corrections of g: some coefficients that are fitted to the
error curves of the candidates verified so far, drawn to a mild prior. Nothing is assumed of model, sampler or prompt.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from osaccel.search.cache_search import Candidate, candidate_of

# log a has this many evenly spaced knots over the steps, in units of one whole generation.
_KNOTS = 8
# Then: r, and of log g a constant, and slopes over steps, ends and lengths of regions, and the log of the gap.
_SLOPES = ("gain", "gain_over_steps", "gain_over_ends", "gain_over_lengths", "gain_over_gaps")
PARAMETERS = (*(f"carry_{knot}" for knot in range(_KNOTS)), "correlation", *_SLOPES)
PRIOR = np.array([*[0.0] * _KNOTS, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0])
# How far a coefficient is expected from the prior; neighbouring knots are drawn together besides.
SPREAD = np.array([*[4.0] * _KNOTS, 0.3, 0.3, 0.5, 0.3, 0.3, 0.2])
_NEIGHBOURS = 2.0
# Errors of single steps scatter around a smooth curve by about this factor, and neighbours scatter alike.
_SCATTER, _CURVE_POINTS = 0.15, 24


class Gains(NamedTuple):
    """log g where it was measured: over the steps for one region, and at some steps for regions with other ends.

    Args:
        steps: (step,), log of what a change at the last block's output does to the latents in a step.
        stops: (block + 1,), log of how much more a change does that enters at this block's input.
    """

    steps: np.ndarray
    stops: np.ndarray


def unknown_gains(num_blocks: int, num_steps: int) -> Gains:
    """Where nothing was measured: an error that enters early passes through more blocks, and late steps matter more."""
    return Gains(np.linspace(0.0, 0.8, num_steps), -1.2 * np.arange(num_blocks + 1) / num_blocks)


class Changes(NamedTuple):
    """What reuse adds in each step, (candidate, step), zero where a candidate computes, and what it may depend on.

    `slopes` goes with the slopes of log g: (slope, candidate, step), each around zero.
    """

    added: np.ndarray
    slopes: np.ndarray


class ErrorModel:
    """Predicts the errors of a family of candidates.

    Args:
        pool: the candidates.
        grams: (gap, step, block, block), see `osaccel.search.regions`.
        gains: what was measured of g.
    """

    def __init__(self, pool: Sequence[Candidate], grams: np.ndarray, gains: Optional[Gains] = None):
        self.pool, self.num_steps, self.num_blocks = list(pool), grams.shape[1], grams.shape[2]
        self.gains = gains or unknown_gains(self.num_blocks, self.num_steps)
        self._sums = np.pad(grams.cumsum(2).cumsum(3), ((0, 0), (0, 0), (1, 0), (1, 0)))
        self._time = np.arange(self.num_steps) / max(1, self.num_steps - 1)
        self._all = self._changes(self.pool)
        self.parameters = PRIOR.copy()

    def scores(self, done: Dict[Candidate, Dict[str, Any]]) -> np.ndarray:
        """Predicted errors of the pool, after a fit to the finished evaluations."""
        self.fit([(candidate_of(evaluation), curve_of(evaluation)) for evaluation in done.values()])
        return self._curves(self._all, self.parameters[None])[0, :, -1]

    def weights(self) -> np.ndarray:
        """(step,): the share of an error entering in a step that is left at the end."""
        log_a = self._log_carry(self.parameters[None])[0]
        return np.exp(np.append(log_a[:0:-1].cumsum()[::-1], 0.0))

    def fit(self, measured: Sequence[Tuple[Candidate, np.ndarray]]) -> None:
        """Fit the coefficients to error curves by damped Gauss-Newton steps from the prior."""
        self.parameters = PRIOR.copy()
        changes = self._changes([candidate for candidate, _ in measured])
        picked, target = _points([curve for _, curve in measured])
        if not len(target):
            return
        damping, (residuals, values) = 1.0, self._misfits(changes, self.parameters[None], picked, target)
        residual, value = residuals[0], values[0]
        for _ in range(30):
            moved = self.parameters + 1e-5 * np.eye(len(PRIOR))
            slope = (self._misfits(changes, moved, picked, target)[0] - residual).T / 1e-5
            normal = slope.T @ slope
            step = np.linalg.solve(normal + damping * np.diag(SPREAD**-2.0), -slope.T @ residual)
            changed, changed_values = self._misfits(changes, (self.parameters + step)[None], picked, target)
            if changed_values[0] < value:
                is_done = value - changed_values[0] < 1e-4 * value
                self.parameters, damping = self.parameters + step, damping / 4
                residual, value = changed[0], changed_values[0]
                if is_done:
                    break
            else:
                damping *= 8

    def _misfits(self, changes: Changes, trials: np.ndarray, picked: Any, target: np.ndarray) -> Any:
        """For every trial the residuals, those from the prior last, and the sum of their squares."""
        curves = self._curves(changes, trials)[:, picked[0], picked[1]]
        data = (np.log(np.maximum(curves, 1e-300)) - target) / _SCATTER
        knots = np.diff(trials[:, :_KNOTS], axis=1) / _NEIGHBOURS
        residuals = np.concatenate([data, (trials - PRIOR) / SPREAD, knots], axis=1)
        return residuals, (residuals**2).sum(1)

    def _log_carry(self, trials: np.ndarray) -> np.ndarray:
        """log a, (trial, step)."""
        places = np.linspace(0, 1, _KNOTS)
        return np.stack([np.interp(self._time, places, trial[:_KNOTS]) for trial in trials]) / self.num_steps

    def _curves(self, changes: Changes, trials: np.ndarray) -> np.ndarray:
        """(trial, candidate, step): the predicted error after each step."""
        carried = np.exp(self._log_carry(trials))
        correlation = np.clip(trials[:, _KNOTS, None], 0.0, 0.95)
        added = changes.added * np.exp(np.tensordot(trials[:, _KNOTS + 1 :], changes.slopes, axes=1))
        found = np.empty_like(added)
        now = np.zeros(added.shape[:2])
        for step in range(self.num_steps):
            old, new = carried[:, step, None] * now, added[:, :, step]
            now = np.sqrt(old**2 + 2 * correlation * old * new + new**2)
            found[:, :, step] = now
        return found

    def _changes(self, candidates: Sequence[Candidate]) -> Changes:
        added = np.zeros((len(candidates), self.num_steps))
        gaps = np.ones_like(added)
        together: Dict[Tuple[int, int], List[int]] = {}
        for row, candidate in enumerate(candidates):
            together.setdefault((candidate.first, candidate.interval), []).append(row)
        for (first, interval), rows in together.items():
            steps = np.array([n for n in range(first, self.num_steps) if (n - first) % interval], dtype=int)
            sums = self._sums[(steps - first) % interval - 1, steps]
            start, stop = (np.array([candidates[row][end] for row in rows]) for end in (0, 1))
            squares = sums[:, stop, stop] - sums[:, start, stop] - sums[:, stop, start] + sums[:, start, start]
            gain = np.exp(self.gains.steps[steps][:, None] + self.gains.stops[stop])
            here = np.ix_(np.array(rows), steps)
            added[here] = (gain * np.sqrt(np.maximum(squares, 0.0))).T
            gaps[here] = (steps - first) % interval
        return Changes(added, np.stack([*self._slopes(candidates, added.shape), np.log(gaps)]))

    def _slopes(self, candidates: Sequence[Candidate], shape: Tuple[int, ...]) -> List[np.ndarray]:
        stops, starts = (np.array([c[end] for c in candidates], dtype=float).reshape(-1, 1) for end in (1, 0))
        over = (np.ones((1, 1)), self._time[None] - 0.5, stops / self.num_blocks - 0.5)
        return [np.broadcast_to(values, shape) for values in (*over, (stops - starts) / self.num_blocks - 0.5)]


def curve_of(evaluation: Dict[str, Any]) -> np.ndarray:
    """The error after each step over all calls, as far as the evaluation went; empty when it has no finite one."""
    curves = [curve for curve in evaluation["curves"] if curve]
    length = min((len(curve) for curve in curves), default=0)
    rows = [[np.nan if value is None else value for value in curve[:length]] for curve in curves]
    return np.sqrt(np.mean(np.square(rows), axis=0)) if rows else np.zeros(0)


def _points(curves: Sequence[np.ndarray]) -> Any:
    """Indices (candidate, step) of some points of each curve, its end among them, and their log errors."""
    rows: List[int] = []
    steps: List[int] = []
    logs: List[float] = []
    for row, curve in enumerate(curves):
        usable = np.flatnonzero(np.isfinite(curve) & (np.nan_to_num(curve) > 0))
        for place in sorted({*np.linspace(0, len(usable) - 1, min(_CURVE_POINTS, len(usable))).round().astype(int)}):
            rows.append(row)
            steps.append(int(usable[place]))
            logs.append(float(np.log(curve[usable[place]])))
    return (np.array(rows, dtype=int), np.array(steps, dtype=int)), np.array(logs)
