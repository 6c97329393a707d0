# SPDX-License-Identifier: Apache-2.0
"""What may stand between a pipeline and its transformer and scheduler during one generation.

A generation holds an ordered list of interceptors, the first outermost: it sees what the pipeline asks for, the last
one what the network and the scheduler are really asked for.
"""

import functools
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch

_NAMES = ("model_output", "timestep", "sample")


class StepCall:
    """One `scheduler.step` call; immutable, `replaced` gives another.

    Attributes:
        model_output, timestep, sample: its first three arguments, however they were given.
        others: the positional arguments behind these, and the keywords.
    """

    def __init__(self, args: tuple, kwargs: Dict[str, Any]):
        named = {**dict(zip(_NAMES, args)), **kwargs}
        self.model_output: torch.Tensor = named.pop("model_output")
        self.timestep = named.pop("timestep")
        self.sample: torch.Tensor = named.pop("sample")
        self.others: Tuple[tuple, Dict[str, Any]] = args[len(_NAMES) :], named

    def replaced(self, model_output: torch.Tensor, sample: Optional[torch.Tensor] = None) -> "StepCall":
        """The same call with other tensors."""
        args, kwargs = self.others
        return StepCall((model_output, self.timestep, self.sample if sample is None else sample, *args), kwargs)

    def made_on(self, step: Callable) -> Any:
        """Call `step`, a scheduler's own."""
        args, kwargs = self.others
        return step(self.model_output, self.timestep, self.sample, *args, **kwargs)


class Interceptor:
    """The base of all: lets everything pass. A subclass overrides what it needs."""

    def begin(self, scheduler: Any) -> None:
        """`set_timesteps` was called: `scheduler.timesteps` are those of the generation that begins."""

    def network(self, proceed: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
        """In place of the transformer's forward; `proceed(*args, **kwargs)` goes on to it."""
        return proceed(*args, **kwargs)

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        """In place of `scheduler.step`; `proceed(call)` goes on to it."""
        return proceed(call)

    def close(self) -> None:
        """The generation is over: let go of every tensor."""


def watches_network(interceptors: Sequence[Interceptor]) -> bool:
    """Whether any of them needs the transformer's forward to be intercepted."""
    return any(type(interceptor).network is not Interceptor.network for interceptor in interceptors)


def network_through(interceptors: Sequence[Interceptor], forward: Callable) -> Callable:
    """`forward` behind all of them."""
    for interceptor in reversed(interceptors):
        forward = _network_through(interceptor, forward)
    return forward


def _network_through(interceptor: Interceptor, inner: Callable) -> Callable:
    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return interceptor.network(inner, args, kwargs)

    return forward


def step_through(interceptors: Sequence[Interceptor], step: Callable) -> Callable[[StepCall], Any]:
    """The scheduler's `step` behind all of them."""

    def innermost(call: StepCall) -> Any:
        return call.made_on(step)

    through: Callable[[StepCall], Any] = innermost
    for interceptor in reversed(interceptors):
        through = functools.partial(interceptor.step, through)
    return through


def latents_of(result: Any) -> torch.Tensor:
    """The next sample in what `scheduler.step` returned, a tuple or an output object."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


def with_latents(result: Any, latents: torch.Tensor) -> Any:
    """What `scheduler.step` returned, with another next sample."""
    placed = latents.to(latents_of(result).device)
    if isinstance(result, tuple):
        return (placed, *result[1:])
    result.prev_sample = placed
    return result
