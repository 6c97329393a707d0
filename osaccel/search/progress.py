# SPDX-License-Identifier: Apache-2.0
"""How far a search is: never back, with the time left and the best so far, in one line wherever it is read.

On a terminal the line is drawn anew; elsewhere, in a log file say, there is a line at every 5 %.
"""

import logging
import sys
import time
from typing import Any, Callable, Optional

logger = logging.getLogger("osaccel")

EVERY = 5  # per cent, between two lines of a log
# Seconds between two lines of a log, and between two drawings on a terminal: nobody reads faster.
LINES, DRAWINGS = 1.0, 0.2


class Progress:
    """A line about one search.

    Args:
        name: what the line begins with.
        shown: whether this process is the one that shows it.
        stream: a terminal, or anything else; standard error by default.
    """

    def __init__(
        self, name: str, shown: bool, stream: Optional[Any] = None, clock: Callable[[], float] = time.monotonic
    ):
        stream = sys.stderr if stream is None else stream
        self.name, self.best = name, ""
        self._clock, self._started = clock, clock()
        self._stream = stream if shown and _is_terminal(stream) else None
        self._shown = shown and logger.isEnabledFor(logging.INFO)
        self._done, self._total = 0.0, 1.0
        self._percent, self._said, self._at = 0, 0, -LINES

    @property
    def percent(self) -> int:
        """What is shown: 100 only when the search has ended, and never less than before."""
        return self._percent

    @property
    def seconds_left(self) -> Optional[float]:
        """As long as so far for every equal part of what is left; None at the beginning."""
        gone = self._clock() - self._started
        return gone * (self._total - self._done) / self._done if self._done > 0 else None

    def at(self, done: float, total: float) -> None:
        """This much of what is now expected to be needed is done, in whatever takes about equal time."""
        self._done, self._total = done, max(done, total)
        self._percent = max(self._percent, min(99, int(100 * done / self._total) if self._total > 0 else 0))
        self._show()

    def close(self) -> None:
        """The search has ended."""
        self._percent, self._done = 100, self._total
        self._show(last=True)

    def line(self) -> str:
        left = self.seconds_left
        parts = [f"{self.name}: {self.percent} %, {clock_of(self._clock() - self._started)}"]
        if left is not None and self.percent < 100:
            parts.append(f"about {clock_of(left)} left")
        return ", ".join([*parts, f"best so far: {self.best}"] if self.best else parts)

    def _show(self, last: bool = False) -> None:
        now = self._clock()
        if not self._shown or not (last or now - self._at >= (DRAWINGS if self._stream else LINES)):
            return
        if self._stream is not None:
            self._at = now
            # The cursor stays at the line's beginning, where a message of somebody else may begin.
            _write(self._stream, f"\033[K{self.line()}" + ("\n" if last else "\r"))
        elif self.percent // EVERY > self._said:
            self._at, self._said = now, self.percent // EVERY
            logger.info("%s", self.line())


def clock_of(seconds: float) -> str:
    """75 as "1:15", 3675 as "1:01:15"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _write(stream: Any, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        # The terminal is gone: nobody is there to be told.
        pass
