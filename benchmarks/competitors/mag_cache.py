# SPDX-License-Identifier: Apache-2.0
"""MagCache (arXiv 2506.09045), as diffusers has it, with the magnitude ratios of the model at hand."""

import ast
import contextlib
import io
from typing import Any, Callable, List, Sequence

from benchmarks.competitors import diffusers_hooks
from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration, Competitor, tuned

NAME = "diffusers MagCache"


def attach(pipeline: Any, steps: int, warmup: int, threshold: float, ratios: Sequence[float]) -> Any:
    from diffusers.hooks import MagCacheConfig

    config = MagCacheConfig(
        threshold=threshold, retention_ratio=warmup / steps, num_inference_steps=steps, mag_ratios=list(ratios)
    )
    return diffusers_hooks.attach(pipeline, config, steps)


def measured_ratios(steps: int, generate: Callable[[Callable], Any]) -> List[float]:
    """What MagCache prints when it calibrates; `generate(attach)` runs one generation."""
    from diffusers.hooks import MagCacheConfig

    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        generate(lambda pipeline: diffusers_hooks.attach(pipeline, config, steps))
    return ast.literal_eval(printed.getvalue().strip().splitlines()[-1])


def at(calibration: Calibration, work: float) -> Arm:
    given = (calibration.steps, calibration.warmup)
    ratios = calibration.learned(NAME, lambda: measured_ratios(calibration.steps, calibration.learn))
    return tuned(calibration, NAME, lambda own, value: attach(own, *given, value, ratios), work)


COMPETITOR = Competitor(NAME, at, "diffusers")
