# SPDX-License-Identifier: Apache-2.0
"""What searches that keep a journal beside their output have in common: opening it, closing it, and saying so."""

import logging
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from osaccel import binding
from osaccel.search import recordings, workers
from osaccel.search.errors import SearchError
from osaccel.search.journal import Journal
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.session import Runner, Session
from osaccel.search.workers import Held, Workers

logger = logging.getLogger("osaccel")

# What a recorded call showed, plain values and tensors.
Observed = Dict[str, Any]
# The journal of a search is beside its output.
SUFFIX = ".search"


class JournalledRunner(Runner):
    """A search whose finished work outlives a kill.

    Args:
        output: the file it writes.
        timesteps: a searched list that the calls are to follow; by default the settings' own.
        held: the lock of the journal, where it was taken already.
    """

    def __init__(
        self,
        session: Session,
        output: Optional[str],
        timesteps: Optional[Sequence[float]] = None,
        held: Optional[Held] = None,
    ):
        super().__init__(session)
        self.team, self.output, self.held = session.team, output or "", held
        self.timesteps = timesteps if timesteps is not None else session.settings.timesteps
        self.replays: List[Replay] = []
        self.num_blocks = 0
        self.fingerprint: Dict[str, Any] = {}
        self._journal: Optional[Journal] = None

    @property
    def journal(self) -> Journal:
        assert self._journal is not None
        return self._journal

    @property
    def directory(self) -> str:
        """Where the journal is."""
        return self.output + SUFFIX

    def open_journal(self, call: Call, decodes: bool, **more: str) -> None:
        """Open it for the first call, once.

        Args:
            decodes: whether candidates are judged by frames too.
            more: what else a journal must agree in to be gone on with.
        """
        if self._journal is not None:
            return
        metric = ("latents and frames" if decodes else "latents") + ", mean over calls"
        prompts = self.session.settings.search_prompts
        self.fingerprint = self.team.share(
            binding.of_search(call, self.num_blocks, self.timesteps, prompts, self.team.size, metric)
        )
        self._journal = workers.open_journal(self.team, self.directory, {**more, **self.fingerprint}, self.held)
        if self.journal.started_anew:
            self.say("what was searched before does not fit any more, starting anew: %s", self.journal.started_anew)
        elif self.journal.evaluations():
            self.say("resuming: %d evaluations are finished", len(self.journal.evaluations()))

    def recorded(self, call: Call, anew: Callable[[Replay], Tuple[Any, Observed]]) -> Tuple[Any, Observed]:
        """The output of a call, and what was observed of it; `anew` runs it where the journal does not have it."""
        number, replay = len(self.replays), Replay(call, self.timesteps)
        observed = recordings.resume(self.journal, self.team, number, replay)
        if observed is not None:
            self.say("call %d was recorded before the search was interrupted; it is not generated again", number + 1)
            output = replay.decode()
        else:
            output, observed = anew(replay)
            recordings.keep(self.journal, self.team, number, replay, observed)
        self.replays.append(replay)
        return output, observed

    def forget(self, *names: str) -> None:
        """Forget, for the whole team, what in the journal begins like this."""
        if self.team.is_leader:
            self.journal.forget(*names)
        self.team.barrier()

    def check_finite(self, replay: Replay) -> None:
        """Raise SearchError, on every rank of the team, when a plain generation is nothing to compare with."""
        final = replay.recording.latents[-1] if replay.recording.latents else torch.tensor(float("nan"))
        if not self.team.all_agree(bool(torch.isfinite(final).all())):
            raise SearchError("The plain generation's latents are not finite; there is nothing to compare with.")

    def say(self, message: str, *args: Any) -> None:
        """A line in the log, by the one process that shows the progress."""
        if self.team.is_first:
            logger.info(message, *args)

    def close(self, problem: Optional[str] = None) -> None:
        if self._journal is not None:
            if problem is not None:
                Workers(self.team, self._journal).give_up(problem)
            self._journal.close()
