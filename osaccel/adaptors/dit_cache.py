# SPDX-License-Identifier: Apache-2.0
"""msModelSlim's Python API for the DiT cache, over the same policy and executor that the environment variables use.

Code written for `msmodelslim.pytorch.multi_modal.dit_cache` runs with only the import changed. What an adaptor attaches
stays until `detach`, but a delta never crosses from one generation into the next.
"""

import inspect
import logging
import weakref
from dataclasses import dataclass
from typing import Any, Callable, List, MutableMapping, Optional, Tuple

import numpy as np
import torch

from osaccel.attaching import is_scheduler, wrap_scheduler
from osaccel.clock import Clock
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.generation import find_blocks
from osaccel.network.forwards import HiddenStates
from osaccel.network.regions import BlockCache
from osaccel.plan import of_dit_cache

logger = logging.getLogger("osaccel")

__all__ = ["DitCacheAdaptor", "DitCacheConfig", "DitCacheSearchConfig"]


@dataclass
class DitCacheSearchConfig:
    """What a cache search aims at.

    Args:
        cache_ratio: speed-up the found configuration must reach, in (1, 2].
        dit_block_num: number of transformer blocks; checked against the pipeline when given.
        num_sampling_steps: denoising steps of a generation; required.
        cache_step_interval: largest step interval tried, >= 2.
        num_hidden_states: hidden states a block takes and returns (2 for two-stream blocks).

    Raises:
        ValueError: a value has the wrong type or is out of range.
    """

    cache_ratio: float = 1.3
    dit_block_num: Optional[int] = None
    num_sampling_steps: Optional[int] = None
    cache_step_interval: int = 2
    num_hidden_states: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.cache_ratio, bool) or not isinstance(self.cache_ratio, (int, float)):
            raise ValueError("cache_ratio must be a number")
        if not 1.0 < self.cache_ratio <= 2.0:
            raise ValueError("cache_ratio should be in the range of (1.0, 2.0]")
        if self.num_sampling_steps is None:
            raise ValueError("num_sampling_steps must be set to search")
        for name in ("dit_block_num", "num_sampling_steps", "num_hidden_states"):
            _check_positive(name, getattr(self, name))
        if not isinstance(self.cache_step_interval, int):
            raise ValueError("cache_step_interval must be an integer")
        if self.cache_step_interval < 2:
            raise ValueError("cache_step_interval for searching must be larger or equal to 2")


def _check_positive(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer")
    if value <= 0:
        raise ValueError(f"{name} must be positive")


class _AdaptorClock(Clock):
    """The step index of one adaptor: set by `set_timestep_idx`, moved on by the scheduler or, without one, by passes.

    Each `set_timestep_idx` wins over what was counted; the index falls back to 0 when a generation begins, so neither
    an aborted nor a shorter run shifts the next one.
    """

    def __init__(self, num_sampling_steps: Optional[int], forget: Callable[[], None]):
        self.num_sampling_steps, self._forget = num_sampling_steps, forget
        self.index: Optional[int] = None
        self.forward, self.has_branches, self.is_half = -1, False, False
        self.has_scheduler = False
        self._first = 0
        self._seen = 0
        self._just_set = True

    @property
    def step(self) -> int:  # type: ignore[override]
        self._follow_explicit_index()
        if self.index is None:
            raise ValueError(
                "timestep_idx is not set, Please call DitCacheAdaptor.set_timestep_idx(t_idx) at the beginning of "
                "timestep."
            )
        return self.index

    def _follow_explicit_index(self) -> None:
        if self._seen != DitCacheAdaptor._times_set:
            self._seen = DitCacheAdaptor._times_set
            self._move_to(DitCacheAdaptor._timestep_idx)
            self._first, self._just_set = self.index or 0, True

    def _move_to(self, index: Optional[int]) -> None:
        if index is None or (self.index is not None and index < self.index):
            self._forget()
        if index != self.index:
            self.forward = -1
        self.index = index

    def begin_generation(self) -> None:
        self._follow_explicit_index()
        self._forget()
        self.index, self._first, self.forward = 0, 0, -1

    def begin_pass(self) -> None:
        """The first block is called: without a scheduler to count steps, each pass through the blocks is one."""
        self._follow_explicit_index()
        if not self.has_scheduler and self.index is not None and not self._just_set:
            following = self.index + 1
            is_over = self.num_sampling_steps is not None and following >= self._first + self.num_sampling_steps
            self._move_to(self._first if is_over else following)
        self._just_set = False

    def end_step(self) -> None:
        self._follow_explicit_index()
        self.index, self.forward = (self.index or 0) + 1, -1


class DitCacheAdaptor:
    """Caches transformer blocks of one pipeline, configured from Python.

    Args:
        pipeline: holds the transformer blocks; its `scheduler`, if any, tells where generations and steps begin.
        config: only a search needs it; also gives `num_hidden_states`.
        dit_block_path: dotted path from the pipeline to the nn.ModuleList of blocks.

    Raises:
        ValueError: `config` is of another type, `dit_block_path` is malformed or leads to no blocks, or
            `config.dit_block_num` is not their number.

    Set `dit_cache_config` (or call `update_cache_config`) to start caching, None to stop. Pipelines without a scheduler
    need `set_timestep_idx` before the first block of each step. Of several adaptors of the same blocks the newest one
    made or set has them; the one before is detached.
    """

    _timestep_idx: Optional[int] = None
    _times_set = 0
    # By the first of its blocks, the adaptor that is attached; it lives as long as it is.
    _attached: "MutableMapping[torch.nn.Module, weakref.ref[DitCacheAdaptor]]" = weakref.WeakKeyDictionary()

    def __init__(
        self,
        pipeline: Any,
        config: Optional[DitCacheSearchConfig] = None,
        dit_block_path: str = "transformer.transformer_blocks",
    ):
        if config is not None and not isinstance(config, DitCacheSearchConfig):
            raise ValueError("config must be DitCacheSearchConfig")
        _check_block_path(dit_block_path)
        self.pipeline, self.search_config = pipeline, config
        try:
            self.blocks = self.get_and_check_blocks(pipeline, dit_block_path)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Failed to access transformer blocks at path '{dit_block_path}'. Please ensure the pipeline has the "
                f"correct structure and the path is valid. Error: {error}"
            ) from None
        if config is not None:
            if config.dit_block_num not in (None, len(self.blocks)):
                raise ValueError("dit_block_num not equal to the number of blocks in the dit_block_path")
            config.dit_block_num = len(self.blocks)
        self._config: Optional[DitCacheConfig] = None
        self._cache: Optional[BlockCache] = None
        self._clock = _AdaptorClock(config.num_sampling_steps if config else None, self._forget)
        self._scheduler: Any = None
        self._undo: List[Callable[[], None]] = []
        self._take_over()

    @staticmethod
    def get_and_check_blocks(obj: Any, block_path: str) -> torch.nn.ModuleList:
        """The blocks at a dotted path; ValueError when there are none, TypeError when it is no nn.ModuleList."""
        return find_blocks(obj, block_path)

    @classmethod
    def set_timestep_idx(cls, t_idx: int) -> None:
        """Say which denoising step (from 0) comes next, on the class or on an adaptor; ValueError if not that."""
        if isinstance(t_idx, bool) or not isinstance(t_idx, int) or t_idx < 0:
            raise ValueError("t_idx must be non-negative integer")
        DitCacheAdaptor._timestep_idx = t_idx
        DitCacheAdaptor._times_set += 1

    def get_timestep_idx(self) -> int:
        """The index of the current step; ValueError when it was never set and no scheduler has started."""
        return self._clock.step

    @property
    def dit_cache_config(self) -> Optional[DitCacheConfig]:
        return self._config

    @dit_cache_config.setter
    def dit_cache_config(self, config: Optional[DitCacheConfig]) -> None:
        if config is not None and not isinstance(config, DitCacheConfig):
            raise ValueError("dit_cache_config must be DitCacheConfig")
        self.detach()
        if config is not None:
            self._attach(config)

    def update_cache_config(
        self, cache_block_start: int, cache_num_blocks: int, cache_step_start: int, cache_step_interval: int
    ) -> None:
        """Start caching with these four values; ValueError when one is out of range or the region has no such block."""
        self.dit_cache_config = DitCacheConfig(
            cache_block_start=cache_block_start,
            cache_num_blocks=cache_num_blocks,
            cache_step_start=cache_step_start,
            cache_step_interval=cache_step_interval,
        )

    @torch.no_grad()
    def search(
        self, run_pipeline_and_save_videos: Callable[[Any], List[Any]], prompts_num: int = 1, num_videos: int = 1
    ) -> DitCacheConfig:
        """Find the configuration that reaches `config.cache_ratio` with the least change of the videos, and use it.

        Args:
            run_pipeline_and_save_videos: called with the pipeline; returns one (T, H, W, C) array or tensor per video,
                or all in one. Every call begins with the random state of the first, so it need not fix seeds.
            prompts_num, num_videos: their product is the number of videos it returns.

        Raises:
            ValueError: there is no search configuration, an argument is wrong, the ratio cannot be reached, or the
                function returns another number of videos.
        """
        from osaccel.search.dit_cache.closure import Wish, search_by_closure
        from osaccel.search.recording.replay import RandomState

        config = self.search_config
        if config is None:
            raise ValueError("search_config must be set before calling search()")
        if not callable(run_pipeline_and_save_videos):
            raise ValueError("run_pipeline_and_save_videos must be callable")
        if isinstance(prompts_num, bool) or not isinstance(prompts_num, int) or prompts_num <= 0:
            raise ValueError("prompts_num must be a positive integer")
        wish = Wish(config.cache_ratio, config.num_sampling_steps or 0, config.cache_step_interval)
        state = RandomState()

        def run() -> List[np.ndarray]:
            state.restore()
            return _checked(run_pipeline_and_save_videos(self.pipeline), prompts_num * num_videos)

        found = search_by_closure(self, run, wish)
        self.dit_cache_config = found
        return found

    def detach(self) -> None:
        """Stop caching and leave pipeline, scheduler and blocks as they were."""
        while self._undo:
            self._undo.pop()()
        self._cache = self._config = self._scheduler = None
        self._clock.has_scheduler = False

    def _attach(self, config: DitCacheConfig) -> None:
        plan = of_dit_cache(config)
        try:
            plan.check_blocks(len(self.blocks))
        except ValueError as error:
            raise ValueError(f"dit_cache_config: {error}") from None
        self._take_over()
        self._config = config
        self._cache = BlockCache(
            list(self.blocks), plan, self._clock, self.hidden_states(), begin_pass=self._begin_pass
        )
        self._undo.append(self._cache.detach)
        self._attached[self.blocks[0]] = weakref.ref(self)
        self._undo.append(self._leave)
        self._follow_scheduler()

    def _leave(self) -> None:
        self._attached.pop(self.blocks[0], None)

    def _take_over(self) -> None:
        """Detach another adaptor of these blocks: a notebook's cell was run twice, and the newer one is meant."""
        reference = self._attached.get(self.blocks[0])
        other = reference() if reference else None
        if other is not None and other is not self:
            old = dict(other._config or {})
            logger.info("a newer DitCacheAdaptor takes over; the one that caches with %s is detached", old)
            other.detach()

    def hidden_states(self) -> HiddenStates:
        """What the blocks call the hidden states they take and return."""
        count = self.search_config.num_hidden_states if self.search_config else 1
        return HiddenStates(_hidden_state_names(self.blocks[0], count))

    def _forget(self) -> None:
        if self._cache is not None:
            self._cache.clear()

    def _begin_pass(self) -> None:
        if getattr(self.pipeline, "scheduler", None) is not self._scheduler:
            # The scheduler was exchanged after attaching, and this is the new one's first generation.
            self._follow_scheduler()
            self._clock.begin_generation()
        self._clock.begin_pass()

    def _follow_scheduler(self) -> None:
        scheduler: Any = getattr(self.pipeline, "scheduler", None)
        self._scheduler = scheduler
        self._clock.has_scheduler = is_scheduler(scheduler)
        if self._clock.has_scheduler:
            self._undo.append(wrap_scheduler(scheduler, self._on_set_timesteps, self._on_step))

    def _on_set_timesteps(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        result = wrapped(*args, **kwargs)
        self._clock.begin_generation()
        return result

    def _on_step(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> Any:
        result = wrapped(*args, **kwargs)
        self._clock.end_step()
        if self._clock.index == len(self._scheduler.timesteps):
            self._forget()
        return result


def _checked(videos: Any, num_videos: int) -> List[np.ndarray]:
    if isinstance(videos, (tuple, np.ndarray, torch.Tensor)):
        # What a pipeline's output has in `images`: one video after the other.
        videos = list(videos)
    if not isinstance(videos, list) or len(videos) != num_videos:
        found = len(videos) if hasattr(videos, "__len__") else type(videos).__name__
        raise ValueError(
            f"run_pipeline_and_save_videos must return a video list with length equal to prompts_num: "
            f"{found}!={num_videos}"
        )
    return [_as_array(video) for video in videos]


def _as_array(video: Any) -> np.ndarray:
    if isinstance(video, torch.Tensor):
        # numpy knows no bfloat16, and no device but the host.
        video = video.detach().cpu().to(torch.float64).numpy()
    return np.asarray(video, dtype=np.float64)


def _check_block_path(path: Any) -> None:
    if not isinstance(path, str) or not path:
        raise ValueError("dit_block_path must be a non-empty string")
    if not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(
            f"Invalid dit_block_path format: '{path}'. Path should be dot-separated valid Python identifiers (e.g., "
            "'transformer.transformer_blocks')"
        )


def _hidden_state_names(block: torch.nn.Module, count: int) -> Tuple[str, ...]:
    """What a block calls its first `count` arguments, so that they may come by keyword too."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(block.forward).parameters.values()
    names = tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[:count]
    names += ("hidden_states", "encoder_hidden_states")[len(names) : count]
    if len(names) < count:
        raise ValueError(f"num_hidden_states is {count}, but {type(block).__name__}.forward takes only {names}")
    return names
