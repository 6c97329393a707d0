# SPDX-License-Identifier: Apache-2.0
"""The cache search's parts: exact replays, the region errors against brute force, the family, the journal's memory."""

import json

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
)

from osaccel.binding import digest_of, weights_digest
from osaccel.clock import Clock
from osaccel.generation import Generation
from osaccel.network.forwards import HiddenStates
from osaccel.plan import of_dit_cache
from osaccel.search.dit_cache import candidates as cache_search
from osaccel.search.dit_cache.candidates import Candidate
from osaccel.search.dit_cache.region_errors import RegionErrors
from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation
from osaccel.search.journal import Journal
from osaccel.search.measure import Measure
from osaccel.search.recording.observe import watch_blocks
from osaccel.search.recording.replay import Call, RandomState, Replay
from osaccel.search.team import Team

SCHEDULERS = (
    DDIMScheduler, DEISMultistepScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
)  # fmt: skip


def make_call(pipeline, **kwargs):
    return Call(type(pipeline).__call__, pipeline, (pipeline,), kwargs)


def recorded(pipeline, **kwargs):
    replay = Replay(make_call(pipeline, **kwargs))
    replay.record()
    return replay


def calls_of(pipeline, function):
    """What the function returns, and how often each block was called meanwhile."""
    before = pipeline.block_calls()
    result = function()
    return result, [now - then for now, then in zip(pipeline.block_calls(), before)]


def full_run(call, candidate):
    call.state.restore()
    with Generation(call.pipeline, of_dit_cache(candidate.config)):
        return call.function(*call.args, **call.kwargs)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_a_resumed_replay_equals_the_whole_cached_generation_bit_for_bit(scheduler):
    pipeline = tiny.UnseededPipeline(
        scheduler=scheduler(clip_sample=False) if scheduler is DDIMScheduler else scheduler()
    )
    replay = Replay(make_call(pipeline))
    plain = replay.record()
    steps = replay.recording.steps
    candidate = Candidate(1, 5, steps // 2, 2)
    resumed, calls = calls_of(pipeline, lambda: replay.run(of_dit_cache(candidate.config), candidate.first))
    assert torch.equal(resumed, full_run(replay.call, candidate))
    assert calls[0] == steps - candidate.first, "no step before the first stored delta is recomputed"
    assert 0 < calls[2] < calls[0], "the region was reused"
    assert torch.equal(replay.decode(), plain)
    assert torch.equal(replay.decode(torch.ones_like(plain)), torch.ones_like(plain))


@pytest.mark.parametrize("first", (0, 3, 7))
@pytest.mark.parametrize("forwards, sequence_first", ((1, False), (2, False), (1, True)))
def test_nothing_before_the_first_stored_delta_is_computed_again(forwards, sequence_first, first):
    pipeline = tiny.UnseededPipeline(forwards=forwards, sequence_first=sequence_first)
    replay, plain = calls_of(pipeline, lambda: recorded(pipeline))
    for start, stop in ((0, 6), (1, 4), (5, 6)):
        candidate = Candidate(start, stop, first, 2)
        resumed, calls = calls_of(pipeline, lambda c=candidate: replay.run(of_dit_cache(c.config), first))
        assert torch.equal(resumed, full_run(replay.call, candidate)), "bit for bit"
        reused = cache_search.reused(10, first, 2)
        assert calls == [forwards * (10 - first - reused * (start <= block < stop)) for block in range(6)]
        assert candidate.price(6, 10) == pytest.approx(sum(calls) / sum(plain))


@pytest.mark.parametrize("forwards", (1, 2))
def test_what_measuring_took_is_the_number_of_real_block_calls(forwards):
    pipeline = tiny.UnseededPipeline(forwards=forwards)
    replays, plain = calls_of(pipeline, lambda: [recorded(pipeline), recorded(pipeline)])
    candidate = Candidate(1, 4, 3, 3)
    found, calls = calls_of(pipeline, lambda: Measure(replays, Team())(candidate.config.to_dict()))
    assert found.block_forwards == sum(calls) == pytest.approx(candidate.price(6, 10) * sum(plain))
    assert found.config == candidate.config.to_dict() and found.resumed_at == 3


def test_replays_restore_every_random_state_and_generators_among_the_arguments():
    generator = torch.Generator().manual_seed(3)
    state = RandomState([generator])
    first = torch.rand(2), np.random.rand(), torch.rand(2, generator=generator)
    state.restore()
    second = torch.rand(2), np.random.rand(), torch.rand(2, generator=generator)
    assert torch.equal(first[0], second[0]) and first[1] == second[1] and torch.equal(first[2], second[2])


@pytest.mark.parametrize("forwards", (1, 2))
def test_region_errors_are_those_of_the_deltas(forwards):
    pipeline = tiny.UnseededPipeline(num_blocks=4, forwards=forwards)
    errors, seen = RegionErrors(4, 2), {}
    replay = Replay(make_call(pipeline, num_inference_steps=6))
    blocks = pipeline.transformer.transformer_blocks

    def attach(generation):
        detach = watch_blocks(blocks, generation.clock, HiddenStates(), errors.observe)
        for index, block in enumerate(blocks):
            inner = block.forward

            def spy(hidden_states, inner=inner, index=index, **kwargs):
                output = inner(hidden_states, **kwargs)
                seen.setdefault((generation.clock.step, index), []).append(output - hidden_states)
                return output

            block.__dict__["forward"] = spy
        return detach

    replay.record(attach)
    grams = errors.tensor(6)
    for start, stop, step, gap in ((0, 4, 3, 1), (1, 3, 5, 2), (2, 3, 1, 1)):
        wanted = sum(
            (sum(seen[step, b][k] - seen[step - gap, b][k] for b in range(start, stop)) ** 2).sum().item()
            for k in range(forwards)
        )
        got = grams[gap - 1, step, start:stop, start:stop].sum().item()
        assert got == pytest.approx(wanted, rel=1e-3)
    assert grams[1, 1].abs().sum() == 0


def test_region_errors_stay_within_their_memory():
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList([tiny.Block() for _ in range(5)])
    limit = 60_000
    errors = RegionErrors(5, 5, memory=limit)
    clock = Clock()
    detach = watch_blocks(blocks, clock, HiddenStates(), errors.observe)
    exact = RegionErrors(5, 5)
    with torch.no_grad():
        for step in range(8):
            hidden = torch.randn(2, 2000, tiny.WIDTH)
            for block in blocks:
                hidden = block(hidden, timestep=torch.tensor(float(step)))
            clock.end_step()
    detach()
    assert 0 < errors.bytes_used <= limit
    assert exact.bytes_used == 0
    assert errors.tensor(8)[0, 1].diagonal().min() > 0


@pytest.mark.parametrize("ratio", (1.05, 1.3, 1.8, 2.0))
def test_every_candidate_reaches_the_ratio_and_none_tightly_fewer(ratio):
    found = cache_search.candidates(8, 20, ratio)
    assert all(candidate.speed_up(8, 20) >= ratio - 1e-9 for candidate in found)
    assert {candidate.start for candidate in found} >= {0}
    assert len(set(found)) == len(found)


def test_an_unreachable_ratio_says_what_is_reachable():
    with pytest.raises(SearchError, match=r"at most 1\.500 is reachable"):
        cache_search.candidates(4, 3, 1.9, max_interval=2)


def test_a_candidate_that_turns_nan_is_recorded_as_lost():
    pipeline = tiny.UnseededPipeline()
    replay = Replay(make_call(pipeline))
    replay.record()
    block = pipeline.transformer.transformer_blocks[5]
    original, plain_calls = block.forward, []

    def poisoned(hidden_states, **kwargs):
        plain_calls.append(1)
        return original(hidden_states, **kwargs) * float("nan")

    block.forward = poisoned
    found = Measure([replay], Team())(Candidate(0, 3, 2, 2).config.to_dict())
    assert found.error is None and len(plain_calls) == 1, "it is over with the first step"
    json.dumps(found.to_json(), allow_nan=False)


def of_error(error):
    return Evaluation({"of": error}, error, 1)


def test_the_journal_ignores_a_torn_line_and_never_glues_to_it(tmp_path):
    journal = Journal(str(tmp_path / "j"), {"steps": 20})
    journal.add(of_error(1.0))
    path = tmp_path / "j" / "evaluations-0.jsonl"
    path.write_text(path.read_text() + '{"error": 2.')
    journal.add(of_error(3.0))
    assert [e.error for e in Journal(str(tmp_path / "j"), {"steps": 20}).evaluations()] == [1.0, 3.0]


@pytest.mark.parametrize("key", ("steps", "model", "prompt", "resolution"))
def test_another_fingerprint_starts_anew_and_says_why(tmp_path, key):
    known = {"steps": 20, "model": "a", "prompt": "b", "resolution": [9, 64, 64]}
    Journal(str(tmp_path / "j"), known).add(of_error(1.0))
    journal = Journal(str(tmp_path / "j"), dict(known, **{key: "changed"}))
    assert journal.evaluations() == []
    assert journal.started_anew == f"{key} was {known[key]!r}, is now 'changed'"


def test_digests_tell_weights_and_arguments_apart():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    assert weights_digest(first) == weights_digest(first) != weights_digest(second)
    # Nothing but the parameters: an epoch counted in a buffer, or a state that is no tensor, is not another checkpoint.
    digest = weights_digest(first)
    first.register_buffer("calls", torch.ones(()))
    first.get_extra_state = lambda: None
    assert weights_digest(first) == digest
    turned = torch.nn.Linear(3, 3)
    turned.weight.data, turned.bias.data = first.weight.data.T.contiguous().T, first.bias.data
    assert not turned.weight.is_contiguous() and weights_digest(turned) == digest
    assert digest_of({"prompt": "a", "seed": 1}) != digest_of({"prompt": "a", "seed": 2})
    assert digest_of([torch.zeros(2)]) != digest_of([torch.ones(2)])


def test_a_pipeline_that_encodes_its_text_by_two_calls_is_replayed_with_both():
    """Prompt and negative prompt: the second encoding must not be taken for the first, or guidance is off."""

    class TwoTexts(tiny.UnseededPipeline):
        def encode_prompt(self, text):
            return float(len(text)) * torch.ones(1, 5, tiny.WIDTH)

        def __call__(self, prompt="", negative_prompt="", **arguments):
            self.texts = self.encode_prompt(prompt), self.encode_prompt(negative_prompt)
            return super().__call__(**arguments)

        def predict(self, latents, t, scale):
            low, high = self.transformer(torch.cat([latents + text for text in self.texts]), timestep=t).chunk(2)
            return low + scale * (high - low)

    pipeline = TwoTexts()
    torch.manual_seed(3)
    expected = pipeline(prompt="a long prompt", negative_prompt="no")
    torch.manual_seed(3)
    replay = Replay(
        Call(TwoTexts.__call__, pipeline, (pipeline,), {"prompt": "a long prompt", "negative_prompt": "no"})
    )
    assert torch.equal(replay.record(keep_outputs=True), expected)
    assert torch.equal(replay.run(resume=4), expected) and torch.equal(replay.decode(), expected)
