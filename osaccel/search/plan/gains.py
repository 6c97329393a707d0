# SPDX-License-Identifier: Apache-2.0
"""How much of an action's local change is left in the final latents, measured by a few replays.

The windows fall into consecutive groups. In one group at a time every window takes a reference action of one family;
the squared error of the final latents over the sum of the squared local changes is the family's gain there. Between the
groups' middles gains are interpolated in the logarithm, beyond them they stay.
"""

import math
from typing import Dict, List, Mapping, NamedTuple, Sequence

import numpy as np

from osaccel.search.plan.actions import FORECAST, HALF, PLAIN, REUSE, SKIP, Action, Windows

# The mildest action of each family: errors add up while they are small.
REFERENCES = {HALF: "c2", SKIP: "s2", FORECAST: "f2", REUSE: "r2"}
# The most groups; fewer where their replays do not fit into the budget.
GROUPS = 4

# Local squared changes of every window by family, relative to the square of the final latents.
Sizes = Sequence[Mapping[str, float]]


class Probe(NamedTuple):
    """One replay: the reference action of a family in all windows of a group."""

    family: str
    windows: Sequence[int]

    def chosen(self, actions: Mapping[str, Action], count: int) -> List[Action]:
        """An action for every window."""
        return [actions[REFERENCES[self.family]] if window in self.windows else PLAIN for window in range(count)]


def probes(families: Sequence[str], windows: Windows, count: int) -> List[Probe]:
    """What to replay, the windows in `count` groups, the groups in the generation's order."""
    groups = np.array_split(np.arange(windows.count), min(count, windows.count))
    return [Probe(family, tuple(int(window) for window in group)) for family in families for group in groups]


def gains(measured: Mapping[Probe, float], sizes: Mapping[str, Sizes], windows: Windows) -> Dict[str, np.ndarray]:
    """For every family, the gain of the squared error in every window.

    Args:
        measured: the squared relative error of the final latents that each probe made.
        sizes: of the families' reference actions, by the action's name.
    """
    found = {}
    for family in {probe.family for probe in measured}:
        middles, logs = [], []
        for probe in sorted((p for p in measured if p.family == family), key=lambda p: p.windows[0]):
            local = sum(sizes[REFERENCES[family]][window][family] for window in probe.windows)
            if local > 0 and measured[probe] > 0:
                middles.append(float(np.mean(probe.windows)))
                logs.append(math.log(measured[probe] / local))
        # Where the reference changes nothing at all, nothing is known; then nothing is taken to be lost.
        every = np.interp(np.arange(windows.count), middles, logs) if logs else np.zeros(windows.count)
        found[family] = np.exp(every)
    return found


class Expectation(NamedTuple):
    """What actions are expected to do to the final latents: squared relative errors, which add up over the windows.

    Attributes:
        sizes: by action, what it does locally; gain: by family, how much of it is left, in every window.
        scale: how much more or less it was when a choice was measured.
    """

    sizes: Mapping[str, Sizes]
    gain: Mapping[str, np.ndarray]
    scale: float = 1.0

    def squares(self, actions: Sequence[Action]) -> np.ndarray:
        """(window, action)."""
        windows = range(len(self.sizes[PLAIN.name]))
        return self.scale * np.array([[self._square(action, window) for action in actions] for window in windows])

    def _square(self, action: Action, window: int) -> float:
        local = self.sizes[action.name][window]
        return float(sum(gain[window] * local[family] for family, gain in self.gain.items()))

    def scaled(self, factor: float) -> "Expectation":
        """As it is when a choice's squared error was measured to be so many times what was expected."""
        return self._replace(scale=self.scale * factor)
