# SPDX-License-Identifier: Apache-2.0
"""The sidecar report of a search for four keys: every candidate and what it cost."""

from typing import Any, Dict, List, Optional

import numpy as np

from osaccel import binding
from osaccel.search.dit_cache.candidates import Candidate, reachable
from osaccel.search.dit_cache.choice import Search
from osaccel.search.evaluation import Evaluation
from osaccel.search.planned import PlannedRunner

# How many of the best expected candidates the report lists beside those that were measured.
LISTED = 200


def report(runner: Any, search: Search, best: Candidate, changes: np.ndarray, seconds: float) -> Dict[str, Any]:
    """The JSON-able report.

    Args:
        runner: the CacheRunner.
        changes: (step, block), how much each block's delta changed since the step before.
        seconds: of the search, without the plain generations.
    """
    steps, blocks, chosen = search.num_steps, search.num_blocks, search.done[best]
    expected, cost = search.expected(), _cost(runner, seconds)
    return {
        "chosen": best.config.to_dict(),
        "goal": {"ratio": search.goal.ratio, "min_psnr": search.goal.min_psnr},
        "speed_up": best.speed_up(blocks, steps),
        "reachable_speed_up": reachable(blocks, steps),
        "error": chosen.error,
        "psnr": chosen.psnr,
        "fingerprint": runner.fingerprint,
        "versions": binding.versions(),
        **binding.occasion([replay.call for replay in runner.replays]),
        "cost": {**cost, "instrument_bytes": runner.bytes_used},
        "slopes": search.expectation.slopes.tolist(),
        "evaluations": _evaluations(search, expected, cost["plain_seconds"]),
        "predictions": [
            {**c.config.to_dict(), "expected_error": value, "predicted_speed_up": c.speed_up(blocks, steps)}
            for c, value in sorted(expected.items(), key=lambda item: item[1])[:LISTED]
        ],
        "delta_change": changes.tolist(),
    }


def _cost(runner: PlannedRunner, seconds: float) -> Dict[str, Any]:
    recording = runner.replays[0].recording
    return {
        **runner.cost(seconds),
        "block_forwards": runner.block_forwards,
        "forwards_per_step": recording.forwards / max(1, recording.steps),
    }


def _evaluations(search: Search, expected: Dict[Candidate, float], plain_seconds: float) -> List[Dict[str, Any]]:
    steps, blocks = search.num_steps, search.num_blocks
    return [
        {
            **{key: value for key, value in evaluation.to_json().items() if key != "curves"},
            "expected_error": expected[candidate],
            "predicted_speed_up": candidate.speed_up(blocks, steps),
            "measured_speed_up": measured_speed_up(evaluation, steps, plain_seconds),
            "whole_generation_timed": evaluation.error is not None and evaluation.resumed_at == 0,
        }
        for candidate, evaluation in search.done.items()
    ]


def measured_speed_up(evaluation: Evaluation, num_steps: int, plain_seconds: float) -> Optional[float]:
    """Plain time over the time of a whole generation with the cache, the part not repeated counted at plain speed."""
    if evaluation.error is None or plain_seconds <= 0:
        return None
    return plain_seconds / (plain_seconds * evaluation.resumed_at / num_steps + evaluation.seconds)
