# SPDX-License-Identifier: Apache-2.0
"""Calibration videos as the source of denoised predictions: read, checked, encoded, noised and fed to the pipeline.

Every file is read and checked before any model runs. One path (a video with one Brownian motion) is one pipeline call:
the pipeline's own loop evaluates the points, only the next sample is replaced.
"""

import contextlib
import itertools
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch

from osaccel import formats
from osaccel.formats import SettingsError
from osaccel.generation import Generation
from osaccel.interceptors import Interceptor, StepCall, with_latents
from osaccel.search.errors import SearchError
from osaccel.search.progress import Progress
from osaccel.search.recording.replay import Call
from osaccel.search.team import Team
from osaccel.search.timesteps.denoised import DenoiserLog

FEWEST, MOST = formats.FEWEST_VIDEOS, formats.MOST_VIDEOS
EVALUATIONS = 2000
MOST_PATHS = 4
# Frames of one video that are kept, in bytes; a run's own are far below, unless the call does not say its size.
MOST_BYTES = 4 << 30


def find_videos(directory: str) -> List[str]:
    """The mp4 files of a directory, sorted; SearchError unless there are 5 to 20."""
    try:
        return formats.find_videos(directory, "OSACCEL_CALIBRATION_VIDEOS")
    except SettingsError as error:
        raise SearchError(str(error)) from None


class Opened(NamedTuple):
    """A video of which nothing is decoded yet: `frames` are uint8, (H, W, 3); `length` is None where no header says."""

    length: Optional[int]
    height: int
    width: int
    frames: Iterator[np.ndarray]


def read_video(path: str, arguments: Mapping[str, Any]) -> np.ndarray:
    """Frames, uint8, (T, H, W, 3), by the first of decord, PyAV and imageio that is installed.

    Args:
        path: an mp4 file.
        arguments: of the pipeline call; `num_frames`, `height` and `width`, where given, are what is read. A video of
            another size, or too short, is refused by its header (decord: by its first frame) before it is decoded.
    """
    for reader in (_open_decord, _open_av, _open_imageio):
        try:
            with reader(path) as video:
                _check(path, video, arguments)
                return _decode(path, video, arguments.get("num_frames"))
        except ImportError:
            continue
        except SearchError:
            raise
        # Each reader has its own exception classes, some plain RuntimeErrors; all of them mean the same here.
        except Exception as error:
            raise SearchError(f"{path}: cannot be read as a video: {' '.join(str(error).split())[:200]}.") from None
    raise SearchError(f"{path}: no reader for mp4 files is installed; install decord, av or imageio with ffmpeg.")


def _check(path: str, video: Opened, arguments: Mapping[str, Any]) -> None:
    count, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
    wanted = (height or video.height, width or video.width)
    if (video.height, video.width) != wanted:
        raise SearchError(
            f"{path}: is {video.height} x {video.width} (height x width), but the run makes {wanted[0]} x {wanted[1]}."
        )
    if count is not None and video.length is not None and video.length < count:
        raise SearchError(f"{path}: has {video.length} frames, but the run makes {count}.")
    size = 3 * video.height * video.width * (count or video.length or 1)
    if size > MOST_BYTES:
        raise SearchError(f"{path}: its frames are {size >> 20} MiB decoded; at most {MOST_BYTES >> 20} are read.")


def _decode(path: str, video: Opened, count: Optional[int]) -> np.ndarray:
    most = MOST_BYTES // (3 * video.height * video.width)
    frames: List[np.ndarray] = []
    for frame in itertools.islice(video.frames, most + 1 if count is None else count):
        if frame.shape != (video.height, video.width, 3) or len(frames) == most:
            raise SearchError(f"{path}: its frames are not what its header says.")
        frames.append(frame)
    if not frames:
        raise SearchError(f"{path}: holds no frames.")
    if count is not None and len(frames) < count:
        raise SearchError(f"{path}: has {len(frames)} frames, but the run makes {count}.")
    return np.stack(frames)


@contextlib.contextmanager
def _open_decord(path: str) -> Iterator[Opened]:
    import decord

    # Frames are decoded ahead by as many threads as there are cores, each with frames of its own.
    reader = decord.VideoReader(path, num_threads=1)
    height, width = reader[0].shape[:2]
    yield Opened(len(reader), height, width, (reader[i].asnumpy() for i in range(len(reader))))


@contextlib.contextmanager
def _open_av(path: str) -> Iterator[Opened]:
    import av  # type: ignore[import-not-found,unused-ignore]

    with av.open(path) as container:
        stream = container.streams.video[0]
        frames = (frame.to_ndarray(format="rgb24") for frame in container.decode(video=0))
        yield Opened(stream.frames or None, stream.height, stream.width, frames)


@contextlib.contextmanager
def _open_imageio(path: str) -> Iterator[Opened]:
    import imageio

    reader: Any
    with imageio.get_reader(path, format="FFMPEG") as reader:
        width, height = reader.get_meta_data()["size"]
        yield Opened(None, height, width, (np.asarray(frame)[..., :3] for frame in reader.iter_data()))


class Videos:
    """The checked frames of a directory, cut to the run's length.

    Args:
        directory: with 5 to 20 mp4 files.
        arguments: of the pipeline call; `num_frames`, `height` and `width` are what the videos must have.
        paths: these files of it only.
    """

    def __init__(self, directory: str, arguments: Mapping[str, Any], paths: Optional[Sequence[str]] = None):
        self.paths = list(find_videos(directory) if paths is None else paths)
        self.frames: Dict[str, np.ndarray] = {}
        for path in self.paths:
            self.frames[path] = read_video(path, arguments)

    def encoded(self, path: str, vae: Any) -> torch.Tensor:
        """Latents (1, C, T, H, W), float32, by the pipeline's own autoencoder (its tiling included)."""
        inner = getattr(vae, "vae", vae)
        parameter = next(inner.parameters())
        pixels = torch.from_numpy(self.frames[path]).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        dtype = parameter.dtype
        with torch.no_grad():
            try:
                return vae.encode(pixels.to(parameter.device, dtype)).float()
            except NotImplementedError:
                # On a CPU torch has no 3-D pooling in half precision. There and back the weights lose nothing.
                inner.float()
                try:
                    return vae.encode(pixels.to(parameter.device)).float()
                finally:
                    inner.to(dtype)


def number_of_paths(videos: int, steps: int) -> int:
    """Noise paths per video, so that videos x paths x steps stay within 2,000 evaluations.

    Raises SearchError when not even one path fits.
    """
    paths = min(MOST_PATHS, EVALUATIONS // (videos * steps))
    if paths < 1:
        raise SearchError(
            f"{videos} calibration videos x {steps} steps are more than {EVALUATIONS} evaluations; use at most "
            f"{EVALUATIONS // steps} videos or fewer steps."
        )
    return paths


def evaluate(
    call: Call,
    videos: Videos,
    log: DenoiserLog,
    team: Team,
    steps: Optional[int] = None,
    watchers: Sequence[Interceptor] = (),
) -> int:
    """Log the guided predictions along noised calibration videos; returns the number of guided evaluations."""
    steps = steps or int(call.arguments["num_inference_steps"])
    paths = number_of_paths(len(videos.paths), steps)
    evaluations = 0
    progress = Progress("calibration videos", team.is_first)
    for number, path in enumerate(videos.paths):
        clean = videos.encoded(path, call.pipeline.vae)
        for motion in range(paths):
            oracle = _NoisedPath(clean, log, team)
            args, kwargs = call.with_arguments(num_inference_steps=steps, output_type="latent", callback=None)
            with Generation(call.pipeline, None, call.target, [oracle, *watchers]):
                call.function(*args, **kwargs)
            log.end_generation()
            evaluations += oracle.calls
            progress.at(number * paths + motion + 1, len(videos.paths) * paths)
    progress.close()
    return evaluations


class _NoisedPath(Interceptor):
    """Leads the pipeline along x = x0 + s^2 W(lam), one Brownian motion W, from noise to data.

    The pipeline's own initial noise is the first point: there the signal is below a hundredth of the noise.
    """

    def __init__(self, clean: torch.Tensor, log: DenoiserLog, team: Team):
        self.clean, self.log, self.team = clean, log, team
        self.calls = 0
        self._motion: Optional[torch.Tensor] = None
        self._snr = 0.0

    def step(self, proceed: Callable[[StepCall], Any], call: StepCall) -> Any:
        sample = call.sample
        self.log.observe(call.model_output, call.timestep, sample)
        result = proceed(call)
        self.calls += 1
        scheduler, levels = self.log.levels.scheduler, self.log.levels
        if self._motion is None:
            self._begin(sample, levels.sigma(call.timestep))
        times = scheduler.timesteps
        if self.calls < len(times):
            following = self._at(levels.sigma(times[self.calls])) / levels.scale(levels.sigma(times[self.calls]))
            result = with_latents(result, following.to(sample.dtype))
        return result

    def _begin(self, sample: torch.Tensor, sigma: float) -> None:
        x = sample.float().cpu() * self.log.levels.scale(sigma)
        self.clean = self._shard(self.clean.cpu(), x.shape)
        self._snr = 1.0 / sigma**2
        self._motion = (x - self.clean) * self._snr

    def _shard(self, clean: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """This rank's frames of the encoded video."""
        frames = shape[2] if len(shape) == 5 else clean.shape[2]
        start = self.team.member * frames
        mine = clean[:, :, start : start + frames] if self.team.size > 1 else clean
        if mine.shape[1:] != shape[1:]:
            raise SearchError(
                f"The encoded calibration videos have shape {tuple(mine.shape[1:])}, the run's latents "
                f"{tuple(shape[1:])}."
            )
        return mine.expand(shape)

    def _at(self, sigma: float) -> torch.Tensor:
        assert self._motion is not None
        snr = 1.0 / sigma**2
        # Two-stage samplers stand still or step back for a moment; the motion is only drawn forward.
        if snr > self._snr:
            noise = torch.randn(self._motion.shape)
            self._motion = self._motion + noise * (snr - self._snr) ** 0.5
            self._snr = snr
        return self.clean + sigma**2 * self._motion
