# SPDX-License-Identifier: Apache-2.0
"""Where a generation stands: the step, the n-th forward within it, and which branches of guidance that holds."""

from typing import Optional


class Clock:
    """What everything attached to one generation reads.

    Attributes:
        step: `scheduler.step` calls since `set_timesteps`.
        forward: which of the step's forwards is running, from 0; guidance run as two forwards has a second one.
        has_branches: whether the batch is known to be [unconditional, conditional] and its halves may part.
        has_means: whether the network can be asked at the mean of skipped steps.
        asked_level: the noise level at which the network was asked at this step, where that is not the step's own.
        is_half: whether the running forward holds the conditional half only.
        was_half: whether a forward of this step did.
        thread: whose calls it counts; None for every thread's.
    """

    thread: Optional[int] = None

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """A generation begins."""
        self.step, self.forward = 0, -1
        self.asked_level: Optional[float] = None
        self.has_branches = self.has_means = self.is_half = self.was_half = False

    def begin_forward(self) -> None:
        """The first block is called."""
        self.forward += 1

    def end_step(self) -> None:
        self.step, self.forward, self.was_half, self.asked_level = self.step + 1, -1, False, None
