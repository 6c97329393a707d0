# SPDX-License-Identifier: Apache-2.0
"""Runs a plan's regions on transformer blocks: at a reuse step no block of the region runs, its stored delta is added.

A delta is what the region's blocks added: output of the last minus input of the first. Where a plan computes the
conditional half alone at some steps, each half of the batch stores and reuses on its own.
"""

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from osaccel.clock import Clock
from osaccel.network.forwards import HiddenStates, ReplacedForward, Streams
from osaccel.plan import HALF, Plan, Region, Schedule, forecast

_WHOLE, _UNCONDITIONAL, _CONDITIONAL = "whole batch", "unconditional", "conditional"


class _Lane:
    """What one branch of one region stored: (step, delta), newest first."""

    __slots__ = ("deltas",)

    def __init__(self) -> None:
        self.deltas: List[Tuple[int, Streams]] = []


def hidden_ahead(hidden: torch.Tensor, delta: torch.Tensor, older: torch.Tensor, ahead: float) -> torch.Tensor:
    """Hidden states plus the delta on the line through the two newest; `ahead` is `osaccel.plan.forecast`."""
    return hidden + (1.0 + ahead) * delta - ahead * older


class RegionCache:
    """One region's deltas, and the replacement forwards of its blocks.

    Args:
        region, schedule: what it is, and when it reuses and stores.
        states: finds the hidden states in a block's arguments.
        batch_dim: the batch's dimension in the hidden states.
    """

    def __init__(self, region: Region, schedule: Schedule, states: HiddenStates, batch_dim: int = 0):
        self.region, self.schedule, self.states, self.batch_dim = region, schedule, states, batch_dim
        self.lanes: Dict[Tuple[int, str], _Lane] = {}
        self.skipped_blocks = 0.0
        self._input: Optional[Streams] = None

    def clear(self) -> None:
        """A new generation begins, or the last one is over."""
        self.lanes.clear()
        self._input = None

    def make_forward(self, index: int, clock: Clock, original: Callable) -> Callable:
        """The function that stands for block `index`: it computes, stores or reconstructs as the plan says."""
        is_first, is_last = index == self.region.start, index == self.region.stop - 1
        reuses, stores = self.schedule.reuses, self.schedule.stores

        def forward(*args: Any, **kwargs: Any) -> Any:
            step = clock.step
            if reuses(step):
                self.skipped_blocks += HALF if clock.is_half else 1.0
                inputs = self.states.of_input(args, kwargs)
                return self.states.as_output(self._reconstruct(inputs, clock) if is_first else inputs)
            if not stores(step):
                return original(*args, **kwargs)
            if is_first:
                self._begin(clock, self.states.of_input(args, kwargs))
            output = original(*args, **kwargs)
            if is_last:
                self._store(clock, self.states.of_output(output))
            return output

        return forward

    def _lanes(self, clock: Clock) -> List[_Lane]:
        """One lane per branch that the running forward holds, in the order of the batch."""
        names: Tuple[str, ...] = (_WHOLE,)
        if clock.has_branches:
            self._part(clock.forward)
            names = (_CONDITIONAL,) if clock.is_half else (_UNCONDITIONAL, _CONDITIONAL)
        return [self.lanes.setdefault((clock.forward, name), _Lane()) for name in names]

    def _part(self, forward: int) -> None:
        """What was stored before the halves were known becomes two tensors, so that one can go without the other."""
        whole = self.lanes.pop((forward, _WHOLE), None)
        for place, name in enumerate((_UNCONDITIONAL, _CONDITIONAL) if whole else ()):
            self.lanes[forward, name] = lane = _Lane()
            lane.deltas = [
                (step, tuple(self._halves(tensor)[place].clone() for tensor in delta))
                for step, delta in (whole.deltas if whole else ())
            ]

    def _halves(self, tensor: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        if tensor.shape[self.batch_dim] % 2:
            raise ValueError(
                f"Guidance is off at a step at which {self.region} is stored or reused; where a pipeline guides at "
                "some of the steps only, a plan can skip steps and leave out halves, but reuse no region."
            )
        return tensor.chunk(2, self.batch_dim)

    def _begin(self, clock: Clock, inputs: Streams) -> None:
        self._input = inputs
        # The oldest delta goes before the new one exists: memory stays at one tensor per order and branch.
        for lane in self._lanes(clock):
            del lane.deltas[self.region.order :]

    def _store(self, clock: Clock, outputs: Streams) -> None:
        assert self._input is not None
        lanes, pairs = self._lanes(clock), list(zip(outputs, self._input))
        self._input = None
        for place, lane in enumerate(lanes):
            if len(lanes) == 1:
                delta = tuple(after - before for after, before in pairs)
            else:
                delta = tuple(self._halves(after)[place] - self._halves(before)[place] for after, before in pairs)
            lane.deltas.insert(0, (clock.step, delta))

    def _reconstruct(self, inputs: Streams, clock: Clock) -> Streams:
        lanes = self._lanes(clock)
        if len(lanes) == 1:
            return tuple(self._add(hidden, number, lanes[0], clock) for number, hidden in enumerate(inputs))
        return tuple(
            torch.cat(
                [self._add(half, number, lane, clock) for half, lane in zip(self._halves(hidden), lanes)],
                self.batch_dim,
            )
            for number, hidden in enumerate(inputs)
        )

    def _add(self, hidden: torch.Tensor, number: int, lane: _Lane, clock: Clock) -> torch.Tensor:
        """One stream of one branch plus its stored or forecast delta."""
        if not lane.deltas:
            raise ValueError(
                f"Step {clock.step} is to reuse the cached delta of {self.region}, but "
                f"this generation has not stored it before (forward {clock.forward} of the step)."
            )
        (newest, streams), *earlier = lane.deltas
        delta = streams[number]
        if delta.shape != hidden.shape:
            raise ValueError(
                f"The cached delta of {self.region} has shape "
                f"{tuple(delta.shape)}, but the hidden states now have shape {tuple(hidden.shape)}; "
                "batch, frames and size must stay the same within a generation."
            )
        if self.region.order == 0 or not earlier:
            return hidden + delta
        before, older = earlier[0]
        return hidden_ahead(hidden, delta, older[number], forecast(clock.step, newest, before))


class BlockCache:
    """A plan's regions attached to the blocks of one transformer; `detach` leaves the blocks as they were.

    Args:
        blocks: the transformer's blocks, in the order they run. Only the first and those of regions are touched.
        plan: see `osaccel.plan`.
        clock: where the generation stands; its forwards are counted here.
        states: the names of the blocks' hidden-state arguments; any shape, batch first or sequence first.
        batch_dim: the batch's dimension in them.
        compile_forward: applied to each block's own forward, for models that run compiled.
        begin_pass: called whenever the first of all blocks is, before the forward is counted.
    """

    def __init__(
        self,
        blocks: Sequence[torch.nn.Module],
        plan: Plan,
        clock: Clock,
        states: Optional[HiddenStates] = None,
        batch_dim: int = 0,
        compile_forward: Optional[Callable[[Callable], Callable]] = None,
        begin_pass: Optional[Callable[[], None]] = None,
    ):
        self._begin_pass, self._clock = begin_pass, clock
        self.num_blocks = len(blocks)
        self._replaced: List[ReplacedForward] = []
        self._forwards = self._work = 0.0
        self.regions = [
            RegionCache(region, Schedule.of(region, plan), states or HiddenStates(), batch_dim)
            for region in plan.used_regions
        ]
        by_block = {block: cache for cache in self.regions for block in range(cache.region.start, cache.region.stop)}
        try:
            for index, block in enumerate(blocks):
                of_block = by_block.get(index)
                if of_block or compile_forward or index == 0:
                    make = self._maker(index, of_block, compile_forward)
                    self._replaced.append(ReplacedForward(block, make, clock))
        except BaseException:
            self.detach()
            raise

    def _maker(
        self, index: int, cache: Optional[RegionCache], compile_forward: Optional[Callable]
    ) -> Callable[[Callable], Callable]:
        def make(original: Callable) -> Callable:
            forward = compile_forward(original) if compile_forward else original
            forward = cache.make_forward(index, self._clock, forward) if cache else forward
            return self._counted(forward) if index == 0 else forward

        return make

    def _counted(self, forward: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._begin_pass is not None:
                self._begin_pass()
            self._clock.begin_forward()
            self._forwards += 1.0
            self._work += HALF if self._clock.is_half else 1.0
            return forward(*args, **kwargs)

        return counted

    @property
    def forwards(self) -> float:
        """Forwards through the blocks so far, halves counted whole."""
        return self._forwards

    @property
    def computed_blocks(self) -> float:
        """Network work so far: block calls x share of the batch."""
        return self._work * self.num_blocks - sum(cache.skipped_blocks for cache in self.regions)

    def clear(self) -> None:
        """Forget every stored delta."""
        for cache in self.regions:
            cache.clear()

    def is_reached(self) -> bool:
        """Whether this thread's calls of the blocks come here."""
        return self._replaced[0].is_current()

    def detach(self) -> None:
        self.clear()
        while self._replaced:
            self._replaced.pop().restore()
