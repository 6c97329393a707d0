# SPDX-License-Identifier: Apache-2.0
"""Shows what enters and leaves every transformer block of a generation to whoever wants to see it."""

from typing import Any, Callable, List, Sequence, Tuple

import torch

from osaccel.network.regions import HiddenStates, ReplacedForward, Streams

# f(step, branch, block index, what entered, what left); a branch is the n-th call of the block within a step.
Observer = Callable[[int, int, int, Streams, Streams], None]


def watch_blocks(
    blocks: Sequence[torch.nn.Module], clock: Any, states: HiddenStates, *observers: Observer
) -> Callable[[], None]:
    """Call the observers after each block until the returned function is called; `clock.step` is the current step."""
    replaced: List[ReplacedForward] = []

    def detach() -> None:
        while replaced:
            replaced.pop().restore()

    def maker(index: int) -> Callable[[Callable], Callable]:
        last: Tuple[int, int] = (-1, 0)

        def make(original: Callable) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Any:
                nonlocal last
                step = clock.step
                last = step, last[1] + 1 if last[0] == step else 0
                before = states.of_input(args, kwargs)
                output = original(*args, **kwargs)
                for observe in observers:
                    observe(step, last[1], index, before, states.of_output(output))
                return output

            return forward

        return make

    try:
        for index, block in enumerate(blocks):
            replaced.append(ReplacedForward(block, maker(index)))
    except BaseException:
        detach()
        raise
    return detach
