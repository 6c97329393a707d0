# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.report PATH`: plots and one self-contained HTML page from a search's sidecar report."""

import argparse
import base64
import html
import os
import sys
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from osaccel import formats
from osaccel.cache.config import CACHE_KEYS
from osaccel.formats import SettingsError
from osaccel.search import restep_plots

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
    frames = path[: -len(SUFFIX)] + ".report.npz"
    report["frames"] = dict(np.load(frames)) if os.path.exists(frames) else None
    report["stem"] = path[: -len(SUFFIX)]
    return report


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
    finished = [e for e in report["evaluations"] if e["error"] is not None]
    points = [(e["predicted_speed_up"], e["error"]) for e in finished]
    axes.scatter(*zip(*points), color="#4477aa", label="verified", zorder=2)
    axes.plot(*zip(*pareto(points)), color="#999999", label="Pareto front", zorder=1)
    axes.scatter([report["speed_up"]], [report["error"]], color="#cc3311", marker="*", s=160, label="chosen", zorder=3)
    axes.set_xlabel("speed-up in blocks")
    axes.set_ylabel("relative error of the final latents")
    axes.set_title("Error against speed-up")
    axes.legend()


def compute_map(report: Dict[str, Any]) -> np.ndarray:
    """(blocks, steps): 1 where a block computes under the chosen configuration, 0 where its delta is reused."""
    steps = len(report["step_weights"])
    found = np.ones((report["fingerprint"]["blocks"], steps))
    start, count, first, interval = (int(report["chosen"][key]) for key in CACHE_KEYS)
    for step in range(first, steps):
        if (step - first) % interval:
            found[start : start + count, step] = 0
    return found


def draw_map(report: Dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    axes.imshow(compute_map(report), aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel("block")
    axes.set_title("Dark: computed, white: reused")


def draw_change(report: Dict[str, Any], figure: Any) -> None:
    axes = figure.subplots()
    change = np.array(report["delta_change"]).T
    shown = np.log10(np.maximum(change, 1e-12))
    # The first step has none before it.
    shown[:, :1] = np.nan
    image = axes.imshow(shown, aspect="auto", origin="lower", cmap="viridis")
    axes.set_xlabel("step")
    axes.set_ylabel("block")
    axes.set_title("Change of each block's delta since the step before (log10)")
    figure.colorbar(image)


def draw_frames(report: Dict[str, Any], figure: Any) -> None:
    plain, cached = report["frames"]["plain"], report["frames"]["cached"]
    axes = figure.subplots(2, len(plain), squeeze=False)
    for row, (name, frames) in enumerate((("plain", plain), ("cached", cached))):
        for column, frame in enumerate(frames):
            axes[row][column].imshow(frame.squeeze(), cmap="gray" if frame.shape[-1] == 1 else None)
            axes[row][column].set_xticks([])
            axes[row][column].set_yticks([])
        axes[row][0].set_ylabel(name)


PLOTS = {"tradeoff": draw_tradeoff, "blocks": draw_map, "change": draw_change}
_TITLES = {
    "tradeoff": "Every verified configuration",
    "blocks": "Which blocks compute at which step",
    "change": "Where the blocks change",
    "frames": "Plain above, cached below",
    "timesteps": "The timesteps found against even spacing",
    "costs": "Predicted error by number of steps",
    "gaps": "Gap to the full number of steps closed",
}
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "img{max-width:100%}table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2rem .6rem;text-align:left}"
    "h2{margin-top:2rem}"
)


def page(report: Dict[str, Any], images: Dict[str, str]) -> str:
    """The HTML page, its pictures inside it."""
    facts = {
        "speed-up in blocks": f"{report['speed_up']:.3f}",
        "error of the final latents": f"{report['error']:.5g}",
        "cost of the search": f"{report['cost']['plain_generations']:.2f} plain generations",
        "verified": len(report["evaluations"]),
        **{key: value for key, value in report["fingerprint"].items() if key in ("steps", "blocks", "sampler")},
        "resolution (frames, height, width)": report["fingerprint"].get("resolution"),
        "versions": ", ".join(f"{name} {value}" for name, value in report.get("versions", {}).items()),
    }
    return _html("Cache search", {"The configuration": report["chosen"], "What it does": facts}, images)


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


if __name__ == "__main__":
    sys.exit(main())
