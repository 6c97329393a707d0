# SPDX-License-Identifier: Apache-2.0
"""Measures what a change in the hidden states does to the latents of one step, by single resumed steps.

A probe reuses, in one step, the delta a region had in the step before, and looks how much of a change of the latents
stays. Skipping all blocks shows how this depends on the step and computes no block at all; regions that start or stop
elsewhere, at few steps, show how it depends on these.
"""

import math
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from osaccel.dit_cache_config import DitCacheConfig
from osaccel.plan import of_dit_cache
from osaccel.search.dit_cache.error_model import Gains, unknown_gains
from osaccel.search.dit_cache.evaluate import relative_size
from osaccel.search.places import even_places
from osaccel.search.recording.replay import Abandoned, Replay
from osaccel.search.team import Team

# Block forwards the probes of regions may take, in plain generations.
BUDGET = 0.3
_WHOLE_PROBES, _REGION_PROBES, _PLACES = 24, 6, 8


def whole_steps(num_steps: int) -> List[int]:
    """Where skipping all blocks is probed: evenly, and densely at the end, where steps become very small."""
    even = np.linspace(1, num_steps - 1, min(_WHOLE_PROBES, num_steps - 1)).round().astype(int).tolist()
    return sorted({step for step in (*even, num_steps - 2, num_steps - 3) if step >= 1})


def places(ends: Sequence[int]) -> List[int]:
    """A few of the blocks where regions of the family start, or stop, evenly taken, the outermost among them."""
    ends = sorted(set(ends))
    return [ends[place] for place in even_places(len(ends), min(_PLACES, len(ends)))]


def region_steps(num_steps: int, num_blocks: int, starts: Sequence[int], stops: Sequence[int]) -> List[int]:
    """Where regions are probed, some of `whole_steps`: as often as the budget allows, but at least once."""
    each = sum(starts) + sum(num_blocks - stop for stop in stops)
    count = min(_REGION_PROBES, max(1, int(BUDGET * num_blocks * num_steps / max(1, each))))
    among = whole_steps(num_steps)
    return sorted({among[int(share * (len(among) - 1))] for share in np.linspace(0, 1, count + 2)[1:-1]})


class Prober:
    """Probes one recorded call.

    Args:
        replay: the call.
        grams: its region errors, (gap, step, block, block), summed over the team.
        team: the ranks that generate together.
    """

    def __init__(self, replay: Replay, grams: np.ndarray, team: Team):
        self.replay, self.grams, self.team = replay, grams, team
        self.num_steps, self.num_blocks = grams.shape[1:3]
        self.block_forwards = 0

    def gains(self, starts: Sequence[int], stops: Sequence[int]) -> Gains:
        """Measured for regions that start at and stop before some of these blocks, and filled in between."""
        whole = self._probed(whole_steps(self.num_steps), 0, self.num_blocks)
        if not whole:
            return unknown_gains(self.num_blocks, self.num_steps)
        steps = self._over_steps(whole)
        starts = [start for start in places(starts) if start > 0]
        stops = [stop for stop in places(stops) if stop < self.num_blocks]
        at = region_steps(self.num_steps, self.num_blocks, starts, stops)
        by_start = {start: self._probed(at, start, self.num_blocks) for start in starts}
        by_stop = {stop: self._probed(at, 0, stop) for stop in stops}
        return Gains(steps, self._differences(by_start, steps, 0), self._differences(by_stop, steps, self.num_blocks))

    def _over_steps(self, found: Dict[int, float]) -> np.ndarray:
        """(step,), from values by step."""
        known = sorted(found)
        return np.interp(np.arange(self.num_steps), known, [found[step] for step in known])

    def _differences(self, found: Dict[int, Dict[int, float]], steps: np.ndarray, whole: int) -> np.ndarray:
        """(block + 1, step): how the regions' gains differ from those of all blocks, which block `whole` stands for."""
        known = {whole: np.zeros(self.num_steps)}
        for block, probed in found.items():
            if probed:
                known[block] = self._over_steps({step: gain - steps[step] for step, gain in probed.items()})
        blocks, now = sorted(known), np.arange(self.num_blocks + 1)
        return np.stack([np.interp(now, blocks, line) for line in zip(*(known[block] for block in blocks))], axis=1)

    def _probed(self, steps: Sequence[int], start: int, stop: int) -> Dict[int, float]:
        found = {step: self._probe(step, start, stop) for step in steps}
        return {step: gain for step, gain in found.items() if gain is not None}

    def _probe(self, step: int, start: int, stop: int) -> Optional[float]:
        """log of what the hidden states' change does to the latents, per unit of it; None when there is no change."""
        change = math.sqrt(max(0.0, float(self.grams[0, step, start:stop, start:stop].sum())))
        policy = of_dit_cache(DitCacheConfig(step - 1, self.num_steps + 1, start, stop - start))
        errors: List[float] = []

        def watch(now: int, latents: torch.Tensor) -> None:
            if now == step:
                errors.append(self._stays(latents, self.replay.recording.latents[now]))
                raise Abandoned

        try:
            self.replay.run_cached(policy, step - 1, watch)
        except Abandoned:
            pass
        self.block_forwards += int(self.replay.cache.computed_blocks) if self.replay.cache else 0
        if not errors or not math.isfinite(errors[0]) or errors[0] <= 0 or change <= 0:
            return None
        return math.log(errors[0] / change)

    def _stays(self, latents: torch.Tensor, plain: torch.Tensor) -> float:
        """The size of what stays of a change, relative to the latents, over the team's shards."""
        plain = plain.double()
        return relative_size(self.team, lasting(latents.detach().cpu().double() - plain), plain)[0]


def lasting(change: torch.Tensor) -> torch.Tensor:
    """The part of a change of latents (batch, channels, ..., height, width) that later steps leave.

    It has low frequencies: the mean of every frame, and for every quarter of the frames its mean over the video.
    """
    over_video = list(range(2, change.dim() - 2))
    slow = change.mean(over_video, keepdim=True) if over_video else change
    halves = [half.tensor_split(2, -1) for half in (slow - _flat(slow)).tensor_split(2, -2)]
    rows = [torch.cat([_flat(quarter) for quarter in quarters], -1) for quarters in halves]
    return _flat(change) + torch.cat(rows, -2)


def _flat(frames: torch.Tensor) -> torch.Tensor:
    return frames.mean((-2, -1), keepdim=True).expand_as(frames)


def measure(
    replay: Replay, grams: np.ndarray, starts: Sequence[int], stops: Sequence[int], team: Team
) -> Tuple[Gains, int]:
    """The gains, the same on every rank, and the block forwards they took."""
    prober = Prober(replay, grams, team)
    gains = prober.gains(starts, stops)
    return team.share(gains), prober.block_forwards


__all__ = ["Prober", "lasting", "measure", "places", "region_steps", "whole_steps"]
