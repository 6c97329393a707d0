# SPDX-License-Identifier: Apache-2.0
"""The demo as a first-time user runs it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("imageio")
pytest.importorskip("scipy")

import imageio  # noqa: E402
import numpy as np  # noqa: E402

from osaccel.demo import compare  # noqa: E402
from osaccel.demo.__main__ import EXTRA  # noqa: E402
from osaccel.formats import read_plan  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def demo(*options, **more):
    command = [sys.executable, "-m", "osaccel.demo", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, **more)


def test_fast_demo_prints_its_table_and_writes_its_pictures(tmp_path):
    result = demo("--fast", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [re.split("  +", line) for line in result.stdout.splitlines() if re.search(r"\d+\.\d+x", line)]
    assert [row[0] for row in rows] == ["plain, 100 steps", "plan, 2x", "DiT cache", "50 searched steps"]
    assert [row[3] for row in rows] == ["1.00x", "2.00x", "1.52x", "2.00x"]
    assert [row[6] for row in rows] == ["100.0 %", "50.0 %", "66.0 %", "50.0 %"]
    assert all(row[-1].endswith(" %") for row in rows)
    # Far from equal noise (about 10 dB), not bit-identical (200).
    assert 25 < float(rows[2][7]) < float(rows[1][7]) < 100
    # In turns: the second round begins where the first has ended.
    order = re.findall(r"^sampling \d of 2: (.+) \.\.\.$", result.stdout, re.MULTILINE)
    assert order[4:] == order[3::-1] and len(order) == 8
    assert (tmp_path / "side_by_side.mp4").stat().st_size > 1000
    assert (tmp_path / "side_by_side.png").read_bytes().startswith(b"\x89PNG")


def test_the_search_on_the_miniature_writes_a_plan_and_its_report(tmp_path):
    result = demo("--search", "1.5x", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "found a plan for 1.5x" in result.stderr and str(tmp_path / "plan.json.report.html") in result.stdout
    assert read_plan(str(tmp_path / "plan.json")).work(12) <= 1 / 1.5 + 1e-9
    refused = demo("--search", "1x", "--out", str(tmp_path))
    assert refused.returncode == 2 and "--target: expected a speed-up such as 2x (above 1)" in refused.stderr


def test_missing_extras_are_one_line_before_anything_is_sampled(tmp_path):
    for name in EXTRA:
        if name not in ("imageio", "scipy"):
            (tmp_path / f"{name}.py").touch()
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    # -S: without this environment's own packages.
    command = [sys.executable, "-S", "-m", "osaccel.demo", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        "osaccel.demo: imageio, scipy are not installed; the extra 'demo' has them: pip install -e \".[demo]\"\n"
    )


def test_the_extra_is_what_the_demo_asks_for():
    (line,) = re.findall(r"^demo = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    named = [re.match(r"[\w-]+", name).group().replace("-", "_") for name in re.findall(r'"(.+?)"', line)]
    assert sorted(named) == sorted(EXTRA)


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_sampled(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for out, why in ((file, "File exists"), (file / "below", "Not a directory")):
        result = demo("--fast", "--out", str(out))
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"osaccel.demo: --out {out} cannot be written: {why}\n"


def test_labels_and_differences_can_be_seen(tmp_path):
    arms = {"plain": [np.full((9, 32, 32, 3), 100, np.uint8)], "star": [np.full((9, 32, 32, 3), 103, np.uint8)]}
    shown = compare.with_difference(arms)
    assert list(shown) == ["plain", "star", "difference x 32"]
    assert (shown["difference x 32"][0] == 96).all()
    compare.write_video(tmp_path / "all.mp4", arms)
    frames = np.stack(imageio.mimread(tmp_path / "all.mp4"))
    assert frames.shape == (9, 24 + 192, 3 * 192, 3)
    strips = frames[:, :24].reshape(9, 24, 3, 192, 3)
    # White letters on black above every column, and the columns as they are.
    assert (strips.max((0, 1, 3, 4)) > 150).all() and (np.median(strips, (0, 1, 3, 4)) < 20).all()
    assert np.abs(frames[4, 100, [96, 288, 480]].mean(-1) - [100, 103, 96]).max() < 6


def test_models_saved_during_a_generation_are_plain(tmp_path):
    """save_pretrained and deepcopy from a callback, on the miniature's OpenSoraT2V inside its real pipeline."""
    code = """
import copy, sys, torch
import osaccel.demo
sys.path.insert(0, osaccel.demo.__path__[0])
from benchmarks.reference.load import load_pipeline
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.plan import of_dit_cache
from osaccel.generation import Generation

pipeline = load_pipeline()
Model = type(pipeline.transformer)
config = DitCacheConfig(cache_block_start=0, cache_num_blocks=12, cache_step_start=0, cache_step_interval=4)

def run(callback=None):
    torch.manual_seed(0)
    options = dict(num_inference_steps=4, guidance_scale=2.0, max_sequence_length=16, output_type="latent")
    prompt = "one large red circle moving left at the top over a dark background"
    return pipeline(prompt, callback=callback, **options).images

copies = []
def duplicate(i, t, latents):
    if i == 2:
        pipeline.transformer.save_pretrained(sys.argv[1])
        copies.append(copy.deepcopy(pipeline.transformer))

plain = run()
with Generation(pipeline, of_dit_cache(config)):
    assert not torch.equal(run(duplicate), plain)
assert torch.equal(run(), plain)
for model in (copies[0], Model.from_pretrained(sys.argv[1]).eval()):
    pipeline.transformer = model
    assert torch.equal(run(), plain)
print("equal")
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert result.stdout.strip() == "equal", result.stderr
