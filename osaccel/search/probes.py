# SPDX-License-Identifier: Apache-2.0
"""Measures what a change in the hidden states does to the latents of one step, by single resumed steps.

A probe reuses, in one step, the delta a region had in the step before, and compares the latents with the plain ones.
Skipping all blocks shows how this depends on the step and computes no block at all; regions that end elsewhere, at few
steps, show how it depends on where a region ends.
"""

import math
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from osaccel.cache.config import DitCacheConfig
from osaccel.cache.policy import IntervalPolicy
from osaccel.search.error_model import Gains, unknown_gains
from osaccel.search.evaluate import relative_error
from osaccel.search.replay import Abandoned, Replay
from osaccel.search.team import Team

# Block forwards the probes of regions may take, in plain generations.
BUDGET = 0.25
_WHOLE_PROBES, _REGION_PROBES = 24, 3


def whole_steps(num_steps: int) -> List[int]:
    """Where skipping all blocks is probed: evenly, and densely at the end, where steps become very small."""
    even = np.linspace(1, num_steps - 1, min(_WHOLE_PROBES, num_steps - 1)).round().astype(int).tolist()
    return sorted({step for step in (*even, num_steps - 2, num_steps - 3) if step >= 1})


def region_steps(num_steps: int, num_blocks: int, ends: Sequence[int]) -> List[int]:
    """Where regions of every end are probed, as often as the budget allows but at least once; a part of the others."""
    each = sum(num_blocks - (end - _start(end, num_blocks)) for end in ends)
    count = min(_REGION_PROBES, max(1, int(BUDGET * num_blocks * num_steps / max(1, each))))
    among = whole_steps(num_steps)
    return sorted({among[int(share * (len(among) - 1))] for share in np.linspace(0, 1, count + 2)[1:-1]})


def _start(end: int, num_blocks: int) -> int:
    return max(0, end - num_blocks // 2)


class Prober:
    """Probes one recorded call.

    Args:
        replay: the call.
        grams: its region errors, (gap, step, block, block), summed over the team.
        team: the ranks that generate together.
    """

    def __init__(self, replay: Replay, grams: np.ndarray, team: Team):
        self.replay, self.grams, self.team = replay, grams, team
        self.block_forwards = 0

    def gains(self, ends: Sequence[int]) -> Gains:
        """Measured for regions that end before the blocks `ends`, and filled in between."""
        num_steps, num_blocks = self.grams.shape[1:3]
        unknown = unknown_gains(num_blocks, num_steps)
        whole = self._known({step: self._probe(step, 0, num_blocks) for step in whole_steps(num_steps)})
        if not whole:
            return unknown
        steps = np.interp(np.arange(num_steps), list(whole), list(whole.values()))
        ends = [end for end in sorted(set(ends)) if end < num_blocks]
        at = region_steps(num_steps, num_blocks, ends)
        measured: Dict[int, Optional[float]] = {num_blocks: 0.0}
        for end in ends:
            found = self._known({step: self._probe(step, _start(end, num_blocks), end) for step in at})
            measured[end] = float(np.mean([gain - steps[step] for step, gain in found.items()])) if found else None
        known = self._known(dict(sorted(measured.items())))
        return Gains(steps, np.interp(np.arange(num_blocks + 1), list(known), list(known.values())))

    @staticmethod
    def _known(found: Dict[int, Optional[float]]) -> Dict[int, float]:
        return {key: value for key, value in found.items() if value is not None}

    def _probe(self, step: int, start: int, stop: int) -> Optional[float]:
        """log of the relative change of the latents over that of the hidden states; None when one of them is none."""
        change = math.sqrt(max(0.0, float(self.grams[0, step, start:stop, start:stop].sum())))
        policy = IntervalPolicy(DitCacheConfig(step - 1, self.grams.shape[1] + 1, start, stop - start))
        errors: List[float] = []

        def watch(now: int, latents: torch.Tensor) -> None:
            if now == step:
                errors.append(relative_error(self.team, latents, self.replay.recording.latents[now])[0])
                raise Abandoned

        try:
            self.replay.run_cached(policy, step - 1, watch)
        except Abandoned:
            pass
        self.block_forwards += self.replay.cache.computed_blocks if self.replay.cache else 0
        if not errors or not math.isfinite(errors[0]) or errors[0] <= 0 or change <= 0:
            return None
        return math.log(errors[0] / change)


def measure(replay: Replay, grams: np.ndarray, ends: Sequence[int], team: Team) -> Tuple[Gains, int]:
    """The gains, the same on every rank, and the block forwards they took."""
    prober = Prober(replay, grams, team)
    gains = prober.gains(ends)
    return team.share(gains), prober.block_forwards


__all__ = ["Prober", "measure", "region_steps", "whole_steps"]
