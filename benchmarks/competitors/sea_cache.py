# SPDX-License-Identifier: Apache-2.0
"""SeaCache (arXiv 2602.18993), as diffusers has it, with its default first-order forecast of the residual."""

from typing import Any, List

from benchmarks.competitors import diffusers_hooks
from benchmarks.lib.bench import Arm
from benchmarks.lib.calibration import Calibration, Competitor, tuned
from osaccel.sampling.levels import NoiseLevels

NAME = "diffusers SeaCache"


def attach(pipeline: Any, steps: int, warmup: int, threshold: float) -> Any:
    """It is made for x = (1 - sigma) * clean + sigma * noise: with the sampler's s = sigma / (1 - sigma), that is its
    scaled input times sqrt(1 + s^2) / (1 + s)."""
    from diffusers.hooks import SeaCacheConfig

    levels = NoiseLevels(pipeline.scheduler)

    def latents(_: Any, args: tuple, kwargs: dict) -> List[Any]:
        scaled = args[0] if args else kwargs["hidden_states"]
        s = diffusers_hooks.sigma_of(levels, kwargs)
        return list((scaled * ((1 + s * s) ** 0.5 / (1 + s))).unbind(0))

    config = SeaCacheConfig(threshold=threshold, retention_steps=warmup, raw_vision_callback=latents)
    return diffusers_hooks.attach(pipeline, config, steps)


def at(calibration: Calibration, work: float) -> Arm:
    given = (calibration.steps, calibration.warmup)
    return tuned(calibration, NAME, lambda own, value: attach(own, *given, value), work)


COMPETITOR = Competitor(NAME, at, "diffusers")
