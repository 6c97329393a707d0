# SPDX-License-Identifier: Apache-2.0
"""The miniature's data, parser and training loop: exact truth in, the same truth out, and runs that repeat."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from benchmarks.reference import data, train  # noqa: E402
from osaccel.demo import parser  # noqa: E402


def test_splits_share_no_prompt_and_cover_all():
    sets = [{scene.caption for scene in data.scenes(split)} for split in data.SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(data.all_scenes())


def test_splits_share_no_random_stream():
    draws = {data.seed_sequence(split, index).integers(2**62) for split in data.SPLITS for index in range(50)}
    assert len(draws) == 150


def test_generator_repeats_itself():
    first, second = data.sample("train", 7), data.sample("train", 7)
    assert first[1] == second[1] and np.array_equal(first[0], second[0])
    assert not np.array_equal(first[0], data.sample("train", 8)[0])


def test_sample_keeps_to_its_split():
    for split in data.SPLITS:
        assert {data.by_caption()[data.sample(split, index)[1]].split for index in range(10)} == {split}


def test_parser_is_near_perfect_on_clean_data():
    videos, prompts = zip(*(data.sample("heldout", index) for index in range(60)))
    result = parser.score(videos, prompts)
    assert result["valid"] >= 0.98 and result["moves_on"] >= 0.98, result


def test_parser_reads_position_and_velocity():
    scene = data.by_caption()["one large red circle moving right at the top over a dark background"]
    rng, twin = np.random.default_rng(3), np.random.default_rng(3)
    frames = data.render(scene, rng)
    data._background(scene.background, twin)
    radius = data._radius(scene, twin)
    data._tilt(scene, twin)
    twin.uniform(-0.04, 0.04, 3)
    (path,) = data._paths(scene, radius.max(), twin)
    (track,) = parser.parse(frames).tracks
    assert np.abs(track.centres - path).max() < 0.3
    assert abs(track.velocity[0] - (path[-1] - path[0])[0] / 16) < 0.02
    assert abs(track.radii.mean() - radius.mean()) < 0.25


def test_parser_tells_a_wrong_place_or_motion():
    frames = data.render(
        data.by_caption()["one small red circle moving right at the top over a dark background"],
        np.random.default_rng(0),
    )
    wrong = {
        "place": "one small red circle moving right at the bottom over a dark background",
        "motion": "one small red circle moving left at the top over a dark background",
    }
    for attribute, prompt in wrong.items():
        verdict = parser.judge(frames, prompt)
        assert {name for name, right in verdict.items() if not right} == {attribute, "valid"}, verdict


def test_parser_reports_noise_as_invalid():
    noise = np.random.default_rng(0).integers(0, 256, (17, 32, 32, 3), dtype=np.uint8)
    assert not parser.judge(noise, data.scenes("heldout")[0].caption)["valid"]
    assert parser.parse(np.zeros_like(noise)).count == 0


def _losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "transformer.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train.run(train.tiny(), folder)
    return folder


def test_training_repeats_itself(trained, tmp_path):
    train.run(train.tiny(), tmp_path)
    assert _losses(tmp_path) == _losses(trained) and len(_losses(trained)) == 8


def test_resumed_training_equals_uninterrupted(trained, tmp_path):
    config = train.tiny()
    train.encode_latents(config, tmp_path, train.train_autoencoder(config, tmp_path, stop_at=2))
    autoencoder = train.train_autoencoder(config, tmp_path)
    for chunk in (tmp_path / "latents").iterdir():
        chunk.unlink()
    train.encode_latents(config, tmp_path, autoencoder)
    train.train_transformer(config, tmp_path, stop_at=3)
    train.train_transformer(config, tmp_path)
    assert _losses(tmp_path) == _losses(trained)
    ends = [torch.load(folder / "transformer.pt", weights_only=True)["average"] for folder in (tmp_path, trained)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_noise_schedule_is_the_upstreams():
    from diffusers import EulerAncestralDiscreteScheduler

    assert torch.allclose(train.alphas_cumprod(), EulerAncestralDiscreteScheduler().alphas_cumprod, rtol=1e-4)


def test_autoencoder_is_causal():
    from opensora.models.causalvideovae import CausalVAEModel

    torch.manual_seed(0)
    model, video = CausalVAEModel().eval(), torch.rand(1, 3, 17, 32, 32)
    changed = video.clone()
    changed[:, :, 9:] = 0
    with torch.no_grad():
        before, after = model.encode(video), model.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3]) and not torch.equal(before[:, :, 3:], after[:, :, 3:])


def test_noise_levels_count_alike():
    weight = train.noise_weight(train.alphas_cumprod(), variance=9.0, floor=0.03)
    assert abs(weight.mean().item() - 1) < 1e-5
    assert (weight.diff() > 0).all() and weight[-1] / weight[0] < 35


def test_timesteps_are_drawn_evenly():
    draw = torch.Generator().manual_seed(0)
    times = train.draw_timesteps(5000, draw)
    assert abs(times.double().mean() - 499.5) < 1 and times.bincount(minlength=1000).unique().tolist() == [5]
