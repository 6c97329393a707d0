# SPDX-License-Identifier: Apache-2.0
"""How a search says how far it is: never back, a line at every 5 % of a log, the time left within a factor of two."""

import io
import logging
import re
from functools import partial

import pytest
import test_plan_search
import test_search_session
import tiny

from osaccel.search import planned, progress
from osaccel.search.progress import Progress, clock_of


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def lines(caplog):
    return [record.getMessage() for record in caplog.records if " %, " in record.getMessage()]


def test_a_log_has_a_line_at_every_5_percent(caplog, clock):
    caplog.set_level(logging.INFO, "osaccel")
    shown = Progress("search", True, io.StringIO(), clock)
    for done in range(1, 1001):
        clock.now += 0.25
        if done == 400:
            shown.best = "2x with error 0.01"
        shown.at(done, 1000)
    shown.close()
    said = lines(caplog)
    assert [int(re.search(r"(\d+) %", line).group(1)) for line in said] == list(range(5, 101, 5))
    assert said[1] == "search: 10 %, 0:25, about 3:45 left"
    assert said[9] == "search: 50 %, 2:05, about 2:05 left, best so far: 2x with error 0.01"
    assert said[-1] == "search: 100 %, 4:10, best so far: 2x with error 0.01"


def test_a_quick_search_is_few_lines(caplog, clock):
    caplog.set_level(logging.INFO, "osaccel")
    shown = Progress("search", True, io.StringIO(), clock)
    for done in range(1, 1001):
        clock.now += 0.002
        shown.at(done, 1000)
    shown.close()
    assert [line.split(",")[0] for line in lines(caplog)] == ["search: 5 %", "search: 55 %", "search: 100 %"]


def test_a_terminal_has_one_line_that_is_drawn_anew(caplog, clock):
    caplog.set_level(logging.INFO, "osaccel")
    terminal = Terminal()
    shown = Progress("search", True, terminal, clock)
    for done in range(1, 11):
        clock.now += 1
        shown.at(done, 10)
    shown.close()
    text = terminal.getvalue()
    assert text.count("\n") == 1 and text.endswith("\033[Ksearch: 100 %, 0:10\n") and text.count("\r") == 10
    assert "search: 50 %, 0:05, about 0:05 left\r" in text and lines(caplog) == []


def test_what_is_expected_may_grow_and_the_line_does_not_go_back(clock):
    shown, seen = Progress("search", False, clock=clock), []
    for done, total in ((1, 4), (2, 4), (2, 8), (3, 8), (5, 8), (9, 8)):
        clock.now += 1
        shown.at(done, total)
        seen.append(shown.percent)
    assert seen == [25, 50, 50, 50, 62, 99]
    shown.close()
    assert shown.percent == 100


def test_only_one_process_shows_it_and_only_where_it_is_asked_for(caplog, clock):
    quiet, other = Terminal(), Terminal()
    caplog.set_level(logging.WARNING, "osaccel")
    for stream, shown in ((quiet, True), (other, False)):
        caplog.set_level(logging.WARNING if shown else logging.INFO, "osaccel")
        found = Progress("search", shown, stream, clock)
        found.at(1, 2)
        found.close()
    assert quiet.getvalue() == other.getvalue() == "" and lines(caplog) == []


def test_seconds_as_a_clock_shows_them():
    assert [clock_of(seconds) for seconds in (0.4, 59.6, 75, 3675, 36000)] == [
        "0:00",
        "1:00",
        "1:15",
        "1:01:15",
        "10:00:00",
    ]


# Real searches, whose clock is the rows that blocks compute ---------------------------------------------------------


class Rows(tiny.Block):
    computed = 0

    def forward(self, hidden_states, timestep=None, attention_mask=None):
        Rows.computed += hidden_states.shape[0]
        return super().forward(hidden_states, timestep, attention_mask)


class PlanPipeline(test_plan_search.Pipeline):
    def __init__(self):
        super().__init__(block=Rows)


class CachePipeline(tiny.UnseededPipeline):
    def __init__(self):
        super().__init__(block=Rows)


def plan_search(path, *goals, calls=1, probed=8):
    test_plan_search.search(path, goals, 60, calls, PlanPipeline(), probed)


def cache_search(path, calls, ratio):
    test_search_session.search(path, CachePipeline(), calls, ratio, num_inference_steps=40)


SEARCHES = {
    "one target": (partial(plan_search, calls=2), ("2x",)),
    "one of three calls probed": (partial(plan_search, calls=3, probed=1), ("2x",)),
    "three targets": (plan_search, ("1.5x", "2x", "2.5x")),
    "four keys": (cache_search, (1, 1.3)),
    "four keys, two calls": (cache_search, (2, 1.5)),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_time_left_is_within_a_factor_of_two_from_20_percent_on(name, tmp_path, monkeypatch):
    search, arguments = SEARCHES[name]
    seen, at, begun = [], Progress.at, []

    def clock():
        begun.append(Rows.computed)
        return Rows.computed - begun[0]

    def watched(self, done, total):
        at(self, done, total)
        seen.append((self.percent, clock(), self.seconds_left))

    monkeypatch.setattr(Progress, "at", watched)
    monkeypatch.setattr(planned, "Progress", partial(progress.Progress, clock=clock))
    search(tmp_path, *arguments)
    end = clock()
    assert [percent for percent, _, _ in seen] == sorted(percent for percent, _, _ in seen)
    lefts = [left / (end - now) for percent, now, left in seen if 20 <= percent <= 85]
    assert len(lefts) > 50 and 0.5 < min(lefts) and max(lefts) < 2
