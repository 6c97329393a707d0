# SPDX-License-Identifier: Apache-2.0
"""Conditional-only steps: half of the batch enters the network, the unconditional output is forecast.

unconditional = conditional - difference, and the difference is forecast from the last steps that computed both: it goes
on from the newest one in the step index, as far as its last two moves agree. Predictions of ancestral samplers are a
martingale, whose moves say nothing of the next; those of the probability flow go straight on. What a forecast was wrong
by is made good at the next full step (`osaccel.sampling.branches`).
"""

import logging
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from osaccel.clock import Clock
from osaccel.interceptors import Interceptor, StepCall
from osaccel.network.forwards import names_of, prediction_of, rows_of, with_prediction
from osaccel.plan import Plan, reached_back
from osaccel.targets import Guidance

logger = logging.getLogger("osaccel")


# Differences: two moves of them say whether these agree.
KEPT = 3


class ConditionalOnly(Interceptor):
    """Runs a plan's conditional-only steps; keeps at most three differences of the size of half of an output, float32.

    Args:
        plan: with the steps.
        guidance: what of the transformer's arguments is halved.
        clock: of the generation.
    """

    def __init__(self, plan: Plan, guidance: Guidance, clock: Clock):
        self.plan, self.guidance, self.clock = plan, guidance, clock
        self.differences: List[Tuple[int, torch.Tensor]] = []
        called = [step for step in range(plan.steps or 0) if step not in plan.skip + plan.conditional_only]
        self._stores = reached_back(called, plan.conditional_only, KEPT)
        self._batch = 0
        self._rows: Optional[int] = None

    def begin(self, scheduler: Any) -> None:
        self.close()

    def close(self) -> None:
        self.differences, self._batch, self._rows = [], 0, None

    def network(self, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        step = self.clock.step
        # Some pipelines guide at some of the steps only; where they do not, there is no half to leave out.
        is_guided = self.clock.has_branches and rows_of(args, kwargs) == self._rows
        if is_guided and self.differences and step in self.plan.conditional_only:
            return self._half(proceed, args, kwargs)
        output = proceed(*args, **kwargs)
        prediction = prediction_of(output)
        if not self._batch:
            self._batch, self._rows = len(prediction), rows_of(args, kwargs)
        if step in self._stores and len(prediction) == self._batch and self._batch % 2 == 0:
            unconditional, conditional = prediction.detach().float().chunk(2)
            self.differences = [(step, conditional - unconditional), *self.differences[: KEPT - 1]]
        return output

    def step(self, proceed: Callable, call: StepCall) -> Any:
        if self.clock.step == 0:
            # The samplers see one prediction a video: where the network made two, guidance is on and in one batch.
            self.clock.has_branches = self._batch == 2 * call.sample.shape[0]
            if not self.clock.has_branches:
                self.differences = []
                logger.info("guidance is off or not in one batch: conditional-only steps compute in full")
        return proceed(call)

    def _half(self, proceed: Callable, args: tuple, kwargs: dict) -> Any:
        args, kwargs = self._halved(proceed, args, kwargs)
        self.clock.is_half = self.clock.was_half = True
        try:
            output = proceed(*args, **kwargs)
        finally:
            self.clock.is_half = False
        conditional = prediction_of(output)
        unconditional = (conditional.float() - ahead_of(self.differences, self.clock.step)).to(conditional.dtype)
        return with_prediction(output, torch.cat([unconditional, conditional]))

    def _halved(self, proceed: Callable, args: tuple, kwargs: dict) -> Tuple[tuple, Dict[str, Any]]:
        """The arguments with the conditional half of everything batch-first."""
        names = names_of(proceed, args)
        halved = tuple(self._half_of(name, value) for name, value in zip(names, args)) + args[len(names) :]
        return halved, {name: self._half_of(name, value) for name, value in kwargs.items()}

    def _half_of(self, name: str, value: Any) -> Any:
        if name not in self.guidance.batch_first:
            return value
        if isinstance(value, (list, tuple)):
            return type(value)([self._half_of(name, item) for item in value])
        if isinstance(value, dict):
            return {key: self._half_of(name, item) for key, item in value.items()}
        # A scalar timestep, or one row for all, has no halves.
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or value.shape[0] == 1:
            return value
        if value.shape[0] != self._batch:
            raise ValueError(
                f"The transformer's argument {name} has {value.shape[0]} rows, but its batch has {self._batch}; only "
                "arguments with one row per half of every video can be halved for a conditional-only step."
            )
        return value[self._batch // 2 :]


def ahead_of(known: Sequence[Tuple[int, torch.Tensor]], step: int) -> torch.Tensor:
    """What a value is taken to be at a later step that was known at these, newest first; (N, ...) each.

    It stays where fewer than three are known. Else it goes on by its last move times the slope of that on the one
    before, both per step, within [0, 1]: not at all where moves are independent, straight on along a line. Each of N
    has its own slope; no synchronisation.
    """
    newest, value = known[0]
    if len(known) < KEPT:
        return value
    (before, older), (first, oldest) = known[1:]
    move, earlier = (value - older) / (newest - before), (older - oldest) / (before - first)
    return value + (step - newest) * slope_on(earlier, move).clamp(0.0, 1.0) * move


def slope_on(base: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The slope of values on what they are measured by, both (N, ...), by least squares; (N, 1, ...)."""
    axes = tuple(range(1, base.dim()))
    return (values * base).sum(axes, keepdim=True) / base.square().sum(axes, keepdim=True).clamp_min(1e-30)
