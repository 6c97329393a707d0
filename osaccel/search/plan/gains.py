# SPDX-License-Identifier: Apache-2.0
"""How much of an action's local change is left in the final latents, measured by a few replays.

The windows fall into consecutive groups. In one group at a time every window takes a reference action of one family;
the squared error of the final latents over the sum of the squared local changes is the family's gain there. Where a
reference saves at conditional-only steps too, what these make by themselves is taken off before, and what is left is
taken to have no less gain than they. Between the groups' middles gains are interpolated in the logarithm, beyond them
they stay.
"""

import math
from typing import Dict, Iterator, List, Mapping, NamedTuple, Sequence

import numpy as np

from osaccel.search.plan.actions import FAMILIES, HALF, PLAIN, Action, Windows
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
    action: Action
    windows: Sequence[int]

    def chosen(self, count: int) -> List[Action]:
        """An action for every window."""
        return [self.action if window in self.windows else PLAIN for window in range(count)]


def probes(references: Mapping[str, Action], windows: Windows, count: int) -> List[Probe]:
    """What to replay, the windows in `count` groups, the groups in the generation's order.

    The last window is a group of its own: behind it the network answers no more, and what was changed is left. Early
    windows are in none; they have the gain of the first group.
    """
    *others, last = range(windows.early, windows.count)
    groups: List[Sequence[int]] = [[*others, last]]
    if others and count > 1:
        groups = [*(part.tolist() for part in np.array_split(others, min(count - 1, len(others)))), [last]]
    return [Probe(family, action, tuple(group)) for family, action in references.items() for group in groups]


def gains(measured: Mapping[Probe, Sequence[float]], sizes: Sizes, windows: Windows) -> Dict[str, np.ndarray]:
    """For every family, the gain of the squared error, (call, window).

    Args:
        measured: the relative error of every call's final latents that each probe made; infinite, never to be done,
            where they are not finite.
        sizes: of the families' reference actions.
    """
    squares = {probe: np.square(errors) for probe, errors in measured.items()}
    every = {probe: _gain(square, _changed(probe, sizes)) for probe, square in squares.items()}
    halves = {probe.windows: probe for probe in measured if probe.family == HALF}
    for probe, square in squares.items():
        half = halves.get(probe.windows)
        if half is not None and probe.family != HALF and HALF in probe.action.cycle[1].families:
            rest = np.where(np.isfinite(square), square - np.minimum(squares[half], square), np.inf)
            every[probe] = np.fmax(_gain(rest, _changed(probe, sizes)), every[half])
    return {
        family: _by_window(every, family, windows.count) for family in dict.fromkeys(probe.family for probe in every)
    }


def _changed(probe: Probe, sizes: Sizes) -> np.ndarray:
    """The squared local change that a probe makes in its own way, by call."""
    return sizes[probe.action.name][:, list(probe.windows), FAMILIES.index(probe.family)].sum(axis=1)


def _gain(square: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """By call; NaN where nothing was changed or nothing is left of it."""
    known = (changed > 0) & (square > 0)
    found = np.divide(square, changed, out=np.full(len(square), np.nan), where=known)
    return np.minimum(found, math.exp(_NEVER))


def _by_window(every: Mapping[Probe, np.ndarray], family: str, count: int) -> np.ndarray:
    """One family's gain, (call, window)."""
    probes = sorted((probe for probe in every if probe.family == family), key=lambda probe: probe.windows[0])
    middles = np.array([np.mean(probe.windows) for probe in probes])
    by_call = np.log([every[probe] for probe in probes]).T
    found = np.ones((len(by_call), count))
    for call, logs in enumerate(by_call):
        known = np.isfinite(logs)
        # Where the reference changes nothing at all, nothing is known; then nothing is taken to be lost.
        if known.any():
            found[call] = np.exp(np.interp(np.arange(count), middles[known], logs[known]))
    return found


class Expectation(NamedTuple):
    """What actions are expected to do to the final latents: squared relative errors, which add up over the windows.

    Attributes:
        sizes: what actions do locally; gain: by family, how much of it is left, (call, window).
        references: the families' mildest actions.
        growth: how much faster than in proportion the gain grows with a change beyond that of its reference.
        scale: how much more or less all of it was when a choice was measured.
    """

    sizes: Sizes
    gain: Mapping[str, np.ndarray]
    references: Mapping[str, Action]
    growth: float = 0.0
    scale: float = 1.0

    def squares(self, actions: Sequence[Action]) -> np.ndarray:
        """(call, window, action)."""
        return self.scale * np.stack([sum(self._by_family(action)) for action in actions], axis=2)

    def _by_family(self, action: Action) -> Iterator[np.ndarray]:
        for family, gain in self.gain.items():
            sizes, reference = (
                self.sizes[name][:, :, FAMILIES.index(family)] for name in (action.name, self.references[family].name)
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
