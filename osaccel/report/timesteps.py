# SPDX-License-Identifier: Apache-2.0
"""Plots of a timestep search's sidecar report; matplotlib is imported when one is drawn and never shown."""

from typing import Any, Dict, List, Mapping

import numpy as np

# What is lost, by number of steps: for the best lists, and for even spacing under the same name with "_even".
_CURVES = {"cost_curve": "lost detail", "decisions_curve": "changed decisions"}


def plot_timesteps(axes: Any, report: Mapping[str, Any]) -> None:
    """The lists found against even spacing."""
    for count, values in report["lists"].items():
        places = np.linspace(0, 1, len(values))
        axes.plot(places, values, marker=".", markersize=3, label=f"{count} steps, found")
    axes.plot([0, 1], [values[0], values[-1]], color="grey", linestyle="--", label="even spacing")
    axes.set(xlabel="part of the steps done", ylabel="timestep", title="timesteps found")
    axes.legend()


def plot_costs(axes: Any, report: Mapping[str, Any]) -> None:
    """The predicted loss of the best list of each length, and of even spacing."""
    for name, label in (("cost_curve", "best list"), ("cost_curve_even", "even spacing")):
        curve = {int(length): cost for length, cost in report[name].items()}
        axes.plot(list(curve), list(curve.values()), marker=".", label=label)
    axes.set(xlabel="steps", ylabel="part of the variance missing", yscale="log", title="predicted loss of detail")
    axes.legend()


def predicted_gaps(report: Mapping[str, Any], name: str) -> Dict[int, float]:
    """Part of the gap between even spacing and the teacher that the best list of each length is predicted to close."""
    found, even = ({int(length): cost for length, cost in report[key].items()} for key in (name, name + "_even"))
    teacher = even[max(even)]
    return {length: (even[length] - found[length]) / (even[length] - teacher) for length in sorted(even)[:-1]}


def plot_predicted_gaps(axes: Any, report: Mapping[str, Any]) -> None:
    """Predicted, by number of steps; those that were searched are marked."""
    lowest = 0.0
    for name, label in _CURVES.items():
        gaps = predicted_gaps(report, name)
        searched = [count for count in gaps if str(count) in report["lists"]]
        text = ", ".join(f"{count} steps: {gaps[count]:.2f}" for count in searched)
        (line,) = axes.plot(list(gaps), list(gaps.values()), label=f"{label} ({text})")
        axes.plot(searched, [gaps[count] for count in searched], "o", color=line.get_color())
        lowest = min(lowest, *gaps.values())
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="steps", ylabel="gap closed", ylim=(max(lowest, -1) - 0.05, 1.05))
    axes.set_title("predicted: 0 = even spacing, 1 = all the script's steps")
    axes.legend()


def plot_gap_closed(axes: Any, gaps: Mapping[str, Mapping[str, List[float]]]) -> None:
    """Part of the gap to the teacher closed per arm, with intervals; as `benchmarks.schedules` writes it."""
    measures = list(next(iter(gaps.values())))
    for number, (arm, values) in enumerate(gaps.items()):
        centre = np.array([values[measure] for measure in measures])
        error = np.abs(centre[:, 1:] - centre[:, :1]).T
        axes.errorbar(np.arange(len(measures)) + 0.1 * number, centre[:, 0], error, fmt="o", label=arm)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(measures)), measures)
    axes.set(ylabel="gap closed", title="0 = even spacing, 1 = as good as the teacher")
    axes.legend()


def plots(report: Mapping[str, Any]) -> Dict[str, Any]:
    """By name, functions of (report, figure): the plots the report has data for."""
    found: Dict[str, Any] = {
        "timesteps": lambda report, figure: plot_timesteps(figure.subplots(), report),
        "costs": lambda report, figure: plot_costs(figure.subplots(), report),
    }
    if "decisions_curve" in report:
        found["gaps"] = lambda report, figure: plot_predicted_gaps(figure.subplots(), report)
    if report.get("gap closed"):
        found["measured"] = lambda report, figure: plot_gap_closed(figure.subplots(), report["gap closed"])
    return found
