# SPDX-License-Identifier: Apache-2.0
"""osaccel's own ways to sample, as arms and scopes: the one place of the benchmarks that opens generations."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any, ContextManager, Optional, Sequence

import osaccel
from benchmarks.lib.bench import Arm, Bench
from benchmarks.lib.kept import digest_of
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.generation import Generation
from osaccel.interceptors import Interceptor
from osaccel.plan import Plan, Region, for_steps, of_dit_cache

MOST_INTERVAL = 8


@functools.lru_cache(maxsize=None)
def code(*places: str) -> str:
    """A digest of these files and folders of osaccel, for results that are kept to be of the code at hand."""
    root = Path(osaccel.__file__).parent
    files = [file for place in places for file in ([root / place] if "." in place else (root / place).rglob("*.py"))]
    return digest_of([file.read_text() for file in sorted(files)])


def with_plan(pipeline: Any, plan: Plan) -> Generation:
    """A generation under a plan."""
    return Generation(pipeline, plan)


def along(pipeline: Any, timesteps: Optional[Sequence[float]] = None, *watchers: Interceptor) -> Generation:
    """A generation that follows a list of timesteps, or that is watched."""
    plan = Plan(timesteps=None if timesteps is None else tuple(timesteps))
    return Generation(pipeline, plan, interceptors=watchers)


def masked(region: Region, mask: Sequence[bool], forecast: bool = False) -> Plan:
    """The plan that computes a region where the mask is set, and reuses or forecasts its delta elsewhere."""
    reuse = tuple(step for step, computed in enumerate(mask) if not computed)
    return Plan(steps=len(mask), regions=(replace(region, reuse=reuse, order=int(forecast)),))


def planned(bench: Bench, plan: Plan, name: str = "osaccel", family: str = "") -> Arm:
    """The arm of a plan."""

    def attach(pipeline: Any) -> ContextManager:
        return with_plan(pipeline, plan)

    bare = replace(for_steps(plan, plan.steps or bench.steps), made_for={}, measured={})
    key = f"plan {digest_of(repr(bare))}, code {code('network', 'sampling', 'plan.py')}"
    return Arm(attach, name=name, family=family or name, work=plan.work(bench.num_blocks, bench.steps), key=key)


def interval_config(budget: int, num_blocks: int, steps: int, warmup: int) -> DitCacheConfig:
    """The four keys within the budget of the smallest interval, then of the fewest blocks; block 0 runs if it can."""
    for interval in range(2, MOST_INTERVAL + 1):
        for count in range(1, num_blocks + 1):
            config = DitCacheConfig(
                cache_block_start=min(1, num_blocks - count), cache_num_blocks=count,
                cache_step_start=warmup, cache_step_interval=interval,
            )  # fmt: skip
            if of_dit_cache(config).work(num_blocks, steps) * num_blocks * steps <= budget + 1e-6:
                return config
    raise ValueError(
        f"no interval up to {MOST_INTERVAL} keeps {num_blocks} blocks x {steps} steps within {budget} block calls"
    )
