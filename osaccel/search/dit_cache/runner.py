# SPDX-License-Identifier: Apache-2.0
"""The search for four keys inside a script: records, measures what `choice` asks for, writes file and report."""

import logging
import time
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from osaccel import formats
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.generation import find_blocks
from osaccel.network.forwards import HiddenStates
from osaccel.plan import of_dit_cache
from osaccel.search import frames as pictures
from osaccel.search import outputs
from osaccel.search.dit_cache import sidecar
from osaccel.search.dit_cache.candidates import MAX_INTERVAL, Candidate, Goal, pool_for
from osaccel.search.dit_cache.choice import Search
from osaccel.search.dit_cache.region_errors import RegionErrors
from osaccel.search.dit_cache.weights import step_weights
from osaccel.search.errors import SearchError
from osaccel.search.planned import BUDGET, PlannedRunner
from osaccel.search.recording.observe import watch_blocks
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.session import Session
from osaccel.search.workers import Held

logger = logging.getLogger("osaccel")


class CacheRunner(PlannedRunner):
    """OSACCEL_SEARCH=dit_cache.

    Args:
        timesteps: a searched list that the calls are to follow; by default the settings' own.
        held: the lock of the journal, where it was taken already.
    """

    def __init__(self, session: Session, timesteps: Optional[Sequence[float]] = None, held: Optional[Held] = None):
        super().__init__(session, session.settings.cache_output, timesteps, held)
        self.goal = Goal(session.settings.cache_ratio, session.settings.min_psnr)
        self.grams: List[torch.Tensor] = []
        self.weights: List[List[float]] = []
        self.bytes_used = 0

    # Recording

    def record(self, call: Call) -> Any:
        blocks = list(find_blocks(call.pipeline, call.target.block_path))
        self.num_blocks = len(blocks)
        self.open_journal(call, self.decodes)
        output, observed = self.recorded(call, lambda replay: self._record_anew(replay, blocks))
        self.grams.append(observed["grams"])
        self.weights.append(observed["weights"])
        self.bytes_used = max(self.bytes_used, observed["bytes_used"])
        return output

    def _record_anew(self, replay: Replay, blocks: List[torch.nn.Module]) -> Tuple[Any, Dict[str, Any]]:
        """The pipeline's output, and what was observed of its blocks."""
        if self.team.share(bool(self.journal.evaluations())):
            self.say("starting anew: call %d is not the one that was recorded", len(self.replays) + 1)
        self.forget("evaluations-", "final-")
        call, errors = replay.call, RegionErrors(len(blocks), MAX_INTERVAL - 1)

        def attach(generation: Any) -> Any:
            return watch_blocks(blocks, generation.clock, HiddenStates(call.target.hidden_states), errors.observe)

        def before_first_forward() -> None:
            # A goal that cannot be reached is told before anything is computed.
            self._pool(len(call.pipeline.scheduler.timesteps))

        replay.before_first_forward = before_first_forward
        output = replay.record(attach)
        self.check_finite(replay)
        steps, variance = replay.recording.steps, float(replay.recording.latents[-1].double().square().mean())
        weights = step_weights(call.pipeline.scheduler, steps, variance).tolist()
        return output, {"grams": errors.tensor(steps), "weights": weights, "bytes_used": errors.bytes_used}

    def _pool(self, num_steps: int) -> List[Candidate]:
        return pool_for(self.goal, self.num_blocks, num_steps)

    @property
    def decodes(self) -> bool:
        return self.goal.min_psnr is not None

    # Searching

    def search(self) -> Dict[str, Any]:
        started = time.time()
        self.begin("cache search")
        grams = torch.stack([self.team.sum(gram) for gram in self.grams]).mean(0).numpy()
        search = Search(self._pool(self.steps), grams, np.mean(self.weights, axis=0), self.goal)
        self._measure(search)
        changes = np.sqrt(np.maximum(np.einsum("tbb->tb", grams[0]), 0.0))
        found = self._conclude(search, changes, time.time() - started)
        self.crew.finish({"cache": found.to_dict(), "timesteps": self.timesteps}, remove=self.session.is_delivered)
        return {"cache": found}

    def _measure(self, search: Search) -> None:
        """What the search asks for, until the budget or its questions end."""
        while True:
            # One decision: the ranks' machines may round differently.
            round_ = self.team.share(self._round(search))
            if not round_:
                break
            for evaluation in self.evaluated([candidate.config.to_dict() for candidate in round_]):
                search.add(evaluation)
            best = self.team.share(search.choice())
            if best is not None:
                found = search.done[best]
                psnr = "" if found.psnr is None else f", {found.psnr:.2f} dB"
                self.progress.line.best = f"{of_dit_cache(best.config).describe()}, error {found.error:.4g}{psnr}"
        self.progress.close()

    def _round(self, search: Search) -> List[Candidate]:
        """The candidates to measure now, at most one per worker; empty when the search is over."""
        chosen, rest = [], BUDGET - self.spent
        self.progress.expected = self.progress.done + max(0.0, rest - search.price / 2)
        for candidate in search.order(int((BUDGET - 1) / search.price))[: self.team.workers]:
            rest -= candidate.price(self.num_blocks, self.steps)
            if rest < 0:
                # A cheaper one further down would be measured only because it is cheap.
                break
            chosen.append(candidate)
        return chosen

    def _conclude(self, search: Search, changes: np.ndarray, seconds: float) -> DitCacheConfig:
        best = self.team.share(search.choice())
        if best is None:
            raise SearchError(self._nothing_found(search))
        frames = self.frames(search.done[best], "cached")
        if self.team.is_first:
            report = sidecar.report(self, search, best, changes, seconds)
            self._write(best, report, frames)
            logger.info(
                "found %s: speed-up %.3f in blocks, error %.4g, %d candidates measured, cost %.2f plain generations; "
                "written to %s", best.config.to_dict(), report["speed_up"], report["error"], len(search.done),
                self.plain_generations, self.output if self.session.is_delivered else "no file",
            )  # fmt: skip
        self.team.barrier()
        return best.config

    def _write(self, best: Candidate, report: Dict[str, Any], frames: Optional[Dict[str, np.ndarray]]) -> None:
        """The report first: a configuration without one is bound to nothing."""
        pictures.replace_frames(formats.frames_path(self.output), frames)
        path, config = formats.report_path(self.output), best.config
        summary = {key: report[key] for key in ("speed_up", "error", "psnr", "fingerprint")}
        outputs.deliver(path, summary, lambda: formats.write_json(path, report))
        self.session.deliver(self.output, config.to_dict(), lambda: formats.write_cache_config(self.output, config))

    def _nothing_found(self, search: Search) -> str:
        psnrs = [evaluation.psnr for evaluation in search.done.values() if evaluation.psnr is not None]
        if self.goal.min_psnr is not None and psnrs:
            return (
                f"No measured cache configuration keeps a PSNR of {self.goal.min_psnr:g} dB; the best one has "
                f"{max(psnrs):.2f} dB. Ask for less."
            )
        return f"None of the {len(search.done)} measured candidates gave finite latents."

    def settings_of(self, found: Any) -> Dict[str, Any]:
        timesteps = {"timesteps": tuple(found["timesteps"])} if found["timesteps"] else {}
        return {"cache": DitCacheConfig(**found["cache"]), **timesteps}


__all__ = ["CacheRunner"]
