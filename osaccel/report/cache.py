# SPDX-License-Identifier: Apache-2.0
"""The page of a cache search: msModelSlim's four keys, what they do, and every candidate that was run."""

from typing import Any, Dict, List, Mapping, Sequence

import numpy as np

from osaccel.dit_cache_config import CACHE_KEYS
from osaccel.report import figures, words
from osaccel.report.content import Content, Table, command, compare, made_for, prompts_of, spent, without_empty_columns
from osaccel.report.figures import BLUE, RED, YELLOW, Figure


def content(report: Dict[str, Any]) -> Content:
    bound, cost, chosen = report["fingerprint"], report.get("cost", {}), report["chosen"]
    return Content(
        "Cache search",
        _found(report),
        f"{compare('cached', 'file', report)} search again with a smaller speed-up, such as "
        f"OSACCEL_CACHE_RATIO={_milder(report):g}.",
        command("--cache-config", report),
        _figures(report),
        [_candidates(report)],
        {
            "The file": {key: chosen[key] for key in CACHE_KEYS},
            "What it was made for": made_for(bound),
            "What the search took": spent(cost),
        },
        prompts_of(report),
        report.get("date", ""),
        words.versions(report),
    )


def _found(report: Mapping[str, Any]) -> List[str]:
    chosen, goal = report["chosen"], report.get("goal", {})
    first, count = chosen["cache_block_start"], chosen["cache_num_blocks"]
    psnr = "" if report.get("psnr") is None else f", PSNR {report['psnr']:.2f} dB"
    found = [
        f"Blocks {first} to {first + count - 1} are computed at every step before {chosen['cache_step_start']}, and "
        f"from there on at every {_ordinal(chosen['cache_step_interval'])} step.",
        f"Measured on {words.times(len(report.get('prompts') or [0]), 'call')}: {report['speed_up']:.2f} times fewer "
        f"blocks, relative error of the final latents {words.number(report['error'])} "
        f"(0 is the plain video){psnr}.",
    ]
    if goal.get("min_psnr") is not None:
        found.append(f"Asked for: a PSNR of {goal['min_psnr']:g} dB.")
    elif goal.get("ratio"):
        found.append(f"Asked for: {goal['ratio']:g} times fewer blocks.")
    return found


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def _milder(report: Mapping[str, Any]) -> float:
    return round((1 + float(report["speed_up"])) / 2, 2)


def _figures(report: Mapping[str, Any]) -> List[Figure]:
    return [
        Figure(
            "tradeoff",
            "Error against speed-up",
            "Every configuration that was run in this search: blocks saved and what the final latents lost. The line "
            "joins those that none of the others beats in both.",
            lambda canvas: draw_tradeoff(report, canvas),
        ),
        Figure(
            "blocks",
            "Which blocks compute at which step",
            f"Steps from left to right, blocks from bottom to top; {words.share(compute_map(report).mean())} of the "
            "blocks' calls are computed.",
            lambda canvas: draw_map(report, canvas),
        ),
        Figure(
            "change",
            "How much what each block adds changes from step to step",
            "Measured in the recorded generation: what a block adds to its input, its delta, against that of the step "
            "before. The outline is where the chosen file reuses deltas.",
            lambda canvas: draw_change(report, canvas),
        ),
    ]


def _candidates(report: Mapping[str, Any]) -> Table:
    found = sorted(report["evaluations"], key=lambda e: (e["error"] is None, e["error"]))
    marked = [number for number, e in enumerate(found) if e.get("config", e) == report["chosen"]]
    rows = [_row(evaluation) for evaluation in found]
    columns = (
        "blocks",
        "from step",
        "every",
        "speed-up in blocks",
        "speed-up in time",
        "error",
        "PSNR in dB",
    )
    text = (
        "All that was run; none of it is predicted; the chosen one is marked. Speed-up in time is of one run on this "
        "machine."
    )
    return without_empty_columns(Table("Candidates", text, columns, rows, marked))


def _row(evaluation: Mapping[str, Any]) -> Sequence[str]:
    config, error = evaluation.get("config", {}), evaluation["error"]
    start, count, first, interval = (config.get(key, 0) for key in CACHE_KEYS)
    measured = evaluation.get("measured_speed_up")
    return (
        f"{start}–{start + count - 1}" if count else words.UNKNOWN,
        str(first),
        str(interval),
        f"{evaluation['predicted_speed_up']:.2f}",
        words.UNKNOWN if measured is None else f"{measured:.2f}",
        words.number(error),
        words.number(evaluation.get("psnr")),
    )


def pareto(points: Sequence[Sequence[float]]) -> List[Sequence[float]]:
    """The (speed-up, error) points no other is faster and closer than, from slow to fast."""
    front: List[Sequence[float]] = []
    for point in sorted(points, key=lambda p: (-p[0], p[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front[::-1]


def draw_tradeoff(report: Mapping[str, Any], canvas: Any) -> None:
    axes = canvas.subplots()
    points = [(e["predicted_speed_up"], e["error"]) for e in report["evaluations"] if e["error"] is not None]
    axes.plot(*zip(*pareto(points)), color=BLUE, alpha=0.5, drawstyle="steps-post", label="best at its speed", zorder=1)
    axes.scatter(*zip(*points), color=BLUE, label="measured", zorder=2)
    axes.scatter([report["speed_up"]], [report["error"]], color=RED, marker="*", s=190, label="chosen", zorder=3)
    goal = report.get("goal", {})
    if goal.get("ratio") and goal.get("min_psnr") is None:
        axes.axvline(goal["ratio"], color=RED, linewidth=1, linestyle=":", label="asked for")
    axes.set_yscale("log")
    figures.plain_numbers(axes.yaxis)
    axes.grid(True)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_xlabel("speed-up: blocks of a plain generation / blocks computed")
    axes.set_ylabel("relative error of the final latents")
    canvas.legend(loc="outside upper center", ncols=4)


def compute_map(report: Mapping[str, Any]) -> np.ndarray:
    """(blocks, steps): 1 where a block computes under the chosen configuration, 0 where its delta is reused."""
    steps = len(report["delta_change"])
    found = np.ones((report["fingerprint"]["blocks"], steps))
    start, count, first, interval = (int(report["chosen"][key]) for key in CACHE_KEYS)
    for step in range(first, steps):
        if (step - first) % interval:
            found[start : start + count, step] = 0
    return found


def draw_map(report: Mapping[str, Any], canvas: Any) -> None:
    from matplotlib.colors import ListedColormap

    axes = canvas.subplots()
    colours = {"reused": YELLOW, "computed": BLUE}
    computes = compute_map(report)
    axes.imshow(computes, aspect="auto", origin="lower", cmap=ListedColormap(list(colours.values())), vmin=0, vmax=1)
    for block in range(1, len(computes)):
        axes.axhline(block - 0.5, color="white", linewidth=0.5)
    figures.label_steps(axes)
    figures.label_blocks(axes, len(computes))
    shares = {"reused": 1 - computes.mean(), "computed": computes.mean()}
    named = {f"{name} ({words.share(shares[name])})": colour for name, colour in colours.items()}
    canvas.legend(handles=figures.patches(named), loc="outside upper center", ncols=2)


def draw_change(report: Mapping[str, Any], canvas: Any) -> None:
    from matplotlib.patches import Rectangle

    axes = canvas.subplots()
    change = np.array(report["delta_change"]).T
    shown = np.log10(np.maximum(change, 1e-12))
    # The first step has none before it.
    shown[:, :1] = np.nan
    image = axes.imshow(shown, aspect="auto", origin="lower", cmap="viridis")
    start, count, first, _ = (int(report["chosen"][key]) for key in CACHE_KEYS)
    corner, width = (first - 0.5, start - 0.5), change.shape[1] - first
    outline = Rectangle(corner, width, count, fill=False, edgecolor=RED, linewidth=2, clip_on=False)
    axes.add_patch(outline)
    figures.label_steps(axes)
    figures.label_blocks(axes, len(change))
    canvas.colorbar(image, label="log10 of the L2 norm of the change since the step before")
    canvas.legend([outline], ["blocks and steps of the chosen cache"], loc="outside upper center")
