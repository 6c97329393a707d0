# SPDX-License-Identifier: Apache-2.0
"""What single windows of steps do to the final latents, and how choices made from few calls fare on the others.

    python -m benchmarks.windows --model miniature --calls 40 --kept FOLDER [--out benchmarks/results/windows-miniature]

1. Every action in one window at a time, the rest plain, on calibration calls (no held-out video is looked at): the
   gain, root of the squared error of the final latents over the squared local change, by window.
2. Those errors add up, in square, to what any mixture of the actions does to a call. So it is known which mixture is
   best over all calls at a given work, and what the search would choose from a few of them: its excess on the calls
   that it has not seen, over draws of calls; by the number of groups, by whether the mean error or its square is
   made small, and by whether every call has a gain of its own.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence

import numpy as np
import torch

from benchmarks.lib import models
from benchmarks.lib.bench import Bench
from benchmarks.lib.calibration import SEED
from benchmarks.lib.kept import made_by
from benchmarks.lib.own import code
from benchmarks.lib.plan_search import recorded
from benchmarks.lib.quality import STATISTICS
from osaccel import formats
from osaccel.search.measure import Measure
from osaccel.search.plan.actions import ACTIONS, BY_NAME, FAMILIES, PLAIN, REFERENCES, Action, Windows, plan_of
from osaccel.search.plan.choice import Choice, at_work, curve, least
from osaccel.search.plan.gains import Expectation, gains, probes
from osaccel.search.plan.local import squared_sizes
from osaccel.search.plan.observation import record_of

# The mildest of every family, and the next stronger of the one that knows no other costs.
ALONE = ("c2", "s2", "f2", "s3")
WORKS = (1 / 1.3, 1 / 1.6, 0.55, 0.5)
JUDGED = ("mean", "typical", "worst tenth")
# How many calls a search might see instead.
OTHERS = (1, 2, 4, 16, 24)


class Measured(NamedTuple):
    """Of every call: squared relative errors of the final latents, squared local changes.

    Attributes:
        names: of the actions, the plain one first.
        squares: (call, window, action).
        sizes: (call, window, action, family).
    """

    windows: Windows
    names: List[str]
    squares: np.ndarray
    sizes: np.ndarray

    @property
    def actions(self) -> List[Action]:
        return [BY_NAME[name] for name in self.names]

    def of(self, calls: Sequence[int], choice: Choice) -> List[float]:
        """Relative errors of calls under a choice, the windows' squares added up."""
        places = [self.names.index(action.name) for action in choice.actions]
        return np.sqrt(sum(self.squares[calls, window, place] for window, place in enumerate(places))).tolist()


def measured(name: str, calls: int, folder: Path) -> Measured:
    """One replay of every call for each action and window; kept one by one."""
    model = models.model(name)
    bench = Bench(model, model.load())
    with tempfile.TemporaryDirectory() as scratch:
        runner = recorded(bench, model.calibration_cases(calls, SEED), str(Path(scratch) / "plan.json"))
    runner.prepare()
    measure = Measure(runner.replays, runner.team)
    windows, actions = runner.windows, [one for one in ACTIONS if one == PLAIN or one.name in ALONE]
    squares = np.zeros((calls, windows.count, len(actions)))
    sizes = np.zeros((calls, windows.count, len(actions), len(FAMILIES)))
    reference = measure.reference.squares()
    for place, action in enumerate(actions):
        for call, observed in enumerate(runner.observed):
            local = squared_sizes(record_of(observed), action, windows)
            sizes[call, :, place] = [[size[family] for family in FAMILIES] for size in local]
        for window in range(windows.count if action != PLAIN else 0):
            begin, digest = windows.steps(window)[0], code("network", "sampling", "plan.py")[:8]
            path = folder / f"{name}-{calls}-{digest}-{action.name}-{begin}.json"
            if not path.exists():
                chosen = [action if number == window else PLAIN for number in range(windows.count)]
                evaluation = measure(formats.plan_content(plan_of(chosen, windows)))
                formats.write_json(str(path), evaluation.details["errors"])
            squares[:, window, place] = np.square(json.loads(path.read_text()))
    sizes /= np.array(reference)[:, None, None, None]
    return Measured(windows, [action.name for action in actions], squares, sizes)


def expectation(data: Measured, calls: Sequence[int], groups: int) -> Expectation:
    """What the search would take from these calls."""
    sizes = {name: data.sizes[calls][:, :, place] for place, name in enumerate(data.names)}
    families = [family for family in FAMILIES if REFERENCES[family] in data.names]
    found = {}
    for probe in probes(families, data.windows, groups):
        place = data.names.index(REFERENCES[probe.family])
        found[probe] = np.sqrt(data.squares[calls][:, list(probe.windows), place].sum(axis=1)).tolist()
    return Expectation(sizes, gains(found, sizes, data.windows))


def pooled(data: Measured, expected: Expectation) -> np.ndarray:
    """(1, window, action): one call for all, whose gain is that of the sums over calls."""
    sizes = {name: values.mean(axis=0, keepdims=True) for name, values in expected.sizes.items()}
    gain = {}
    for family, values in expected.gain.items():
        local = expected.sizes[REFERENCES[family]][:, :, FAMILIES.index(family)]
        gain[family] = (values * local).sum(axis=0, keepdims=True) / local.sum(axis=0, keepdims=True)
    return Expectation(sizes, gain).squares(data.actions)


def chosen(data: Measured, squares: np.ndarray, work: float, is_mean: bool = True) -> Choice:
    """The choice of least mean error, or of least mean square."""
    known = data.actions, squares, data.windows
    found = least(*known, work) if is_mean else at_work(curve(*known), work)
    if found is None:
        raise ValueError(f"no mixture of {', '.join(data.names)} has a work of {work:g}")
    return found


Rule = Callable[[Measured, Sequence[int], float], Choice]


def by_groups(count: int) -> Rule:
    return lambda data, calls, work: chosen(data, expectation(data, calls, count).squares(data.actions), work)


def by_mean_square(data: Measured, calls: Sequence[int], work: float) -> Choice:
    return chosen(data, expectation(data, calls, 3).squares(data.actions), work, is_mean=False)


def by_pooled_gains(data: Measured, calls: Sequence[int], work: float) -> Choice:
    return chosen(data, pooled(data, expectation(data, calls, 3)), work)


RULES: Dict[str, Rule] = {
    **{f"{groups} groups": by_groups(groups) for groups in (1, 2, 3, 4)},
    "3 groups, mean square": by_mean_square,
    "3 groups, one gain for all calls": by_pooled_gains,
}


def excess(data: Measured, work: float, few: int, draws: int, rule: Rule) -> List[float]:
    """Mean, over draws of `few` calls, of a choice's error on all others over that of the best choice for all."""
    generator, ratios = np.random.default_rng(0), []
    best = chosen(data, data.squares, work)
    for _ in range(draws):
        calls = generator.permutation(len(data.squares)).tolist()
        seen, unseen = calls[:few], calls[few:]
        own = rule(data, seen, work)
        ratios.append([statistic(data, unseen, own, name) / statistic(data, unseen, best, name) for name in JUDGED])
    return np.mean(ratios, axis=0).tolist()


def statistic(data: Measured, calls: Sequence[int], choice: Choice, name: str) -> float:
    return float(STATISTICS[name](data.of(calls, choice), axis=0))


def table(data: Measured, name: str, few: int, draws: int) -> str:
    lines = [f"{name}: {len(data.squares)} calls, one window of {data.windows.length} steps at a time", ""]
    lines += ["root of the gain by window", "      " + "".join(f"{window:8}" for window in range(data.windows.count))]
    for place, action in list(enumerate(data.names))[1:]:
        family = FAMILIES.index(next(kind for kind in data.actions[place].cycle if kind in FAMILIES))
        gain = data.squares[:, :, place].mean(axis=0) / data.sizes[:, :, place, family].mean(axis=0)
        lines.append(f"{action:6}" + "".join(f"{value:8.3f}" for value in np.sqrt(gain)))
    lines += ["", f"excess of choices from {few} calls on the others, {draws} draws: {', '.join(JUDGED)}"]
    for work in WORKS:
        best = chosen(data, data.squares, work)
        values = [statistic(data, list(range(len(data.squares))), best, one) for one in JUDGED]
        said = ", ".join(f"{value:.4f}" for value in values)
        lines.append(f"work {work:.3f}: best {' '.join(action.name for action in best.actions)}: {said}")
        for name, rule in RULES.items():
            found = excess(data, work, few, draws, rule)
            lines.append(f"    {name:33}" + "".join(f"{value - 1:+8.0%}" for value in found))
        for seen in OTHERS:
            found = excess(data, work, seen, draws, by_groups(3))
            lines.append(f"    {f'3 groups, {seen} calls':33}" + "".join(f"{value - 1:+8.0%}" for value in found))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=models.MODULES, default="miniature")
    parser.add_argument("--calls", type=int, default=40)
    parser.add_argument("--few", type=int, default=8, help="calls that a search sees")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--kept", type=Path, required=True, help="a folder for what is measured")
    parser.add_argument("--out", type=Path, help="write the table there, .txt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.kept.mkdir(parents=True, exist_ok=True)
    data = measured(options.model, options.calls, options.kept)
    text = table(data, options.model, options.few, options.draws)
    print(text)
    if options.out:
        head = "\n".join(f"{key}: {value}" for key, value in made_by().items())
        options.out.with_suffix(".txt").write_text(f"{head}\n{text}\n")


if __name__ == "__main__":
    main()
