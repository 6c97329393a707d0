# SPDX-License-Identifier: Apache-2.0
"""How much of an action's local change is left in the final latents, measured by a few replays.

The windows fall into consecutive groups. In one group at a time every window takes a reference action of one family;
the squared error of the final latents over the sum of the squared local changes is the family's gain there. Between the
groups' middles gains are interpolated in the logarithm, beyond them they stay.
"""

import math
from typing import Dict, List, Mapping, NamedTuple, Sequence

import numpy as np

from osaccel.search.plan.actions import FORECAST, HALF, PLAIN, SKIP, Action, Windows

# The mildest action of each family: errors add up while they are small.
REFERENCES = {HALF: "c2", SKIP: "s2", FORECAST: "f2"}

# Local squared changes of every window by family, relative to the square of the final latents.
Sizes = Sequence[Mapping[str, float]]


# Of every window.
Gain = np.ndarray


class Probe(NamedTuple):
    """One replay of the first `calls` calls: the reference action of a family in all windows of a group."""

    family: str
    windows: Sequence[int]
    calls: int

    def chosen(self, actions: Mapping[str, Action], count: int) -> List[Action]:
        """An action for every window."""
        return [actions[REFERENCES[self.family]] if window in self.windows else PLAIN for window in range(count)]


def probes(families: Sequence[str], windows: Windows, count: int, calls: int) -> List[Probe]:
    """What to replay, the windows in `count` groups, the groups in the generation's order.

    Calls differ most in what is done first, so the first group is replayed on all of them and each later one on half as
    many as the one before.
    """
    groups = np.array_split(np.arange(windows.count), min(count, windows.count))
    return [
        Probe(family, tuple(int(window) for window in group), max(1, calls >> number))
        for family in families
        for number, group in enumerate(groups)
    ]


def gains(measured: Mapping[Probe, float], sizes: Mapping[str, Sequence[Sizes]], windows: Windows) -> Dict[str, Gain]:
    """For every family, the gain of the squared error in every window.

    Args:
        measured: the squared relative error of the final latents that each probe made.
        sizes: of the families' reference actions, by the action's name, of every call.
    """
    found = {}
    for family in {probe.family for probe in measured}:
        middles, logs = [], []
        for probe in sorted((p for p in measured if p.family == family), key=lambda p: p.windows[0]):
            own = sizes[REFERENCES[family]][: probe.calls]
            local = float(np.mean([sum(of_call[window][family] for window in probe.windows) for of_call in own]))
            if local > 0 and measured[probe] > 0:
                middles.append(float(np.mean(probe.windows)))
                logs.append(math.log(measured[probe] / local))
        # Where the reference changes nothing at all, nothing is known; then nothing is taken to be lost.
        every = np.interp(np.arange(windows.count), middles, logs) if logs else np.zeros(windows.count)
        found[family] = np.exp(every)
    return found


def expected_square(errors: Sequence[float]) -> float:
    """The mean squared error over calls to come, from the relative errors of those at hand.

    Where little is settled yet, most calls hardly change and a few become other videos, so that the mean of a few calls
    says little. Their logarithms tell more: the mean of a log-normal distribution is exp(mean + variance / 2). With one
    call there is no spread to see.
    """
    if min(errors) <= 0 or len(errors) == 1:
        return float(np.mean(np.square(errors)))
    logs = 2 * np.log(errors)
    return max(float(np.mean(np.square(errors))), float(np.exp(logs.mean() + logs.var(ddof=1) / 2)))


def squares(actions: Sequence[Action], sizes: Mapping[str, Sequence[Sizes]], gain: Mapping[str, Gain]) -> np.ndarray:
    """(window, action): the squared relative error that each action is expected to add to the final latents."""
    columns = []
    for action in actions:
        of_calls = [
            [sum(gain[family][w] * local.get(family, 0.0) for family in gain) for w, local in enumerate(by_window)]
            for by_window in sizes[action.name]
        ]
        columns.append(np.mean(of_calls, axis=0))
    return np.array(columns).T
