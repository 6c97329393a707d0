# SPDX-License-Identifier: Apache-2.0
"""Shows what enters and leaves every transformer block of a generation to whoever wants to see it."""

from typing import Any, Callable, List, Sequence

import torch

from osaccel.clock import Clock
from osaccel.network.forwards import HiddenStates, ReplacedForward, Streams

# f(step, n-th forward within the step, block index, what entered, what left).
Observer = Callable[[int, int, int, Streams, Streams], None]


def watch_blocks(
    blocks: Sequence[torch.nn.Module], clock: Clock, states: HiddenStates, *observers: Observer
) -> Callable[[], None]:
    """Call the observers after each block until the returned function is called; counts the clock's forwards."""
    replaced: List[ReplacedForward] = []

    def detach() -> None:
        while replaced:
            replaced.pop().restore()

    def maker(index: int) -> Callable[[Callable], Callable]:
        def make(original: Callable) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if index == 0:
                    clock.begin_forward()
                before = states.of_input(args, kwargs)
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
