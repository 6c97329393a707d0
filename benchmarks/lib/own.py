# SPDX-License-Identifier: Apache-2.0
"""osaccel's own ways to sample, as arms and scopes: the one place of the benchmarks that opens generations."""

from typing import Any, Callable, ContextManager, Optional, Sequence

from benchmarks.lib.bench import Arm, Bench
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.generation import Generation
from osaccel.network.policy import IntervalPolicy, Policy, computed_blocks

MOST_INTERVAL = 8


def with_policy(pipeline: Any, policy: Policy) -> Generation:
    """A generation under a cache policy."""
    return Generation(pipeline, policy=policy)


def along(pipeline: Any, timesteps: Optional[Sequence[float]] = None, step: Optional[Callable] = None) -> Generation:
    """A generation that follows a list of timesteps, or whose scheduler's steps are watched."""
    return Generation(pipeline, timesteps=timesteps, step=step)


def cached(bench: Bench, policy: Policy, name: str = "osaccel", family: str = "") -> Arm:
    """The arm of a cache policy."""
    blocks = computed_blocks(policy, bench.num_blocks, bench.steps)

    def attach(pipeline: Any) -> ContextManager:
        return with_policy(pipeline, policy)

    return Arm(attach, name=name, family=family or name, work=blocks / bench.plain_blocks)


def interval_config(budget: int, num_blocks: int, steps: int, warmup: int) -> DitCacheConfig:
    """The four keys within the budget of the smallest interval, then of the fewest blocks; block 0 runs if it can."""
    for interval in range(2, MOST_INTERVAL + 1):
        for count in range(1, num_blocks + 1):
            config = DitCacheConfig(
                cache_block_start=min(1, num_blocks - count), cache_num_blocks=count,
                cache_step_start=warmup, cache_step_interval=interval,
            )  # fmt: skip
            if computed_blocks(IntervalPolicy(config), num_blocks, steps) <= budget:
                return config
    raise ValueError(
        f"no interval up to {MOST_INTERVAL} keeps {num_blocks} blocks x {steps} steps within {budget} block calls"
    )
