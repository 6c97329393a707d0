# SPDX-License-Identifier: Apache-2.0
"""The cache search inside a script: records, ranks, verifies, writes the configuration and its report.

Everything finished is in the journal beside the output, so a killed search goes on where it stopped. Where prompts are
split over ranks, the ranks are the workers of rank 0's search: rounds of one candidate per worker, results in files.
"""

import json
import logging
import os
import time
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch

from osaccel import formats
from osaccel.cache.executor import HiddenStates
from osaccel.generation import find_blocks
from osaccel.search import cache_search, fingerprint
from osaccel.search.cache_search import MAX_INTERVAL, Candidate, Goal, Search, SearchError, candidate_of
from osaccel.search.evaluate import Evaluator, frames_of
from osaccel.search.journal import Journal, digest_of, weights_digest
from osaccel.search.regions import RegionErrors
from osaccel.search.replay import Call, Replay
from osaccel.search.session import Runner, Session

logger = logging.getLogger("osaccel")

_POLL_SECONDS = 0.2
_JOIN_SECONDS = 600.0


class CacheRunner(Runner):
    """OSACCEL_SEARCH=dit_cache."""

    def __init__(self, session: Session, timesteps: Optional[Sequence[float]] = None):
        super().__init__(session)
        settings = session.settings
        self.timesteps = timesteps if timesteps is not None else settings.timesteps
        self.output = settings.cache_output or ""
        self.goal = Goal(settings.cache_ratio, settings.min_psnr)
        self.team = session.team
        self.replays: List[Replay] = []
        self.grams: Optional[torch.Tensor] = None
        self.bytes_used = 0
        self.num_blocks = 0
        self.fingerprint: Dict[str, Any] = {}
        self.journal: Any = None

    # Recording

    def record(self, call: Call) -> Any:
        blocks = list(find_blocks(call.pipeline, call.block_path))
        self.num_blocks = len(blocks)
        replay = Replay(call, self.timesteps)
        if self.journal is None:
            self._open_journal(call)
        number = len(self.replays)
        self.replays.append(replay)
        name = f"recording-{number}-{self.team.member}.pt"
        known = self.journal.load(name)
        usable = known is not None and known["call"] == digest_of(call.arguments)
        if self.team.all_agree(usable):
            self._say("call %d was recorded before the search was interrupted; it is not generated again", number + 1)
            call.state.load(known["random"])
            vars(replay.recording).update(known["recording"])
            self._add_grams(known["grams"])
            self.bytes_used = max(self.bytes_used, known["bytes_used"])
            return replay.decode()
        if self.team.all_agree(True) and known is not None:
            self._forget_evaluations("the prompt of call %d changed", number + 1)
        return self._record_anew(call, replay, blocks, name)

    def _record_anew(self, call: Call, replay: Replay, blocks: List[torch.nn.Module], name: str) -> Any:
        errors = RegionErrors(len(blocks), MAX_INTERVAL - 1)

        def attach(generation: Any) -> Any:
            detach = errors.attach(blocks, generation.clock, HiddenStates(call.hidden_states))
            return detach

        replay.before_first_forward = self._check_reachable
        output = replay.record(attach)
        final = replay.recording.latents[-1] if replay.recording.latents else torch.tensor(float("nan"))
        if not self.team.all_agree(bool(torch.isfinite(final).all())):
            raise SearchError("The plain generation's latents are not finite; there is nothing to compare with.")
        grams = errors.tensor(replay.recording.steps)
        self._add_grams(grams)
        self.bytes_used = max(self.bytes_used, errors.bytes_used)
        content = {
            "call": digest_of(call.arguments),
            "random": call.state.to_dict(),
            "recording": vars(replay.recording),
            "grams": grams,
            "bytes_used": errors.bytes_used,
        }
        self.journal.save(name, content)
        return output

    def _check_reachable(self) -> None:
        num_steps = len(self.session.calls[0].pipeline.scheduler.timesteps)
        cache_search.pool_for(self.goal, self.num_blocks, num_steps)

    def _add_grams(self, grams: torch.Tensor) -> None:
        self.grams = grams if self.grams is None else self.grams + grams

    def _open_journal(self, call: Call) -> None:
        self.fingerprint = describe(call, self.num_blocks, self.timesteps, self.session)
        directory = self.output + ".search"
        if self.team.is_leader:
            self.journal = Journal(directory, self.fingerprint)
        self.team.barrier()
        self.journal = self.journal or Journal(directory, self.fingerprint, is_writer=False)
        if self.journal.started_anew:
            self._say("what was searched before does not fit any more, starting anew: %s", self.journal.started_anew)
        elif self.journal.evaluations():
            self._say("resuming: %d evaluations are finished", len(self.journal.evaluations()))

    def _forget_evaluations(self, reason: str, *args: Any) -> None:
        self._say("starting anew: " + reason, *args)
        if self.team.is_leader:
            for name in os.listdir(self.journal.directory):
                if name.startswith("evaluations-") or name.startswith("final-"):
                    os.unlink(os.path.join(self.journal.directory, name))
        self.team.barrier()

    # Searching

    def search(self) -> Dict[str, Any]:
        started = time.time()
        search = self._prepare()
        workers = _Workers(self.session, self.journal, self)
        workers.publish()
        progress = _Progress(search, self.team.is_first)
        evaluator = Evaluator(self.replays, self.team, self.goal.min_psnr is not None, progress.step)
        for evaluation in self.team.share(self.journal.evaluations()):
            search.add(evaluation)
        progress.sync()
        while True:
            round_ = search.next_round()
            if not round_:
                break
            best = search.done.get(search.best()) if search.best() else None  # type: ignore[arg-type]
            for evaluation in workers.run_round(round_, evaluator, best):
                search.add(evaluation)
            progress.sync()
        progress.close()
        found = self._conclude(search, evaluator, time.time() - started)
        workers.finish(found)
        return {"cache": found}

    def _prepare(self) -> Search:
        assert self.grams is not None
        num_steps = self.replays[0].recording.steps
        if any(replay.recording.steps != num_steps for replay in self.replays):
            raise SearchError("The recorded calls have different numbers of steps; one configuration cannot fit them.")
        grams = self.team.sum(self.grams).numpy()
        weights, gains = cache_search.default_weights(self.num_blocks, num_steps)
        pool = cache_search.pool_for(self.goal, self.num_blocks, num_steps)
        scores = cache_search.predict(pool, grams, weights, gains)
        self.scores = self.team.share(dict(zip(pool, scores.tolist())))
        self.weights, self.summed = weights, grams
        ordered = np.array([self.scores[candidate] for candidate in pool])
        return Search(pool, ordered, self.num_blocks, num_steps, self.goal, workers=self.team.workers)

    def evaluate(self, candidate: Candidate, evaluator: Evaluator, best: Any, journal_worker: int) -> Dict[str, Any]:
        """One evaluation, recorded the moment it is finished."""
        evaluation = self.team.share(evaluator(candidate, best))
        if evaluation["error"] is not None and (best is None or evaluation["error"] < (best["error"] or np.inf)):
            self.journal.save(_final_name(candidate, self.team.member), evaluator.final)
        if self.team.is_leader:
            self.journal.add(evaluation, journal_worker)
        return evaluation

    def _conclude(self, search: Search, evaluator: Evaluator, seconds: float) -> Any:
        best = search.best()
        if best is None:
            raise SearchError(self._nothing_found(search))
        frames = self._frames(best)
        if self.team.is_first:
            report = self._report(search, best, seconds)
            if frames is not None:
                _write_frames(self.output + ".report.npz", frames)
            formats.write_json(fingerprint.report_path(self.output), report)
            formats.write_cache_config(self.output, best.config)
            chosen = search.done[best]
            logger.info(
                "found %s: speed-up %.3f in blocks, error %.4g, %d candidates verified, cost %.2f plain generations; "
                "written to %s", best.config.to_dict(), best.speed_up(search.num_blocks, search.num_steps),
                chosen["error"], len(search.done), search.spent, self.output,
            )  # fmt: skip
        self.team.barrier()
        return best.config

    def _nothing_found(self, search: Search) -> str:
        psnrs = [e["psnr"] for e in search.done.values() if e["psnr"] is not None]
        if self.goal.min_psnr is not None and psnrs:
            return (
                f"No verified cache configuration keeps a PSNR of {self.goal.min_psnr:g} dB; the best one has "
                f"{max(psnrs):.2f} dB. Ask for less."
            )
        return f"None of the {len(search.done)} verified candidates gave finite latents."

    def _frames(self, best: Candidate) -> Optional[Dict[str, np.ndarray]]:
        """Plain and cached frames of the first call, thinned out; None when the pipeline gives none."""
        final = self.journal.load(_final_name(best, self.team.member))
        if not self.team.all_agree(final is not None):
            return None
        try:
            pair = {"plain": self.replays[0].decode(), "cached": self.replays[0].decode(final)}
            return {name: thinned(frames_of(output)) for name, output in pair.items()}
        except (ValueError, TypeError, RuntimeError) as error:
            # The configuration is found; a report without pictures is no reason to lose it.
            logger.warning("the report has no frames: %s", error)
            return None

    def _report(self, search: Search, best: Candidate, seconds: float) -> Dict[str, Any]:
        steps, blocks, recording = search.num_steps, search.num_blocks, self.replays[0].recording
        plain_seconds = sum(replay.recording.seconds for replay in self.replays)
        rows = []
        for candidate, evaluation in search.done.items():
            full = evaluation["error"] is not None and candidate.first == 0
            rows.append(
                {
                    **{key: value for key, value in evaluation.items() if key != "curves"},
                    "predicted_error": self.scores.get(candidate),
                    "predicted_speed_up": candidate.speed_up(blocks, steps),
                    "measured_speed_up": measured_speed_up(evaluation, candidate, steps, plain_seconds),
                    "whole_generation_timed": full,
                }
            )
        per_block = np.einsum("gtbb->gtb", self.summed)[0]
        return {
            "chosen": best.config.to_dict(),
            "goal": {"ratio": self.goal.ratio, "min_psnr": self.goal.min_psnr},
            "speed_up": best.speed_up(blocks, steps),
            "reachable_speed_up": cache_search.reachable(blocks, steps),
            "error": search.done[best]["error"],
            "psnr": search.done[best]["psnr"],
            "fingerprint": self.fingerprint,
            "versions": fingerprint.versions(),
            "cost": {
                "plain_generations": search.spent,
                "block_forwards": int(round(search.spent * blocks * steps * len(self.replays))),
                "seconds": seconds + plain_seconds,
                "plain_seconds": plain_seconds,
                "instrument_bytes": self.bytes_used,
                "recording_bytes": sum(replay.recording.nbytes() for replay in self.replays),
                "forwards_per_step": recording.forwards / max(1, recording.steps),
            },
            "evaluations": rows,
            "predictions": [
                {**c.config.to_dict(), "predicted_error": s, "predicted_speed_up": c.speed_up(blocks, steps)}
                for c, s in sorted(self.scores.items(), key=lambda item: item[1])[:200]
            ],
            "step_weights": self.weights.tolist(),
            "delta_change": np.sqrt(np.maximum(per_block, 0)).tolist(),
        }

    def _say(self, message: str, *args: Any) -> None:
        if self.team.is_first:
            logger.info(message, *args)

    def assist(self, call: Call) -> Dict[str, Any]:
        return _Workers(self.session, None, self).assist(call)


class AllRunner(Runner):
    """OSACCEL_SEARCH=all: timesteps first, then the cache for a generation that follows them."""

    def __init__(self, session: Session):
        super().__init__(session)
        from osaccel.search.restep import RestepRunner  # type: ignore[import-not-found,unused-ignore]

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


class _Progress:
    """A bar over block forwards, with the time left, on the one rank that shows it."""

    def __init__(self, search: Search, shown: bool):
        self.search, self.bar = search, None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            total = search.budget * search.num_steps
            self.bar = tqdm(
                total=total, desc="osaccel search", unit="step", bar_format="{l_bar}{bar}| {elapsed}<{remaining}"
            )
            self.sync()

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update(1 if self.bar.n + 1 <= self.bar.total else 0)

    def sync(self) -> None:
        if self.bar is not None:
            self.bar.n = min(self.search.spent * self.search.num_steps, self.bar.total)
            self.bar.refresh()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.n = self.bar.total
            self.bar.close()


class _Workers:
    """Rank 0 and the other ranks of a script that splits its prompts; they meet in files, never in collectives."""

    def __init__(self, session: Session, journal: Optional[Journal], runner: CacheRunner):
        self.session, self.journal, self.runner, self.team = session, journal, runner, session.team
        self.token = ""

    def publish(self) -> None:
        """Rank 0: say where the recorded calls are."""
        if self.team.workers == 1:
            return
        assert self.journal is not None
        self.token = self._agree_on_token()
        calls = [{"args": replay.call.args, "kwargs": replay.call.kwargs} for replay in self.runner.replays]
        self.journal.save(f"plan-{self.token}-{self.team.member}.pt", calls)

    def run_round(self, round_: List[Candidate], evaluator: Evaluator, best: Any) -> List[Dict[str, Any]]:
        """Every candidate of the round evaluated once, by whichever worker is there; the same results in any case."""
        if self.team.workers == 1:
            return [self.runner.evaluate(candidate, evaluator, best, 0) for candidate in round_]
        assert self.journal is not None
        name = f"round-{self.token}-{'-'.join(map(str, round_[0]))}"
        if self.team.is_leader:
            self.journal.save(name + ".pt", {"round": [tuple(candidate) for candidate in round_], "best": best})
        self._take(name, round_, evaluator, best)
        return self._collect(round_)

    def _take(self, name: str, round_: List[Candidate], evaluator: Evaluator, best: Any) -> None:
        """Evaluate unclaimed candidates until none is left."""
        assert self.journal is not None
        for number, candidate in enumerate(round_):
            if self.team.share(self.journal.claim(f"{name}-{number}") if self.team.is_leader else None):
                self.runner.evaluate(candidate, evaluator, best, self.team.worker)

    def _collect(self, round_: List[Candidate]) -> List[Dict[str, Any]]:
        assert self.journal is not None
        waited = time.time()
        while True:
            known = {candidate_of(evaluation): evaluation for evaluation in self.journal.evaluations()}
            if self.team.share(all(candidate in known for candidate in round_)):
                return self.team.share([known.get(candidate) for candidate in round_])
            if time.time() - waited > 20 * _JOIN_SECONDS:
                raise SearchError("Another rank claimed a candidate and never finished it.")
            time.sleep(_POLL_SECONDS)

    def finish(self, found: Any) -> None:
        if self.team.workers > 1 and self.team.is_leader:
            assert self.journal is not None
            if self.team.worker == 0:
                # A rank that comes when the directory is gone finds the result here.
                self._store().set(self._result_key(), json.dumps(found.to_dict()))
            self.journal.save(f"done-{self.token}.pt", found.to_dict())
            self._wait_until_seen()
        if self.team.is_first and self.journal is not None:
            self.journal.remove()
        self.team.barrier()

    def _wait_until_seen(self) -> None:
        """The other ranks read the result from the directory that is about to go."""
        assert self.journal is not None
        until = time.time() + 30
        while time.time() < until:
            names = os.listdir(self.journal.directory)
            joined = [name for name in names if name.startswith(f"joined-{self.token}")]
            left = [name for name in names if name.startswith(f"left-{self.token}")]
            if len(left) >= len(joined):
                return
            time.sleep(_POLL_SECONDS)

    def assist(self, call: Call) -> Dict[str, Any]:
        """Another rank: join rank 0's search, if it can be reached, and leave with its result."""
        from osaccel.cache.config import DitCacheConfig

        runner = self.runner
        self.token = self._agree_on_token()
        self.journal = runner.journal = Journal(runner.output + ".search", {}, is_writer=False)
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
        return {"cache": DitCacheConfig(**found)}

    def _join(self, call: Call) -> Optional[Dict[str, int]]:
        """Work on rank 0's candidates until it is done; its result, or None when it never published a plan."""
        assert self.journal is not None
        plan = self._wait_for(f"plan-{self.token}-{self.team.member}.pt")
        if plan is None:
            return self._result()
        self.journal.claim(f"joined-{self.token}-{self.team.worker}")
        self._adopt(call, plan)
        evaluator = Evaluator(self.runner.replays, self.team, self.runner.goal.min_psnr is not None)
        found = self._work(evaluator)
        self.journal.claim(f"left-{self.token}-{self.team.worker}")
        return found

    def _result_key(self) -> str:
        return f"osaccel/found-{self.token}"

    def _result(self) -> Optional[Dict[str, int]]:
        if not self._store().check([self._result_key()]):
            return None
        return json.loads(self._store().get(self._result_key()).decode())

    def _adopt(self, call: Call, plan: List[Dict[str, Any]]) -> None:
        """Make rank 0's recorded calls this rank's own, on its own pipeline and device."""
        assert self.journal is not None
        for number, content in enumerate(plan):
            known = self.journal.load(f"recording-{number}-{self.team.member}.pt")
            device = {"device": call.kwargs["device"]} if "device" in call.kwargs else {}
            function, pipeline = call.function, call.pipeline
            adopted = Call(
                function,
                pipeline,
                content["args"],
                {**content["kwargs"], **device},
                call.block_path,
                call.hidden_states,
            )
            adopted.state.load(known["random"])
            replay = Replay(adopted, self.runner.timesteps)
            vars(replay.recording).update(known["recording"])
            self.runner.replays.append(replay)

    def _work(self, evaluator: Evaluator) -> Dict[str, int]:
        assert self.journal is not None
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
        assert self.journal is not None
        until = time.time() + _JOIN_SECONDS
        while time.time() < until:
            content = self.journal.load(name)
            if content is not None or self._result() is not None:
                return content
            time.sleep(_POLL_SECONDS)
        return None

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


def describe(call: Call, num_blocks: int, timesteps: Optional[Sequence[float]], session: Session) -> Dict[str, Any]:
    """Everything an evaluation depends on; a search whose fingerprint differs starts anew."""
    pipeline = call.pipeline
    owner = pipeline
    for part in call.block_path.split(".")[:-1]:
        owner = getattr(owner, part)
    # diffusers keeps private entries there, one of them a list in the order of a set, another in every process.
    config = {key: value for key, value in getattr(pipeline.scheduler, "config", {}).items() if key[:1] != "_"}
    found = {
        **fingerprint.of_call(pipeline, call.arguments, num_blocks, timesteps),
        "model": weights_digest(owner),
        "sampler_config": digest_of(config),
        "guidance_scale": call.arguments.get("guidance_scale"),
        "prompt": digest_of({name: call.arguments.get(name) for name in ("prompt", "negative_prompt")}),
        "arguments": digest_of(call.arguments),
        "timesteps": None if timesteps is None else digest_of([float(value) for value in timesteps]),
        "prompts": session.settings.search_prompts,
        "ranks": session.team.size,
        "metric": "latents" if session.settings.min_psnr is None else "latents and frames",
        "versions": fingerprint.versions(),
    }
    return session.team.share(found)


def measured_speed_up(
    evaluation: Dict[str, Any], candidate: Candidate, num_steps: int, plain_seconds: float
) -> Optional[float]:
    """Plain time over the time of a whole generation with the cache, the part not repeated counted at plain speed."""
    if evaluation["abandoned"] or evaluation["error"] is None or plain_seconds <= 0:
        return None
    return plain_seconds / (plain_seconds * candidate.first / num_steps + evaluation["seconds"])


def thinned(frames: np.ndarray, count: int = 6, size: int = 256) -> np.ndarray:
    """At most `count` frames of at most about `size` pixels a side, 8 bit, of the first video; (T, H, W, C)."""
    if frames.ndim == 5:
        frames = frames[0]
    if frames.ndim != 4:
        raise ValueError(f"frames of shape {frames.shape} are not (T, H, W, C)")
    picked = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    stride = max(1, -(-max(frames.shape[1:3]) // size))
    return frames[picked, ::stride, ::stride].clip(0, 255).astype(np.uint8)


def _write_frames(path: str, frames: Dict[str, Any]) -> None:
    temporary = f"{path}.{os.getpid()}.part"
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **frames)
    os.replace(temporary, path)


def _final_name(candidate: Candidate, member: int) -> str:
    return f"final-{'-'.join(map(str, candidate))}-{member}.pt"


__all__ = ["AllRunner", "CacheRunner"]
