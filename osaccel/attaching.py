# SPDX-License-Identifier: Apache-2.0
"""Puts wrappers around methods of one instance and takes them off again; nothing of a class is touched."""

import os
from typing import Any, Callable, Dict, Optional

import wrapt


def wrap_method(instance: Any, name: str, function: Callable, wrapper: Callable) -> Callable[[], None]:
    """Put a wrapt wrapper around `function` on the instance as `name`; returns what takes it off again."""
    previous: Dict[str, Any] = {name: instance.__dict__[name]} if name in instance.__dict__ else {}

    def undo() -> None:
        instance.__dict__.pop(name, None)
        instance.__dict__.update(previous)

    setattr(instance, name, wrapt.FunctionWrapper(function, wrapper))
    return undo


def is_scheduler(candidate: Any) -> bool:
    """Whether something has the two methods by which generations and steps are known."""
    return all(callable(getattr(candidate, name, None)) for name in ("set_timesteps", "step"))


def wrap_scheduler(
    scheduler: Any,
    on_set_timesteps: Callable,
    on_step: Callable,
    set_timesteps: Optional[Callable] = None,
    step: Optional[Callable] = None,
) -> Callable[[], None]:
    """Put wrapt wrappers around a scheduler's two methods, or around what stands for them; returns what undoes it."""
    undo = [
        wrap_method(scheduler, "set_timesteps", set_timesteps or scheduler.set_timesteps, on_set_timesteps),
        wrap_method(scheduler, "step", step or scheduler.step, on_step),
    ]

    def detach() -> None:
        while undo:
            undo.pop()()

    return detach


def is_rank_zero() -> bool:
    """Whether this process is the one that logs: rank 0 of torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"
