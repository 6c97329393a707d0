# SPDX-License-Identifier: Apache-2.0
"""A module's forward replaced on the instance, and the tensors in what goes in and comes out of it."""

import functools
import inspect
import threading
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch

from osaccel.attaching import ABSENT, hide_from_copies, lock, put_back
from osaccel.clock import Clock

Streams = Tuple[torch.Tensor, ...]


class _Switch:
    """A module's `forward` while replacements are attached to it: every thread gets its own, the newest it has.

    Pipelines in several threads may share a module; a generation within a step of another one may, too. In a thread
    without a replacement the module's own forward runs.
    """

    def __init__(self, module: torch.nn.Module):
        self.module, self.original = module, module.forward
        self.attached: Tuple[ReplacedForward, ...] = ()
        self._previous = module.__dict__.get("forward", ABSENT)

        # Torch.compile would inline past a wrapt proxy.
        @functools.wraps(self.original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            current = self.current()
            return (self.original if current is None else current.forward)(*args, **kwargs)

        forward._osaccel_switch = self  # type: ignore[attr-defined]
        module.__dict__["forward"] = forward
        self._show_to_copies = hide_from_copies(module, self._put_back)

    @staticmethod
    def of(module: torch.nn.Module) -> "_Switch":
        return getattr(module.__dict__.get("forward"), "_osaccel_switch", None) or _Switch(module)

    def current(self) -> Optional["ReplacedForward"]:
        thread = threading.get_ident()
        for one in reversed(self.attached):
            if one.thread in (thread, None):
                return one
        return None

    def add(self, one: "ReplacedForward") -> None:
        for other in self.attached:
            if other.clock is one.clock or other.thread is None or one.thread is None:
                raise RuntimeError("A cache is already attached to these transformer blocks; detach it first.")
        self.attached += (one,)

    def remove(self, one: "ReplacedForward") -> None:
        self.attached = tuple(other for other in self.attached if other is not one)
        if not self.attached:
            self._put_back(self.module.__dict__)
            self._show_to_copies()

    def _put_back(self, attributes: Dict[str, Any]) -> None:
        put_back(attributes, "forward", self._previous)


class ReplacedForward:
    """A module's `forward` replaced on the instance, and put back by `restore`.

    A plain function. While it is replaced, copy, deepcopy and pickle (so torch.save too) give a module without the
    replacement.

    Args:
        module: whose.
        make: gives the replacement, from the module's own forward.
        clock: for whose thread; None for all of them.
    """

    def __init__(self, module: torch.nn.Module, make: Callable[[Callable], Callable], clock: Optional[Clock] = None):
        self.clock = clock
        with lock:
            self._switch = _Switch.of(module)
            try:
                self.forward = make(self._switch.original)
                self._switch.add(self)
            except BaseException:
                self._switch.remove(self)
                raise

    @property
    def thread(self) -> Optional[int]:
        return None if self.clock is None else self.clock.thread

    def is_current(self) -> bool:
        """Whether it is what this thread's calls of the module reach."""
        return self._switch.current() is self

    def restore(self) -> None:
        with lock:
            self._switch.remove(self)


class HiddenStates:
    """Finds the hidden states in a block's arguments and return value: the first `names`, by keyword or by position."""

    def __init__(self, names: Sequence[str] = ("hidden_states",)):
        self.names = tuple(names)

    def of_input(self, args: tuple, kwargs: dict) -> Streams:
        count = len(self.names)
        found = args[:count] + tuple(kwargs[name] for name in self.names[len(args) :] if name in kwargs)
        if len(found) != count:
            raise TypeError(
                f"A transformer block was called without its hidden states ({', '.join(self.names)}, by position or by "
                f"keyword); it got {len(args)} positional arguments and the keywords {sorted(kwargs)}."
            )
        return found

    def of_output(self, output: Any) -> Streams:
        return (output,) if len(self.names) == 1 else tuple(output[: len(self.names)])

    def as_output(self, streams: Streams) -> Any:
        return streams[0] if len(self.names) == 1 else streams


def prediction_of(output: Any) -> torch.Tensor:
    """The tensor in what a transformer's forward returned: itself, a tuple's first, or an output object's `sample`."""
    if isinstance(output, torch.Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def with_prediction(output: Any, prediction: torch.Tensor) -> Any:
    """What a transformer's forward returned, with another tensor in it."""
    if isinstance(output, torch.Tensor):
        return prediction
    return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)


def rows_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Optional[int]:
    """The batch of a transformer's call, halves of guidance counted: rows of `hidden_states`, or the first argument.

    None where there is no such tensor.
    """
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    return len(hidden) if isinstance(hidden, torch.Tensor) and hidden.dim() else None


class Inputs(NamedTuple):
    """The latents and the time in a transformer's call, by the names that diffusers' transformers give them."""

    hidden_states: torch.Tensor
    timestep: torch.Tensor


def names_of(forward: Callable, args: Sequence[Any]) -> List[str]:
    """What `forward` calls its positional arguments, as far as it names them."""
    return list(inspect.signature(forward).parameters)[: len(args)]


def inputs_of(forward: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Optional[Inputs]:
    """The latents and the time that a transformer is called with; None unless both are tensors of these names."""
    given = {**dict(zip(names_of(forward, args), args)), **kwargs}
    found = [given.get(name) for name in Inputs._fields]
    return Inputs(*found) if all(isinstance(value, torch.Tensor) for value in found) else None  # type: ignore[arg-type]


def with_inputs(
    forward: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], inputs: Inputs
) -> Tuple[tuple, Dict[str, Any]]:
    """The call's arguments with other latents and another time."""
    changed, names = inputs._asdict(), names_of(forward, args)
    placed = tuple(changed.get(name, value) for name, value in zip(names, args))
    return placed + tuple(args[len(names) :]), {name: changed.get(name, value) for name, value in kwargs.items()}
