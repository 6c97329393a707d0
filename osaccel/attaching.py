# SPDX-License-Identifier: Apache-2.0
"""Puts wrappers around methods of one instance and takes them off again; nothing of a class is touched.

Invariant: what is put on an instance is not on its copies, and nothing is left when the last of it is taken off.
"""

import os
import threading
from typing import Any, Callable, Dict, Optional

import wrapt

# What is attached to something that threads share comes and goes one by one.
lock = threading.RLock()
ABSENT = object()


class PlainState:
    """An instance's `__getstate__` while something is attached to it: copy, deepcopy and pickle see it without."""

    def __init__(self, instance: Any):
        self.instance, self.cleaners = instance, []  # type: ignore[var-annotated]
        self.previous = instance.__dict__.get("__getstate__", ABSENT)
        instance.__dict__["__getstate__"] = self

    def __call__(self) -> Dict[str, Any]:
        state = dict(self._own())
        put_back(state, "__getstate__", self.previous)
        for clean in reversed(self.cleaners):
            clean(state)
        return state

    def _own(self) -> Dict[str, Any]:
        if self.previous is not ABSENT:
            return self.previous()
        of_class = getattr(type(self.instance), "__getstate__", None)
        # From Python 3.11 on every object has one.
        is_default = of_class is getattr(object, "__getstate__", None)
        return vars(self.instance) if is_default or of_class is None else of_class(self.instance)


def hide_from_copies(instance: Any, clean: Callable[[Dict[str, Any]], None]) -> Callable[[], None]:
    """Until the returned function is called, `clean(attributes)` is applied to what copies of the instance get."""
    with lock:
        state = instance.__dict__.get("__getstate__")
        if not isinstance(state, PlainState):
            state = PlainState(instance)
        state.cleaners.append(clean)

    def undo() -> None:
        with lock:
            state.cleaners.remove(clean)
            if not state.cleaners:
                put_back(instance.__dict__, "__getstate__", state.previous)

    return undo


def put_back(attributes: Dict[str, Any], name: str, value: Any) -> None:
    """Let an attribute be what it was before; ABSENT removes it."""
    if value is ABSENT:
        attributes.pop(name, None)
    else:
        attributes[name] = value


def wrap_method(instance: Any, name: str, function: Callable, wrapper: Callable) -> Callable[[], None]:
    """Put a wrapt wrapper around `function` on the instance as `name`; returns what takes it off again."""
    previous = instance.__dict__.get(name, ABSENT)
    show_to_copies = hide_from_copies(instance, lambda attributes: put_back(attributes, name, previous))

    def undo() -> None:
        put_back(instance.__dict__, name, previous)
        show_to_copies()

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
