# SPDX-License-Identifier: Apache-2.0
"""The page of a timestep search: the lists, and what they are predicted to lose against even spacing."""

from typing import Any, Callable, Dict, List, Mapping, Optional

import numpy as np

from osaccel.report import words
from osaccel.report.content import Content, Table, command, known, made_for, prompts_of
from osaccel.report.figures import GREY, Figure, plain_numbers, whole_numbers

# What is lost, by number of steps: for the best lists, and for even spacing under the same name with "_even".
_CURVES = {"cost_curve": "lost detail", "decisions_curve": "changed decisions"}
_METHODS = {"wdp": "the least predicted loss of detail and of what is decided at high noise (wdp)"}


def plot_timesteps(axes: Any, report: Mapping[str, Any]) -> None:
    """The lists found against even spacing."""
    for count, values in report["lists"].items():
        places = np.linspace(0, 1, len(values))
        axes.plot(places, values, marker=".", markersize=3, label=f"{count} steps, found")
    axes.plot([0, 1], [values[0], values[-1]], color=GREY, linestyle="--", label="even spacing")
    axes.set(xlabel="part of the steps done", ylabel="timestep")
    axes.legend()


def plot_costs(axes: Any, report: Mapping[str, Any]) -> None:
    """The predicted loss of the best list of each length, and of even spacing."""
    for name, label in (("cost_curve", "best list"), ("cost_curve_even", "even spacing")):
        curve = {int(length): cost for length, cost in report[name].items()}
        axes.plot(list(curve), list(curve.values()), marker=".", label=label)
    axes.set(xlabel="steps", ylabel="part of the variance missing", yscale="log")
    plain_numbers(axes.yaxis)
    whole_numbers(axes.xaxis)
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
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="steps", ylabel="gap closed", ylim=(max(lowest, -1) - 0.05, 1.05))
    whole_numbers(axes.xaxis)
    axes.set_title("predicted: 0 = even spacing, 1 = all the script's steps")
    axes.legend()


def plot_gap_closed(axes: Any, gaps: Mapping[str, Mapping[str, List[float]]]) -> None:
    """Part of the gap to the teacher closed per arm, with intervals; as `benchmarks.schedules` writes it."""
    measures = list(next(iter(gaps.values())))
    for number, (arm, values) in enumerate(gaps.items()):
        centre = np.array([values[measure] for measure in measures])
        error = np.abs(centre[:, 1:] - centre[:, :1]).T
        axes.errorbar(np.arange(len(measures)) + 0.1 * number, centre[:, 0], error, fmt="o", label=arm)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(measures)), measures)
    axes.set(ylabel="gap closed", title="0 = even spacing, 1 = as good as the teacher")
    axes.legend()


def content(report: Dict[str, Any]) -> Content:
    bound, cost = report.get("fingerprint", {}), report.get("cost", {})
    counts = [int(count) for count in report["lists"]]
    found = [
        f"Found {words.times(len(counts), 'list')} ({_listed(counts)}) from generations of {report['teacher_steps']} "
        "steps. What a list loses is predicted here, not measured.",
    ]
    extra = (report.get("forwards") or {}).get("extra")
    return Content(
        "Timestep search",
        found,
        _following(counts, bound.get("steps")),
        command("--timesteps", report),
        figures(report),
        [_lists(report)],
        {
            "How it was found": known(
                {
                    "method": _METHODS.get(report.get("method", ""), report.get("method")),
                    "parameters": _said(report.get("parameters") or {}),
                    "looked at": _looked_at(report.get("calibration")),
                    "transformer forwards beyond the script's own": extra,
                }
            ),
            # The list is what is bound to; its length is said above.
            "What it was made for": made_for({**bound, "timesteps": None, "steps": None}),
            **({"What the search took": cost} if cost else {}),
        },
        prompts_of(report),
        report.get("date", ""),
        words.versions(report),
    )


def _following(counts: List[int], own: Optional[int]) -> str:
    """What to do; `own` is the length of the list that the page's command applies."""
    own = counts[0] if own is None else own
    others = "" if len(counts) == 1 else " Every other list has a file and a report of its own beside this one."
    return (
        f"Sample a few of your own prompts with the list, and without it at {own} steps (--num_sampling_steps {own}), "
        f"and compare the videos. The command below applies the list of {own} steps; that number replaces the one your "
        f"command asks for.{others}"
    )


def _listed(counts: List[int]) -> str:
    return ", ".join(f"{count} steps" for count in counts)


def _looked_at(calibration: Any) -> Optional[str]:
    return ", ".join(calibration) if isinstance(calibration, list) else calibration


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def _lists(report: Mapping[str, Any]) -> Table:
    rows = [
        (f"{count} steps", ", ".join(f"{value:.5g}" for value in values)) for count, values in report["lists"].items()
    ]
    return Table("The lists", "From the noisiest step to the last, in [0, 1000].", ("length", "timesteps"), rows)


def figures(report: Mapping[str, Any]) -> List[Figure]:
    """The pictures the report has data for."""
    found = [
        Figure(
            "timesteps", "The timesteps found against even spacing",
            "Where a line is flat, the list spends more steps than even spacing does.",
            _on_axes(plot_timesteps, report),
        ),
        Figure(
            "costs", "Predicted loss by number of steps",
            "Detail that is predicted to be lost, for the best list and for even spacing; not measured. To first "
            "order, so that near 1 it says no more than that much is lost.",
            _on_axes(plot_costs, report),
        ),
    ]  # fmt: skip
    if "decisions_curve" in report:
        text = (
            "Part of the gap between even spacing and the full number of steps; predicted, not measured. A changed "
            "decision is content that turns out otherwise than at the full number of steps."
        )
        found.append(Figure("gaps", "Gap closed, as predicted", text, _on_axes(plot_predicted_gaps, report)))
    if report.get("gap closed"):
        text = "Measured on held-out prompts, with intervals."
        found.append(
            Figure("measured", "Gap closed, as measured", text, _on_axes(plot_gap_closed, report["gap closed"]))
        )
    return found


def _on_axes(plot: Callable[[Any, Any], None], shown: Any) -> Callable[[Any], None]:
    return lambda canvas: plot(canvas.subplots(), shown)
