# SPDX-License-Identifier: Apache-2.0
"""`DitCacheAdaptor.search`: the same ranking and choice, where a candidate can only be judged by running a function.

The plain run is observed block by block; the candidates it ranks best are run whole and compared frame by frame.
"""

import math
import time
from typing import Any, Callable, Dict, List

import numpy as np
import torch

from osaccel.clock import Clock
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.generation import wrap_method
from osaccel.search.dit_cache import candidates as cache_search
from osaccel.search.dit_cache.candidates import Candidate, Goal, Search, SearchError
from osaccel.search.dit_cache.error_model import predictions
from osaccel.search.dit_cache.region_errors import RegionErrors
from osaccel.search.recording.observe import watch_blocks

# Whole generations cannot be resumed, so fewer fit into the same cost.
GENERATIONS = 6


def search_by_closure(adaptor: Any, run: Callable[[Any], List[Any]], num_videos: int) -> DitCacheConfig:
    """The best configuration for `adaptor.search_config`; ValueError when the ratio cannot be reached."""
    settings = adaptor.search_config
    num_steps, num_blocks = settings.num_sampling_steps, settings.dit_block_num
    try:
        pool = cache_search.candidates(num_blocks, num_steps, settings.cache_ratio, settings.cache_step_interval)
    except SearchError as error:
        raise ValueError(str(error)) from None
    errors = RegionErrors(num_blocks, settings.cache_step_interval - 1)
    plain = _observed(adaptor, run, num_videos, errors)
    scores = predictions(pool, errors.tensor(num_steps).numpy()).errors
    search = Search(pool, scores, num_blocks, num_steps, Goal(settings.cache_ratio), budget=math.inf)
    while len(search.done) < GENERATIONS - 1:
        round_ = search.next_round()
        if not round_:
            break
        search.add(_evaluate(adaptor, run, num_videos, round_[0], plain))
    best = search.best()
    if best is None:
        raise ValueError("No candidate gave finite videos.")
    return best.config


def _observed(adaptor: Any, run: Callable, num_videos: int, errors: RegionErrors) -> List[np.ndarray]:
    """The plain videos; meanwhile `errors` sees the blocks."""
    adaptor.detach()
    settings = adaptor.search_config
    clock = _Clock(settings.num_sampling_steps)
    blocks = list(adaptor._blocks)
    undo = [
        errors.close,
        watch_blocks(blocks, clock, adaptor.hidden_states(), errors.observe),
        clock.follow(adaptor.pipeline, blocks[-1]),
    ]
    try:
        return _checked(run(adaptor.pipeline), num_videos)
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
        if not all(callable(getattr(scheduler, name, None)) for name in ("set_timesteps", "step")):
            handle = last_block.register_forward_hook(lambda *_: self._end_pass())
            return handle.remove
        undo = [
            wrap_method(scheduler, "set_timesteps", scheduler.set_timesteps, self._before(self.restart)),
            wrap_method(scheduler, "step", scheduler.step, self._before(self.end_step)),
        ]

        def detach() -> None:
            while undo:
                undo.pop()()

        return detach

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


def _evaluate(
    adaptor: Any, run: Callable, num_videos: int, candidate: Candidate, plain: List[np.ndarray]
) -> Dict[str, Any]:
    started, settings = time.perf_counter(), adaptor.search_config
    adaptor.dit_cache_config = candidate.config
    try:
        videos = _checked(run(adaptor.pipeline), num_videos)
    finally:
        adaptor.detach()
    # Of rank 0's videos: in the upstream's scripts every rank decodes all of them.
    error = float(np.mean([np.mean((a - b) ** 2) for a, b in zip(plain, videos)])) ** 0.5
    return {
        "config": candidate.config.to_dict(),
        "error": _agreed(error) if math.isfinite(error) else None,
        "psnr": None,
        "abandoned": False,
        "block_forwards": cache_search.cost(candidate, settings.dit_block_num, settings.num_sampling_steps, resume=0),
        "seconds": time.perf_counter() - started,
    }


def _agreed(error: float) -> float:
    """Rank 0's value on all ranks, so that all go on with the same candidate."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return error
    holder = [error]
    torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def _checked(videos: Any, num_videos: int) -> List[np.ndarray]:
    if not isinstance(videos, list) or len(videos) != num_videos:
        found = len(videos) if hasattr(videos, "__len__") else type(videos).__name__
        raise ValueError(
            f"run_pipeline_and_save_videos must return a video list with length equal to prompts_num: "
            f"{found}!={num_videos}"
        )
    return [np.asarray(video, dtype=np.float64) for video in videos]


__all__ = ["GENERATIONS", "search_by_closure"]
