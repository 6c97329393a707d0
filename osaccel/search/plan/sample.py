# SPDX-License-Identifier: Apache-2.0
"""Which of the recorded calls are probed, and which of these stands for each; pure, no torch.

What an action does within a window is known of every recorded call, and a recording is a video that the user's command
makes anyway. What is left of it in the end must be measured by replays, and differs less from call to call. So some
calls are probed, and each of the others is taken to have the gain of the one that stands for it.
"""

import math
from typing import List, NamedTuple, Sequence

import numpy as np

from osaccel.search.plan.actions import FAMILIES, REFERENCES, Windows
from osaccel.search.plan.gains import Sizes


class Sample(NamedTuple):
    """Calls that are probed.

    Attributes:
        calls: their numbers, ascending.
        standing: for every recorded call the place in `calls` of the one that stands for it.
    """

    calls: Sequence[int]
    standing: Sequence[int]

    def of_all(self, errors: Sequence[float], changes: np.ndarray) -> List[float]:
        """The errors that a probe would make of all recorded calls.

        Args:
            errors: of those that are probed; changes: what the probe changes locally, squared, of all.
        """
        own = changes[list(self.calls)]
        # Where the one that stands for others changes nothing, nothing is known of them.
        gains = [error / math.sqrt(change) if change > 0 else 0.0 for error, change in zip(errors, own)]
        return [
            gains[place] * math.sqrt(change) if change > 0 else 0.0 for place, change in zip(self.standing, changes)
        ]


def sample(sizes: Sizes, windows: Windows, count: int) -> Sample:
    """The calls in the order of their local changes are cut into `count` parts; the middle one stands for its part.

    Args:
        sizes: at least those of the families' reference actions.
        count: of more than there are, all are taken.
    """
    order = np.argsort(_logs(sizes, windows), kind="stable")
    parts = [part.tolist() for part in np.array_split(order, min(count, len(order)))]
    middles = [part[len(part) // 2] for part in parts]
    calls = sorted(middles)
    stands = {call: calls.index(middle) for part, middle in zip(parts, middles) for call in part}
    return Sample(calls, [stands[call] for call in range(len(order))])


def _logs(sizes: Sizes, windows: Windows) -> np.ndarray:
    """How large each call's changes are where probes make them: the mean logarithm over families and windows."""
    families = [family for family in FAMILIES if REFERENCES[family] in sizes]
    changes = np.stack([sizes[REFERENCES[family]][:, windows.early :, FAMILIES.index(family)] for family in families])
    return np.log(np.maximum(changes, np.finfo(float).tiny)).mean(axis=(0, 2))
