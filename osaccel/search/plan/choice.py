# SPDX-License-Identifier: Apache-2.0
"""Chooses an action for every window so that the summed squared errors are least at every network work; exact.

Errors that different windows make in the final latents are nearly orthogonal, so their squares add up and the best plan
is a multiple-choice knapsack, solved by dynamic programming over the work in halves of one block. That is so for every
weighted mean over calls, and by way of these the mean error is made small too, for a given work (`least`).
"""

from typing import List, NamedTuple, Optional, Sequence

import numpy as np

from osaccel.search.plan.actions import Action, Windows, units


class Choice(NamedTuple):
    """An action for every window.

    Attributes:
        work: network work of the generation, plain = 1.
        errors: predicted relative error of the final latents, by call.
    """

    actions: Sequence[Action]
    work: float
    errors: Sequence[float]

    @property
    def error(self) -> float:
        """The mean over the calls; NaN where nothing is predicted."""
        return float(np.mean(self.errors)) if len(self.errors) else float("nan")


def curve(
    actions: Sequence[Action], squares: np.ndarray, windows: Windows, weights: Optional[Sequence[float]] = None
) -> List[Choice]:
    """The choice of least mean square at every work where more work gives less, from the least to the plain generation.

    Args:
        actions: what a window may do; the first must be the plain one.
        squares: (call, window, action), the squared relative error that it adds to the final latents; may be infinite.
        weights: of the calls, in whose weighted mean the square is to be the least; by default all alike.
    """
    costs = np.array([[units(action, windows, window) for action in actions] for window in range(windows.count)])
    # The very first step.
    before = 2 * windows.blocks
    most = int(costs.max(axis=1).sum())
    best = np.full(most + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((windows.count, most + 1), dtype=int)
    weighted = np.average(squares, axis=0, weights=weights)
    for window in range(windows.count):
        best, taken[window] = _extend(best, costs[window], weighted[window])
    whole = before + most
    found: List[Choice] = []
    lowest = np.inf
    for cost, square in enumerate(best):
        # Only what no cheaper choice is as good as.
        if np.isfinite(square) and square < lowest:
            lowest = square
            places = _trace(taken, costs, cost)
            errors = np.sqrt(squares[:, range(windows.count), places].sum(axis=1))
            found.append(Choice([actions[place] for place in places], (before + cost) / whole, errors.tolist()))
    return found


def _extend(best: np.ndarray, costs: np.ndarray, squares: np.ndarray) -> "tuple[np.ndarray, np.ndarray]":
    """The least error at every cost with one more window, and its action."""
    options = np.full((len(costs), len(best)), np.inf)
    for number, (cost, square) in enumerate(zip(costs, squares)):
        options[number, cost:] = best[: len(best) - cost] + square
    taken = options.argmin(axis=0)
    return options[taken, np.arange(len(best))], taken


def _trace(taken: np.ndarray, costs: np.ndarray, cost: int) -> List[int]:
    """The places of the actions, window by window."""
    found: List[int] = []
    for window in range(len(taken) - 1, -1, -1):
        found.append(int(taken[window, cost]))
        cost -= int(costs[window, found[-1]])
    return found[::-1]


def least(actions: Sequence[Action], squares: np.ndarray, windows: Windows, work: float) -> Optional[Choice]:
    """A choice within this work whose mean error is no more than that of the least mean square, and mostly less.

    A root is below each of its tangents: E <= (E^2 / F + F) / 2, equal at E = F. So with weights of 1 / F, F the errors
    of a choice, a choice of less weighted square has less mean error; again and again until none has (majorization and
    minimization: Hunter and Lange, The American Statistician 58, 2004). The arguments are those of `curve`.
    """
    found = at_work(curve(actions, squares, windows), work)
    while found is not None and min(found.errors) > 0:
        better = at_work(curve(actions, squares, windows, [1 / error for error in found.errors]), work)
        if better is None or better.error >= found.error:
            break
        found = better
    return found


def at_work(choices: Sequence[Choice], work: float) -> Optional[Choice]:
    """The least mean square within this work; None when even the cheapest choice takes more."""
    return max((choice for choice in choices if choice.work <= work + 1e-9), key=lambda c: c.work, default=None)


def at_error(choices: Sequence[Choice], error: float) -> Optional[Choice]:
    """The least work that keeps this error; None when none does."""
    return min((choice for choice in choices if choice.error <= error), key=lambda c: c.work, default=None)
