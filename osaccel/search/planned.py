# SPDX-License-Identifier: Apache-2.0
"""What searches have in common whose candidates are plans, run again on the recorded calls and measured there."""

import math
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from osaccel.search import recordings
from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation, key_of
from osaccel.search.frames import frames
from osaccel.search.journal import Journal
from osaccel.search.journalled import JournalledRunner
from osaccel.search.measure import Measure, calls_of_job, first_change, plan_of_job, price_of
from osaccel.search.progress import Progress
from osaccel.search.recording.replay import Call
from osaccel.search.workers import Evaluate, Helper, Job, Workers

# Network work a search may take of each recorded call, in its plain generations; the recorded one is counted in.
BUDGET = 6.0
# Errors of calls to come are known within about a quarter: what is less likely to be right must be so much better.
TOLERANCE = 1.25
# The share of the steps, the noisiest, that are the first ones. There a change leaves nearly every video as it is and
# turns one in some dozens into another, which a search that sees a few calls cannot see.
SETTLING = 0.1


def settling(steps: int) -> int:
    """How many the first steps are."""
    return max(1, math.ceil(SETTLING * steps))


def doubt(first: int, steps: int) -> float:
    """What the measured error of a plan is multiplied by that changes nothing before step `first`."""
    return TOLERANCE if first < settling(steps) else 1.0


class PlannedRunner(JournalledRunner):
    """A search that measures plans, each once, whatever is interrupted.

    Attributes:
        measure, known, progress: what runs a plan, what the journal holds, how far it is; `begin` makes them.
        asked: the evaluations that were decided on.
    """

    measure: Measure
    progress: "ReplayProgress"

    @property
    def steps(self) -> int:
        return self.replays[0].recording.steps

    @property
    def decodes(self) -> bool:
        """Whether candidates are judged by frames too."""
        raise NotImplementedError

    def begin(self, name: str) -> None:
        """All calls are recorded."""
        if any(replay.recording.steps != self.steps for replay in self.replays):
            raise SearchError("The recorded calls have different numbers of steps; nothing fits them all.")
        self.crew = Workers(self.team, self.journal)
        self.crew.publish(recordings.shared(self.replays))
        self.known = {evaluation.key: evaluation for evaluation in self.team.share(self.journal.evaluations())}
        self.asked: Dict[str, Evaluation] = {}
        self.progress = ReplayProgress(name, self.team.is_first)
        self.measure = Measure(self.replays, self.team, self.journal, self.decodes, self.progress.step)

    def price(self, job: Job) -> float:
        """Plain generations' worth of running a job, of each call that it is run on."""
        return price_of(plan_of_job(job, self.steps), self.num_blocks)

    def share(self, job: Job) -> float:
        """The part of the recorded calls that a job is run on."""
        return len(calls_of_job(job, len(self.replays))) / len(self.replays)

    def is_known(self, job: Job) -> bool:
        return key_of(job) in self.known

    def evaluated(self, jobs: Sequence[Job]) -> List[Evaluation]:
        """The jobs' evaluations; what the journal knows is not run again."""
        missing = [job for job in jobs if not self.is_known(job)]
        for start in range(0, len(missing), self.team.workers):
            now = missing[start : start + self.team.workers]
            self.progress.begin(sum(self.share(job) * self.price(job) for job in now), self._steps_of(now[0]))
            round_ = self.crew.run_round(now, self.measure, None)
            self.known.update((evaluation.key, evaluation) for evaluation in round_)
            self.progress.end()
        found = [self.known[key_of(job)] for job in jobs]
        self.asked.update((evaluation.key, evaluation) for evaluation in found)
        return found

    def _steps_of(self, job: Job) -> int:
        """Steps that running a job computes."""
        calls = len(calls_of_job(job, len(self.replays)))
        return calls * (self.steps - first_change(plan_of_job(job, self.steps)))

    def frames(
        self, evaluation: Evaluation, label: str, plain: Optional[np.ndarray] = None
    ) -> Optional[Dict[str, np.ndarray]]:
        """Frames of the first call, plain (where they are not given) and as evaluated."""
        final = self.measure.final(evaluation.config)
        is_here = self.team.all_agree(final is not None)
        return frames(self.replays[0], final, label, plain) if is_here and final is not None else None

    @property
    def block_forwards(self) -> float:
        """Network work so far, plain generations included, in block calls x share of the batch.

        What a killed search had run counts when it is asked for again and not before: all decisions stay the same.
        """
        return self.plain + self.beside + sum(evaluation.block_forwards for evaluation in self.asked.values())

    @property
    def plain(self) -> int:
        """The same of the plain generations."""
        return self.num_blocks * sum(replay.recording.forwards for replay in self.replays)

    @property
    def beside(self) -> float:
        """The same of what was tried beside their steps."""
        return 0.0

    @property
    def plain_generations(self) -> float:
        """The network work so far in plain generations of all recorded calls."""
        return self.block_forwards / self.plain

    @property
    def spent(self) -> float:
        """The network work so far of a call that everything was run on, in its plain generations."""
        of_each = (one.block_forwards / self.share(one.config) for one in self.asked.values())
        return (self.plain + self.beside + sum(of_each)) / self.plain

    def cost(self, seconds: float) -> Dict[str, Any]:
        """Of a report; `seconds` are those of the search, without the plain generations."""
        plain_seconds = sum(replay.recording.seconds for replay in self.replays)
        return {
            "plain_generations": self.plain_generations,
            "seconds": seconds + plain_seconds,
            "plain_seconds": plain_seconds,
            "recording_bytes": sum(replay.recording.nbytes() for replay in self.replays),
        }

    # Other ranks of a script that splits its prompts

    def assist(self, call: Call) -> Dict[str, Any]:
        def prepare(journal: Journal, context: Any) -> Evaluate:
            return Measure(recordings.adopt(journal, self.team, call, context), self.team, journal, self.decodes)

        return self.settings_of(Helper(self.team, self.directory).assist(prepare))

    def settings_of(self, found: Any) -> Dict[str, Any]:
        """The settings that rank 0 published with `Workers.finish`."""
        raise NotImplementedError


class ReplayProgress:
    """A search's progress in network work of its replays.

    Attributes:
        expected: the replays' work as far as is known now, in plain generations; done: of the rounds that are over.
    """

    def __init__(self, name: str, shown: bool):
        self.line = Progress(name, shown)
        self.expected = self.done = self._round = 0.0
        self._steps, self._of = 0, 1

    def begin(self, work: float, steps: int) -> None:
        """A round of this work begins, of which this process computes so many steps, other workers others meanwhile."""
        self._round, self._steps, self._of = work, 0, steps or 1

    def step(self) -> None:
        """A step of one call was replayed."""
        self._steps += 1
        self._show(self._round * min(1.0, self._steps / self._of))

    def end(self) -> None:
        """The round is over."""
        self.done, self._round = self.done + self._round, 0.0
        self._show(0.0)

    def close(self) -> None:
        self.line.close()

    def _show(self, ahead: float) -> None:
        # A goal that is missed takes another replay, which was not expected.
        self.line.at(self.done + ahead, max(self.expected, self.done + self._round))
