# SPDX-License-Identifier: Apache-2.0
"""Cache policies: pure functions of the step index, so that every rank decides alike without communication."""

from typing import Dict, NamedTuple, Optional, Protocol, Sequence, Set, Tuple

from osaccel.dit_cache_config import DitCacheConfig


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


class Policy(Protocol):
    """What the executor needs; `history` is the number of deltas that the coefficients reach back."""

    @property
    def history(self) -> int: ...

    @property
    def regions(self) -> Tuple[Region, ...]: ...

    def plan(self, region: int, step: int) -> RegionPlan:
        """What region number `region` does at step index `step` (0 is the first, noisiest one)."""
        ...


class IntervalPolicy:
    """msModelSlim's rule for one region: after a warm-up every interval-th step computes, the others reuse."""

    history = 1

    def __init__(self, config: DitCacheConfig):
        self.config = config
        start = config.cache_block_start
        stop = start + config.cache_num_blocks
        self.regions: Tuple[Region, ...] = (Region(start, stop),) if config.cache_num_blocks else ()

    def plan(self, region: int, step: int) -> RegionPlan:
        since_start = step - self.config.cache_step_start
        if since_start < 0:
            return COMPUTE
        return STORE if since_start % self.config.cache_step_interval == 0 else REUSE


class MaskPolicy:
    """One region, computed at the steps that a mask names; at the others its delta is reused, or forecast.

    Args:
        region: the blocks that are computed or not as one.
        mask: for every step of the generation, whether the region is computed; the first must be.
        forecast: extrapolate in the step index along the two newest deltas instead of reusing the newest. It keeps one
            more delta, and reuses where only one step has been computed.

    Raises:
        ValueError: the mask is empty or does not begin with a computed step; `plan`: a step past the mask's end.
    """

    def __init__(self, region: Region, mask: Sequence[bool], forecast: bool = False):
        if not mask or not mask[0]:
            raise ValueError("The mask's first step must be computed: there is no delta to replace it yet.")
        self.regions: Tuple[Region, ...] = (region,)
        self.history = 2 if forecast else 1
        self._plans = _mask_plans(mask, self.history)

    def plan(self, region: int, step: int) -> RegionPlan:
        if step >= len(self._plans):
            raise ValueError(f"The mask has {len(self._plans)} steps, but the generation takes more of them.")
        return self._plans[step]


def _mask_plans(mask: Sequence[bool], history: int) -> Tuple[RegionPlan, ...]:
    reconstructed: Dict[int, Tuple[float, ...]] = {}
    needed: Set[int] = set()
    computed: Tuple[int, ...] = ()
    for step, runs in enumerate(mask):
        if runs:
            computed = (step, *computed)[:history]
        else:
            reconstructed[step] = _coefficients(step, computed)
            needed.update(computed)
    return tuple(
        RegionPlan(coefficients=reconstructed[step]) if step in reconstructed else RegionPlan(store=step in needed)
        for step in range(len(mask))
    )


def _coefficients(step: int, computed: Tuple[int, ...]) -> Tuple[float, ...]:
    """Weights of the deltas of the newest `computed` steps: newest + (step - newest) * slope."""
    if len(computed) == 1:
        return (1.0,)
    ahead = (step - computed[0]) / (computed[0] - computed[1])
    return (1.0 + ahead, -ahead)


def check_regions(policy: Policy, num_blocks: int, source: str) -> None:
    """Raise ValueError, opening with `source`, when a region reaches past the last of `num_blocks` blocks."""
    for region in policy.regions:
        if region.stop > num_blocks:
            raise ValueError(
                f"{source}: cache_block_start + cache_num_blocks = {region.stop} reaches past the last of the "
                f"{num_blocks} transformer blocks; their sum may be at most {num_blocks}."
            )


def computed_blocks(policy: Policy, num_blocks: int, num_steps: int) -> int:
    """Block calls of one branch in a generation of `num_steps` steps; without cache it would be blocks * steps."""
    skipped = 0
    for number, region in enumerate(policy.regions):
        reused = sum(policy.plan(number, step).coefficients is not None for step in range(num_steps))
        skipped += reused * (region.stop - region.start)
    return num_blocks * num_steps - skipped
