# SPDX-License-Identifier: Apache-2.0
"""msModelSlim's Python API for the timestep search, over the same parts that OSACCEL_SEARCH=restep uses.

Runs on whatever device the pipeline lives on; RANK and WORLD_SIZE are not needed when there is one process.
"""

import inspect
import os
import random
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import numpy as np
import torch

from osaccel import formats
from osaccel.search import outputs
from osaccel.search.recording.replay import Call
from osaccel.search.team import Team
from osaccel.search.timesteps import calibration, runner
from osaccel.search.timesteps import lists as timesteps
from osaccel.search.timesteps.denoised import DenoiserLog, NoiseLevels

__all__ = ["ReStepAdaptor", "ReStepSearchConfig"]

FILE_NAME = "searched_schedule.txt"
_PROMPT = "(masterpiece), (best quality), (ultra-detailed)"
_NEGATIVE = "nsfw, lowres, bad anatomy, text, error, worst quality, low quality, jpeg artifacts, watermark, blurry."
# What `pipeline.args`, the sample script's own namespace, may say, by the name the pipeline's call has for it.
_ARGUMENTS = {name: name for name in ("num_frames", "height", "width", "guidance_scale", "max_sequence_length")}


@dataclass
class ReStepSearchConfig:
    """What a timestep search works on; checked by ReStepAdaptor.

    Args:
        videos_path: directory with 5 to 20 mp4 files made with the original number of steps. Required.
        save_dir: directory that searched_schedule.txt is written to. Required.
        neighbour_type: 'uniform' takes the calibration videos evenly from the sorted directory, 'random' at random.
        monte_carlo_iters: how many of the videos are used, 1 to all.
        num_sampling_steps: length of the list to find.
    """

    videos_path: Optional[str] = None
    save_dir: Optional[str] = None
    neighbour_type: str = "uniform"
    monte_carlo_iters: int = 5
    num_sampling_steps: int = 50


class ReStepAdaptor:
    """Searches a timestep list for `pipeline`.

    Args:
        pipeline: an OpenSoraPipeline; its `args`, if any, give size and guidance of the run.
        config: see ReStepSearchConfig.
        method: 'wdp' (default), 'klub' (the published Align Your Steps search) or 'arctan' (no model calls).
        group: the sequence-parallel process group, when the pipeline's ranks share one video.

    Raises:
        ValueError: an argument is wrong; the message names it.
    """

    def __init__(self, pipeline: Any, config: ReStepSearchConfig, method: str = "wdp", group: Optional[Any] = None):
        if pipeline is None:
            raise ValueError("pipeline must be OpenSoraPipeline")
        if not isinstance(config, ReStepSearchConfig):
            raise ValueError("config must be ReStepSearchConfig")
        if method not in timesteps.METHODS:
            raise ValueError(f"method must be one of {', '.join(timesteps.METHODS)}, got {method!r}")
        self.videos_paths = self.check_search_config(config)
        self.pipeline, self.search_config, self.method = pipeline, config, method
        self.team = Team(group)

    @staticmethod
    def check_search_config(config: ReStepSearchConfig) -> List[str]:
        """The videos' paths, sorted; ValueError for a wrong value."""
        if not isinstance(config.videos_path, str) or not os.path.isdir(config.videos_path):
            raise ValueError(f"config.videos_path must be an existing directory, got {config.videos_path!r}")
        if not isinstance(config.save_dir, str) or not config.save_dir:
            raise ValueError(f"config.save_dir must be a directory to write to, got {config.save_dir!r}")
        steps = config.num_sampling_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError("config.num_sampling_steps must be an integer and >= 1")
        if config.neighbour_type not in ("uniform", "random"):
            raise ValueError("config.neighbour_type must be either 'uniform' or 'random'")
        names = sorted(name for name in os.listdir(config.videos_path) if name.endswith(".mp4"))
        if not calibration.FEWEST <= len(names) <= calibration.MOST:
            raise ValueError("videos_path must contain between 5 and 20 .mp4 videos")
        used = config.monte_carlo_iters
        if isinstance(used, bool) or not isinstance(used, int) or not 0 < used <= len(names):
            raise ValueError(
                "config.monte_carlo_iters must be an integer greater than 0 and <= the number of .mp4 videos in "
                "videos_path"
            )
        return [os.path.join(config.videos_path, name) for name in names]

    def search(self) -> List[float]:
        """The list found, ascending, in [0, 1]; also written to save_dir/searched_schedule.txt, or else to the log."""
        config, count = self.search_config, self.search_config.num_sampling_steps
        self._check_pipeline_steps()
        if self.method == "arctan" or count < 3:
            found, report = self._without_model(count), {"kind": "restep", "method": self.method}
        else:
            found, report = self._from_videos(count)
        found = self.team.share([float(value) for value in found])
        path = os.path.join(str(config.save_dir), FILE_NAME)
        if self.team.is_first:
            outputs.deliver(path, found, lambda: self._write(path, found, report))
        self.team.barrier()
        return [value / formats.NUM_TRAIN_TIMESTEPS for value in reversed(found)]

    @staticmethod
    def _write(path: str, found: List[float], report: Dict[str, Any]) -> None:
        formats.write_timesteps(path, found)
        formats.write_json(formats.report_path(path), report)

    @staticmethod
    def seed_everything(seed: int) -> None:
        """Seed every random generator with `seed` plus this process's rank, and ask for deterministic convolutions."""
        seed += int(os.environ.get("RANK", "0"))
        random.seed(seed)
        np.random.seed(seed)
        # Seeds every device that torch knows of, too.
        torch.manual_seed(seed)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False

    def _check_pipeline_steps(self) -> None:
        steps = getattr(getattr(self.pipeline, "args", None), "num_sampling_steps", None)
        if steps is not None and steps != self.search_config.num_sampling_steps:
            raise ValueError(
                f"pipeline_args.num_sampling_steps must be equal as {self.search_config.num_sampling_steps}, "
                f"got {steps}"
            )

    def _without_model(self, count: int) -> Any:
        table = NoiseLevels(self.pipeline.scheduler).table[::-1]
        return timesteps.arctan(np.arange(len(table))[::-1].astype(float), table, count)

    def _from_videos(self, count: int) -> Any:
        call = self._call()
        videos = calibration.Videos(str(self.search_config.videos_path), call.arguments, self._chosen())
        log = DenoiserLog(self.pipeline.scheduler)
        # Twice the steps to choose from, as when 50 are sought among 100.
        steps = min(2 * count, calibration.EVALUATIONS // len(videos.paths))
        evaluations = calibration.evaluate(call, videos, log, self.team, steps)
        statistics = log.statistics(self.team)
        values = timesteps.search(statistics, [count], self.method)[count]
        report = runner.make_report(statistics, {count: values.tolist()}, self.method, timesteps.DEFAULTS)
        report["evaluations"] = evaluations
        return values, report

    def _chosen(self) -> List[str]:
        count, paths = self.search_config.monte_carlo_iters, self.videos_paths
        if self.search_config.neighbour_type == "random":
            return sorted(random.Random(0).sample(paths, count))
        return [paths[int(place)] for place in np.linspace(0, len(paths) - 1, count).round()]

    def _call(self) -> Call:
        args = getattr(self.pipeline, "args", None)
        given: Dict[str, Any] = {"prompt": _PROMPT, "negative_prompt": _NEGATIVE, "num_inference_steps": 2}
        for name, argument in _ARGUMENTS.items():
            if getattr(args, name, None) is not None:
                given[argument] = getattr(args, name)
        return Call(_of(self.pipeline), self.pipeline, (), given)


def _of(pipeline: Any) -> Any:
    """The pipeline's call with no gradients; a search inside a search script must not start another one."""
    call = pipeline.__call__

    def without_gradients(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return call(*args, **kwargs)

    # Said outright: before Python 3.11, inspect looks through a wrapped method down to the function that takes self.
    without_gradients.__signature__ = inspect.signature(call)  # type: ignore[attr-defined]
    return without_gradients
