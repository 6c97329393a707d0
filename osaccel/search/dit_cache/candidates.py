# SPDX-License-Identifier: Apache-2.0
"""The configurations that msModelSlim's four numbers can say, and those of them that reach a goal."""

import math
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

from osaccel.dit_cache_config import DitCacheConfig
from osaccel.search.errors import SearchError

MAX_INTERVAL = 6


class Candidate(NamedTuple):
    """A configuration as blocks `start .. stop - 1`, reused from step `first` on at every step but each interval-th."""

    start: int
    stop: int
    first: int
    interval: int

    @property
    def config(self) -> DitCacheConfig:
        return DitCacheConfig(self.first, self.interval, self.start, self.stop - self.start)

    def speed_up(self, num_blocks: int, num_steps: int) -> float:
        """Blocks of a plain generation over blocks computed with this cache."""
        return 1 / (1 - self._saved(num_blocks, num_steps))

    def price(self, num_blocks: int, num_steps: int) -> float:
        """Plain generations' worth of a replay, which computes nothing before the step that stores the first delta."""
        return 1 - self.first / num_steps - self._saved(num_blocks, num_steps)

    def _saved(self, num_blocks: int, num_steps: int) -> float:
        """The share of a plain generation's blocks that is not computed."""
        region = self.stop - self.start
        return region * reused(num_steps, self.first, self.interval) / (num_blocks * num_steps)


def reused(num_steps: int, first: int, interval: int) -> int:
    """How many of the steps reuse."""
    after = num_steps - first
    return after - -(-after // interval)


def reachable(num_blocks: int, num_steps: int, max_interval: int = MAX_INTERVAL) -> float:
    """The largest speed-up any configuration has, in blocks."""
    most = max((reused(num_steps, 0, interval) for interval in range(2, max_interval + 1)), default=0)
    return num_steps / (num_steps - most)


def candidates(num_blocks: int, num_steps: int, ratio: float, max_interval: int = MAX_INTERVAL) -> List[Candidate]:
    """Every configuration that reaches `ratio` tightly: with a shorter region or one reuse less it would not.

    Raises:
        SearchError: none reaches it.
    """
    found: List[Candidate] = []
    # A hair less than asked: 1 / ratio is not exact.
    needed = num_blocks * num_steps * (1 - 1 / ratio) - 1e-9
    for interval in range(2, max_interval + 1):
        most = reused(num_steps, 0, interval)
        shorter = most + 1
        for length in range(1, num_blocks + 1):
            count = max(1, math.ceil(needed / length))
            if count > most or count == shorter:
                continue
            shorter = count
            firsts = [first for first in range(num_steps) if reused(num_steps, first, interval) == count]
            found += [
                Candidate(start, start + length, first, interval)
                for first in firsts
                for start in range(num_blocks - length + 1)
            ]
    if not found:
        raise SearchError(
            f"No cache configuration speeds {num_blocks} blocks x {num_steps} steps up by {ratio:g}; at most "
            f"{reachable(num_blocks, num_steps, max_interval):.3f} is reachable. Ask for less, or sample more steps."
        )
    return found


class Goal(NamedTuple):
    """What is searched: the least error at a speed-up of `ratio`, or the fastest that keeps `min_psnr`."""

    ratio: float
    min_psnr: Optional[float] = None


def pool_for(goal: Goal, num_blocks: int, num_steps: int) -> List[Candidate]:
    """The candidates of a goal; for a PSNR, those of a ladder of speed-ups."""
    if goal.min_psnr is None:
        return candidates(num_blocks, num_steps, goal.ratio)
    top = reachable(num_blocks, num_steps)
    if top <= 1:
        raise SearchError(f"With {num_steps} steps nothing can be reused. Sample more steps.")
    found: Dict[Candidate, None] = {}
    for step in range(1, 41):
        ratio = top ** (step / 40)
        if ratio - 1e-9 <= top:
            found.update(dict.fromkeys(candidates(num_blocks, num_steps, ratio - 1e-9)))
    return list(found)


def candidate_of(config: Mapping[str, Any]) -> Candidate:
    """The candidate of msModelSlim's four keys."""
    start = config["cache_block_start"]
    return Candidate(
        start, start + config["cache_num_blocks"], config["cache_step_start"], config["cache_step_interval"]
    )
