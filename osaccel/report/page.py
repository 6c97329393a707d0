# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.report PATH`: plots and one self-contained HTML page from a search's sidecar report."""

import argparse
import base64
import os
import sys
import zipfile
from typing import Any, Callable, Dict, Optional, Sequence

import numpy as np

from osaccel import __version__, formats
from osaccel.formats import SettingsError
from osaccel.messages import closest
from osaccel.report import cache, figures, plan, timesteps
from osaccel.report.content import Content

SUFFIX = ".report.json"
# The searches by the kind that their report names; a cache search's names none.
KINDS: Dict[str, Callable[[Dict[str, Any]], Content]] = {
    "plan": plan.content,
    "restep": timesteps.content,
    "dit_cache": cache.content,
}
_NEEDED = {
    "plan": ("plan", "work", "error", "fingerprint", "curves", "evaluations", "windows"),
    "restep": ("lists", "cost_curve", "cost_curve_even"),
    "dit_cache": ("chosen", "evaluations", "fingerprint", "delta_change"),
}


def load(path: str) -> Dict[str, Any]:
    """The report at `path`, which may be the file that a search wrote or the report itself; its frames among it."""
    path = path if path.endswith(SUFFIX) else path + SUFFIX
    report = formats.read_file(path)
    kind = report.get("kind", "dit_cache") if isinstance(report, dict) else None
    if kind not in KINDS:
        raise SettingsError(f"{path}: not a report of a search.")
    missing = [key for key in _NEEDED[kind] if key not in report]
    if missing:
        raise SettingsError(f"{path}: not a report of a {kind} search; missing {', '.join(missing)}.")
    stem = path[: -len(SUFFIX)]
    return {**report, "kind": kind, "frames": _frames(stem + ".report.npz"), "stem": stem}


def _frames(path: str) -> Optional[Dict[str, np.ndarray]]:
    """Frames (T, H, W, C), 8 bit: "plain" and those of what was found; None when the report has none."""
    if not os.path.exists(path):
        return None
    try:
        with np.load(path, allow_pickle=False) as content:
            other = next(iter(sorted(set(content.files) - {"plain"})), "plan")
            return {name: content[name] for name in ("plain", other)}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SettingsError(f"{path}: cannot be read as frames: {error}. Remove it to have a page without.") from None


def write(report: Dict[str, Any], directory: Optional[str] = None) -> str:
    """Write the PNG files and the page beside the report, or into `directory`; returns the page's path."""
    stem = report["stem"]
    if directory is not None:
        os.makedirs(directory, exist_ok=True)
        stem = os.path.join(directory, os.path.basename(stem))
    page = KINDS[report["kind"]](report)
    if report["frames"]:
        (_, plain), (name, other) = report["frames"].items()
        page.figures.append(figures.of_frames(plain, other, name))
    pictures = {}
    for figure in page.figures:
        content = figures.png(figure)
        with open(f"{stem}.{figure.name}.png", "wb") as file:
            file.write(content)
        pictures[figure.name] = {"light": _inline(content), "dark": _inline(figures.png(figure, "dark"))}
    path = stem + ".report.html"
    formats.write_atomically(path, lambda file: file.write(render(page, pictures)))
    return path


def _inline(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def render(page: Content, pictures: Dict[str, Dict[str, str]]) -> str:
    """The page's HTML, everything in it escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html").render(page=page, pictures=pictures)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m osaccel.report", description="Plots and a page from a search.")
    parser.add_argument("path", help="what the search wrote: a plan, a cache configuration, a list, or a .report.json")
    parser.add_argument("--out", metavar="DIR", help="where to write (default: beside the report)")
    parser.add_argument("--version", action="version", version=f"osaccel {__version__}")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = closest(unknown[0], ["--out", "--version", "--help"])
        print(f"osaccel: error: {unknown[0]}: unknown option. {known}", file=sys.stderr)
        return 2
    try:
        print(write(load(options.path), options.out))
    except (SettingsError, OSError) as error:
        print(f"osaccel: error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"osaccel: error: the report needs {error.name}: pip install {error.name}", file=sys.stderr)
        return 2
    return 0
