# SPDX-License-Identifier: Apache-2.0
"""What the network would have answered had blocks been forecast, tried beside the steps of a plain generation.

At every other step the network is called again with the same arguments. Then no block is computed: the hidden states
where the forecast blocks begin are those of the plain call, and what these blocks add is forecast from the steps
before. The answer goes nowhere: the plain generation stays what it is, bit for bit.
"""

import time
from typing import Any, Callable, Dict, List, Optional

import torch

from osaccel.interceptors import Interceptor
from osaccel.network.forwards import Streams, prediction_of, with_prediction
from osaccel.network.regions import hidden_ahead
from osaccel.plan import forecast
from osaccel.search.plan.actions import COMPUTED_BLOCKS, FULL, Windows, edges, kinds
from osaccel.search.plan.local import full_before, tried


class ForecastsAside(Interceptor):
    """Runs the passes, and observes the blocks for them (`osaccel.search.recording.observe`).

    Attributes:
        windows: of the generation.
        starts: the first of the blocks that are forecast, all behind it are too.
        errors: by start and step, what a forecast made of the network's output less what it was, float32, on the host.
            Empty where guidance runs as two forwards or for some of the steps, or there are no blocks to forecast.
        is_running: whether a pass is running now.
        seconds: that all of it took.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.starts = sorted({edge for edge in edges(num_blocks) if edge < num_blocks})
        self.errors: Dict[int, Dict[int, torch.Tensor]] = {}
        self.is_running = False
        self.seconds = 0.0
        # By step and start, what the blocks from there on added; by start, what enters there in the running step.
        self._deltas: Dict[int, Dict[int, Streams]] = {}
        self._inputs: Dict[int, Streams] = {}

    def begin(self, scheduler: Any) -> None:
        self.close()
        self.errors.clear()
        self.windows = Windows.of(len(scheduler.timesteps), self.num_blocks)
        # The two steps that each forecast follows, newest first, and the last that follows each; alike with guidance.
        self._follows: Dict[int, List[int]] = {}
        for window in range(self.windows.count):
            by_step = kinds(tried(self.windows, is_guided=False)[0], self.windows, window)
            forecasts = [step for step, kind in by_step.items() if kind != FULL]
            self._follows.update((step, full_before(step, by_step)) for step in forecasts)
        self._last = {step: follower for follower in sorted(self._follows) for step in self._follows[follower]}
        self._shape: Optional[torch.Size] = None
        self._is_uniform = self.num_blocks > COMPUTED_BLOCKS

    @torch.no_grad()
    def observe(self, step: int, forward: int, index: int, before: Streams, after: Streams) -> None:
        """Called after every block of the plain generation."""
        self._step = step
        shape = before[0].shape if index == COMPUTED_BLOCKS else self._shape
        if forward > 0 or shape != (self._shape or shape):
            self._is_uniform = False
            self.close()
            self.errors.clear()
        self._shape = shape
        if not self._is_uniform or step not in self._last and step not in self._follows:
            return
        if index in self.starts:
            self._inputs[index] = before
        if index == self.num_blocks - 1:
            self._keep_deltas(step, after)

    def _keep_deltas(self, step: int, after: Streams) -> None:
        # What no forecast follows any more goes before new deltas exist: those of three steps at most are there.
        self._deltas = {kept: deltas for kept, deltas in self._deltas.items() if self._last[kept] >= step}
        if step in self._last:
            started = time.perf_counter()
            # On the host: a search is not to take more of the device than a plan.
            self._deltas[step] = {
                start: tuple((late - early).cpu() for late, early in zip(after, before))
                for start, before in self._inputs.items()
            }
            self.seconds += time.perf_counter() - started
        if step not in self._follows:
            self._inputs.clear()

    def network(self, proceed: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
        output = proceed(*args, **kwargs)
        if self._is_uniform and self._step in self._follows:
            # A compiled network may write its next answer where its last one is.
            output = with_prediction(output, prediction_of(output).clone())
            # Moved first: accelerators run behind, and what is timed is to be the passes.
            plain = _on_host(output)
            started = time.perf_counter()
            for start in self.starts:
                self._start = start
                tried = self._tried(proceed, args, kwargs)
                self.errors.setdefault(start, {})[self._step] = tried - plain
            self._inputs.clear()
            self.seconds += time.perf_counter() - started
        return output

    @torch.no_grad()
    def _tried(self, proceed: Callable, args: tuple, kwargs: Dict[str, Any]) -> torch.Tensor:
        self.is_running = True
        try:
            return _on_host(proceed(*args, **kwargs))
        finally:
            self.is_running = False

    def of_block(self, index: int, before: Streams) -> Streams:
        if index != self._start:
            return before
        newest, older = self._follows[self._step]
        ahead = forecast(self._step, newest, older)
        streams = zip(self._inputs[index], self._deltas[newest][index], self._deltas[older][index])
        return tuple(
            hidden_ahead(hidden, late.to(hidden.device), early.to(hidden.device), ahead)
            for hidden, late, early in streams
        )

    def close(self) -> None:
        self._deltas.clear()
        self._inputs.clear()


def _on_host(output: Any) -> torch.Tensor:
    return prediction_of(output).detach().float().cpu()
