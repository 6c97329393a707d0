# SPDX-License-Identifier: Apache-2.0
"""OSACCEL_SEARCH=restep: a timestep list from the script's own generations, without one extra transformer forward."""

import logging
import os
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from osaccel import binding, formats
from osaccel.generation import Generation, find_blocks
from osaccel.interceptors import Interceptor
from osaccel.plan import Correction
from osaccel.sampling import UnsupportedScheduler
from osaccel.sampling.powers import check_scheduler
from osaccel.search.errors import SearchError
from osaccel.search.limits import too_many_asked
from osaccel.search.places import even_places
from osaccel.search.recording.replay import Call
from osaccel.search.session import Runner, Session
from osaccel.search.timesteps import calibration
from osaccel.search.timesteps import lists as timesteps
from osaccel.search.timesteps.denoised import DenoiserLog

logger = logging.getLogger("osaccel")


class _ForwardCounter(Interceptor):
    """Counts the transformer's forwards of one kind."""

    def __init__(self, counts: Dict[str, int], kind: str):
        self.counts, self.kind = counts, kind

    def network(self, proceed: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
        self.counts[self.kind] += 1
        return proceed(*args, **kwargs)


class RestepRunner(Runner):
    """Logs the recorded generations (or the calibration videos), then searches every asked number of steps."""

    def __init__(self, session: Session):
        super().__init__(session)
        self.log: Optional[DenoiserLog] = None
        self.forwards = {"script": 0, "search": 0}
        self._videos: List[str] = []

    def record(self, call: Call) -> Any:
        self._check(call)
        directory = self.session.settings.calibration_videos
        log = self._log_of(call)
        if directory is not None and not self._videos:
            self._calibrate(call, log, directory)
        counting = self._counter("script")
        watchers = [counting, log] if directory is None else [counting]
        with Generation(call.pipeline, None, call.target, watchers):
            output = call.function(*call.args, **call.kwargs)
        if directory is None:
            log.end_generation()
        return output

    def search(self) -> Dict[str, Any]:
        assert self.log is not None
        settings, team = self.session.settings, self.session.team
        statistics = self.log.statistics(team)
        parameters = _parameters(settings.correction)
        lists = _find(statistics, settings.target_steps, "wdp", parameters)
        # One decision: rounding may differ between the ranks' machines.
        shared = team.share([[float(value) for value in lists[count]] for count in settings.target_steps])
        if team.is_first:
            report = make_report(statistics, dict(zip(settings.target_steps, shared)), "wdp", parameters)
            report["forwards"] = {**self.forwards, "extra": self.forwards["search"]}
            report.update(binding.occasion(self.session.calls))
            count = len(self.log.generations)
            report["calibration"] = self._videos or f"{count} generation{'s' * (count > 1)} of the script"
            self._write(shared, report)
        # As a reader gets it back: what is bound to this list is bound to the file's.
        return {"timesteps": _as_stored(shared[0])}

    def _write(self, lists: Sequence[Sequence[float]], report: Dict[str, Any]) -> None:
        """Each list and its sidecar report."""
        settings = self.session.settings
        call = self.session.calls[0]
        for path, values in zip(paths_of(settings.timesteps_output or "", settings.target_steps), lists):
            self.session.deliver(path, list(values), partial(write, path, values, report, call))

    def _check(self, call: Call) -> None:
        steps = call.arguments.get("num_inference_steps")
        too_many = too_many_asked(self.session.settings.target_steps, steps) if isinstance(steps, int) else None
        if too_many:
            raise SearchError(too_many)
        if not hasattr(call.pipeline.scheduler, "alphas_cumprod"):
            raise SearchError(f"{type(call.pipeline.scheduler).__name__} has no training noise schedule to search on.")
        if self.session.settings.correction is not None:
            try:
                check_scheduler(call.pipeline.scheduler)
            except UnsupportedScheduler as error:
                raise SearchError(str(error)) from None

    def _log_of(self, call: Call) -> DenoiserLog:
        if self.log is None:
            self.log = DenoiserLog(call.pipeline.scheduler)
        # Scripts may build a new pipeline for each round; the schedule is the same.
        self.log.levels.scheduler = call.pipeline.scheduler
        return self.log

    def _calibrate(self, call: Call, log: DenoiserLog, directory: str) -> None:
        videos = calibration.Videos(directory, call.arguments)
        self._videos = [os.path.basename(path) for path in videos.paths]
        calibration.evaluate(call, videos, log, self.session.team, watchers=[self._counter("search")])
        call.state.restore()

    def _counter(self, kind: str) -> Interceptor:
        return _ForwardCounter(self.forwards, kind)


def _parameters(correction: Optional[Correction]) -> timesteps.Parameters:
    """The defaults, and what is known of the generations that will follow the list.

    Strengths per step belong to the steps of one list, which is not known yet: their mean stands for them.
    """
    strength = correction.corrector if correction else 0.0
    return timesteps.DEFAULTS._replace(corrector=float(np.mean(strength)))


def _find(
    statistics: timesteps.Statistics, counts: Sequence[int], method: str, parameters: timesteps.Parameters
) -> Dict[int, np.ndarray]:
    try:
        return timesteps.search(statistics, counts, method, parameters)
    except ValueError as error:
        raise SearchError(str(error)) from None


def make_report(
    statistics: timesteps.Statistics,
    lists: Dict[int, List[float]],
    method: str,
    parameters: timesteps.Parameters,
) -> Dict[str, Any]:
    """What the sidecar keeps: the lists, what they are predicted to cost against even spacing, and the cost curve."""
    size = len(statistics.timesteps)
    predicted = _predicted(statistics, sorted({*range(5, size, 5), *lists, size}), parameters)
    return {
        "kind": "restep",
        "method": method,
        "parameters": dict(parameters._asdict()),
        "teacher_steps": size,
        "latent_variance": statistics.variance,
        "lists": {str(count): list(values) for count, values in lists.items()},
        **predicted,
    }


def _predicted(
    statistics: timesteps.Statistics, lengths: Sequence[int], parameters: timesteps.Parameters
) -> Dict[str, Dict[str, float]]:
    """By number of steps, for the best wdp list and for even spacing: the part of the variance that is missing, and the
    changed decisions, even spacing's with half of the steps being 1.
    """
    objective, size = timesteps.Objective(statistics, parameters), len(statistics.timesteps)
    unit = timesteps.path_cost(objective.decisions, even_places(size, max(2, size // 2))) or 1.0
    curves: Dict[str, Dict[str, float]] = {
        name: {} for name in ("cost_curve", "cost_curve_even", "decisions_curve", "decisions_curve_even")
    }
    for length in lengths:
        for ending, places in (("", objective.best(length)), ("_even", even_places(size, length))):
            curves["cost_curve" + ending][str(length)] = timesteps.path_cost(objective.detail, places)
            curves["decisions_curve" + ending][str(length)] = timesteps.path_cost(objective.decisions, places) / unit
    return curves


def paths_of(output: str, counts: Sequence[int]) -> List[str]:
    """The file of each count: the first is `output` itself, the others have their count before the ending."""
    stem, ending = os.path.splitext(output)
    return [output if number == 0 else f"{stem}.{count}{ending}" for number, count in enumerate(counts)]


def write(path: str, values: Sequence[float], report: Dict[str, Any], call: Call) -> None:
    """Write a list and its sidecar report."""
    formats.write_timesteps(path, values)
    bound = {
        **binding.of_call(call.pipeline, call.arguments, _number_of_blocks(call), _as_stored(values)),
        "teacher_steps": report["teacher_steps"],
        "versions": binding.versions(),
    }
    formats.write_json(formats.report_path(path), {**report, "fingerprint": bound})
    logger.info("searched timesteps (%d steps) written to %s", len(values), path)


def _as_stored(values: Sequence[float]) -> Tuple[float, ...]:
    """The list as a reader of its file gets it: division and multiplication may change the last bit."""
    return formats.parse_timesteps(
        [value / formats.NUM_TRAIN_TIMESTEPS for value in reversed(values)], "the list found"
    )


def _number_of_blocks(call: Call) -> int:
    try:
        return len(find_blocks(call.pipeline, call.target.block_path))
    except (TypeError, ValueError):
        return 0
