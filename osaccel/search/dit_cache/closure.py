# SPDX-License-Identifier: Apache-2.0
"""The same ranking and choice where a candidate can only be judged by running a function that returns videos.

The plain run is observed block by block; the candidates it ranks best are run whole and compared frame by frame.
"""

import math
import time
from typing import Any, Callable, List, NamedTuple, Optional, Protocol

import numpy as np
import torch

from osaccel.attaching import is_scheduler, wrap_scheduler
from osaccel.clock import Clock
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.network.forwards import HiddenStates
from osaccel.search.dit_cache import candidates as cache_search
from osaccel.search.dit_cache.candidates import Candidate, Goal, Search
from osaccel.search.dit_cache.error_model import predictions
from osaccel.search.dit_cache.region_errors import RegionErrors
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
        pool = cache_search.candidates(num_blocks, wish.num_steps, wish.ratio, wish.max_interval)
    except SearchError as error:
        raise ValueError(str(error)) from None
    errors = RegionErrors(num_blocks, wish.max_interval - 1)
    plain = _observed(subject, run, wish.num_steps, errors)
    scores = predictions(pool, errors.tensor(wish.num_steps).numpy()).errors
    search = Search(pool, scores, num_blocks, wish.num_steps, Goal(wish.ratio), budget=math.inf)
    while len(search.done) < GENERATIONS - 1:
        round_ = search.next_round()
        if not round_:
            break
        search.add(_evaluate(subject, run, wish.num_steps, round_[0], plain))
    best = search.best()
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


def _evaluate(subject: Subject, run: Run, num_steps: int, candidate: Candidate, plain: List[np.ndarray]) -> Evaluation:
    started = time.perf_counter()
    subject.dit_cache_config = candidate.config
    try:
        videos = run()
    finally:
        subject.dit_cache_config = None
    # Of rank 0's videos: in the upstream's scripts every rank decodes all of them.
    error = float(np.mean([np.mean((a - b) ** 2) for a, b in zip(plain, videos)])) ** 0.5
    return Evaluation(
        config=candidate.config.to_dict(),
        error=_agreed(error) if math.isfinite(error) else None,
        block_forwards=cache_search.cost(candidate, len(subject.blocks), num_steps, resume=0),
        seconds=time.perf_counter() - started,
    )


def _agreed(error: float) -> float:
    """Rank 0's value on all ranks, so that all go on with the same candidate."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return error
    holder = [error]
    torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]
