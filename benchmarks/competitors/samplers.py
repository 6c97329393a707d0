# SPDX-License-Identifier: Apache-2.0
"""diffusers' own samplers of higher order: what a user could choose instead of a correction, one call a step each."""

import contextlib
from typing import Any, Callable, ContextManager, Dict, Iterator, List

import torch
from diffusers import DPMSolverMultistepScheduler, SASolverScheduler, UniPCMultistepScheduler

from benchmarks.lib.bench import Arm

SDE = "sde-dpmsolver++"
MAKERS: Dict[str, Callable[..., Any]] = {
    "DPM++ 2M SDE midpoint": lambda **spacing: DPMSolverMultistepScheduler(algorithm_type=SDE, **spacing),
    "DPM++ 2M SDE heun": lambda **spacing: DPMSolverMultistepScheduler(
        algorithm_type=SDE, solver_type="heun", **spacing
    ),
    "SASolver": SASolverScheduler,
    "DPM++ 2M": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
SPACINGS: Dict[str, Dict[str, Any]] = {
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
}


def scheduler_of(name: str, spacing: str) -> Any:
    """A new scheduler on the training schedule that the upstream's samplers have, diffusers' default."""
    return MAKERS[name](**SPACINGS[spacing])


@contextlib.contextmanager
def instead(pipeline: Any, scheduler: Any, seed: int) -> Iterator[None]:
    """Another scheduler for the pipeline; its noise is what it draws after `torch.manual_seed(seed)`."""
    original = pipeline.scheduler
    pipeline.scheduler = scheduler
    torch.manual_seed(seed)
    try:
        yield
    finally:
        pipeline.scheduler = original


def of(name: str, spacing: str, count: int, plain: int, seed: int = 0) -> Arm:
    """`count` steps of it instead of the plain run's."""

    def attach(pipeline: Any) -> ContextManager:
        return instead(pipeline, scheduler_of(name, spacing), seed)

    title = f"{name}, {spacing} {count}"
    return Arm(attach, steps=count, name=title, family=name, work=count / plain, key=title)


def every(count: int, plain: int) -> List[Arm]:
    """All of them with every spacing."""
    return [of(name, spacing, count, plain) for name in MAKERS for spacing in SPACINGS]
