# SPDX-License-Identifier: Apache-2.0
"""Arms on the same videos: a row each, a table of rows, and a plot of error against work with a line per family."""

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from benchmarks.lib.bench import Arm, Bench
from benchmarks.lib.kept import digest_of
from benchmarks.lib.models import Case
from benchmarks.lib.quality import STATISTICS, errors, interval, over, psnr, summary

FORM, FORMS = "{:.4f} [{:.4f}, {:.4f}]", {"turned": "{:.1%} [{:.1%}, {:.1%}]"}
# Videos of a row that are kept at a time.
PART = 16
# A line's points: work, value.
Points = List[Tuple[float, float]]


class Row(NamedTuple):
    """What an arm did, video by video. work: network work, block calls x share of the batch, plain = 1."""

    name: str
    family: str
    work: float
    seconds: float
    errors: List[float]
    psnr: List[float]


def measure(bench: Bench, arm: Arm, cases: Sequence[Case]) -> Row:
    """The arm on these videos against their plain runs; kept if the arm has a key."""
    if not arm.key:
        return _measure(bench, arm, cases)
    name = f"row-{digest_of([arm.key, *map(list, cases)])}"
    return Row(**bench.kept.value(name, lambda: _measure(bench, arm, cases)._asdict()))


def in_parts(bench: Bench, arm: Arm, cases: Sequence[Case], size: int = PART) -> Row:
    """`measure` of `size` videos at a time, each part kept, so that more videos can be added later."""
    rows = [measure(bench, arm, cases[start : start + size]) for start in range(0, len(cases), size)]
    videos = [len(row.errors) for row in rows]
    return Row(
        arm.name,
        arm.family,
        float(np.average([row.work for row in rows], weights=videos)),
        float(np.average([row.seconds for row in rows], weights=videos)),
        [error for row in rows for error in row.errors],
        [value for row in rows for value in row.psnr],
    )


def _measure(bench: Bench, arm: Arm, cases: Sequence[Case]) -> Row:
    samples, plain = bench.run(arm, cases), bench.plain(cases)
    work = float(np.mean([sample.computed for sample in samples])) / bench.plain_blocks
    seconds = float(np.mean([sample.seconds for sample in samples]))
    decoded = [psnr(bench.frames(base), bench.frames(own)) for own, base in zip(samples, plain)]
    return Row(arm.name, arm.family, work, seconds, errors(samples, plain), decoded)


def table(rows: Sequence[Row], against: Optional[str] = None) -> str:
    """A line per row, 95 % bootstrap intervals in brackets.

    Args:
        against: a row's name; the others say how much larger their mean and typical errors are than its, the same
            videos drawn for both.
    """
    rival = next((row for row in rows if row.name == against), None)
    heads = [*STATISTICS, "PSNR dB", *(["mean over its", "typical over its"] if rival else [])]
    width = max(len(row.name) for row in rows) + 2
    lines = [] if rival is None else [f"over its: how much larger than that of {against}"]
    lines.append(f"{'':<{width}}{'work':>7}{'s/video':>9}" + "".join(f"{head:>26}" for head in heads))
    for row in rows:
        cells = [FORMS.get(name, FORM).format(*found) for name, found in summary(row.errors).items()]
        cells.append("{:.1f} [{:.1f}, {:.1f}]".format(*interval(row.psnr)))
        if rival:
            cells += [_over(row, rival, STATISTICS[name]) for name in ("mean", "typical")]
        figures = f"{row.work:>7.1%}{row.seconds:>9.2f}" + "".join(f"{cell:>26}" for cell in cells)
        lines.append(f"{row.name:<{width}}{figures}")
    return "\n".join(lines)


def _over(row: Row, rival: Row, statistic: Callable[..., Any]) -> str:
    if row is rival:
        return "-"
    return "{:+.0%} [{:+.0%}, {:+.0%}]".format(*over(row.errors, rival.errors, statistic))


def summaries(rows: Sequence[Row]) -> List[Dict[str, Any]]:
    """The rows for a JSON file: statistics with intervals beside the figures of every video."""
    return [{**row._asdict(), "summary": summary(row.errors), "mean psnr": interval(row.psnr)} for row in rows]


def plot(rows: Sequence[Row], path: Path, title: str = "", first: Sequence[str] = ("osaccel",)) -> None:
    """Mean and typical error against network work, a line per family, thick where its name begins with `first`."""
    panels = []
    for name in ("mean", "typical"):
        lines: Dict[str, Points] = {}
        for row in rows:
            lines.setdefault(row.family, []).append((row.work, float(STATISTICS[name](row.errors, axis=0))))
        panels.append((f"{name} relative error of the final latents", lines))
    draw(panels, path, "network work, plain = 1", title, first)


def draw(
    panels: Sequence[Tuple[str, Dict[str, Points]]],
    path: Path,
    across: str,
    title: str = "",
    first: Sequence[str] = ("osaccel",),
) -> None:
    """A panel for each (label, lines), logarithmic where the label speaks of an error; `across` is the other label."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(7 * len(panels), 6), squeeze=False)
    for axis, (label, lines) in zip(axes[0], panels):
        for number, (name, points) in enumerate(lines.items()):
            works, values = zip(*sorted(points))
            is_own = name.startswith(tuple(first))
            axis.plot(
                works, values, label=name, color=f"C{number % 10}", markersize=4,
                marker="o" if is_own else "sv^D"[number % 4], linewidth=2.4 if is_own else 1.1,
                linestyle="--" if name.startswith("fewer") else "-",
            )  # fmt: skip
        axis.set(xlabel=across, ylabel=label, yscale="log" if "error" in label else "linear", title=title)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
