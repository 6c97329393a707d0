# SPDX-License-Identifier: Apache-2.0
"""The package cache-dit: its DBCache, attached as its documentation says for a model that it does not know."""

import contextlib
import functools
from typing import Any, Iterator, Optional, Sequence

from benchmarks.lib import masks
from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration, Competitor, tuned


@contextlib.contextmanager
def attach(
    pipeline: Any,
    steps: int,
    warmup: int,
    threshold: float = 0.0,
    mask: Optional[Sequence[bool]] = None,
    taylor: bool = False,
) -> Iterator[None]:
    """DBCache with F1B0: block 0 always runs and its residual decides, or a fixed mask does.

    With `taylor` the residual of the other blocks is not reused but forecast (TaylorSeer calibrator, order 1).
    """
    import cache_dit as package

    net = pipeline.transformer
    config = package.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=warmup, residual_diff_threshold=threshold,
        num_inference_steps=steps, enable_separate_cfg=False,
    )  # fmt: skip
    if mask is not None:
        config.steps_computation_mask, config.steps_computation_policy = [int(on) for on in mask], "static"
    calibrator = package.TaylorSeerCalibratorConfig(taylorseer_order=1) if taylor else None
    adapter = package.BlockAdapter(
        transformer=net, blocks=net.transformer_blocks, forward_pattern=package.ForwardPattern.Pattern_3
    )
    package.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
    yield


def by_threshold(calibration: Calibration, work: float, name: str, taylor: bool) -> Arm:
    def with_threshold(own: Any, value: float) -> Any:
        return attach(own, calibration.steps, calibration.warmup, value, taylor=taylor)

    return tuned(calibration, name, with_threshold, work)


def by_even_mask(calibration: Calibration, work: float, name: str) -> Arm:
    steps, warmup, blocks = calibration.steps, calibration.warmup, calibration.num_blocks
    mask = masks.even(calibration.budget(work), blocks, steps, warmup)
    computed = steps + sum(mask) * (blocks - 1)
    return Arm(
        lambda own: attach(own, steps, warmup, mask=mask, taylor=True), name=name, family=name,
        work=computed / calibration.bench.plain_blocks, key=f"{name}, {sum(mask)} of {steps}, {warmup}",
    )  # fmt: skip


def _competitor(name: str, **how: Any) -> Competitor:
    return Competitor(name, functools.partial(by_threshold, name=name, **how), "cache-dit")


_MASKED = "cache-dit DBCache + TaylorSeer, even mask"
COMPETITORS = (
    _competitor("cache-dit DBCache, threshold", taylor=False),
    _competitor("cache-dit DBCache + TaylorSeer, threshold", taylor=True),
    Competitor(_MASKED, functools.partial(by_even_mask, name=_MASKED), "cache-dit"),
)
