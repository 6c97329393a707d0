# SPDX-License-Identifier: Apache-2.0
"""Compares videos with the plain run's, frame by frame before any lossy encoding, and shows them side by side."""

from pathlib import Path
from typing import Any, Dict, Mapping, Sequence

import imageio
import numpy as np
from scipy.ndimage import uniform_filter

# A good plan is one grey level away from the plain run, which nobody sees.
AMPLIFIED = 32


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


def difference(video: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """How far two uint8 videos are apart, made visible."""
    apart = np.abs(video.astype(np.int16) - plain.astype(np.int16))
    return (apart * AMPLIFIED).clip(0, 255).astype(np.uint8)


def with_difference(arms: Mapping[str, Sequence[np.ndarray]]) -> Dict[str, Sequence[np.ndarray]]:
    """The arms, and behind the second one how far it is from the first."""
    plain, star, *others = arms
    apart = [difference(*pair) for pair in zip(arms[star], arms[plain])]
    rows = {plain: arms[plain], star: arms[star], f"difference x {AMPLIFIED}": apart}
    return {**rows, **{name: arms[name] for name in others}}


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def label(text: str, width: int, height: int) -> np.ndarray:
    """A black strip with white text, uint8 (H, W, 3)."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, height))
    ImageDraw.Draw(strip).text((6, height // 4), text, fill="white")
    return np.asarray(strip)


def write_video(path: Path, arms: Mapping[str, Sequence[np.ndarray]], fps: int = 8, factor: int = 6) -> None:
    """One mp4: a column per arm with its name above it, a row per prompt."""
    columns = []
    for name, videos in with_difference(arms).items():
        column = enlarge(np.concatenate(list(videos), axis=1), factor)
        strip = label(name, column.shape[2], 24)
        columns.append(np.concatenate([np.broadcast_to(strip, (len(column), *strip.shape)), column], axis=1))
    imageio.mimwrite(path, list(np.concatenate(columns, axis=2)), fps=fps, quality=8, macro_block_size=2)


def write_picture(path: Path, arms: Mapping[str, Sequence[np.ndarray]], prompts: Sequence[str], shown: int = 6) -> None:
    """One PNG: for every prompt a row per arm, with `shown` frames from first to last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = with_difference(arms)
    # Above every prompt's rows is one for the prompt itself.
    heights = [0.3, *[1.0] * len(arms)] * len(prompts)
    figure = pyplot.figure(figsize=(1.2 * (shown + 1.3), 1.22 * sum(heights)))
    grid = figure.add_gridspec(len(heights), shown, height_ratios=heights)
    for number, prompt in enumerate(prompts):
        first = number * (len(arms) + 1) + 1
        for row, (name, videos) in enumerate(arms.items(), start=first):
            axes = [figure.add_subplot(grid[row, column]) for column in range(shown)]
            _show(axes, videos[number], name, prompt if row == first else "")
    figure.subplots_adjust(left=0.18, right=0.995, top=1, bottom=0.005, wspace=0.03, hspace=0.03)
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
