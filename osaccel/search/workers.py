# SPDX-License-Identifier: Apache-2.0
"""The ranks of a script that splits its prompts, as the workers of one search.

Rank 0 publishes rounds of jobs; each job is claimed by whoever is there. Ranks meet in the journal's files and in the
rendezvous store, never in collectives: they may have other numbers of prompts, and come at any time. Each touches a
file while it lives, so none waits for one that has died: what a dead helper claimed is done by rank 0, and helpers of a
dead rank 0 end with a message.
"""

import json
import logging
import os
import time
from dataclasses import replace
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

import torch

from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation, key_of
from osaccel.search.journal import Journal, lock_path
from osaccel.search.lock import Lock, owner_of
from osaccel.search.presence import Heart, Owner, silence
from osaccel.search.team import Team

logger = logging.getLogger("osaccel")

POLL_SECONDS = 0.1
# How often it is looked whether another rank has died: that may cost a file on a shared disk.
CHECK_SECONDS = 1.0
# How long a helper waits for the first sign of rank 0, which may still load its model.
JOIN_SECONDS = 600.0
_SEEN_SECONDS = 30.0

# A JSON-able configuration; `Evaluation.config` of its evaluation is equal to it.
Job = Mapping[str, Any]
# (job, what the round's jobs share) -> its evaluation, the same on every rank of the team.
Evaluate = Callable[[Job, Any], Evaluation]


class Held(NamedTuple):
    """A journal's lock, held for a team by its leader; the other ranks have None."""

    lock: Optional[Lock]

    def release(self) -> None:
        """Let other searches have the journal."""
        if self.lock is not None:
            self.lock.release()


def take_lock(team: Team, directory: str) -> Held:
    """Take the lock of a journal for this team, on all of its ranks; helpers are told, and see that rank 0 lives.

    Raises:
        SearchError: on every rank of the team, when another search has it.
    """
    lock = team.led(lambda: Lock.take(lock_path(directory)))
    store = _store() if lock is not None and team.workers > 1 else None
    if store is not None and lock is not None:
        store.set(_TOKEN, lock.owner.token)
    return Held(lock)


def open_journal(team: Team, directory: str, fingerprint: Mapping[str, Any], held: Optional[Held] = None) -> Journal:
    """The journal of a search, for every rank of the team; see `Journal`.

    Args:
        held: what `take_lock` gave, where it was called before.
    """
    lock = (held or take_lock(team, directory)).lock
    journal = team.led(lambda: Journal(directory, fingerprint, lock=lock))
    return journal or Journal(directory, fingerprint, is_writer=False)


class Workers:
    """Evaluates rounds of jobs: alone, or as rank 0 with the ranks that help.

    Args:
        team: the ranks that generate together, of which this process is one.
        journal: the search's, which this team's leader owns.
    """

    def __init__(self, team: Team, journal: Journal):
        self.team, self.journal = team, journal
        self._rounds, self._looked = 0, 0.0

    def publish(self, context: Any) -> None:
        """Say what helpers need before they can evaluate: plain values and tensors, one for each rank of the team."""
        if self.team.workers == 1:
            return
        kept = self.journal.save(f"context-{self.journal.run}-{self.team.member}", context)
        if not self.team.all_agree(kept):
            raise SearchError(f"{self.journal.directory}: cannot be written; ranks that split prompts meet there.")
        if self.team.is_leader:
            self.journal.put(f"published-{self.journal.run}", True)

    def run_round(self, jobs: Sequence[Job], evaluate: Evaluate, shared: Any = None) -> List[Evaluation]:
        """Every job evaluated once, by whichever worker is there, in the jobs' order.

        Each evaluation is in the journal the moment it is finished.

        Args:
            shared: JSON-able, given to `evaluate` with each job.
        """
        if self.team.workers == 1:
            return [_evaluated(self.team, self.journal, evaluate, job, shared) for job in jobs]
        name, self._rounds = f"round-{self.journal.run}-{self._rounds:04d}", self._rounds + 1
        if self.team.is_leader:
            self.journal.put(name, {"jobs": [dict(job) for job in jobs], "shared": shared})
        _take(self.team, self.journal, name, jobs, evaluate, shared)
        return self._collect(name, jobs, evaluate, shared)

    def finish(self, found: Any, remove: bool = True) -> None:
        """Tell the helpers what was found, JSON-able, and remove the journal when they have seen it."""
        if self.team.workers > 1 and self.team.is_first:
            store = _store()
            if store is not None:
                # A rank that comes when the directory is gone finds the result here.
                store.set(_result_key(self.journal.run), json.dumps(found))
            self.journal.put(f"done-{self.journal.run}", {"found": found})
            self._wait_until_seen()
        if remove:
            self.journal.remove()
        else:
            self.journal.close()
        self.team.barrier()

    def give_up(self, message: str) -> None:
        """Tell the helpers that there will be no result, and why."""
        if self.team.workers > 1 and self.team.is_first:
            self.journal.put(f"done-{self.journal.run}", {"error": message})
            self._wait_until_seen()

    def _collect(self, name: str, jobs: Sequence[Job], evaluate: Evaluate, shared: Any) -> List[Evaluation]:
        wanted = [key_of(job) for job in jobs]
        while True:
            known = {evaluation.key: evaluation for evaluation in self.journal.evaluations()}
            if self.team.share(all(key in known for key in wanted)):
                return self.team.share([known.get(key) for key in wanted])
            missing = [place for place, key in enumerate(wanted) if key not in known]
            # Decided by the leader: files may be seen at another time elsewhere.
            for place in self.team.share(self._left(name, missing)):
                logger.warning("a rank that was evaluating a candidate has ended; rank 0 evaluates it")
                _evaluated(self.team, self.journal, evaluate, jobs[place], shared)
            time.sleep(POLL_SECONDS)

    def _left(self, name: str, places: Sequence[int]) -> List[int]:
        """Those of a round's jobs that were claimed by a rank that has ended; looked for now and then."""
        if not self.team.is_leader or time.time() - self._looked < CHECK_SECONDS:
            return []
        self._looked = time.time()
        return [place for place in places if self.journal.is_left(f"{name}-{place}")]

    def _wait_until_seen(self) -> None:
        """The helpers read the result from the directory that is about to go."""
        until = time.time() + _SEEN_SECONDS
        while time.time() < until:
            joined = [self.journal.claimant(name[: -len(".claim")]) for name in self.journal.names("joined-", ".claim")]
            left = {name[len("left-") : -len(".claim")] for name in self.journal.names("left-", ".claim")}
            waiting = [helper for helper in joined if helper is not None and helper.token not in left]
            if all(helper.is_gone(self.journal.beat_path(helper)) for helper in waiting):
                return
            time.sleep(POLL_SECONDS)


class Helper:
    """Another rank than rank 0: joins rank 0's search inside its own first call.

    Args:
        team: the ranks that generate together, of which this process is one.
        directory: of rank 0's journal.
    """

    def __init__(self, team: Team, directory: str):
        self.team, self.directory = team, directory
        self.me = Owner.here()
        self._begun = time.time()
        # When rank 0's lock was first found missing or dead, and the state in which it was first seen.
        self._missed = self._touched = self._looked = 0.0

    def assist(self, prepare: Callable[[Journal, Any], Evaluate]) -> Any:
        """Evaluate rank 0's jobs until it is done; returns what it found.

        Args:
            prepare: called once with rank 0's journal and what it published; returns what evaluates a job.

        Raises:
            SearchError: rank 0 published nothing, found nothing, or has died.
        """
        run = self._followed(self._token)
        outcome = self._followed(lambda: self._published(run))
        if outcome != _PUBLISHED:
            return _found(outcome)
        journal = Journal.join(self.directory)
        context = journal.load(f"context-{run}-{self.team.member}")
        if not self.team.all_agree(context is not None):
            raise SearchError(f"{self.directory}: what rank 0 published cannot be read; is the directory shared?")
        heart = self._join(journal)
        try:
            return self._work(journal, run, prepare(journal, context))
        except SearchError:
            # What this rank was still doing may be what rank 0 did not wait for any more.
            outcome = self._result(run)
            if outcome is None:
                raise
            return _found(outcome)
        finally:
            if heart is not None:
                heart.stop()
                journal.claim(f"left-{self.me.token}", self.me)

    def _join(self, journal: Journal) -> Optional[Heart]:
        if not self.team.is_leader:
            return None
        path = journal.beat_path(self.me)
        with open(path, "wb"):
            journal.claim(f"joined-{self.me.token}", self.me)
        return Heart(path)

    def _work(self, journal: Journal, run: str, evaluate: Evaluate) -> Any:
        seen: Set[str] = set()
        while True:
            kind, content = self._followed(lambda: self._next(journal, run, seen))
            if kind == "done":
                return _found(content)
            seen.add(kind)
            if content is not None:
                _take(self.team, journal, kind, content["jobs"], evaluate, content["shared"], self.me)

    def _next(self, journal: Journal, run: str, seen: Set[str]) -> Optional[Tuple[str, Any]]:
        """The outcome, or a round that was not seen yet; None while there is neither."""
        outcome = journal.get(f"done-{run}") or self._result(run)
        if outcome is not None:
            return "done", outcome
        for name in journal.names(f"round-{run}", ".note"):
            if name[: -len(".note")] not in seen:
                return name[: -len(".note")], journal.get(name[: -len(".note")])
        self._check(run)
        return None

    # Waiting for rank 0

    def _followed(self, look: Callable[[], Optional[Any]]) -> Any:
        """What the leader sees when it sees something, on every rank of the team; an error of its own too."""
        while True:
            seen: Dict[str, Any] = {}
            if self.team.is_leader:
                try:
                    seen["value"] = look()
                except SearchError as error:
                    seen["error"] = str(error)
            seen = self.team.share(seen)
            if "error" in seen:
                raise SearchError(seen["error"])
            if seen["value"] is not None:
                return seen["value"]
            time.sleep(POLL_SECONDS)

    def _token(self) -> Optional[str]:
        """The name of rank 0's run: what a run that was killed left behind is not taken for this one's."""
        store = _store()
        found = self._beating() if store is None else _asked(store, _TOKEN)
        if found is None and time.time() - self._begun > JOIN_SECONDS:
            raise SearchError(
                f"Rank 0 has begun no search in {self.directory} for {JOIN_SECONDS:g} s. The directory of the output "
                "must be shared by all ranks, and rank 0 must make OSACCEL_SEARCH_PROMPTS calls."
            )
        return found

    def _beating(self) -> Optional[str]:
        """Without a store: the run whose lock is seen to be touched."""
        path = lock_path(self.directory)
        holder = owner_of(path)
        if holder is None:
            return None
        touched = os.stat(path).st_mtime
        self._touched = self._touched or touched
        return holder.token if touched != self._touched else None

    def _published(self, run: str) -> Any:
        outcome = self._result(run)
        if outcome is not None:
            return outcome
        if os.path.exists(os.path.join(self.directory, f"published-{run}.note")):
            return _PUBLISHED
        self._check(run)
        return None

    def _check(self, run: str) -> None:
        """Raise SearchError when rank 0 has died; looks now and then."""
        if time.time() - self._looked < CHECK_SECONDS:
            return
        self._looked = time.time()
        path = lock_path(self.directory)
        holder = owner_of(path)
        if holder is not None and holder.token == run and not holder.is_gone(path):
            self._missed = 0.0
            return
        # The lock may be gone because the search is over: its result is looked for once more.
        self._missed = self._missed or time.time()
        if time.time() - self._missed < _GRACE_SECONDS:
            return
        seen = f"{holder} was heard from {silence(path):.0f} s ago" if holder and holder.token == run else "it is gone"
        raise SearchError(
            f"Rank 0 has ended without a result: {seen}. This rank was helping its search in {self.directory} and ends "
            "too; run the same command again, and the search goes on where it stopped."
        )

    def _result(self, run: str) -> Optional[Any]:
        store = _store()
        text = None if store is None else _asked(store, _result_key(run), missing_is_fatal=False)
        return None if text is None else {"found": json.loads(text)}


_TOKEN, _PUBLISHED = "osaccel/search", "published"
_GRACE_SECONDS = 3.0


def _evaluated(team: Team, journal: Journal, evaluate: Evaluate, job: Job, shared: Any) -> Evaluation:
    """One evaluation, recorded the moment it is finished."""
    evaluation = team.share(replace(evaluate(job, shared), worker=team.worker))
    kept = journal.add(evaluation, team.worker) if team.is_leader else True
    if team.workers > 1 and not team.share(kept):
        raise SearchError(f"{journal.directory}: cannot be written; ranks that split prompts meet there.")
    return evaluation


def _take(
    team: Team,
    journal: Journal,
    name: str,
    jobs: Sequence[Job],
    evaluate: Evaluate,
    shared: Any,
    me: Optional[Owner] = None,
) -> None:
    """Evaluate unclaimed jobs until none is left, each worker beginning at a place of its own."""
    for turn in range(len(jobs)):
        place = (turn + team.worker) % len(jobs)
        if team.share(journal.claim(f"{name}-{place}", me) if team.is_leader else None):
            _evaluated(team, journal, evaluate, jobs[place], shared)


def _found(outcome: Mapping[str, Any]) -> Any:
    if "error" in outcome:
        raise SearchError(f"Rank 0's search has ended without a result: {outcome['error']}")
    return outcome["found"]


def _result_key(run: str) -> str:
    return f"osaccel/found-{run}"


def _store() -> Optional[Any]:
    """The rendezvous store of the script's ranks; None where they made no process group."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    return distributed.distributed_c10d._get_default_store()


def _asked(store: Any, key: str, missing_is_fatal: bool = True) -> Optional[str]:
    """What is under a key of the store, or None; SearchError when the rank that keeps the store is gone."""
    try:
        return store.get(key).decode() if store.check([key]) else None
    except RuntimeError as error:
        if not missing_is_fatal:
            return None
        reason = str(error).splitlines()[0][:200]
        raise SearchError(f"Rank 0, where the ranks meet, cannot be reached any more: {reason}") from None
