# SPDX-License-Identifier: Apache-2.0
"""Searches one after the other: the only module that knows more than one of them."""

from typing import Any, Dict

from osaccel.search.dit_cache.runner import CacheRunner
from osaccel.search.recording.replay import Call
from osaccel.search.session import Runner, Session
from osaccel.search.timesteps.runner import RestepRunner


class AllRunner(Runner):
    """OSACCEL_SEARCH=all: timesteps first, then the cache for a generation that follows them."""

    def __init__(self, session: Session):
        super().__init__(session)
        self.restep = RestepRunner(session)

    def record(self, call: Call) -> Any:
        return self.restep.record(call)

    def search(self) -> Dict[str, Any]:
        found = self.restep.search()
        cache = CacheRunner(self.session, found["timesteps"])
        for call in self.session.calls:
            cache.record(call)
        return {**found, **cache.search()}

    def assist(self, call: Call) -> Dict[str, Any]:
        return CacheRunner(self.session).assist(call)
