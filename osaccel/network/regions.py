# SPDX-License-Identifier: Apache-2.0
"""Runs a cache policy on transformer blocks: on a reuse step no block of the region runs, its stored delta is added.

Blocks get a plain function as instance-level `forward` (a wrapt proxy would be inlined past by torch.compile); copies
and pickles of an attached module see the module as it was before.
"""

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from osaccel.network.policy import Policy, Region, RegionPlan

Streams = Tuple[torch.Tensor, ...]
_ABSENT = object()


class StepClock:
    """The index of the current denoising step: `scheduler.step` calls since `set_timesteps`."""

    def __init__(self) -> None:
        self.step = 0


class ReplacedForward:
    """A module's `forward` replaced on the instance, and put back by `restore`.

    While it is replaced, copy, deepcopy and pickle (so torch.save too) give a module without the replacement.
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


class _Lane:
    """What one branch of one region keeps: the input while the region runs, then its deltas, newest first."""

    __slots__ = ("deltas", "input")

    def __init__(self) -> None:
        self.input: Optional[Streams] = None
        self.deltas: List[Streams] = []


class _CallsInStep:
    """Numbers a block's calls within a step from 0: guidance run as two forwards gives branch 0 and branch 1."""

    __slots__ = ("moment", "next")

    def __init__(self) -> None:
        self.moment, self.next = (-1, -1), 0

    def number(self, generation: int, step: int) -> int:
        if (generation, step) != self.moment:
            self.moment, self.next = (generation, step), 0
        self.next += 1
        return self.next - 1


class RegionCache:
    """One region's deltas, and the replacement forwards of its blocks."""

    def __init__(self, region: Region, plan: Callable[[int], RegionPlan], history: int, states: HiddenStates):
        self.region, self.plan, self.history, self.states = region, plan, history, states
        self.lanes: Dict[int, _Lane] = {}
        self.skipped_blocks = 0
        self._generation = 0

    def clear(self) -> None:
        """A new generation begins, or the last one is over."""
        self.lanes.clear()
        self._generation += 1

    def seed(self, branch: int, delta: Streams) -> None:
        """Take `delta` as what the branch stored last, as if this generation had computed it."""
        self.lanes.setdefault(branch, _Lane()).deltas.insert(0, delta)

    def make_forward(self, index: int, clock: Any, original: Callable) -> Callable:
        """The function that stands for block `index`: it computes, stores or reconstructs as the plan says."""
        is_first, is_last = index == self.region.start, index == self.region.stop - 1
        calls = _CallsInStep()

        def forward(*args: Any, **kwargs: Any) -> Any:
            step = clock.step
            branch = calls.number(self._generation, step)
            plan = self.plan(step)
            if plan.coefficients is not None:
                self.skipped_blocks += 1
                inputs = self.states.of_input(args, kwargs)
                return self.states.as_output(self._reconstruct(inputs, branch, plan, step) if is_first else inputs)
            if not plan.store:
                return original(*args, **kwargs)
            if is_first:
                self._begin(branch, self.states.of_input(args, kwargs))
            output = original(*args, **kwargs)
            if is_last:
                self._store(branch, self.states.of_output(output))
            return output

        return forward

    def _begin(self, branch: int, inputs: Streams) -> None:
        lane = self.lanes.setdefault(branch, _Lane())
        lane.input = inputs
        # The oldest delta goes before the new one exists: memory stays at `history` tensors per branch.
        del lane.deltas[max(self.history - 1, 0) :]

    def _store(self, branch: int, outputs: Streams) -> None:
        lane = self.lanes[branch]
        assert lane.input is not None
        delta = tuple(after - before for after, before in zip(outputs, lane.input))
        lane.input = None
        lane.deltas.insert(0, delta)

    def _reconstruct(self, inputs: Streams, branch: int, plan: RegionPlan, step: int) -> Streams:
        lane = self.lanes.get(branch)
        coefficients = plan.coefficients or ()
        if lane is None or len(lane.deltas) < len(coefficients):
            raise ValueError(
                f"Step {step} is to reuse the cached delta of {self.region}, but "
                f"this generation has not stored it before (branch {branch})."
            )
        return tuple(
            self._add(hidden, [delta[number] for delta in lane.deltas[: len(coefficients)]], coefficients)
            for number, hidden in enumerate(inputs)
        )

    def _add(self, hidden: torch.Tensor, deltas: List[torch.Tensor], coefficients: Tuple[float, ...]) -> torch.Tensor:
        if deltas[0].shape != hidden.shape:
            raise ValueError(
                f"The cached delta of {self.region} has shape "
                f"{tuple(deltas[0].shape)}, but the hidden states now have shape {tuple(hidden.shape)}; "
                "batch, frames and size must stay the same within a generation."
            )
        for delta, coefficient in zip(deltas, coefficients):
            hidden = hidden + (delta if coefficient == 1.0 else coefficient * delta)
        return hidden


class BlockCache:
    """A policy attached to the blocks of one transformer; `detach` leaves the blocks as they were.

    Args:
        blocks: the transformer's blocks, in the order they run. Only blocks of the policy's regions are touched.
        policy: see `osaccel.network.policy`.
        clock: has `step`, the index of the current denoising step.
        states: the names of the blocks' hidden-state arguments; any shape, batch first or sequence first.
        compile_forward: applied to each block's own forward, for models that run compiled.
        begin_pass: called whenever the first of all blocks is.
    """

    def __init__(
        self,
        blocks: Sequence[torch.nn.Module],
        policy: Policy,
        clock: Any,
        states: Optional[HiddenStates] = None,
        compile_forward: Optional[Callable[[Callable], Callable]] = None,
        begin_pass: Optional[Callable[[], None]] = None,
    ):
        self._begin_pass = begin_pass
        self.num_blocks = len(blocks)
        self._replaced: List[ReplacedForward] = []
        self._forwards = 0
        self.regions: List[RegionCache] = []
        by_block: Dict[int, RegionCache] = {}
        for number, region in enumerate(policy.regions):
            cache = RegionCache(region, _plan_of(policy, number), policy.history, states or HiddenStates())
            self.regions.append(cache)
            by_block.update(dict.fromkeys(range(region.start, region.stop), cache))
        try:
            for index, block in enumerate(blocks):
                of_block = by_block.get(index)
                if of_block or compile_forward or index == 0:
                    make = self._maker(index, of_block, clock, compile_forward)
                    self._replaced.append(ReplacedForward(block, make))
        except BaseException:
            self.detach()
            raise

    def _maker(
        self, index: int, cache: Optional[RegionCache], clock: Any, compile_forward: Optional[Callable]
    ) -> Callable[[Callable], Callable]:
        def make(original: Callable) -> Callable:
            forward = compile_forward(original) if compile_forward else original
            forward = cache.make_forward(index, clock, forward) if cache else forward
            return self._counted(forward) if index == 0 else forward

        return make

    def _counted(self, forward: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._forwards += 1
            if self._begin_pass is not None:
                self._begin_pass()
            return forward(*args, **kwargs)

        return counted

    @property
    def total_blocks(self) -> int:
        """Block calls so far if nothing had been skipped."""
        return self._forwards * self.num_blocks

    @property
    def computed_blocks(self) -> int:
        """Blocks that really ran so far."""
        return self.total_blocks - sum(cache.skipped_blocks for cache in self.regions)

    def seed(self, region: int, branch: int, delta: Streams) -> None:
        """Take `delta` as what the branch of this region stored last: for a generation that begins in the middle."""
        self.regions[region].seed(branch, delta)

    def clear(self) -> None:
        """Forget every stored delta."""
        for cache in self.regions:
            cache.clear()

    def detach(self) -> None:
        self.clear()
        while self._replaced:
            self._replaced.pop().restore()


def _plan_of(policy: Policy, region: int) -> Callable[[int], RegionPlan]:
    return lambda step: policy.plan(region, step)
