# SPDX-License-Identifier: Apache-2.0
"""Shows what enters and leaves every transformer block of a generation to whoever wants to see it."""

from typing import Any, Callable, List, Optional, Protocol, Sequence

import torch

from osaccel.clock import Clock
from osaccel.network.forwards import HiddenStates, ReplacedForward, Streams

# f(step, n-th forward within the step, block index, what entered, what left).
Observer = Callable[[int, int, int, Streams, Streams], None]


class Aside(Protocol):
    """Who may run the network once more within a step, which neither the clock nor the observers are to see."""

    is_running: bool

    def of_block(self, index: int, before: Streams) -> Optional[Streams]:
        """What stands in for a block's output while it is running; None has the block computed."""


def watch_blocks(
    blocks: Sequence[torch.nn.Module],
    clock: Clock,
    states: HiddenStates,
    *observers: Observer,
    aside: Optional[Aside] = None,
) -> Callable[[], None]:
    """Call the observers after each block until the returned function is called; counts the clock's forwards."""
    replaced: List[ReplacedForward] = []

    def detach() -> None:
        while replaced:
            replaced.pop().restore()

    def maker(index: int) -> Callable[[Callable], Callable]:
        def make(original: Callable) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                before = states.of_input(args, kwargs)
                if aside is not None and aside.is_running:
                    instead = aside.of_block(index, before)
                    return original(*args, **kwargs) if instead is None else states.as_output(instead)
                if index == 0:
                    clock.begin_forward()
                output = original(*args, **kwargs)
                for observe in observers:
                    observe(clock.step, clock.forward, index, before, states.of_output(output))
                return output

            return forward

        return make

    try:
        for index, block in enumerate(blocks):
            replaced.append(ReplacedForward(block, maker(index), clock))
    except BaseException:
        detach()
        raise
    return detach
