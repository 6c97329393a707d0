# SPDX-License-Identifier: Apache-2.0
"""Chooses an action for every window so that the summed squared errors are least at every network work; exact.

Errors that different windows make in the final latents are nearly orthogonal, so their squares add up and the best plan
is a multiple-choice knapsack, solved by dynamic programming over the work in halves of one block.
"""

from typing import List, NamedTuple, Optional, Sequence

import numpy as np

from osaccel.search.plan.actions import Action, Windows, units


class Choice(NamedTuple):
    """An action for every window.

    Attributes:
        work: network work of the generation, plain = 1.
        square: predicted squared relative error of the final latents.
    """

    actions: Sequence[Action]
    work: float
    square: float

    @property
    def error(self) -> float:
        return float(np.sqrt(self.square))


def curve(actions: Sequence[Action], squares: np.ndarray, windows: Windows) -> List[Choice]:
    """The best choice at every work where more work gives less error, from the least work to the plain generation.

    Args:
        actions: what a window may do; the first must be the plain one.
        squares: (window, action), the squared relative error that it adds to the final latents; may be infinite.
    """
    costs = np.array([[units(action, windows, window) for action in actions] for window in range(windows.count)])
    before = windows.first * 2 * windows.blocks
    most = int(costs.max(axis=1).sum())
    best = np.full(most + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((windows.count, most + 1), dtype=int)
    for window in range(windows.count):
        best, taken[window] = _extend(best, costs[window], squares[window])
    whole = before + most
    found: List[Choice] = []
    for cost, square in enumerate(best):
        # Only what no cheaper choice is as good as.
        if np.isfinite(square) and (not found or square < found[-1].square):
            found.append(Choice(_trace(taken, costs, actions, cost), (before + cost) / whole, float(square)))
    return found


def _extend(best: np.ndarray, costs: np.ndarray, squares: np.ndarray) -> "tuple[np.ndarray, np.ndarray]":
    """The least error at every cost with one more window, and its action."""
    options = np.full((len(costs), len(best)), np.inf)
    for number, (cost, square) in enumerate(zip(costs, squares)):
        options[number, cost:] = best[: len(best) - cost] + square
    taken = options.argmin(axis=0)
    return options[taken, np.arange(len(best))], taken


def _trace(taken: np.ndarray, costs: np.ndarray, actions: Sequence[Action], cost: int) -> List[Action]:
    found: List[Action] = []
    for window in range(len(taken) - 1, -1, -1):
        number = int(taken[window, cost])
        found.append(actions[number])
        cost -= int(costs[window, number])
    return found[::-1]


def at_work(choices: Sequence[Choice], work: float) -> Optional[Choice]:
    """The least error within this work; None when even the cheapest choice takes more."""
    return max((choice for choice in choices if choice.work <= work + 1e-9), key=lambda c: c.work, default=None)


def at_error(choices: Sequence[Choice], error: float) -> Optional[Choice]:
    """The least work that keeps this error; None when none does."""
    return min((choice for choice in choices if choice.error <= error), key=lambda c: c.work, default=None)
