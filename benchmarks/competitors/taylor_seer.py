# SPDX-License-Identifier: Apache-2.0
"""TaylorSeer (arXiv 2503.06923), as diffusers has it: order 1 on every block's output, at a fixed interval."""

from typing import Any, Tuple

from benchmarks.competitors import diffusers_hooks
from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration, Competitor

NAME = "diffusers TaylorSeer"


def attach(pipeline: Any, steps: int, warmup: int, every: int) -> Any:
    """Every `every`-th step computes, after the warm-up."""
    import torch
    from diffusers.hooks import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=every, disable_cache_before_step=warmup, max_order=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+"],
    )  # fmt: skip
    return diffusers_hooks.attach(pipeline, config, steps)


def schedule(budget: int, num_blocks: int, steps: int, warmup: int) -> Tuple[int, int]:
    """The smallest interval within the budget, and what is left as warm-up."""
    runs = budget // num_blocks
    for interval in range(2, steps):
        for start in range(steps, warmup - 1, -1):
            if computed_steps(interval, start, steps) <= runs:
                return interval, start
    raise ValueError(f"no interval keeps TaylorSeer within {budget} block calls")


def computed_steps(interval: int, start: int, steps: int) -> int:
    return start + sum((step - start - 1) % interval == 0 for step in range(start, steps))


def at(calibration: Calibration, work: float) -> Arm:
    steps = calibration.steps
    every, start = schedule(calibration.budget(work), calibration.num_blocks, steps, calibration.warmup)
    return Arm(
        lambda own: attach(own, steps, start, every), name=f"{NAME}, interval {every}", family=NAME,
        work=computed_steps(every, start, steps) / steps, key=f"{NAME}, {every} from {start}",
    )  # fmt: skip


COMPETITOR = Competitor(NAME, at, "diffusers")
