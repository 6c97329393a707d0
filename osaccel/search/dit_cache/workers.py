# SPDX-License-Identifier: Apache-2.0
"""The ranks of a script that splits its prompts, as the workers of one cache search.

Rank 0 publishes rounds of one candidate per worker; each is claimed by whoever is there. Ranks meet in files and in the
rendezvous store, never in collectives: they may have other numbers of prompts, and come at any time.
"""

import json
import os
import time
from typing import Any, Dict, List, Optional, Sequence

import torch

from osaccel.search.dit_cache.candidates import Candidate, candidate_of
from osaccel.search.dit_cache.evaluate import Evaluator
from osaccel.search.errors import SearchError
from osaccel.search.journal import Journal
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.team import Team

_POLL_SECONDS = 0.1
_JOIN_SECONDS = 600.0


def final_name(candidate: Candidate, member: int) -> str:
    """Where the final latents of a candidate on the first call are kept, for the report's frames."""
    return f"final-{'-'.join(map(str, candidate))}-{member}.pt"


class Workers:
    """Evaluates rounds of candidates: alone, or as rank 0 with the ranks that help.

    Args:
        team: the ranks that generate together, of which this process is one.
        journal: where finished evaluations go, and where the workers meet.
    """

    def __init__(self, team: Team, journal: Journal):
        self.team, self.journal = team, journal
        self.token = ""

    def publish(self, replays: Sequence[Replay]) -> None:
        """Rank 0: say where the recorded calls are."""
        if self.team.workers == 1:
            return
        self.token = self._agree_on_token()
        calls = [{"args": replay.call.args, "kwargs": replay.call.kwargs} for replay in replays]
        self.journal.save(f"plan-{self.token}-{self.team.member}.pt", calls)

    def run_round(self, round_: List[Candidate], evaluator: Evaluator, best: Any) -> List[Dict[str, Any]]:
        """Every candidate of the round evaluated once, by whichever worker is there; the same results in any case."""
        if self.team.workers == 1:
            return [self._evaluate(candidate, evaluator, best) for candidate in round_]
        name = f"round-{self.token}-{'-'.join(map(str, round_[0]))}"
        if self.team.is_leader:
            self.journal.save(name + ".pt", {"round": [tuple(candidate) for candidate in round_], "best": best})
        self._take(name, round_, evaluator, best)
        return self._collect(round_)

    def finish(self, found: Dict[str, int]) -> None:
        """Rank 0: tell the others what was found, and remove the journal when they have seen it."""
        if self.team.workers > 1 and self.team.is_leader:
            if self.team.worker == 0:
                # A rank that comes when the directory is gone finds the result here.
                self._store().set(self._result_key(), json.dumps(found))
            self.journal.save(f"done-{self.token}.pt", found)
            self._wait_until_seen()
        if self.team.is_first:
            self.journal.remove()
        self.team.barrier()

    def _take(self, name: str, round_: List[Candidate], evaluator: Evaluator, best: Any) -> None:
        """Evaluate unclaimed candidates until none is left, each worker beginning at a place of its own."""
        for place in range(len(round_)):
            number = (place + self.team.worker) % len(round_)
            candidate = round_[number]
            if self.team.share(self.journal.claim(f"{name}-{number}") if self.team.is_leader else None):
                self._evaluate(candidate, evaluator, best)

    def _evaluate(self, candidate: Candidate, evaluator: Evaluator, best: Any) -> Dict[str, Any]:
        """One evaluation, recorded the moment it is finished."""
        evaluation = self.team.share({**evaluator(candidate, best), "worker": self.team.worker})
        if evaluation["error"] is not None:
            self.journal.save(final_name(candidate, self.team.member), evaluator.final)
        if self.team.is_leader:
            self.journal.add(evaluation, self.team.worker)
        return evaluation

    def _collect(self, round_: List[Candidate]) -> List[Dict[str, Any]]:
        waited = time.time()
        while True:
            known = {candidate_of(evaluation): evaluation for evaluation in self.journal.evaluations()}
            if self.team.share(all(candidate in known for candidate in round_)):
                return self.team.share([known.get(candidate) for candidate in round_])
            if time.time() - waited > 20 * _JOIN_SECONDS:
                raise SearchError("Another rank claimed a candidate and never finished it.")
            time.sleep(_POLL_SECONDS)

    def _wait_until_seen(self) -> None:
        """The other ranks read the result from the directory that is about to go."""
        until = time.time() + 30
        while time.time() < until:
            names = os.listdir(self.journal.directory)
            joined = [name for name in names if name.startswith(f"joined-{self.token}")]
            left = [name for name in names if name.startswith(f"left-{self.token}")]
            if len(left) >= len(joined):
                return
            time.sleep(_POLL_SECONDS)

    def _result_key(self) -> str:
        return f"osaccel/found-{self.token}"

    @staticmethod
    def _store() -> Any:
        return torch.distributed.distributed_c10d._get_default_store()

    def _agree_on_token(self) -> str:
        """A name for this run, so that what a killed run left behind is not taken for this one's.

        From the rendezvous store, which is no collective: ranks may come at any time.
        """
        store = self._store()
        if self.team.worker == 0 and self.team.is_leader:
            store.set("osaccel/search", f"{os.getpid()}-{int(time.time())}")
        return store.get("osaccel/search").decode()


class Helper(Workers):
    """Another rank than rank 0: joins rank 0's search inside its own first call.

    Args:
        team, journal: see Workers; the journal is rank 0's, by its directory.
        timesteps: the searched list that rank 0's calls follow, or None.
        decode: whether candidates are judged by frames too.
    """

    def __init__(self, team: Team, journal: Journal, timesteps: Optional[Sequence[float]], decode: bool):
        super().__init__(team, journal)
        self.timesteps, self.decode = timesteps, decode

    def assist(self, call: Call) -> Dict[str, int]:
        """Work on rank 0's candidates if it can be reached, and return its result.

        Raises:
            SearchError: rank 0 published nothing.
        """
        self.token = self._agree_on_token()
        try:
            found = self._join(call)
        except FileNotFoundError:
            # Rank 0 was done, and took the directory away while this rank was joining.
            found = self._result()
        if found is None:
            raise SearchError(
                f"Rank 0 has published no search in {self.journal.directory} for {_JOIN_SECONDS:g} s. The directory of "
                "OSACCEL_CACHE_CONFIG must be shared by all ranks, and rank 0 must make OSACCEL_SEARCH_PROMPTS calls."
            )
        return found

    def _join(self, call: Call) -> Optional[Dict[str, int]]:
        """Work on rank 0's candidates until it is done; its result, or None when it never published a plan."""
        plan = self._wait_for(f"plan-{self.token}-{self.team.member}.pt")
        if plan is None:
            return self._result()
        self.journal.claim(f"joined-{self.token}-{self.team.worker}")
        replays = [self._adopt(call, number, content) for number, content in enumerate(plan)]
        found = self._work(Evaluator(replays, self.team, self.decode))
        self.journal.claim(f"left-{self.token}-{self.team.worker}")
        return found

    def _adopt(self, call: Call, number: int, content: Dict[str, Any]) -> Replay:
        """Rank 0's recorded call as this rank's own, on its own pipeline and device."""
        device = {"device": call.kwargs["device"]} if "device" in call.kwargs else {}
        kwargs = {**content["kwargs"], **device}
        adopted = Call(call.function, call.pipeline, content["args"], kwargs, call.target)
        replay = Replay(adopted, self.timesteps)
        replay.load(self.journal.load(f"recording-{number}-{self.team.member}.pt")["replay"])
        return replay

    def _work(self, evaluator: Evaluator) -> Dict[str, int]:
        seen: List[str] = []
        while True:
            names = self.team.share(sorted(os.listdir(self.journal.directory)))
            if f"done-{self.token}.pt" in names:
                return self.journal.load(f"done-{self.token}.pt")
            for name in names:
                if name.startswith(f"round-{self.token}") and name.endswith(".pt") and name not in seen:
                    seen.append(name)
                    content = self.journal.load(name)
                    round_ = [Candidate(*values) for values in content["round"]]
                    self._take(name[:-3], round_, evaluator, content["best"])
            time.sleep(_POLL_SECONDS)

    def _wait_for(self, name: str) -> Any:
        """Wait while rank 0 is seen to be recording, or for as long as it may take to begin."""
        until = time.time() + _JOIN_SECONDS
        while time.time() < until:
            content = self.journal.load(name)
            if content is not None or self._result() is not None:
                return content
            time.sleep(_POLL_SECONDS)
        return None

    def _result(self) -> Optional[Dict[str, int]]:
        if not self._store().check([self._result_key()]):
            return None
        return json.loads(self._store().get(self._result_key()).decode())
