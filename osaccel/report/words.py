# SPDX-License-Identifier: Apache-2.0
"""Numbers as a reader says them; pure."""

from typing import Any, List, Mapping, Optional, Sequence

# Stands for what is not known.
UNKNOWN = "–"
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size(count: float) -> str:
    """1536 as "1.5 KiB"."""
    power = 0
    while count >= 1024 and power < len(_UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} {_UNITS[power]}" if power == 0 or count >= 100 else f"{count:.1f} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """3725 as "1 h 2 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def share(part: float) -> str:
    """0.505 as "50.5 %"."""
    return f"{100 * part:.1f} %"


def number(value: Optional[float]) -> str:
    """Four digits; a dash for what is not known."""
    return UNKNOWN if value is None else f"{value:.4g}"


def times(count: int, one: str, more: str = "") -> str:
    """ "1 step", "2 steps"."""
    return f"{count} {one if count == 1 else more or one + 's'}"


def spans(steps: Sequence[int]) -> str:
    """1, 2, 3, 7 as "1–3, 7"; evenly spaced ones as "2, 4, … 40"."""
    steps = sorted(steps)
    gaps = {after - step for step, after in zip(steps, steps[1:])}
    if len(steps) > 4 and len(gaps) == 1 and gaps != {1}:
        return f"{steps[0]}, {steps[1]}, … {steps[-1]}"
    runs: List[List[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def versions(report: Mapping[str, Any]) -> str:
    """The versions a search ran with, on one line."""
    found = report.get("versions") or (report.get("fingerprint") or {}).get("versions") or {}
    return ", ".join(f"{name} {value}" for name, value in found.items())


def resolution(bound: Mapping[str, Any]) -> Optional[str]:
    """ "29 frames of 640 x 480" from frames, height and width; None where the call did not say."""
    found = bound.get("resolution")
    return f"{times(found[0], 'frame')} of {found[2]} x {found[1]}" if found else None
