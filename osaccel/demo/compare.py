# SPDX-License-Identifier: Apache-2.0
"""Compares videos with the plain run's, frame by frame before any lossy encoding, and shows them side by side."""

from pathlib import Path
from typing import Any, Mapping, Sequence

import imageio
import numpy as np
from scipy.ndimage import uniform_filter


def ssim(video: np.ndarray, plain: np.ndarray, window: int = 7) -> float:
    """Mean structural similarity (Wang et al. 2004, uniform window) of uint8 videos (T, H, W, C)."""
    size = (1, window, window, 1)
    x, y = video.astype(np.float64), plain.astype(np.float64)
    mean_x, mean_y = uniform_filter(x, size), uniform_filter(y, size)
    var_x, var_y = uniform_filter(x * x, size) - mean_x**2, uniform_filter(y * y, size) - mean_y**2
    covariance = uniform_filter(x * y, size) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(
        np.mean(
            (2 * mean_x * mean_y + c1) * (2 * covariance + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
        )
    )


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def write_video(path: Path, arms: Mapping[str, Sequence[np.ndarray]], fps: int = 8, factor: int = 4) -> None:
    """One mp4: a column per arm, a row per prompt."""
    columns = [np.concatenate(list(videos), axis=1) for videos in arms.values()]
    imageio.mimwrite(
        path, list(enlarge(np.concatenate(columns, axis=2), factor)), fps=fps, quality=8, macro_block_size=1
    )


def write_picture(path: Path, arms: Mapping[str, Sequence[np.ndarray]], prompts: Sequence[str], shown: int = 6) -> None:
    """One PNG: for every prompt a row per arm, with `shown` frames from first to last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = len(prompts) * len(arms)
    figure, axes = pyplot.subplots(rows, shown, figsize=(1.3 * shown, 1.4 * rows + 0.4), squeeze=False)
    for number, prompt in enumerate(prompts):
        for row, (name, videos) in enumerate(arms.items(), start=number * len(arms)):
            _show(axes[row], videos[number], name, prompt if row == number * len(arms) else "")
    figure.subplots_adjust(left=0.2, right=0.99, top=0.97, bottom=0.01, wspace=0.05, hspace=0.25)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _show(axes: Any, video: np.ndarray, label: str, title: str) -> None:
    frames = np.linspace(0, len(video) - 1, len(axes)).round().astype(int)
    for axis, frame in zip(axes, frames):
        axis.imshow(video[frame], interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    axes[0].set_title(title, fontsize=8, loc="left")
