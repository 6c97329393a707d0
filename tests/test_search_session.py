# SPDX-License-Identifier: Apache-2.0
"""A whole cache search in this process, on the tiny pipeline: what it costs, what it refuses, what starts it anew."""

import json
import logging
import math

import numpy as np
import pytest
import tiny
import torch

from osaccel import formats
from osaccel.generation import Generation
from osaccel.plan import of_dit_cache
from osaccel.search.errors import SearchError
from osaccel.search.session import Session
from osaccel.settings import Settings
from osaccel.targets import Target


def search(tmp_path, pipeline=None, prompts=1, ratio=1.3, min_psnr=None, **kwargs):
    """Search on `prompts` calls, as OSACCEL_SEARCH_THEN=continue does; returns the pipeline and the report."""
    pipeline, output = pipeline or tiny.UnseededPipeline(), str(tmp_path / "found.json")
    settings = Settings(
        search="dit_cache", cache_ratio=ratio, min_psnr=min_psnr, cache_output=output, search_prompts=prompts,
        search_then="continue",
    )  # fmt: skip
    session = Session(settings, Target())
    torch.manual_seed(5)
    try:
        for number in range(prompts):
            arguments = {"prompt": f"prompt {number}", "guidance_scale": 1.0, **kwargs}
            session.on_call(pipeline.__call__, pipeline, (), arguments)
    finally:
        # It would end this process with an error, as it ends a script whose search is not over.
        session.abandon()
    assert session.is_over
    return pipeline, json.loads((tmp_path / "found.json.report.json").read_text())


def sampled(pipeline, config=None):
    """A fresh generation with the noise of the search's first call."""
    torch.manual_seed(5)
    with Generation(pipeline, of_dit_cache(config) if config else None):
        return pipeline(prompt="prompt 0", guidance_scale=1.0)


def psnr(plain, cached):
    return 10 * math.log10(255**2 / ((plain - cached) ** 2).mean().item())


@pytest.mark.parametrize("prompts", (1, 2))
def test_the_report_counts_every_block_call_of_the_search(tmp_path, prompts):
    pipeline, report = search(tmp_path, prompts=prompts)
    assert report["cost"]["block_forwards"] == sum(pipeline.block_calls())
    assert report["cost"]["plain_generations"] == sum(pipeline.block_calls()) / (prompts * 60) <= 6


def test_the_reported_error_is_that_of_a_fresh_generation(tmp_path):
    pipeline, report = search(tmp_path)
    config = formats.read_cache_config(str(tmp_path / "found.json"))
    plain, cached = sampled(pipeline), sampled(pipeline, config)
    assert report["error"] == pytest.approx(((cached - plain).norm() / plain.norm()).item(), rel=1e-5)
    finished = [evaluation for evaluation in report["evaluations"] if evaluation["error"] is not None]
    # What reuses at step 1, the first tenth of 10, must be better by a quarter.
    best = min(finished, key=lambda e: e["error"] * (1.25 if e["config"]["cache_step_start"] == 0 else 1))
    assert report["error"] == best["error"] and report["chosen"] == best["config"]
    # What is expected is in the unit of what was measured.
    assert np.mean([np.log(e["expected_error"] / e["error"]) for e in finished]) == pytest.approx(0, abs=0.1)


def test_a_wished_psnr_is_kept_when_the_found_config_samples_afresh(tmp_path):
    _, mild = search(tmp_path, ratio=1.1)
    pipeline = tiny.UnseededPipeline()
    plain = sampled(pipeline)
    wish = psnr(plain, sampled(pipeline, formats.read_cache_config(str(tmp_path / "found.json")))) - 0.01
    (tmp_path / "psnr").mkdir()
    pipeline, report = search(tmp_path / "psnr", min_psnr=wish)
    config = formats.read_cache_config(str(tmp_path / "psnr" / "found.json"))
    kept = psnr(plain, sampled(pipeline, config))
    assert kept >= wish and report["psnr"] == pytest.approx(kept, abs=1e-3)
    assert report["speed_up"] > 0.95 * mild["speed_up"], "which keeps it, as is known"


def test_a_psnr_that_no_config_keeps_is_an_error_that_says_what_is_reachable(tmp_path):
    with pytest.raises(SearchError, match=r"keeps a PSNR of 190 dB; the best one has -?\d+\.\d\d dB"):
        search(tmp_path, min_psnr=190.0)
    assert not (tmp_path / "found.json").exists()


def test_an_unreachable_ratio_is_an_error_before_the_first_forward(tmp_path):
    pipeline = tiny.UnseededPipeline()
    with pytest.raises(SearchError, match=r"speeds 6 blocks x 1 steps up by 1\.3; at most 1\.000 is reachable"):
        search(tmp_path, pipeline, num_inference_steps=1)
    assert sum(pipeline.block_calls()) == 0


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_candidates_that_are_not_finite_lose_and_do_not_stop_the_search(tmp_path, value):
    pipeline = tiny.UnseededPipeline()
    fragile = pipeline.transformer.transformer_blocks[5] = Fragile(pipeline.scheduler, value)
    _, report = search(tmp_path, pipeline, ratio=1.5)
    lost = [e["config"] for e in report["evaluations"] if e["error"] is None]
    assert fragile.broke and lost
    assert report["chosen"] not in lost and np.isfinite(report["error"])


class Fragile(tiny.CountingBlock):
    """Breaks when it runs again after a step in which it did not."""

    def __init__(self, scheduler, value):
        super().__init__()
        self.scheduler, self.value, self.seen, self.broke = scheduler, value, (None, 0), False

    def forward(self, hidden_states, timestep=None, attention_mask=None):
        output = super().forward(hidden_states, timestep, attention_mask)
        # A generation makes new sigmas; a replay lets the scheduler count the steps it does not compute.
        sigmas, index = self.scheduler.sigmas, self.scheduler.step_index
        skipped = self.seen[0] is sigmas and index > self.seen[1] + 1
        self.seen, self.broke = (sigmas, index), self.broke or skipped
        return output * self.value if skipped else output


@pytest.mark.parametrize(
    "change, said",
    (
        ({"pipeline": 1}, "model was"),
        ({"prompt": "another"}, "prompt was"),
        ({"num_inference_steps": 12}, "steps was 10, is now 12"),
        ({"height": 16}, "resolution was [5, 8, 8], is now [5, 16, 8]"),
    ),
)
def test_a_changed_fingerprint_starts_an_interrupted_search_anew_and_says_so(tmp_path, caplog, change, said):
    stop_after(tmp_path, 2)
    done = (tmp_path / "found.json.search" / "evaluations-0.jsonl").read_text()
    assert done.count("\n") == 2
    change = dict(change)
    pipeline = tiny.UnseededPipeline()
    if change.pop("pipeline", None):
        torch.nn.init.normal_(pipeline.transformer.transformer_blocks[2].linear.weight)
    with caplog.at_level(logging.INFO, "osaccel"):
        search(tmp_path, pipeline, **change)
    assert "starting anew" in caplog.text and said in caplog.text and "resuming" not in caplog.text


def test_an_interrupted_search_goes_on_without_repeating_a_block(tmp_path, caplog):
    (tmp_path / "whole").mkdir()
    _, whole = search(tmp_path / "whole")
    stop_after(tmp_path, 2)
    with caplog.at_level(logging.INFO, "osaccel"):
        pipeline, again = search(tmp_path)
    assert "resuming: 2 evaluations are finished" in caplog.text
    done = 60 + sum(e["block_forwards"] for e in whole["evaluations"][:2])
    assert sum(pipeline.block_calls()) == whole["cost"]["block_forwards"] - done
    assert [e["error"] for e in again["evaluations"]] == [e["error"] for e in whole["evaluations"]]
    assert again["chosen"] == whole["chosen"]


def stop_after(tmp_path, evaluations):
    """A search that dies while it evaluates the candidate after that many."""
    pipeline = tiny.UnseededPipeline()
    step, journal = pipeline.scheduler.step.__func__, tmp_path / "found.json.search" / "evaluations-0.jsonl"

    def dying(self, *args, **kwargs):
        if journal.exists() and journal.read_text().count("\n") == evaluations:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    # Its name is in the fingerprint.
    name = type(pipeline.scheduler).__name__
    pipeline.scheduler.__class__ = type(name, (type(pipeline.scheduler),), {"step": dying})
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, pipeline)
