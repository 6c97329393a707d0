# SPDX-License-Identifier: Apache-2.0
"""The page of a plan search: the plan as a picture, error against work, and everything that was run.

What was not measured in this search is called predicted.
"""

from typing import Any, Container, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from osaccel import formats
from osaccel.plan import Plan
from osaccel.report import figures, words
from osaccel.report.content import Content, Table, command, compare, made_for, prompts_of, spent, without_empty_columns
from osaccel.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, YELLOW, Figure
from osaccel.settings import Goal

# What a cell of the picture is, by its colour.
KINDS = {
    "computed": BLUE,
    "conditional only: guidance is forecast": ORANGE,
    "reused": YELLOW,
    "forecast": PURPLE,
    "skipped": GREY,
}
COMPUTED, HALF, REUSED, FORECAST, SKIPPED = range(len(KINDS))
_LINES = {"together": BLUE, "conditional only": ORANGE, "skipped": GREEN, "forecast": PURPLE, "reused": YELLOW}
# A matter of words alone: from here on the page says that the prediction was off,
_FAR = 1.5
# and that a speed-up in time beyond the ideal one is no gain of the plan's.
_NOISE = 1.05


class Run(NamedTuple):
    """One replay of the search, as it is shown.

    Attributes:
        work: of the whole generation, plain = 1.
        first: the step it began at, those before being the plain ones; seconds: it took from there, None where unknown.
        calls: how many of the recorded ones it was run on, None for all.
    """

    plan: Plan
    work: float
    error: Optional[float]
    psnr: Optional[float]
    first: int
    seconds: Optional[float]
    calls: Optional[int]
    is_chosen: bool


class Shown:
    """A report with what is derived from it."""

    def __init__(self, report: Mapping[str, Any]):
        self.report, bound = report, report["fingerprint"]
        self.plan = formats.parse_plan(dict(report["plan"]), "the report's plan")
        self.steps = self.plan.steps or bound["steps"]
        self.blocks = int(bound["blocks"])
        self.guidance = bound.get("guidance_scale")
        self.is_guided = self.guidance is None or self.guidance > 1
        self.plain_seconds = report.get("cost", {}).get("plain_seconds")
        self.runs = [self._run(evaluation) for evaluation in report["evaluations"]]

    def _run(self, evaluation: Mapping[str, Any]) -> Run:
        plan = formats.parse_plan(dict(evaluation["config"]), "a plan of the report")
        work = plan.work(self.blocks, self.steps, self.is_guided)
        first, seconds = evaluation.get("resumed_at", 0), evaluation.get("seconds") or None
        calls = len(evaluation["calls"]) if "calls" in evaluation else None
        is_chosen = plan == self.plan and calls is None
        return Run(plan, work, evaluation["error"], evaluation.get("psnr"), first, seconds, calls, is_chosen)

    @property
    def chosen(self) -> Optional[Run]:
        return next((run for run in self.runs if run.is_chosen), None)

    @property
    def windows(self) -> List[range]:
        first, length = (self.report["windows"][key] for key in ("first", "length"))
        return [
            range(first + n * length, first + (n + 1) * length) for n in range(len(self.report["windows"]["actions"]))
        ]


def content(report: Dict[str, Any]) -> Content:
    shown = Shown(report)
    return Content(
        f"Plan for {report['goal']}",
        _found(shown),
        _following(shown),
        command("--plan", report) if shown.plan.touches_network else "",
        _figures(shown),
        [_runs(shown), *([_windows(shown)] if shown.windows else [])],
        {"What it was made for": made_for(report["fingerprint"]), "What the search took": spent(report["cost"])},
        prompts_of(report),
        report.get("date", ""),
        words.versions(report),
    )


def _found(shown: Shown) -> List[str]:
    report, calls = shown.report, len(shown.report.get("prompts") or [0])
    psnr = "" if report.get("psnr") is None else f", PSNR of the frames {report['psnr']:.2f} dB"
    found = [
        f"{words.share(report['work'])} of the network work, an ideal speed-up of {1 / report['work']:.2f}x: "
        f"{shown.plan.describe()}, of {shown.steps} steps.",
        f"Measured on {words.times(calls, 'call')}: relative error of the final latents {words.number(report['error'])}"
        f" (0 is the plain video){psnr}.{_predicted(report)}",
    ]
    if not report.get("keeps", True):
        found.append("The target was not reached within what the search may take.")
    return [*found, *_in_time(shown)]


def _predicted(report: Mapping[str, Any]) -> str:
    predicted = report.get("predicted_error")
    return "" if predicted is None else f" Predicted before it was run: {words.number(predicted)}."


def _in_time(shown: Shown) -> List[str]:
    """What was measured in seconds, and whether the saved work explains it."""
    chosen, plain = shown.chosen, shown.plain_seconds
    if chosen is None or chosen.seconds is None or not plain or not shown.plan.touches_network:
        return []
    # The steps that were not repeated are counted as the plain ones were.
    seconds = plain * chosen.first / shown.steps + chosen.seconds
    took = f"In time, one run each: {words.duration(plain)} plain, {words.duration(seconds)} under the plan"
    if plain / seconds > _NOISE / shown.report["work"]:
        return [
            f"{took}. That is more than the saved work explains: the plain run was the first of its process, and was "
            "recorded. The summary line that every generation logs says what your own runs gain."
        ]
    return [f"{took}, {plain / seconds:.2f}x, all that surrounds the network counted in."]


def _following(shown: Shown) -> str:
    report = shown.report
    if not shown.plan.touches_network:
        milder = f", such as OSACCEL_TARGET={report['milder']}" if report.get("milder") else ""
        return (
            f"Nothing that saves work was found to keep {report['goal']}: this plan computes every step in full and "
            f"gains nothing. Search again with a milder target{milder}."
        )
    times = report["error"] / report["predicted_error"] if report.get("predicted_error") else 1.0
    warning = (
        f"The error was measured {times:.1f} times as large as predicted, so look closely. " if times > _FAR else ""
    )
    return f"{warning}{compare('planned', 'plan', report)} {_otherwise(report)}."


def _otherwise(report: Mapping[str, Any]) -> str:
    """What to do where the plan loses too much."""
    if not report.get("keeps", True):
        return "sample more steps and search again"
    kind = str(report["goal"]).rpartition(":")[0] or "speed"
    # Half of the gain, or half as far from the plain run: 6 dB.
    if kind == "speed":
        value = round((1 + 1 / report["work"]) / 2, 2)
    elif kind == "psnr":
        value = round(report["psnr"] + 6, 1)
    else:
        value = float(f"{report['error'] / 2:.2g}")
    goal = Goal(kind, value)
    if not goal.is_allowed:
        return "sample without it"
    return f"search again with a target that loses less, such as OSACCEL_TARGET={goal}"


def _figures(shown: Shown) -> List[Figure]:
    halves = "the unconditional half of the batch above the conditional one" if shown.is_guided else "one forward"
    return [
        Figure(
            "plan", "What every step computes",
            f"Steps from left to right, {halves}; {words.share(shown.report['work'])} of the plain network work.",
            lambda canvas: draw_plan(shown, canvas), (8, 2.2 + 0.35 * len(_bands(shown.plan, shown.blocks))),
        ),
        Figure(
            "curve", "Error against network work",
            "Lines are predicted: the best choices of all families together and of each alone. Dots were measured in "
            "this search and have the colour of their family, or of all families where they are of several. Among "
            "them are the replays that the prediction is made from. Each changes one group of windows by one family "
            "and nothing else, so it saves little and may lie well above the lines, which save where it costs least.",
            lambda canvas: draw_curve(shown, canvas),
        ),
    ]  # fmt: skip


# The tables


def _runs(shown: Shown) -> Table:
    runs = sorted(shown.runs, key=lambda run: (run.work, run.error is None, run.error))
    rows = [
        (
            said(run.plan) + (f" (on {words.times(run.calls, 'call')})" if run.calls else ""),
            words.share(run.work),
            f"{1 / run.work:.2f}x",
            str(run.first),
            words.UNKNOWN if run.seconds is None else words.duration(run.seconds),
            words.number(run.error) if run.error is not None else "not finite",
            words.number(run.psnr),
        )
        for run in runs
    ]
    columns = ("what it was", "network work", "ideal", "run from step", "time", "error", "PSNR in dB")
    text = (
        "Every plan that this search ran, all measured, on all recorded calls where no number is named, from the first "
        "step that the plan changes; the chosen one is marked."
    )
    marked = [number for number, run in enumerate(runs) if run.is_chosen]
    return without_empty_columns(Table("What was run", text, columns, rows, marked))


def said(plan: Plan) -> str:
    """What a plan does and at which steps."""
    parts = [f"skipped {words.spans(plan.skip)}"] if plan.skip else []
    if plan.conditional_only:
        parts.append(f"conditional only {words.spans(plan.conditional_only)}")
    for region in plan.used_regions:
        steps = [step for step in range(plan.steps or 0) if step in region.reuse]
        parts.append(f"{region} {'forecast' if region.order else 'reused'} at {words.spans(steps)}")
    return "; ".join(parts) or "plain"


def _windows(shown: Shown) -> Table:
    gains = shown.report.get("gains", {})
    before = range(shown.report["windows"]["first"])
    rows = [(words.spans(before), _counts(shown.plan, before), *(words.UNKNOWN for _ in gains))]
    for number, steps in enumerate(shown.windows):
        of_window = (words.number(values[number]) for values in gains.values())
        rows.append((words.spans(steps), _counts(shown.plan, steps), *of_window))
    named = {"half": "conditional only", "skip": "skipped"}
    columns = ("steps", "the plan there", *(f"gain, {named.get(family, family)}" for family in gains))
    text = (
        "Gain: how much of the change that an action makes inside its window is left in the final latents, measured in "
        "groups of windows, on calls that stand for the others, and interpolated between groups; early windows have "
        "that of the first one. Steps before the first window have no action of their own: its cycle goes on backwards "
        "where it is early and only skips."
    )
    return Table("Windows of the search", text, columns, rows)


def _counts(plan: Plan, steps: range) -> str:
    counts = {"full": 0, "conditional only": 0, "skipped": 0, "forecast": 0, "reused": 0}
    for step in steps:
        region = next((one for one in plan.regions if step in one.reuse), None)
        if step in plan.skip:
            counts["skipped"] += 1
        elif region is not None:
            counts["forecast" if region.order else "reused"] += 1
        else:
            counts["conditional only" if step in plan.conditional_only else "full"] += 1
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


# The pictures


# A band is at least as high as its label needs.
_LOWEST = 0.2


class Row(NamedTuple):
    """A band of the picture: consecutive blocks of one half of the batch, and a kind for every step."""

    label: str
    height: float
    kinds: Sequence[int]


def rows_of(plan: Plan, steps: int, blocks: int, is_guided: bool = True) -> List[Row]:
    """The picture's bands from the bottom up: within each half the blocks in their order."""
    found = []
    for half in ("conditional", "unconditional") if is_guided else ("",):
        for start, stop in _bands(plan, blocks):
            kinds = [_kind(plan, step, start, half == "unconditional") for step in range(steps)]
            where = "all blocks" if (start, stop) == (0, blocks) else _named(start, stop)
            height = max((stop - start) / blocks, _LOWEST)
            found.append(Row(", ".join(filter(None, (half, where))), height, kinds))
    return found


def _named(start: int, stop: int) -> str:
    return f"block {start}" if stop == start + 1 else f"blocks {start}–{stop - 1}"


def _bands(plan: Plan, blocks: int) -> List[Tuple[int, int]]:
    edges = sorted({0, blocks, *(edge for region in plan.regions for edge in (region.start, region.stop))})
    return list(zip(edges, edges[1:]))


def _kind(plan: Plan, step: int, block: int, is_unconditional: bool) -> int:
    if step in plan.skip:
        return SKIPPED
    if is_unconditional and step in plan.conditional_only:
        return HALF
    for region in plan.regions:
        if region.start <= block < region.stop and step in region.reuse:
            return FORECAST if region.order else REUSED
    return COMPUTED


def draw_plan(shown: Shown, canvas: Any) -> None:
    import numpy as np
    from matplotlib.colors import ListedColormap

    axes = canvas.subplots()
    rows = rows_of(shown.plan, shown.steps, shown.blocks, shown.is_guided)
    edges = np.concatenate([[0.0], np.cumsum([row.height for row in rows])])
    kinds = np.array([row.kinds for row in rows])
    axes.pcolormesh(
        np.arange(shown.steps + 1) - 0.5, edges, kinds, cmap=ListedColormap(list(KINDS.values())),
        vmin=-0.5, vmax=len(KINDS) - 0.5, edgecolors=axes.get_facecolor(), linewidth=30 / shown.steps,
    )  # fmt: skip
    axes.set_yticks((edges[:-1] + edges[1:]) / 2, [row.label for row in rows])
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    figures.label_steps(axes)
    used = {name: colour for number, (name, colour) in enumerate(KINDS.items()) if number in kinds}
    canvas.legend(handles=figures.patches(used), loc="outside upper center", ncols=3)


def draw_curve(shown: Shown, canvas: Any) -> None:
    axes, report = canvas.subplots(), shown.report
    for name, points in report["curves"].items():
        drawn = [(100 * work, error) for work, error in points if error > 0]
        if drawn:
            label = f"predicted, {'all families' if name == 'together' else name + ' alone'}"
            axes.plot(*zip(*drawn), color=_LINES.get(name), linestyle="-" if name == "together" else "--", label=label)
    others = [run for run in shown.runs if run.error and not run.is_chosen]
    if others:
        works, errors = [100 * run.work for run in others], [run.error for run in others]
        axes.scatter(works, errors, c=[_colour(run.plan, report["curves"]) for run in others], s=22, zorder=3)
        axes.scatter([], [], color=GREY, s=22, label="measured, in its family's colour")
    work, predicted = 100 * report["work"], report.get("predicted_error")
    if predicted:
        axes.plot([work, work], [predicted, report["error"]], color=RED, linewidth=1, linestyle=":")
        axes.scatter([work], [predicted], facecolors="none", edgecolors=RED, label="chosen, predicted", zorder=4)
    if report["error"]:
        axes.scatter([work], [report["error"]], color=RED, marker="*", s=170, label="chosen, measured", zorder=5)
    axes.set_yscale("log")
    figures.plain_numbers(axes.yaxis)
    axes.grid(True)
    axes.set(xlabel="network work of the generation (%)", ylabel="relative error of the final latents")
    top = axes.secondary_xaxis("top", functions=(_hundred_over, _hundred_over))
    top.set_xticks([1, 1.25, 1.5, 2, 3, 4, 6])
    top.xaxis.set_major_formatter("{x:g}x")
    top.set_xlabel("ideal speed-up")
    canvas.legend(loc="outside lower center", ncols=3)


def _colour(plan: Plan, drawn: Container[str]) -> str:
    """A dot's: that of its family's line where it is of one family and the line is drawn, else of all together."""
    families = {"forecast" if region.order else "reused" for region in plan.used_regions}
    families |= {name for name, steps in (("skipped", plan.skip), ("conditional only", plan.conditional_only)) if steps}
    family = families.pop() if len(families) == 1 else "together"
    return _LINES[family if family in drawn else "together"]


def _hundred_over(value: Any) -> Any:
    import numpy as np

    return 100 / np.maximum(np.asarray(value, float), 1e-9)
