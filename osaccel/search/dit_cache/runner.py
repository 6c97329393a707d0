# SPDX-License-Identifier: Apache-2.0
"""The cache search inside a script: records, ranks, verifies, writes the configuration and its report.

Everything finished is in the journal beside the output, so a killed search goes on where it stopped. Where prompts are
split over ranks, the ranks are the workers of rank 0's search, see `osaccel.search.workers`.
"""

import logging
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from osaccel import binding, formats
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.generation import find_blocks
from osaccel.network.forwards import HiddenStates
from osaccel.search import frames as pictures
from osaccel.search import outputs, recordings
from osaccel.search.dit_cache import candidates as cache_search
from osaccel.search.dit_cache import probes, sidecar
from osaccel.search.dit_cache.candidates import MAX_INTERVAL, Candidate, Goal, Search, candidate_of
from osaccel.search.dit_cache.error_model import Gains, predictions
from osaccel.search.dit_cache.evaluate import Evaluator
from osaccel.search.dit_cache.progress import Progress
from osaccel.search.dit_cache.region_errors import RegionErrors
from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation, key_of
from osaccel.search.journal import Journal
from osaccel.search.journalled import JournalledRunner
from osaccel.search.recording import boundaries
from osaccel.search.recording.boundaries import Boundaries
from osaccel.search.recording.observe import watch_blocks
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.session import Session
from osaccel.search.team import Team
from osaccel.search.workers import Evaluate, Held, Helper, Job, Workers

logger = logging.getLogger("osaccel")


class CacheRunner(JournalledRunner):
    """OSACCEL_SEARCH=dit_cache.

    Args:
        timesteps: a searched list that the calls are to follow; by default the settings' own.
        held: the lock of the journal, where it was taken already.
    """

    def __init__(self, session: Session, timesteps: Optional[Sequence[float]] = None, held: Optional[Held] = None):
        super().__init__(session, session.settings.cache_output, timesteps, held)
        self.goal = Goal(session.settings.cache_ratio, session.settings.min_psnr)
        self.grams: List[torch.Tensor] = []
        self.bytes_used = 0

    # Recording

    def record(self, call: Call) -> Any:
        blocks = list(find_blocks(call.pipeline, call.target.block_path))
        self.num_blocks = len(blocks)
        self.open_journal(call, self._decodes)
        output, observed = self.recorded(call, lambda replay: self._record_anew(replay, blocks))
        self.grams.append(observed["grams"])
        self.bytes_used = max(self.bytes_used, observed["bytes_used"])
        return output

    def _record_anew(self, replay: Replay, blocks: List[torch.nn.Module]) -> Tuple[Any, Dict[str, Any]]:
        """The pipeline's output, and what was observed of its blocks."""
        if self.team.share(bool(self.journal.evaluations())):
            self.say("starting anew: call %d is not the one that was recorded", len(self.replays) + 1)
        self.forget("evaluations-", "final-", "gains-")
        call = replay.call
        errors = RegionErrors(len(blocks), MAX_INTERVAL - 1)
        kept = replay.boundaries = Boundaries(boundaries.MEMORY // self.session.settings.search_prompts)

        def attach(generation: Any) -> Any:
            states = HiddenStates(call.target.hidden_states)
            return watch_blocks(blocks, generation.clock, states, errors.observe, kept.observe)

        def before_first_forward() -> None:
            num_steps = len(call.pipeline.scheduler.timesteps)
            firsts = {candidate.first for candidate in self._pool(num_steps)}
            kept.steps = firsts | {step - 1 for step in probes.whole_steps(num_steps)}

        replay.before_first_forward = before_first_forward
        output = replay.record(attach)
        kept.close()
        self.check_finite(replay)
        self._agree_on_boundaries(replay)
        return output, {"grams": errors.tensor(replay.recording.steps), "bytes_used": errors.bytes_used}

    def _pool(self, num_steps: int) -> List[Candidate]:
        return cache_search.pool_for(self.goal, self.num_blocks, num_steps)

    def _agree_on_boundaries(self, replay: Replay) -> None:
        """Ranks resume at the same step, so a step is kept by all of them or by none."""
        kept = replay.boundaries.kept
        here = torch.tensor([float(step in kept) for step in range(replay.recording.steps)])
        everywhere = self.team.sum(here) > self.team.size - 0.5
        for step in [step for step in kept if not everywhere[step]]:
            replay.boundaries.forget(step)

    @property
    def _decodes(self) -> bool:
        return self.goal.min_psnr is not None

    # Searching

    def search(self) -> Dict[str, Any]:
        started = time.time()
        search, changes = self._prepare()
        crew = Workers(self.team, self.journal)
        crew.publish(recordings.shared(self.replays))
        self._verify(search, crew)
        found = self._conclude(search, changes, time.time() - started)
        crew.finish({"cache": found.to_dict(), "timesteps": self.timesteps}, remove=self.session.is_delivered)
        return {"cache": found}

    def _verify(self, search: Search, crew: Workers) -> None:
        """Evaluate what the search asks for until it asks for nothing; what the journal knows is not run again."""
        progress = Progress(search, self.team.is_first)
        evaluate = evaluates(self.team, self.journal, Evaluator(self.replays, self.team, self._decodes, progress.step))
        known = {evaluation.key: evaluation for evaluation in self.team.share(self.journal.evaluations())}
        progress.sync()
        while True:
            # One decision: the ranks' machines may round differently.
            round_ = self.team.share(search.next_round())
            if not round_:
                break
            best = self.team.share(search.best())
            jobs = [candidate.config.to_dict() for candidate in round_]
            missing = [job for job in jobs if key_of(job) not in known]
            if missing:
                rival = search.done[best].to_json() if best else None
                known.update((found.key, found) for found in crew.run_round(missing, evaluate, rival))
            for job in jobs:
                search.add(known[key_of(job)])
            progress.sync()
        progress.close()

    def _prepare(self) -> Tuple[Search, np.ndarray]:
        """The search, and how much each block's delta changes from step to step."""
        num_steps = self.replays[0].recording.steps
        if any(replay.recording.steps != num_steps for replay in self.replays):
            raise SearchError("The recorded calls have different numbers of steps; one configuration cannot fit them.")
        grams = [self.team.sum(gram).numpy() for gram in self.grams]
        pool = self._pool(num_steps)
        gains, overhead = self._gains(grams[0], pool)
        # Errors are relative to all calls together.
        predicted = predictions(pool, np.stack(grams).mean(axis=0), gains)
        search = Search(
            pool,
            predicted.errors,
            self.num_blocks,
            num_steps,
            self.goal,
            plain=self.num_blocks * sum(replay.recording.forwards for replay in self.replays),
            overhead=overhead,
            price=self._price,
            workers=self.team.workers,
            calls=len(self.replays),
            turned=predicted.turned,
        )
        return search, np.sqrt(np.maximum(np.einsum("tbb->tb", grams[0][0]), 0.0))

    def _gains(self, grams: np.ndarray, pool: List[Candidate]) -> Tuple[Gains, int]:
        """What a change of the hidden states does to the latents, from the first call, and its block forwards."""
        name = f"gains-{self.team.member}"
        known = self.journal.load(name)
        if self.team.all_agree(known is not None):
            return Gains(*known["gains"]), known["block_forwards"]
        starts, stops = [candidate.start for candidate in pool], [candidate.stop for candidate in pool]
        gains, spent = probes.measure(self.replays[0], grams, starts, stops, self.team)
        self.journal.save(name, {"gains": tuple(gains), "block_forwards": spent})
        return gains, spent

    def _price(self, candidate: Candidate) -> float:
        """Plain generations' worth of verifying a candidate on all recorded calls."""
        num_steps = self.replays[0].recording.steps
        spent = [
            cache_search.cost(candidate, self.num_blocks, num_steps, replay.resumed_at(candidate.first))
            for replay in self.replays
        ]
        return sum(spent) / (len(spent) * self.num_blocks * num_steps)

    def _conclude(self, search: Search, changes: np.ndarray, seconds: float) -> DitCacheConfig:
        best = self.team.share(search.choice())
        if best is None:
            raise SearchError(self._nothing_found(search))
        final = self.journal.load(final_name(best, self.team.member))
        has_final = self.team.all_agree(final is not None)
        frames = pictures.frames(self.replays[0], final) if has_final else None
        if self.team.is_first:
            report = sidecar.report(search, best, changes, self.replays, self.fingerprint, seconds, self.bytes_used)
            self._write(best, report, frames)
            logger.info(
                "found %s: speed-up %.3f in blocks, error %.4g, %d candidates verified, cost %.2f plain generations; "
                "written to %s", best.config.to_dict(), report["speed_up"], report["error"], len(search.done),
                search.spent, self.output if self.session.is_delivered else "no file",
            )  # fmt: skip
        self.team.barrier()
        return best.config

    def _write(self, best: Candidate, report: Dict[str, Any], frames: Optional[Dict[str, np.ndarray]]) -> None:
        """The report first: a configuration without one is bound to nothing."""
        if frames is not None:
            pictures.write_frames(self.output + ".report.npz", frames)
        path, config = binding.report_path(self.output), best.config
        summary = {key: report[key] for key in ("speed_up", "error", "psnr", "fingerprint")}
        outputs.deliver(path, summary, lambda: formats.write_json(path, report))
        self.session.deliver(self.output, config.to_dict(), lambda: formats.write_cache_config(self.output, config))

    def _nothing_found(self, search: Search) -> str:
        psnrs = [evaluation.psnr for evaluation in search.done.values() if evaluation.psnr is not None]
        if self.goal.min_psnr is not None and psnrs:
            return (
                f"No verified cache configuration keeps a PSNR of {self.goal.min_psnr:g} dB; the best one has "
                f"{max(psnrs):.2f} dB. Ask for less."
            )
        return f"None of the {len(search.done)} verified candidates gave finite latents."

    def assist(self, call: Call) -> Dict[str, Any]:
        def prepare(journal: Journal, context: Any) -> Evaluate:
            replays = recordings.adopt(journal, self.team, call, context)
            return evaluates(self.team, journal, Evaluator(replays, self.team, self._decodes))

        found = Helper(self.team, self.directory).assist(prepare)
        timesteps = {"timesteps": tuple(found["timesteps"])} if found["timesteps"] else {}
        return {"cache": DitCacheConfig(**found["cache"]), **timesteps}


def final_name(candidate: Candidate, member: int) -> str:
    """Where the final latents of a candidate on the first call are kept, for the report's frames."""
    return f"final-{'-'.join(map(str, candidate))}-{member}"


def evaluates(team: Team, journal: Journal, evaluator: Evaluator) -> Evaluate:
    """What evaluates a worker's job, the four keys, against the best evaluation so far."""

    def evaluate(job: Job, best: Any) -> Evaluation:
        candidate = candidate_of(job)
        evaluation = evaluator(candidate, Evaluation.from_json(best) if best else None)
        if evaluation.error is not None:
            journal.save(final_name(candidate, team.member), evaluator.final)
        return evaluation

    return evaluate


__all__ = ["CacheRunner"]
