# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.report PATH`: plots and one self-contained HTML page from a search's sidecar report."""

import argparse
import base64
import html
import os
import sys
import zipfile
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from osaccel import formats
from osaccel.dit_cache_config import CACHE_KEYS
from osaccel.formats import SettingsError
from osaccel.report import timesteps as restep_plots

SUFFIX = ".report.json"


def load(path: str) -> Dict[str, Any]:
    """The report at `path`, which may be the configuration file or the report itself."""
    path = path if path.endswith(SUFFIX) else path + SUFFIX
    report = formats.read_file(path)
    if isinstance(report, dict) and report.get("kind") == "restep" and "cost_curve" in report:
        return {**report, "frames": None, "stem": path[: -len(SUFFIX)]}
    missing = [key for key in ("chosen", "evaluations", "fingerprint") if key not in (report or {})]
    if not isinstance(report, dict) or missing:
        raise SettingsError(f"{path}: not a report of a cache search; missing {', '.join(missing)}.")
    report["frames"] = _frames(path[: -len(SUFFIX)] + ".report.npz")
    report["stem"] = path[: -len(SUFFIX)]
    return report


def _frames(path: str) -> Optional[Dict[str, np.ndarray]]:
    """Plain and cached frames, (T, H, W, C), 8 bit; None when the report has none."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in ("plain", "cached")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SettingsError(f"{path}: cannot be read as frames: {error}. Remove it to have a page without.") from None


def write(report: Dict[str, Any], directory: Optional[str] = None) -> str:
    """Write the PNG files and the page beside the report, or into `directory`; returns the page's path."""
    import matplotlib

    matplotlib.use("Agg")
    stem = report["stem"]
    if directory is not None:
        os.makedirs(directory, exist_ok=True)
        stem = os.path.join(directory, os.path.basename(stem))
    is_restep = report.get("kind") == "restep"
    images = {}
    for name, draw in (restep_plots.plots(report) if is_restep else PLOTS).items():
        images[name] = f"{stem}.{name}.png"
        _draw(draw, report, images[name])
    if report["frames"]:
        images["frames"] = f"{stem}.frames.png"
        _draw(draw_frames, report, images["frames"])
    path = stem + ".report.html"
    formats.write_atomically(path, lambda file: file.write((restep_page if is_restep else page)(report, images)))
    return path


def _draw(draw: Any, report: Dict[str, Any], path: str) -> None:
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(8, 4.5), layout="constrained")
    try:
        draw(report, figure)
        figure.savefig(path, dpi=120)
    finally:
        pyplot.close(figure)


def pareto(points: Sequence[Sequence[float]]) -> List[Sequence[float]]:
    """The (speed-up, error) points no other is faster and closer than, from slow to fast."""
    front: List[Sequence[float]] = []
    for point in sorted(points, key=lambda p: (-p[0], p[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front[::-1]


def draw_tradeoff(report: Dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    points = [(e["predicted_speed_up"], e["error"]) for e in report["evaluations"] if e["error"] is not None]
    stopped = [
        (e["predicted_speed_up"], e["last_error"])
        for e in report["evaluations"]
        if e["error"] is None and e.get("last_error")
    ]
    if stopped:
        axes.scatter(
            *zip(*stopped), facecolors="none", edgecolors="#999999", marker="^", label="given up: error so far"
        )
    axes.plot(*zip(*pareto(points)), color="#66aadd", drawstyle="steps-post", label="Pareto front", zorder=1)
    axes.scatter(*zip(*points), color="#225588", label="verified", zorder=2)
    axes.scatter([report["speed_up"]], [report["error"]], color="#cc3311", marker="*", s=190, label="chosen", zorder=3)
    goal = report.get("goal", {})
    if goal.get("ratio") and goal.get("min_psnr") is None:
        axes.axvline(goal["ratio"], color="#cc3311", linewidth=1, linestyle=":", label="asked for")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(True, which="both", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_xlabel("speed-up: blocks of a plain generation / blocks computed")
    axes.set_ylabel("relative error of the final latents")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)


def compute_map(report: Dict[str, Any]) -> np.ndarray:
    """(blocks, steps): 1 where a block computes under the chosen configuration, 0 where its delta is reused."""
    steps = len(report["delta_change"])
    found = np.ones((report["fingerprint"]["blocks"], steps))
    start, count, first, interval = (int(report["chosen"][key]) for key in CACHE_KEYS)
    for step in range(first, steps):
        if (step - first) % interval:
            found[start : start + count, step] = 0
    return found


def draw_map(report: Dict[str, Any], figure: Any) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    axes = figure.subplots()
    colours = {"reused": "#f2c14e", "computed": "#225588"}
    computes = compute_map(report)
    axes.imshow(computes, aspect="auto", origin="lower", cmap=ListedColormap(list(colours.values())), vmin=0, vmax=1)
    for block in range(1, len(computes)):
        axes.axhline(block - 0.5, color="white", linewidth=0.5)
    _label_blocks_and_steps(axes, len(computes))
    shares = {"reused": 1 - computes.mean(), "computed": computes.mean()}
    handles = [Patch(color=colour, label=f"{name} ({100 * shares[name]:.1f} %)") for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)


def draw_change(report: Dict[str, Any], figure: Any) -> None:
    from matplotlib.patches import Rectangle

    axes = figure.subplots()
    change = np.array(report["delta_change"]).T
    shown = np.log10(np.maximum(change, 1e-12))
    # The first step has none before it.
    shown[:, :1] = np.nan
    image = axes.imshow(shown, aspect="auto", origin="lower", cmap="viridis")
    start, count, first, _ = (int(report["chosen"][key]) for key in CACHE_KEYS)
    corner, width = (first - 0.5, start - 0.5), change.shape[1] - first
    outline = Rectangle(corner, width, count, fill=False, edgecolor="#ff5533", linewidth=2, clip_on=False)
    axes.add_patch(outline)
    _label_blocks_and_steps(axes, len(change))
    figure.colorbar(image, label="log10 of the L2 norm of the change since the step before")
    figure.legend([outline], ["blocks and steps of the chosen cache"], loc="outside upper center", frameon=False)


def _label_blocks_and_steps(axes: Any, blocks: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("denoising step (0 is the noisiest)")
    axes.set_ylabel("transformer block")
    axes.set_yticks(range(0, blocks, 1 + (blocks - 1) // 16))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_frames(report: Dict[str, Any], figure: Any) -> None:
    plain, cached = report["frames"]["plain"], report["frames"]["cached"]
    difference = np.abs(cached.astype(float) - plain)
    # A power of two that makes the largest difference fill the range.
    gain = 2 ** int(np.floor(np.log2(255 / max(difference.max(), 1.0))))
    rows = {"plain": plain, "cached": cached, f"difference x {gain}": (gain * difference).astype(np.uint8)}
    height, width = plain.shape[1:3]
    figure.set_size_inches(9, 9 / len(plain) * 3 * height / width + 0.3)
    axes = figure.subplots(len(rows), len(plain), squeeze=False)
    for row, (name, frames) in enumerate(rows.items()):
        for column, frame in enumerate(frames):
            axes[row][column].imshow(frame.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes[row][column].set_xticks([])
            axes[row][column].set_yticks([])
        axes[row][0].set_ylabel(name)


PLOTS = {"tradeoff": draw_tradeoff, "blocks": draw_map, "change": draw_change}
_TITLES = {
    "tradeoff": "Error against speed-up of every verified configuration",
    "blocks": "Which blocks compute at which step",
    "change": "How much each block's delta changes from step to step",
    "frames": "Frames of the plain and of the cached generation",
    "timesteps": "The timesteps found against even spacing",
    "costs": "Predicted error by number of steps",
    "gaps": "Gap to the full number of steps closed, as predicted",
    "measured": "Gap to the full number of steps closed, as measured",
}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "img{max-width:100%}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left}"
    "h2{margin-top:2rem}"
)


def page(report: Dict[str, Any], images: Dict[str, str]) -> str:
    """The HTML page, its pictures inside it."""
    cost, bound, goal = report["cost"], report["fingerprint"], report.get("goal", {})
    wished = f"PSNR of {goal['min_psnr']:g} dB" if goal.get("min_psnr") else f"speed-up of {goal.get('ratio', 1):g}"
    facts = {
        "asked for": wished,
        "speed-up in blocks": f"{report['speed_up']:.3f}",
        "error of the final latents": f"{report['error']:.5g}",
        **({"PSNR of the frames": f"{report['psnr']:.2f} dB"} if report.get("psnr") is not None else {}),
        **{key: bound[key] for key in ("steps", "blocks", "sampler") if key in bound},
        "frames, height, width": ", ".join(map(str, bound.get("resolution") or ["not known"])),
        "versions": ", ".join(f"{name} {value}" for name, value in report.get("versions", {}).items()),
    }
    given_up = sum(bool(e.get("abandoned")) for e in report["evaluations"])
    spent = {
        "cost of the search": f"{cost['plain_generations']:.2f} plain generations, the plain one included",
        "candidates verified": f"{len(report['evaluations'])}, {given_up} of them given up early",
        **_if_known(cost, "block forwards", "block_forwards", "{}"),
        **_if_known(cost, "time", "seconds", "{:.1f} s"),
        **_if_known(cost, "block boundaries kept", "boundary_bytes", "{} bytes on the host"),
        **_if_known(cost, "storing steps computed again", "storing_steps_recomputed", "{}"),
    }
    tables = {"The configuration": report["chosen"], "What it does": facts, "What it took to find": spent}
    return _html("Cache search", tables, images)


def _if_known(content: Dict[str, Any], label: str, key: str, form: str) -> Dict[str, str]:
    return {label: form.format(content[key])} if content.get(key) is not None else {}


def restep_page(report: Dict[str, Any], images: Dict[str, str]) -> str:
    """The same for a timestep search."""
    facts = {
        "method": report["method"],
        "parameters": report["parameters"],
        "chosen among": f"{report['teacher_steps']} steps",
        "extra transformer forwards": report.get("forwards", {}).get("extra"),
        **{key: report.get("fingerprint", {}).get(key) for key in ("sampler", "resolution", "versions")},
    }
    lists = {
        f"{count} steps": ", ".join(f"{value:.6g}" for value in values) for count, values in report["lists"].items()
    }
    return _html("Timestep search", {"Timesteps": lists, "How they were found": facts}, images)


def _html(title: str, tables: Dict[str, Dict[str, Any]], images: Dict[str, str]) -> str:
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>osaccel: {title}</title>",
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>",
        *(f"<h2>{heading}</h2>{_table(values)}" for heading, values in tables.items()),
    ]
    for name, path in images.items():
        with open(path, "rb") as file:
            data = base64.b64encode(file.read()).decode()
        parts.append(f"<h2>{_TITLES[name]}</h2><img alt='{_TITLES[name]}' src='data:image/png;base64,{data}'>")
    return "".join([*parts, "</body></html>\n"])


def _table(values: Dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>" for key, value in values.items()
    )
    return f"<table>{rows}</table>"


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m osaccel.report", description="Plots and a page from a search.")
    parser.add_argument("path", help="the found configuration, or its .report.json")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: beside the report)")
    options = parser.parse_args(arguments)
    try:
        print(write(load(options.path), options.out))
    except SettingsError as error:
        print(f"osaccel: error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"osaccel: error: the report needs matplotlib: {error}", file=sys.stderr)
        return 2
    return 0
