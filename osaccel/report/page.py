# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.report PATH`: plots and one self-contained HTML page from a search's sidecar report."""

import argparse
import base64
import contextlib
import os
import sys
import zipfile
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Sequence

import numpy as np

from osaccel import __version__, formats
from osaccel.formats import SettingsError
from osaccel.messages import closest
from osaccel.report import cache, figures, plan, timesteps
from osaccel.report.content import Content

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
# A damaged number must not decide how much memory and time a page takes: cells of a picture of blocks and steps, steps
# of all windows, and bytes of frames.
_MOST_CELLS, _MOST_STEPS, _MOST_FRAMES = 1_000_000, 10_000, 64 << 20


def load(path: str) -> Dict[str, Any]:
    """The report at `path`, which may be the file that a search wrote or the report itself; its frames among it."""
    if not path.endswith(formats.REPORT):
        _check_was_searched(path)
        path += formats.REPORT
    report = formats.read_file(path)
    kind = report.get("kind", "dit_cache") if isinstance(report, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise SettingsError(f"{path}: not a report of a search.")
    missing = [key for key in _NEEDED[kind] if key not in report]
    if missing:
        raise SettingsError(f"{path}: not a report of a {kind} search; missing {', '.join(missing)}.")
    stem = path[: -len(formats.REPORT)]
    return {**report, "kind": kind, "frames": _frames(formats.frames_path(stem)), "stem": stem}


def _check_was_searched(path: str) -> None:
    if os.path.lexists(path + formats.REPORT):
        return
    if not os.path.lexists(path):
        raise SettingsError(f"{path}: does not exist; a search that failed or is not finished writes no file.")
    raise SettingsError(
        f"{path}: nothing to show: no search wrote a report beside it ({os.path.basename(path) + formats.REPORT})."
    )


def _frames(path: str) -> Optional[Dict[str, np.ndarray]]:
    """Frames (T, H, W, C), 8 bit: "plain" and those of what was found; None when the report has none."""
    if not os.path.exists(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > _MOST_FRAMES:
                raise ValueError(f"they are more than {_MOST_FRAMES} bytes")
        with np.load(path, allow_pickle=False) as content:
            other = next(iter(sorted(set(content.files) - {"plain"})), "plan")
            return {name: content[name] for name in ("plain", other)}
    # A flipped bit may surface as any of zipfile's, zlib's and NumPy's exceptions.
    except Exception as error:
        raise SettingsError(f"{path}: cannot be read as frames: {error}. Remove it to have a page without.") from None


@contextlib.contextmanager
def _damage_is_said(report: Mapping[str, Any]) -> Iterator[None]:
    """What a report lacks, or holds in another form, shows wherever it is used; all of it means the same."""
    try:
        yield
    except SettingsError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SettingsError(
            f"{report['stem']}{formats.REPORT}: cannot be shown as a {report['kind']} search: {type(error).__name__}: "
            f"{error}."
        ) from None


def _check_sizes(report: Mapping[str, Any]) -> None:
    bound, windows = report.get("fingerprint", {}), report.get("windows", {"first": 0, "length": 0, "actions": ()})
    steps = max(bound.get("steps") or 1, len(report.get("delta_change", ())))
    if windows["first"] < 0 or windows["length"] < 0:
        raise ValueError("its windows begin before the first step")
    behind = windows["first"] + windows["length"] * len(windows["actions"])
    if (bound.get("blocks") or 1) * steps > _MOST_CELLS or max(steps, behind) > _MOST_STEPS:
        raise ValueError("its blocks and steps are too many to be shown")


def content_of(report: Dict[str, Any]) -> Content:
    """What the page of a report that `load` gave says; SettingsError where it is damaged."""
    with _damage_is_said(report):
        _check_sizes(report)
        page = KINDS[report["kind"]](report)
        if report["frames"]:
            (_, plain), (name, other) = report["frames"].items()
            page.figures.append(figures.of_frames(plain, other, name))
        return page


def write(report: Dict[str, Any], directory: Optional[str] = None) -> str:
    """Write the PNG files and the page beside the report, or into `directory`; returns the page's path."""
    stem = report["stem"]
    if directory is not None:
        os.makedirs(directory, exist_ok=True)
        stem = os.path.join(directory, os.path.basename(stem))
    page, path = content_of(report), stem + ".report.html"
    with _damage_is_said(report):
        drawn = {
            figure.name: {mode: figures.png(figure, mode) for mode in ("light", "dark")} for figure in page.figures
        }
        whole = render(page, {name: {mode: _inline(png) for mode, png in pair.items()} for name, pair in drawn.items()})
    for name, pair in drawn.items():
        with open(f"{stem}.{name}.png", "wb") as file:
            file.write(pair["light"])
    formats.write_atomically(path, lambda file: file.write(whole))
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
    try:
        return environment.get_template("page.html").render(page=page, pictures=pictures)
    except jinja2.UndefinedError as error:
        raise ValueError(str(error)) from None


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
