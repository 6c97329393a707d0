# SPDX-License-Identifier: Apache-2.0
"""How much of an action's local change is left in the final latents, measured by a few replays.

The windows fall into consecutive groups. In one group at a time every window takes a reference action of one family;
the squared error of the final latents over the sum of the squared local changes is the family's gain there. Between the
groups' middles gains are interpolated in the logarithm, beyond them they stay.
"""

import math
from typing import Dict, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

import numpy as np

from osaccel.search.plan.actions import BY_NAME, FAMILIES, PLAIN, REFERENCES, Action, Windows
from osaccel.search.planned import TOLERANCE

# The most groups; fewer where their replays do not fit into the budget.
GROUPS = 4
# The logarithm of a gain that no choice takes; finite, as it is interpolated.
_NEVER = 300.0
# How fast gains may grow with changes: not at all to in proportion.
_GROWTHS = np.linspace(0.0, 1.0, 101)

# By action's name: local squared changes, (call, window, family), relative to the squares of the final latents.
Sizes = Mapping[str, np.ndarray]


class Probe(NamedTuple):
    """One replay: the reference action of a family in all windows of a group."""

    family: str
    windows: Sequence[int]

    def chosen(self, count: int) -> List[Action]:
        """An action for every window."""
        return [BY_NAME[REFERENCES[self.family]] if window in self.windows else PLAIN for window in range(count)]

    def changes(self, sizes: Sizes) -> np.ndarray:
        """The squared local change that it makes, by call."""
        return sizes[REFERENCES[self.family]][:, list(self.windows), FAMILIES.index(self.family)].sum(axis=1)


def probes(families: Sequence[str], windows: Windows, count: int) -> List[Probe]:
    """What to replay, the windows in `count` groups, the groups in the generation's order.

    The last window is a group of its own: behind it the network answers no more, and what was changed is left. Early
    windows are in none; they have the gain of the first group.
    """
    *others, last = range(windows.early, windows.count)
    groups: List[Sequence[int]] = [[*others, last]]
    if others and count > 1:
        groups = [*(part.tolist() for part in np.array_split(others, min(count - 1, len(others)))), [last]]
    return [Probe(family, tuple(group)) for family in families for group in groups]


def gains(measured: Mapping[Probe, Sequence[float]], sizes: Sizes, windows: Windows) -> Dict[str, np.ndarray]:
    """For every family, the gain of the squared error, (call, window).

    Args:
        measured: the relative error of every call's final latents that each probe made; infinite, never to be done,
            where they are not finite.
        sizes: of the families' reference actions.
    """
    found: Dict[str, np.ndarray] = {}
    for family in dict.fromkeys(probe.family for probe in measured):
        own = {probe: (errors, probe.changes(sizes)) for probe, errors in measured.items() if probe.family == family}
        by_call = [
            {probe: (errors[call], changes[call]) for probe, (errors, changes) in own.items()}
            for call in range(len(sizes[REFERENCES[family]]))
        ]
        found[family] = np.array([_gains(shown, windows.count) for shown in by_call])
    return found


def _gains(shown: Mapping[Probe, Tuple[float, float]], count: int) -> np.ndarray:
    """One family's gain for one call in `count` windows, of the error and the squared local change of each probe."""
    middles, logs = [], []
    for probe in sorted(shown, key=lambda probe: probe.windows[0]):
        error, changed = shown[probe]
        square = error**2
        if changed > 0 and square > 0:
            middles.append(float(np.mean(probe.windows)))
            logs.append(min(math.log(square / changed), _NEVER))
    # Where the reference changes nothing at all, nothing is known; then nothing is taken to be lost.
    return np.exp(np.interp(np.arange(count), middles, logs)) if logs else np.ones(count)


class Expectation(NamedTuple):
    """What actions are expected to do to the final latents: squared relative errors, which add up over the windows.

    Attributes:
        sizes: what actions do locally; gain: by family, how much of it is left, (call, window).
        growth: how much faster than in proportion the gain grows with a change beyond that of its reference.
        scale: how much more or less all of it was when a choice was measured.
    """

    sizes: Sizes
    gain: Mapping[str, np.ndarray]
    growth: float = 0.0
    scale: float = 1.0

    def squares(self, actions: Sequence[Action]) -> np.ndarray:
        """(call, window, action)."""
        return self.scale * np.stack([sum(self._by_family(action)) for action in actions], axis=2)

    def _by_family(self, action: Action) -> Iterator[np.ndarray]:
        for family, gain in self.gain.items():
            sizes, reference = (
                self.sizes[name][:, :, FAMILIES.index(family)] for name in (action.name, REFERENCES[family])
            )
            yield gain * sizes * beyond(sizes, reference) ** self.growth

    def told(self, actions: Sequence[Action], errors: Sequence[float]) -> "Expectation":
        """As it is when these actions, one for every window, were measured to make these errors, by call.

        More than was expected comes from the changes that are larger than the references', by least squares in which a
        growth of 1 weighs as much as an error of TOLERANCE; what that does not explain scales everything.
        """
        wanted, anew = float(np.mean(errors)), self._replace(scale=1.0)
        grown = [anew._replace(growth=growth) for growth in _GROWTHS.tolist()]
        expected = np.array([one.error(actions) for one in grown])
        if wanted == 0 or not 0 < expected[-1] < math.inf:
            return self
        # References alone say nothing of larger changes.
        if expected[-1] > expected[0]:
            misses = np.log(wanted / expected) / math.log(TOLERANCE)
            anew = grown[int(np.argmin(misses**2 + _GROWTHS**2))]
        return anew._replace(scale=(wanted / anew.error(actions)) ** 2)

    def error(self, actions: Sequence[Action]) -> float:
        """The mean over calls of what is expected of an action for every window."""
        squares = self.squares(actions)
        return float(np.sqrt(squares[:, range(len(actions)), range(len(actions))].sum(axis=1)).mean())


def beyond(sizes: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How many times larger than a reference's changes are, in the mean over calls; at least 1, (1, window)."""
    ours, theirs = sizes.mean(axis=0, keepdims=True), reference.mean(axis=0, keepdims=True)
    return np.maximum(1.0, np.divide(ours, theirs, out=np.ones_like(ours), where=theirs > 0))
