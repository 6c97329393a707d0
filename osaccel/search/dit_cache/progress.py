# SPDX-License-Identifier: Apache-2.0
"""The cache search's progress: plain generations spent of those that it is expected to take."""

from osaccel.plan import of_dit_cache
from osaccel.search import progress
from osaccel.search.dit_cache.candidates import MAX_VERIFIED, Search

RECENT = 6  # rounds that tell what the next ones take


class Progress:
    """Follows a search and the steps that are computed for it."""

    def __init__(self, search: Search, shown: bool):
        self.search = search
        self.line = progress.Progress("cache search", shown)
        self.begun = search.spent
        self._steps, self._spent = 0, [search.spent]

    def step(self) -> None:
        """A step of one call was computed; as many workers as there are compute others meanwhile."""
        search = self.search
        self._steps += 1
        share = search.workers * self._steps / (search.num_steps * search.belief.calls)
        # The steps of a round are no more than what the round is expected to take.
        self._show(min(share, self._price))

    def sync(self) -> None:
        """A round is over, or was known from before an interruption, which takes no time now."""
        spent = self.search.spent
        if self._steps:
            self._spent.append(spent)
        else:
            self.begun += spent - self._spent[-1]
            self._spent = [spent]
        self._steps = 0
        best = self.search.best()
        if best is not None:
            found = self.search.done[best]
            psnr = "" if found.psnr is None else f", {found.psnr:.2f} dB"
            self.line.best = f"{of_dit_cache(best.config).describe()}, error {found.error:.4g}{psnr}"
        self._show(0.0)

    def close(self) -> None:
        self.line.close()

    def _show(self, ahead: float) -> None:
        spent = self.search.spent - self.begun + ahead
        self.line.at(spent, max(self._expected, spent))

    @property
    def _price(self) -> float:
        """Plain generations that a round takes: the mean of the newest, as later ones are given up sooner."""
        newest = self._spent[-1 - RECENT :]
        return (newest[-1] - newest[0]) / (len(newest) - 1) if len(newest) > 1 else 0.5

    @property
    def _expected(self) -> float:
        """It ends when the budget cannot pay another candidate, or when enough are verified."""
        search = self.search
        rounds = (MAX_VERIFIED - len(search.done)) / search.workers
        rest = min(search.budget - self._price / 2 - search.spent, self._price * rounds)
        return search.spent - self.begun + max(0.0, rest)
