# SPDX-License-Identifier: Apache-2.0
"""A module's forward replaced on the instance, and the tensors in what goes in and comes out of it."""

from typing import Any, Callable, Dict, Sequence, Tuple

import torch

Streams = Tuple[torch.Tensor, ...]
_ABSENT = object()


class ReplacedForward:
    """A module's `forward` replaced on the instance, and put back by `restore`.

    A plain function: torch.compile would inline past a wrapt proxy. While it is replaced, copy, deepcopy and pickle
    (so torch.save too) give a module without the replacement.
    """

    def __init__(self, module: torch.nn.Module, make: Callable[[Callable], Callable]):
        self.module = module
        self.previous = {key: module.__dict__.get(key, _ABSENT) for key in ("forward", "__getstate__")}
        if getattr(self.previous["forward"], "_osaccel_replacement", False):
            raise RuntimeError("A cache is already attached to these transformer blocks; detach it first.")
        replacement = make(module.forward)
        replacement._osaccel_replacement = True  # type: ignore[attr-defined]
        module.__dict__["forward"] = replacement
        module.__dict__["__getstate__"] = self._original_state

    def _original_state(self) -> Dict[str, Any]:
        state = dict(self.module.__dict__)
        self._put_back(state)
        return state

    def _put_back(self, attributes: Dict[str, Any]) -> None:
        for key, value in self.previous.items():
            if value is _ABSENT:
                attributes.pop(key, None)
            else:
                attributes[key] = value

    def restore(self) -> None:
        self._put_back(self.module.__dict__)


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
