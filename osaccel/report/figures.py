# SPDX-License-Identifier: Apache-2.0
"""What the pages draw with: one palette on light and on dark ground, axes of steps and blocks, rows of frames.

matplotlib is imported when something is drawn and never shown.
"""

import io
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import numpy as np

# A figure is drawn by a function of it; the palette below is told apart with any kind of colour vision.
Draw = Callable[[Any], None]
BLUE, ORANGE, GREEN, YELLOW, RED, PURPLE = "#2f7fc1", "#e08214", "#1b9e77", "#f2c14e", "#d7301f", "#9970ab"
GREY = "#9aa0a6"
_GROUNDS = {"light": ("#ffffff", "#222222", "#e3e3e3"), "dark": ("#1b1d21", "#dddddd", "#3a3d42")}


class Figure(NamedTuple):
    """One picture of a page.

    Attributes:
        name: part of the PNG's file name.
        title: heading; text: what it shows, for everyone; it is the alternative text too.
    """

    name: str
    title: str
    text: str
    draw: Draw
    size: Sequence[float] = (8, 4.2)


def png(figure: Figure, ground: str = "light") -> bytes:
    """The picture on light or dark ground."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(_style(*_GROUNDS[ground])):
        canvas = pyplot.figure(figsize=tuple(figure.size), layout="constrained")
        try:
            figure.draw(canvas)
            content = io.BytesIO()
            canvas.savefig(content, dpi=120, format="png")
        finally:
            pyplot.close(canvas)
    return content.getvalue()


def _style(ground: str, ink: str, lines: str) -> Any:
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        "figure.facecolor": ground, "axes.facecolor": ground, "savefig.facecolor": ground, "grid.color": lines,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "legend.frameon": False,
        "font.size": 10, **dict.fromkeys(inked, ink),
    }  # fmt: skip


def whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def label_steps(axes: Any) -> None:
    axes.set_xlabel("denoising step (0 is the noisiest)")
    whole_numbers(axes.xaxis)


def label_blocks(axes: Any, blocks: int) -> None:
    axes.set_ylabel("transformer block")
    axes.set_yticks(range(0, blocks, 1 + (blocks - 1) // 16))


def plain_numbers(axis: Any) -> None:
    """Tick labels of a logarithmic axis as they are written by hand, and few of them."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def patches(colours: Mapping[str, str]) -> Sequence[Any]:
    """Legend handles, one for each name."""
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=name) for name, colour in colours.items()]


def of_frames(plain: np.ndarray, other: np.ndarray, name: str) -> Figure:
    """Plain frames above other ones and what differs, (T, H, W, C), 8 bit."""
    difference = np.abs(other.astype(float) - plain)
    # A power of two that makes the largest difference fill the range.
    gain = 2 ** int(np.floor(np.log2(255 / max(difference.max(), 1.0))))
    rows = {"plain": plain, name: other, f"difference x {gain}": (gain * difference).astype(np.uint8)}
    height, width = plain.shape[1:3]
    return Figure(
        "frames",
        "The first video, frame by frame",
        f"{len(plain)} frames of the first call: plain, {name} from the same noise, and their difference times {gain}.",
        lambda canvas: _draw_frames(canvas, rows),
        (9, 9 / len(plain) * 3 * height / width + 0.3),
    )


def _draw_frames(canvas: Any, rows: Mapping[str, np.ndarray]) -> None:
    axes = canvas.subplots(len(rows), len(next(iter(rows.values()))), squeeze=False)
    for row, (name, frames) in enumerate(rows.items()):
        for column, frame in enumerate(frames):
            axes[row][column].imshow(frame.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes[row][column].set_xticks([])
            axes[row][column].set_yticks([])
            axes[row][column].spines[:].set_visible(False)
        axes[row][0].set_ylabel(name)
