# SPDX-License-Identifier: Apache-2.0
"""What the network would have answered had its blocks been forecast, tried beside the steps of a plain generation.

At every other step the network is called once more with the same arguments. Then the first block is computed and what
the others add is forecast from the steps before, which is all that such a step of a plan computes. The answer goes
nowhere: the plain generation stays what it is, bit for bit.
"""

import time
from typing import Any, Callable, Dict, List, Optional

import torch

from osaccel.interceptors import Interceptor
from osaccel.network.forwards import Streams, prediction_of, with_prediction
from osaccel.network.regions import hidden_ahead
from osaccel.plan import forecast
from osaccel.search.plan.actions import BY_NAME, COMPUTED_BLOCKS, FORECAST, REFERENCES, Windows, kinds
from osaccel.search.plan.local import full_before


class ForecastsAside(Interceptor):
    """Runs the passes, and observes the blocks for them (`osaccel.search.recording.observe`).

    Attributes:
        windows: of the generation.
        errors: by step, what a forecast made of the network's output less what it was, float32, on the host. Empty
            where guidance runs as two forwards or for some of the steps, or there are no blocks to forecast.
        is_running: whether a pass is running now.
        seconds: that all passes took.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.errors: Dict[int, torch.Tensor] = {}
        self.is_running = False
        self.seconds = 0.0
        self._deltas: Dict[int, Streams] = {}

    def begin(self, scheduler: Any) -> None:
        self.errors.clear()
        self._deltas.clear()
        self.windows = Windows.of(len(scheduler.timesteps), self.num_blocks)
        # The two steps that each forecast follows, newest first; and the last that follows each.
        self._follows: Dict[int, List[int]] = {}
        for window in range(self.windows.count):
            by_step = kinds(BY_NAME[REFERENCES[FORECAST]], self.windows, window)
            forecasts = [step for step, kind in by_step.items() if kind == FORECAST]
            self._follows.update((step, full_before(step, by_step)) for step in forecasts)
        self._last = {step: follower for follower in sorted(self._follows) for step in self._follows[follower]}
        self._before: Optional[Streams] = None
        self._shape: Optional[torch.Size] = None
        self._is_uniform = self.num_blocks > COMPUTED_BLOCKS

    @torch.no_grad()
    def observe(self, step: int, forward: int, index: int, before: Streams, after: Streams) -> None:
        """Called after every block of the plain generation."""
        self._step = step
        shape = before[0].shape if index == COMPUTED_BLOCKS else self._shape
        if forward > 0 or shape != (self._shape or shape):
            self._is_uniform = False
            self._deltas.clear()
            self.errors.clear()
        self._shape = shape
        if not self._is_uniform or step not in self._last:
            return
        if index == COMPUTED_BLOCKS:
            self._before = before
            # What no forecast follows any more goes before the new delta exists: at most three are there.
            self._deltas = {kept: delta for kept, delta in self._deltas.items() if self._last[kept] >= step}
        if index == self.num_blocks - 1:
            assert self._before is not None
            self._deltas[step] = tuple(late - early for late, early in zip(after, self._before))
            self._before = None

    def network(self, proceed: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
        output = proceed(*args, **kwargs)
        if self._is_uniform and self._step in self._follows:
            # A compiled network may write its next answer where its last one is.
            output = with_prediction(output, prediction_of(output).clone())
            # Moved first: accelerators run behind, and what is timed is to be the pass.
            plain = _on_host(output)
            started = time.perf_counter()
            self.errors[self._step] = self._tried(proceed, args, kwargs) - plain
            self.seconds += time.perf_counter() - started
        return output

    @torch.no_grad()
    def _tried(self, proceed: Callable, args: tuple, kwargs: Dict[str, Any]) -> torch.Tensor:
        self.is_running = True
        try:
            return _on_host(proceed(*args, **kwargs))
        finally:
            self.is_running = False

    def of_block(self, index: int, before: Streams) -> Optional[Streams]:
        if index < COMPUTED_BLOCKS:
            return None
        if index > COMPUTED_BLOCKS:
            return before
        newest, older = self._follows[self._step]
        ahead = forecast(self._step, newest, older)
        streams = zip(before, self._deltas[newest], self._deltas[older])
        return tuple(hidden_ahead(hidden, late, early, ahead) for hidden, late, early in streams)

    def close(self) -> None:
        self._deltas.clear()


def _on_host(output: Any) -> torch.Tensor:
    return prediction_of(output).detach().float().cpu()
