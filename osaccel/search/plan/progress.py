# SPDX-License-Identifier: Apache-2.0
"""The plan search's progress: network work of its replays, which are known beforehand but for the last ones."""

from typing import Sequence

from osaccel.plan import Plan
from osaccel.search.plan.measure import first_change
from osaccel.search.progress import Progress


def price_of(plan: Plan, num_blocks: int) -> float:
    """Plain generations' worth of replaying a plan: nothing before its first change is computed."""
    return plan.work(num_blocks) - first_change(plan) / (plan.steps or 1)


class PlanProgress:
    """Follows rounds of replays and the steps that are computed for them.

    Args:
        expected: the replays' work before the first one, see `price_of`.
        calls: recorded calls, on each of which a plan is replayed.
    """

    def __init__(self, expected: float, num_blocks: int, calls: int, shown: bool):
        self.line = Progress("plan search", shown)
        self.expected, self.num_blocks, self.calls = expected, num_blocks, calls
        self._done = self._round = 0.0
        self._steps, self._of = 0, 1

    def begin(self, plans: Sequence[Plan]) -> None:
        """A round begins: this process runs the first of these plans, other workers the others meanwhile."""
        self._round = sum(price_of(plan, self.num_blocks) for plan in plans)
        self._steps, self._of = 0, self.calls * ((plans[0].steps or 1) - first_change(plans[0])) or 1

    def step(self) -> None:
        """A step of one call was replayed."""
        self._steps += 1
        self._show(self._round * min(1.0, self._steps / self._of))

    def end(self) -> None:
        """The round is over."""
        self._done, self._round = self._done + self._round, 0.0
        self._show(0.0)

    def close(self) -> None:
        self.line.close()

    def _show(self, ahead: float) -> None:
        # A target that is missed takes another replay, which was not expected.
        self.line.at(self._done + ahead, max(self.expected, self._done + self._round))
