# SPDX-License-Identifier: Apache-2.0
"""Frames of a pipeline's output: compared, thinned out for a report, and written."""

import contextlib
import logging
import math
import os
from typing import Any, Dict, Optional, Sequence

import numpy as np
import torch

from osaccel import formats
from osaccel.search import stored
from osaccel.search.recording.replay import Replay

logger = logging.getLogger("osaccel")


def frames_of(output: Any) -> np.ndarray:
    """The frames in a pipeline's output, as an array."""
    images = getattr(output, "images", output)
    images = images[0] if isinstance(images, tuple) else images
    return images.detach().cpu().float().numpy() if isinstance(images, torch.Tensor) else np.asarray(images, np.float32)


def psnr(reference: np.ndarray, frames: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of frames in 0 .. 255; 200 when they are equal, -200 when not finite."""
    error = float(np.mean((reference.astype(np.float64) - frames) ** 2)) if np.isfinite(frames).all() else math.nan
    if not math.isfinite(error):
        return -200.0
    return min(200.0, 10 * math.log10(255.0**2 / max(error, 1e-16)))


def mean_psnr(values: Sequence[float]) -> float:
    """Of the mean squared error, as if the calls were one long video."""
    return -10 * math.log10(sum(10 ** (-value / 10) for value in values) / len(values))


def frames(
    replay: Replay, final: torch.Tensor, label: str = "cached", plain: Optional[np.ndarray] = None
) -> Optional[Dict[str, np.ndarray]]:
    """Plain frames of a call and those of other final latents, thinned out; None when the pipeline gives none.

    plain: this call's, from an earlier answer; they are not decoded again.
    """
    try:
        plain = thinned(frames_of(replay.decode())) if plain is None else plain
        return {"plain": plain, label: thinned(frames_of(replay.decode(final)))}
    except (ValueError, TypeError, RuntimeError) as error:
        # The configuration is found; a report without pictures is no reason to lose it.
        logger.warning("the report has no frames: %s", error)
        return None


def thinned(frames: np.ndarray, count: int = 6, size: int = 256) -> np.ndarray:
    """At most `count` frames of at most about `size` pixels a side, 8 bit, of the first video; (T, H, W, C)."""
    if frames.ndim == 5:
        frames = frames[0]
    if frames.ndim != 4:
        raise ValueError(f"frames of shape {frames.shape} are not (T, H, W, C)")
    picked = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    stride = max(1, -(-max(frames.shape[1:3]) // size))
    return frames[picked, ::stride, ::stride].clip(0, 255).astype(np.uint8)


def replace_frames(path: str, content: Optional[Dict[str, Any]]) -> None:
    """Write what `frames` gave, whole or not at all; where that is nothing, remove what is there."""
    if content is None:
        _remove(path)
        return
    try:
        stored.write_whole(path, lambda file: np.savez_compressed(file, **content))
        formats.make_readable(path)
    except OSError as error:
        logger.warning("%s cannot be written: %s; the report has no frames", path, error.strerror)


def _remove(path: str) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
    except OSError as error:
        logger.warning("%s cannot be removed: %s; its frames are those of an earlier search", path, error.strerror)
