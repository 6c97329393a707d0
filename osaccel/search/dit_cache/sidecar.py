# SPDX-License-Identifier: Apache-2.0
"""The sidecar report of a cache search: every candidate and what it cost, and frames of plain against cached."""

import logging
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from osaccel import binding
from osaccel.search.dit_cache import candidates as cache_search
from osaccel.search.dit_cache.candidates import Candidate, Search
from osaccel.search.evaluation import Evaluation
from osaccel.search.recording.replay import Replay

logger = logging.getLogger("osaccel")


def report(
    search: Search,
    best: Candidate,
    changes: np.ndarray,
    replays: Sequence[Replay],
    bound: Dict[str, Any],
    seconds: float,
    instrument_bytes: int,
) -> Dict[str, Any]:
    """The JSON-able report.

    Args:
        changes: (step, block), how much each block's delta changed since the step before.
        bound: the fingerprint the configuration is bound to.
        seconds: of the search, without the plain generations.
        instrument_bytes: what observing the blocks took at most, on the device of the hidden states.
    """
    steps, blocks, chosen = search.num_steps, search.num_blocks, search.done[best]
    expected = search.expected()
    plain_seconds = sum(replay.recording.seconds for replay in replays)
    return {
        "chosen": best.config.to_dict(),
        "goal": {"ratio": search.goal.ratio, "min_psnr": search.goal.min_psnr},
        "speed_up": best.speed_up(blocks, steps),
        "reachable_speed_up": cache_search.reachable(blocks, steps),
        "error": chosen.error,
        "expected_turned": expected[best]["expected_turned"],
        "psnr": chosen.psnr,
        "fingerprint": bound,
        "versions": binding.versions(),
        **binding.occasion([replay.call for replay in replays]),
        "cost": {
            **_cost(search, replays),
            "seconds": seconds + plain_seconds,
            "plain_seconds": plain_seconds,
            "instrument_bytes": instrument_bytes,
        },
        "evaluations": _evaluations(search, expected, plain_seconds),
        "predictions": [
            {**c.config.to_dict(), **values, "predicted_speed_up": c.speed_up(blocks, steps)}
            for c, values in sorted(expected.items(), key=lambda item: item[1]["expected_error"])[:200]
        ],
        "delta_change": changes.tolist(),
    }


def _cost(search: Search, replays: Sequence[Replay]) -> Dict[str, Any]:
    recording = replays[0].recording
    recomputed = sum(e.resumed_at == candidate.first for candidate, e in search.done.items())
    return {
        "plain_generations": search.spent,
        "block_forwards": search.block_forwards,
        "probe_block_forwards": search.overhead,
        "recording_bytes": sum(replay.recording.nbytes() for replay in replays),
        # Where the boundaries of a candidate's storing step did not fit into their limit, it was computed again.
        "boundary_bytes": sum(replay.boundaries.bytes_used for replay in replays),
        "boundary_bytes_limit": sum(replay.boundaries.memory for replay in replays),
        "storing_steps_recomputed": recomputed,
        "forwards_per_step": recording.forwards / max(1, recording.steps),
    }


def _evaluations(
    search: Search, expected: Dict[Candidate, Dict[str, float]], plain_seconds: float
) -> List[Dict[str, Any]]:
    steps, blocks = search.num_steps, search.num_blocks
    return [
        {
            **{key: value for key, value in evaluation.to_json().items() if key != "curves"},
            # Where it was given up, the error that it had by then.
            "last_error": next((value for value in reversed(evaluation.curves[-1]) if value is not None), None),
            **expected[candidate],
            "predicted_speed_up": candidate.speed_up(blocks, steps),
            "measured_speed_up": measured_speed_up(evaluation, steps, plain_seconds),
            "whole_generation_timed": evaluation.error is not None and evaluation.resumed_at == 0,
        }
        for candidate, evaluation in search.done.items()
    ]


def measured_speed_up(evaluation: Evaluation, num_steps: int, plain_seconds: float) -> Optional[float]:
    """Plain time over the time of a whole generation with the cache, the part not repeated counted at plain speed."""
    if not evaluation.is_finished or plain_seconds <= 0:
        return None
    return plain_seconds / (plain_seconds * evaluation.resumed_at / num_steps + evaluation.seconds)
