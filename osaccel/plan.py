# SPDX-License-Identifier: Apache-2.0
"""The plan: one frozen value that says what every step of a generation computes; pure functions of the step, no torch.

Step indices count the run's own `scheduler.step` calls from 0, the noisiest. What no list names is computed in full.
"""

import bisect
from collections.abc import Sequence as SequenceType
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Callable, FrozenSet, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from osaccel.dit_cache_config import DitCacheConfig

FORMAT = "osaccel.plan/1"
ORDERS = (0, 1)
# What a conditional-only step leaves of the batch.
HALF = 0.5


class Interval(NamedTuple):
    """msModelSlim's rule for the steps that reuse: from `first` on all but every `every`-th."""

    first: int
    every: int

    def __contains__(self, step: object) -> bool:
        return isinstance(step, int) and step >= self.first and (step - self.first) % self.every != 0


@dataclass(frozen=True)
class Region:
    """Blocks `start .. stop - 1`, which are not computed at the steps in `reuse`.

    Args:
        reuse: steps at which the region's stored delta (what its blocks added) stands in for its blocks.
        order: 0 adds the newest stored delta, 1 extrapolates along the two newest in the step index.
    """

    start: int
    stop: int
    reuse: Union[Tuple[int, ...], Interval] = ()
    order: int = 0

    @property
    def is_used(self) -> bool:
        """Whether any step can reuse."""
        return self.reuse.every > 1 if isinstance(self.reuse, Interval) else bool(self.reuse)

    def __str__(self) -> str:
        last = self.stop - 1
        return f"blocks {self.start} to {last}" if self.start < last else f"block {last}"


@dataclass(frozen=True)
class Correction:
    """Strengths in [0, 1] of the second-order correction, one number or one per step (docs/correction.md).

    Each is the most that is done: a video whose predictions swing back gets less (`osaccel.sampling.corrected`).

    Args:
        predictor: how far what stands in for the denoised prediction within a step follows its newest change.
        corrector: how much of what an interval lost is made good once its end is known: the network is asked at
            the mean of skipped steps.
        response: how far what stands in at skipped steps answers to the noise that was added since
            (`osaccel.sampling.response`); of use for samplers that add noise.
    """

    predictor: Union[float, Tuple[float, ...]] = 0.0
    corrector: Union[float, Tuple[float, ...]] = 0.0
    response: Union[float, Tuple[float, ...]] = 0.0

    @property
    def is_used(self) -> bool:
        """Whether it does anything of its own; a response answers at skipped steps only."""
        return _is_any(self.predictor) or _is_any(self.corrector)

    @property
    def responds(self) -> bool:
        return _is_any(self.response)

    def __str__(self) -> str:
        names = ["predictor", "corrector", *(["response"] if self.responds else [])]
        return ", ".join(f"{name} {_extent(getattr(self, name))}" for name in names)

    def at(self, step: int) -> "Strengths":
        """The strengths of one step."""
        values = (getattr(self, name) for name in Strengths._fields)
        return Strengths(*(value[step] if isinstance(value, tuple) else value for value in values))


class Strengths(NamedTuple):
    """Of a correction at one step."""

    predictor: float
    corrector: float
    response: float


# What stands beside skipped steps unless something else is asked for.
UNDER_SKIP = Correction(corrector=1.0, response=1.0)


@dataclass(frozen=True)
class Plan:
    """What a generation does differently from the plain one; the default is the plain one.

    Args:
        steps: the `scheduler.step` calls of the run it is for; None for rules that fit any number.
        skip: steps at which the network is not called; a stand-in goes to the scheduler (`osaccel.sampling.standin`).
        conditional_only: steps at which only the conditional half of the batch is computed (`osaccel.network.halves`).
        regions: disjoint blocks that are reused at some steps (`osaccel.network.regions`).
        correction: strengths of the second-order correction.
        timesteps: a searched list, descending, in [0, 1000], in place of the scheduler's spacing.
        made_for: what the plan is bound to (`osaccel.binding`); measured: what a search found. Neither changes a run.

    Raises:
        ValueError: the parts contradict each other or do not fit `steps`; the message begins with the key.
    """

    steps: Optional[int] = None
    skip: Tuple[int, ...] = ()
    conditional_only: Tuple[int, ...] = ()
    regions: Tuple[Region, ...] = ()
    correction: Correction = Correction()
    timesteps: Optional[Tuple[float, ...]] = None
    made_for: Mapping[str, Any] = field(default_factory=dict, compare=False)
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.steps is not None and not (_is_integer(self.steps) and self.steps > 0):
            raise ValueError(f"steps must be an integer from 1 on, or None for any number, got {self.steps!r}.")
        for name, named in self.named_steps():
            _check_steps(name, named, self.steps)
        both = sorted(set(self.skip) & set(self.conditional_only))
        if both:
            raise ValueError(f"skip and conditional_only both name step {both[0]}; a skipped step computes nothing.")
        for number, region in enumerate(self.regions):
            _check_region(f"regions[{number}]", region, self.skip)
        _check_disjoint(self.regions)
        for name in Strengths._fields:
            _check_strengths(f"correction.{name}", getattr(self.correction, name), self.steps)

    def named_steps(self) -> List[Tuple[str, Tuple[int, ...]]]:
        """By key, the steps at which something is saved; those of a rule have no names."""
        named = [("skip", self.skip), ("conditional_only", self.conditional_only)]
        for number, region in enumerate(self.regions):
            if not isinstance(region.reuse, Interval):
                named.append((f"regions[{number}].reuse", region.reuse))
        return named

    @property
    def touches_network(self) -> bool:
        """Whether some step computes less than everything."""
        return bool(self.skip or self.conditional_only or self.used_regions)

    @property
    def is_plain(self) -> bool:
        """Whether a generation under it is the plain one."""
        return not (self.touches_network or self.correction.is_used or self.timesteps)

    @property
    def used_regions(self) -> Tuple[Region, ...]:
        return tuple(region for region in self.regions if region.is_used)

    def check_steps(self, steps: int) -> None:
        """Raise ValueError when a run of `steps` steps is not what the plan is for."""
        if self.steps not in (None, steps):
            raise ValueError(
                f"the plan is for {self.steps} steps, but this generation takes {steps}; sample with {self.steps} "
                "steps, or search a plan for this number."
            )

    def check_blocks(self, num_blocks: int) -> None:
        """Raise ValueError when a region reaches past the last of `num_blocks` blocks."""
        for number, region in enumerate(self.regions):
            if region.stop > num_blocks:
                what = (
                    "cache_block_start + cache_num_blocks"
                    if isinstance(region.reuse, Interval)
                    else f"regions[{number}].stop"
                )
                their = "their sum" if isinstance(region.reuse, Interval) else "it"
                raise ValueError(
                    f"{what} = {region.stop} reaches past the last of the {num_blocks} transformer blocks; "
                    f"{their} may be at most {num_blocks}."
                )

    def work_of(self, step: int, num_blocks: int, guided: bool = True) -> float:
        """Network work of one step: block calls x share of the batch; a full step is `num_blocks`."""
        if step in self.skip:
            return 0.0
        reused = sum(region.stop - region.start for region in self.regions if step in region.reuse)
        return (num_blocks - reused) * (HALF if guided and step in self.conditional_only else 1.0)

    def work(self, num_blocks: int, steps: Optional[int] = None, guided: bool = True) -> float:
        """Network work of a generation, plain = 1; `steps` where the plan does not say."""
        count = self.steps or steps
        if count is None:
            raise ValueError("the number of steps is needed: this plan fits any.")
        return sum(self.work_of(step, num_blocks, guided) for step in range(count)) / (num_blocks * count)

    def describe(self) -> str:
        """What it does, in a few words."""
        parts = [f"{_steps_in_words(self.skip)} skipped"] if self.skip else []
        if self.conditional_only:
            parts.append(f"{len(self.conditional_only)} conditional only")
        for region in self.used_regions:
            how = "forecast" if region.order else "reused"
            if isinstance(region.reuse, Interval):
                when = f"from step {region.reuse.first} on but at 1 step in {region.reuse.every}"
            else:
                when = f"at {_steps_in_words(region.reuse)}"
            parts.append(f"{region} {how} {when}")
        if self.correction.is_used:
            parts.append(f"corrected ({self.correction})")
        return ", ".join(parts) or "every step in full"


def _steps_in_words(steps: Sequence[int]) -> str:
    return "1 step" if len(steps) == 1 else f"{len(steps)} steps"


def _is_any(strength: Union[float, Tuple[float, ...]]) -> bool:
    return any(strength) if isinstance(strength, tuple) else bool(strength)


def _extent(strength: Union[float, Tuple[float, ...]]) -> str:
    values = strength if isinstance(strength, tuple) else (strength,)
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def of_dit_cache(config: DitCacheConfig) -> Plan:
    """The plan that msModelSlim's four numbers stand for, for any number of steps."""
    start, stop = config.cache_block_start, config.cache_block_start + config.cache_num_blocks
    if config.cache_num_blocks == 0:
        return Plan()
    return Plan(regions=(Region(start, stop, Interval(config.cache_step_start, config.cache_step_interval)),))


def for_steps(plan: Plan, steps: int) -> Plan:
    """The same plan with the number of steps and every step named."""
    plan.check_steps(steps)
    regions = tuple(
        replace(region, reuse=tuple(step for step in range(steps) if step in region.reuse)) for region in plan.regions
    )
    return replace(plan, steps=steps, regions=regions)


class Schedule(NamedTuple):
    """When one region of a plan reuses, and at which of the steps it computes its delta is worth storing."""

    reuses: Callable[[int], bool]
    stores: Callable[[int], bool]

    @classmethod
    def of(cls, region: Region, plan: Plan) -> "Schedule":
        reuse = region.reuse
        if isinstance(reuse, Interval):
            first = reuse.first
            return cls(reuse.__contains__, lambda step: step >= first and step not in reuse)
        return cls(frozenset(reuse).__contains__, _stored(region, plan).__contains__)


def _stored(region: Region, plan: Plan) -> FrozenSet[int]:
    """The computed steps whose delta a later step reaches back to, on either branch.

    A conditional-only step stores for the conditional branch alone, so the unconditional one reaches further back.
    """
    called = [step for step in range(plan.steps or 0) if step not in plan.skip]
    needed: FrozenSet[int] = frozenset()
    for branch in (called, [step for step in called if step not in plan.conditional_only]):
        computed = [step for step in branch if step not in region.reuse]
        needed |= reached_back(computed, [step for step in branch if step in region.reuse], region.order + 1)
    return needed


def reached_back(steps: Sequence[int], wanted: Iterable[int], depth: int) -> FrozenSet[int]:
    """Of the ascending `steps`, those among the `depth` newest before one of the `wanted` steps."""
    needed: List[int] = []
    for step in wanted:
        place = bisect.bisect_left(steps, step)
        needed.extend(steps[max(0, place - depth) : place])
    return frozenset(needed)


def forecast(step: int, newest: int, before: int) -> float:
    """How far along the line through two earlier steps `step` lies: value = newest + it * (newest - before)."""
    return (step - newest) / (newest - before)


def _is_integer(value: Any) -> bool:
    # True is an int to Python.
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_steps(name: str, named: Sequence[int], steps: Optional[int]) -> None:
    if not isinstance(named, SequenceType) or isinstance(named, str):
        raise ValueError(f"{name} must be a sequence of steps, got {named!r}.")
    if named and steps is None:
        raise ValueError(f"{name} names steps, so steps must say how many there are.")
    for step in named:
        if not _is_integer(step):
            raise ValueError(f"{name}: a step must be an integer, got {step!r}.")
        if not 0 <= step < (steps or 0):
            raise ValueError(f"{name}: step {step} is not one of the run's steps, 0 to {(steps or 0) - 1}.")
    twice = [step for step, after in zip(sorted(named), sorted(named)[1:]) if step == after]
    if twice:
        raise ValueError(f"{name} names step {twice[0]} twice.")
    if 0 in named:
        raise ValueError(f"{name}: the first step, 0, must be computed in full; nothing can stand in for it yet.")


def _check_region(name: str, region: Region, skip: Sequence[int]) -> None:
    if region.order not in ORDERS or isinstance(region.order, bool):
        raise ValueError(f"{name}.order must be 0 (reuse) or 1 (forecast), got {region.order!r}.")
    if not 0 <= region.start < region.stop:
        raise ValueError(
            f"{name}: start {region.start} and stop {region.stop} name no blocks; 0 <= start < stop is allowed."
        )
    both = sorted(step for step in skip if step in region.reuse)
    if both:
        raise ValueError(f"skip and {name}.reuse both name step {both[0]}; a skipped step calls no block.")


def _check_disjoint(regions: Sequence[Region]) -> None:
    numbers = sorted(range(len(regions)), key=lambda number: regions[number].start)
    for left, right in zip(numbers, numbers[1:]):
        if regions[right].start < regions[left].stop:
            first, second = sorted((left, right))
            raise ValueError(f"regions[{first}] and regions[{second}] both hold block {regions[right].start}.")


def _check_strengths(name: str, value: Any, steps: Optional[int]) -> None:
    values = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and len(value) != steps:
        raise ValueError(f"{name} has {len(value)} values, but the plan has {steps} steps; one each, or one number.")
    for strength in values:
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
            raise ValueError(f"{name} must be a number in [0, 1], got {strength!r}.")
