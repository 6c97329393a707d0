# SPDX-License-Identifier: Apache-2.0
"""OSACCEL_SEARCH in an unmodified script: the first pipeline calls are recorded, the last of them holds the search.

A mode is a runner, named in RUNNERS. The recorded calls return what the plain script would get; after the search the
process ends with status 0 on every rank, or goes on with what was found.
"""

import atexit
import importlib
import logging
import os
import sys
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional

from osaccel.search import outputs
from osaccel.search.errors import SearchError
from osaccel.search.recording.replay import Call, RandomState
from osaccel.search.team import Team
from osaccel.settings import Settings
from osaccel.targets import Target

logger = logging.getLogger("osaccel")

# mode: "module:class" of its runner.
RUNNERS = {
    "plan": "osaccel.search.plan.runner:PlanRunner",
    "dit_cache": "osaccel.search.dit_cache.runner:CacheRunner",
    "restep": "osaccel.search.timesteps.runner:RestepRunner",
    "all": "osaccel.search.combined:AllRunner",
}


class Runner:
    """One kind of search. Made at the first pipeline call of the process, with the Session it works for.

    `session.settings` holds the parameters, `session.team` the ranks that generate together (sums, one decision),
    `session.calls` the calls recorded so far.
    """

    def __init__(self, session: "Session"):
        self.session = session

    def record(self, call: Call) -> Any:
        """Run `call` plainly, once, observing what the search needs; returns what the pipeline returned.

        `osaccel.search.recording.replay.Replay(call).record(...)` does that and keeps what replays need. Must raise
        SearchError before the first transformer forward when the goal cannot be reached.
        """
        raise NotImplementedError

    def search(self) -> Dict[str, Any]:
        """Search with the recorded calls, write the files, and return the Settings fields that were found.

        For example {"cache": DitCacheConfig(...)} or {"timesteps": (999.0, ...)}.
        """
        raise NotImplementedError

    def close(self, problem: Optional[str] = None) -> None:
        """The runner is not used any more: let other searches have its files.

        Args:
            problem: why there is no result; None when there is one.
        """

    def assist(self, call: Call) -> Dict[str, Any]:
        """Where a script splits its prompts over ranks: what the other ranks do, inside their first call.

        They must use no collective: they may have other numbers of prompts. The default waits for nothing, finds
        nothing, and lets the rank end or go on plainly.
        """
        return {}


class Session:
    """All calls of one process until the search is over.

    Args:
        settings: with `search` set.
        target: where things are in the pipeline.
    """

    def __init__(self, settings: Settings, target: Target):
        self.settings, self.target = settings, target
        self.team = Team(target.sequence_parallel_group())
        self.calls: List[Call] = []
        self.is_over = False
        # Whether what was found is in the file that was asked for; else it is in the log.
        self.is_delivered = True
        self._has_failed = False
        self._runner: Optional[Runner] = None
        atexit.register(self._complain_if_unfinished)

    @property
    def runner(self) -> Runner:
        if self._runner is None:
            module, name = RUNNERS[self.settings.search or ""].split(":")
            self._runner = getattr(importlib.import_module(module), name)(self)
        return self._runner

    def on_call(self, function: Callable, pipeline: Any, args: tuple, kwargs: dict) -> Any:
        """What happens in place of a pipeline call while the search is not over; returns the call's output."""
        call = Call(function, pipeline, args, kwargs, self.target)
        try:
            if self.team.worker > 0:
                self._end(self.runner.assist(call))
                call.state.restore()
                # This rank's own call was not made yet; it is the first one with what was found.
                return function(*args, **kwargs)
            if self.team.is_first:
                which = f"{len(self.calls) + 1} of {self.settings.search_prompts}"
                logger.info("search (%s): generation %s is recorded", self.settings.search, which)
            return self._record(call)
        except BaseException as error:
            self._give_up(error)
            raise

    def abandon(self) -> None:
        """Nothing is said at the end of the process of a search that is not over; for callers that drive a session."""
        atexit.unregister(self._complain_if_unfinished)

    def deliver(self, path: str, content: Any, write: Callable[[], Any]) -> None:
        """Write the file that was asked for; where that fails, `content` is in the log and the process fails."""
        self.is_delivered = outputs.deliver(path, content, write) and self.is_delivered

    def _record(self, call: Call) -> Any:
        output = self.runner.record(call)
        self.calls.append(call)
        after = RandomState(call.state.generators)
        if len(self.calls) == self.settings.search_prompts:
            self._end(self.runner.search())
            after.restore()
        return output

    def _give_up(self, error: BaseException) -> None:
        """The call failed. Most scripts end now; in one that does not, the next call is the first of a new search."""
        runner, self._runner, self.calls = self._runner, None, []
        self._has_failed = True
        try:
            if runner is not None and not self.is_over:
                runner.close(str(error) or type(error).__name__)
        except (OSError, SearchError) as problem:
            # What failed first is what the user must see.
            logger.debug("closing the search: %s", problem)

    def _end(self, found: Dict[str, Any]) -> None:
        self.is_over = True
        self.runner.close()
        if self.settings.search_then == "exit":
            end_process(self.team, 0 if self.team.share(self.is_delivered) else 1)
        self.settings = replace(self.settings, search=None, **found)
        self._runner, self.calls = None, []

    def _complain_if_unfinished(self) -> None:
        has_begun = bool(self.calls) or self._has_failed
        if has_begun and not self.is_over and sys.exc_info()[0] is None and not hasattr(sys, "last_value"):
            logger.error(
                "the script ended after %d pipeline calls, OSACCEL_SEARCH_PROMPTS asks for %d; nothing was searched",
                len(self.calls), self.settings.search_prompts,
            )  # fmt: skip
            _flush()
            os._exit(1)


def end_process(team: Team, status: int = 0) -> None:
    """End this rank with this status, whatever the script would do next.

    The upstream's scripts catch bare exceptions, SystemExit too, and one of them never ends by itself, so the process
    is ended directly; the barrier keeps a rank from closing connections another one still uses.
    """
    team.barrier()
    _flush()
    os._exit(status)


def _flush() -> None:
    for handler in list(logger.handlers):
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()


__all__ = ["RUNNERS", "Runner", "SearchError", "Session", "end_process"]
