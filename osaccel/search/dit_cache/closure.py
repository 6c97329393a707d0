# SPDX-License-Identifier: Apache-2.0
"""The same ranking and choice where a candidate can only be judged by running a function that returns videos.

The plain run is observed block by block; the candidates it ranks best are run whole and compared frame by frame.
"""

import math
from typing import Any, Callable, List, NamedTuple, Optional, Protocol

import numpy as np
import torch

from osaccel.attaching import is_scheduler, wrap_scheduler
from osaccel.clock import Clock
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.network.forwards import HiddenStates
from osaccel.search.dit_cache.candidates import Candidate, Goal, candidates
from osaccel.search.dit_cache.choice import Search
from osaccel.search.dit_cache.region_errors import RegionErrors
from osaccel.search.dit_cache.weights import step_weights
from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation
from osaccel.search.recording.observe import watch_blocks

# Whole generations cannot be resumed, so fewer fit into the same cost.
GENERATIONS = 6


class Subject(Protocol):
    """A pipeline, and the one place where a configuration is attached to its blocks.

    Attributes:
        pipeline: its scheduler, if it has one, tells where steps begin.
        blocks: the transformer's blocks, in the order they run.
        dit_cache_config: setting it attaches a configuration in place of the one before, None detaches.
    """

    pipeline: Any
    dit_cache_config: Optional[DitCacheConfig]

    @property
    def blocks(self) -> torch.nn.ModuleList: ...

    def hidden_states(self) -> HiddenStates:
        """What the blocks call the hidden states they take and return."""
        ...


class Wish(NamedTuple):
    """What is searched: the least change of the videos at a speed-up of `ratio`.

    Attributes:
        num_steps: steps of a generation.
        max_interval: the largest step interval tried.
    """

    ratio: float
    num_steps: int
    max_interval: int


# Runs the pipeline as it is attached now; the same videos every time.
Run = Callable[[], List[np.ndarray]]


def search_by_closure(subject: Subject, run: Run, wish: Wish) -> DitCacheConfig:
    """The best configuration; nothing is attached to the subject afterwards.

    Raises:
        ValueError: the ratio cannot be reached, or no candidate gives finite videos.
    """
    num_blocks = len(subject.blocks)
    try:
        pool = candidates(num_blocks, wish.num_steps, wish.ratio, wish.max_interval)
    except SearchError as error:
        raise ValueError(str(error)) from None
    errors = RegionErrors(num_blocks, wish.max_interval - 1)
    plain = _observed(subject, run, wish.num_steps, errors)
    # Of the latents nothing is seen here: samplers are made for a variance of 1.
    weights = step_weights(getattr(subject.pipeline, "scheduler", None), wish.num_steps, variance=1.0)
    search = Search(pool, errors.tensor(wish.num_steps).numpy(), weights, Goal(wish.ratio))
    for _ in range(min(len(pool), GENERATIONS - 1)):
        for candidate in search.order(GENERATIONS - 1)[:1]:
            search.add(_evaluate(subject, run, candidate, plain))
    best = search.choice()
    if best is None:
        raise ValueError("No candidate gave finite videos.")
    return best.config


def _observed(subject: Subject, run: Run, num_steps: int, errors: RegionErrors) -> List[np.ndarray]:
    """The plain videos; meanwhile `errors` sees the blocks."""
    subject.dit_cache_config = None
    clock, blocks = _Clock(num_steps), list(subject.blocks)
    undo = [
        errors.close,
        watch_blocks(blocks, clock, subject.hidden_states(), errors.observe),
        clock.follow(subject.pipeline, blocks[-1]),
    ]
    try:
        return run()
    finally:
        while undo:
            undo.pop()()


class _Clock(Clock):
    """The step of the observed run: from the scheduler, or, without one, one pass through the blocks per step."""

    def __init__(self, num_steps: int):
        super().__init__()
        self.num_steps = num_steps

    def follow(self, pipeline: Any, last_block: torch.nn.Module) -> Callable[[], None]:
        scheduler: Any = getattr(pipeline, "scheduler", None)
        if is_scheduler(scheduler):
            return wrap_scheduler(scheduler, self._before(self.restart), self._before(self.end_step))
        return last_block.register_forward_hook(lambda *_: self._end_pass()).remove

    def _end_pass(self) -> None:
        self.end_step()
        if self.step == self.num_steps:
            self.restart()

    @staticmethod
    def _before(then: Callable[[], None]) -> Callable:
        def wrapper(wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
            result = wrapped(*args, **kwargs)
            then()
            return result

        return wrapper


def _evaluate(subject: Subject, run: Run, candidate: Candidate, plain: List[np.ndarray]) -> Evaluation:
    subject.dit_cache_config = candidate.config
    try:
        videos = run()
    finally:
        subject.dit_cache_config = None
    # Of rank 0's videos: in the upstream's scripts every rank decodes all of them.
    error = float(np.mean([np.mean((a - b) ** 2) for a, b in zip(plain, videos)])) ** 0.5
    return Evaluation(candidate.config.to_dict(), _agreed(error), 0)


def _agreed(error: float) -> Optional[float]:
    """Rank 0's value on all ranks, so that all go on with the same candidate; None where it is not finite."""
    found = error if math.isfinite(error) else None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return found
    holder = [found]
    torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]
