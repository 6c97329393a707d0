# SPDX-License-Identifier: Apache-2.0
"""How much of an action's local change is left in the final latents, measured by a few replays.

The windows fall into consecutive groups. In one group at a time every window takes a reference action of one family;
the squared error of the final latents over the sum of the squared local changes is the family's gain there. Between the
groups' middles gains are interpolated in the logarithm, beyond them they stay.
"""

import math
from typing import Dict, List, Mapping, NamedTuple, Sequence

import numpy as np

from osaccel.search.plan.actions import BY_NAME, FAMILIES, PLAIN, REFERENCES, Action, Windows

# The most groups; fewer where their replays do not fit into the budget.
GROUPS = 4
# The logarithm of a gain that no choice takes; finite, as it is interpolated.
_NEVER = 300.0

# By action's name: local squared changes, (call, window, family), relative to the squares of the final latents.
Sizes = Mapping[str, np.ndarray]


class Probe(NamedTuple):
    """One replay: the reference action of a family in all windows of a group."""

    family: str
    windows: Sequence[int]

    def chosen(self, count: int) -> List[Action]:
        """An action for every window."""
        return [BY_NAME[REFERENCES[self.family]] if window in self.windows else PLAIN for window in range(count)]


def probes(families: Sequence[str], windows: Windows, count: int) -> List[Probe]:
    """What to replay, the windows in `count` groups, the groups in the generation's order."""
    groups = np.array_split(np.arange(windows.count), min(count, windows.count))
    return [Probe(family, tuple(int(window) for window in group)) for family in families for group in groups]


def gains(measured: Mapping[Probe, Sequence[float]], sizes: Sizes, windows: Windows) -> Dict[str, np.ndarray]:
    """For every family, the gain of the squared error, (call, window).

    Args:
        measured: the relative error of every call's final latents that each probe made; infinite, never to be done,
            where they are not finite.
        sizes: of the families' reference actions.
    """
    found: Dict[str, np.ndarray] = {}
    for family in dict.fromkeys(probe.family for probe in measured):
        local = sizes[REFERENCES[family]][:, :, FAMILIES.index(family)]
        own = {probe: errors for probe, errors in measured.items() if probe.family == family}
        by_call = [{probe: errors[call] for probe, errors in own.items()} for call in range(len(local))]
        found[family] = np.array([_gains(errors, changes) for errors, changes in zip(by_call, local)])
    return found


def _gains(measured: Mapping[Probe, float], local: np.ndarray) -> np.ndarray:
    """One family's gain for one call, by window."""
    middles, logs = [], []
    for probe in sorted(measured, key=lambda probe: probe.windows[0]):
        square = measured[probe] ** 2
        changed = local[list(probe.windows)].sum()
        if changed > 0 and square > 0:
            middles.append(float(np.mean(probe.windows)))
            logs.append(min(math.log(square / changed), _NEVER))
    # Where the reference changes nothing at all, nothing is known; then nothing is taken to be lost.
    return np.exp(np.interp(np.arange(len(local)), middles, logs)) if logs else np.ones(len(local))


class Expectation(NamedTuple):
    """What actions are expected to do to the final latents: squared relative errors, which add up over the windows.

    Attributes:
        sizes: what actions do locally; gain: by family, how much of it is left, (call, window).
        scale: how much more or less it was when a choice was measured.
    """

    sizes: Sizes
    gain: Mapping[str, np.ndarray]
    scale: float = 1.0

    def squares(self, actions: Sequence[Action]) -> np.ndarray:
        """(call, window, action)."""
        by_action = []
        for action in actions:
            sizes = self.sizes[action.name]
            by_action.append(sum(gain * sizes[:, :, FAMILIES.index(family)] for family, gain in self.gain.items()))
        return self.scale * np.stack(by_action, axis=2)

    def scaled(self, factor: float) -> "Expectation":
        """As it is when a choice's squared error was measured to be so many times what was expected."""
        return self._replace(scale=self.scale * factor)
