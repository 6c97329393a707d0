# SPDX-License-Identifier: Apache-2.0
"""The second reference model: its data and read-out agree, its training resumes exactly, its checkpoint samples."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("scipy")

from benchmarks.reference.second import data, load, readout, train  # noqa: E402
from benchmarks.reference.second.model import LinearAutoencoder  # noqa: E402


def test_splits_share_no_prompt_and_cover_all():
    sets = [{texture.caption for texture in data.textures(split)} for split in data.SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(data.all_textures())
    heldout, calibration = load.heldout_prompts(200), load.calibration_prompts(200)
    assert len(set(heldout)) == len(set(calibration)) == 200
    assert not set(heldout) & set(calibration)
    shown = {data.sample("train", index)[1] for index in range(100)}
    assert not shown & {*heldout, *calibration}


def test_captions_fit():
    ids = train.tokenize([texture.caption for texture in data.all_textures()]).input_ids
    assert ids.shape[1] == data.CAPTION_WORDS and not (ids == 2).any()  # 2 is an unknown word


def test_generator_repeats_itself():
    first, second = data.sample("train", 7), data.sample("train", 7)
    assert first[1] == second[1] and np.array_equal(first[0], second[0])
    assert not np.array_equal(first[0], data.sample("train", 8)[0])


def test_readout_is_near_perfect_on_clean_data():
    verdicts = [_judged(*data.sample("heldout", index)) for index in range(60)]
    assert np.mean([verdict["valid"] for verdict in verdicts]) >= 0.98


def _judged(frames, caption):
    return readout.judge((frames * 255).astype(np.uint8), caption)


def test_readout_tells_every_wrong_attribute():
    caption = "azure dots set half on ivory moving slowly left in dimming light from above"
    frames = data.render(data.by_caption()[caption], np.random.default_rng(1))
    changes = {
        "pattern": ("dots", "checks"), "set": ("half", "quarter"), "ink": ("azure", "orange"),
        "paper": ("ivory", "navy"), "pace": ("slowly", "quickly"), "way": ("left", "right"),
        "light": ("dimming", "steady"), "side": ("above", "left"),
    }  # fmt: skip
    assert _judged(frames, caption)["valid"]
    for name, change in changes.items():
        verdict = _judged(frames, caption.replace(*change))
        assert [key for key, right in verdict.items() if not right] == [name, "valid"]


def test_autoencoder_gives_latents_of_unit_deviation():
    videos, _ = train.videos(range(40))
    autoencoder = LinearAutoencoder(channels=10)
    autoencoder.fit(videos)
    latents = autoencoder.encode(videos)
    assert latents.shape == (40, 10, 4, 6, 6)
    assert abs(latents.std() - 1) < 0.01 and latents.transpose(0, 1).flatten(1).std(1).min() > 0.5
    assert (autoencoder.decode(latents) - videos).pow(2).mean() < 0.06 * videos.var()


def test_training_resumes_exactly(tmp_path):
    config = train.tiny()
    straight = train.run(config, tmp_path / "straight")
    train.run(config, tmp_path / "resumed", stop_at=3)
    resumed = train.run(config, tmp_path / "resumed")
    for one, other in zip(straight.average.parameters(), resumed.average.parameters()):
        assert torch.equal(one, other)
    losses = [(tmp_path / name / "transformer.jsonl").read_text() for name in ("straight", "resumed")]
    assert losses[0] == losses[1]
    assert [json.loads(line)["step"] for line in losses[0].splitlines()] == list(range(config.steps))


def test_an_export_samples_like_the_training_model(tmp_path):
    config = train.tiny()
    average = train.run(config, tmp_path).average
    assert train.export(config, tmp_path, tmp_path / "checkpoint") == config.steps
    loaded = load.load_pipeline(checkpoint=tmp_path / "checkpoint").transformer
    wanted, found = average.transformer.state_dict(), loaded.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(wanted[name], found[name], atol=1e-3) for name in wanted)


def test_checkpoint_is_small():
    assert sum(path.stat().st_size for path in load.CHECKPOINT.rglob("*") if path.is_file()) <= 12e6


def test_checkpoint_samples():
    pipeline = load.load_pipeline()
    assert {parameter.dtype for parameter in pipeline.transformer.parameters()} == {torch.float32}
    options = {"num_frames": load.FRAMES, "height": load.SIZE, "width": load.SIZE, "guidance_scale": load.GUIDANCE}
    options.update(num_inference_steps=30, max_sequence_length=load.CAPTION_WORDS)
    prompts = load.calibration_prompts(2)

    def sample(output_type):
        noise = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return pipeline(prompts, generator=noise, output_type=output_type, **options).images

    latents, frames = sample("latent"), sample("pil")
    assert latents.shape == (2, 10, 4, 6, 6) and 0.5 < latents.std() < 5  # guidance raises it
    assert torch.equal(frames, pipeline.decode_latents(latents))
    verdicts = [load.judge(video, prompt) for video, prompt in zip(frames.numpy(), prompts)]
    assert all(verdict["light"] and verdict["side"] for verdict in verdicts)
