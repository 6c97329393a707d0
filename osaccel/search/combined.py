# SPDX-License-Identifier: Apache-2.0
"""Searches one after the other: the only module that knows more than one of them."""

from typing import Any, Dict, Optional

from osaccel.search.dit_cache.runner import CacheRunner
from osaccel.search.journalled import SUFFIX
from osaccel.search.recording.replay import Call
from osaccel.search.session import Runner, Session
from osaccel.search.timesteps.runner import RestepRunner
from osaccel.search.workers import Held, take_lock


class AllRunner(Runner):
    """OSACCEL_SEARCH=all: timesteps first, then the cache for a generation that follows them."""

    def __init__(self, session: Session):
        super().__init__(session)
        self.restep = RestepRunner(session)
        self._held: Optional[Held] = None
        self._cache: Optional[CacheRunner] = None

    def record(self, call: Call) -> Any:
        if not self.session.calls:
            # Helpers wait for the cache search, and see here that rank 0 is at work.
            self._held = take_lock(self.session.team, (self.session.settings.cache_output or "") + SUFFIX)
        return self.restep.record(call)

    def search(self) -> Dict[str, Any]:
        found = self.restep.search()
        cache = self._cache = CacheRunner(self.session, found["timesteps"], self._held)
        for call in self.session.calls:
            cache.record(call)
        return {**found, **cache.search()}

    def close(self, problem: Optional[str] = None) -> None:
        if self._cache is not None:
            self._cache.close(problem)
        elif self._held is not None:
            self._held.release()

    def assist(self, call: Call) -> Dict[str, Any]:
        return CacheRunner(self.session).assist(call)
