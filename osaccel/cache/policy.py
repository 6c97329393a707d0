# SPDX-License-Identifier: Apache-2.0
"""Cache policies: pure functions of the step index, so that every rank decides alike without communication."""

from typing import NamedTuple, Optional, Tuple

from osaccel.cache.config import DitCacheConfig


class Region(NamedTuple):
    """Blocks `start .. stop - 1`, computed or reconstructed as one."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"blocks {self.start} to {self.stop - 1}"


class RegionPlan(NamedTuple):
    """What one region does in one step.

    Without `coefficients` the region computes, and keeps its delta (output of the last block minus input of the first)
    when `store` is set. With them nothing runs: output = input + sum(coefficients[k] * k-th newest stored delta).
    """

    store: bool = False
    coefficients: Optional[Tuple[float, ...]] = None


COMPUTE = RegionPlan()
STORE = RegionPlan(store=True)
REUSE = RegionPlan(coefficients=(1.0,))


class IntervalPolicy:
    """msModelSlim's rule for one region: warm-up, then every interval-th step computes and the others reuse its delta.

    A policy is any object with `regions` and `plan`; `history` is the number of deltas its coefficients reach back.
    """

    history = 1

    def __init__(self, config: DitCacheConfig):
        self.config = config
        start = config.cache_block_start
        stop = start + config.cache_num_blocks
        self.regions: Tuple[Region, ...] = (Region(start, stop),) if config.cache_num_blocks else ()

    def plan(self, region: int, step: int) -> RegionPlan:
        """What region number `region` does at step index `step` (0 is the first, noisiest one)."""
        since_start = step - self.config.cache_step_start
        if since_start < 0:
            return COMPUTE
        return STORE if since_start % self.config.cache_step_interval == 0 else REUSE


def check_regions(policy: IntervalPolicy, num_blocks: int, source: str) -> None:
    """Raise ValueError, opening with `source`, when a region reaches past the last of `num_blocks` blocks."""
    for region in policy.regions:
        if region.stop > num_blocks:
            raise ValueError(
                f"{source}: cache_block_start + cache_num_blocks = {region.stop} reaches past the last of the "
                f"{num_blocks} transformer blocks; their sum may be at most {num_blocks}."
            )


def computed_blocks(policy: IntervalPolicy, num_blocks: int, num_steps: int) -> int:
    """Block calls of one branch in a generation of `num_steps` steps; without cache it would be blocks * steps."""
    skipped = 0
    for number, region in enumerate(policy.regions):
        reused = sum(policy.plan(number, step).coefficients is not None for step in range(num_steps))
        skipped += reused * (region.stop - region.start)
    return num_blocks * num_steps - skipped
