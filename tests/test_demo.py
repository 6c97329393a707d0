# SPDX-License-Identifier: Apache-2.0
"""The demo as a first-time user runs it."""

import re
import subprocess
import sys


def test_fast_demo_prints_its_table_and_writes_its_pictures(tmp_path):
    command = [sys.executable, "-m", "osaccel.demo", "--fast", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if re.search(r"\d+\.\d+x", line)]
    assert [row.split("  ")[0] for row in rows] == [
        "plain, 100 steps",
        "DiT cache",
        "50 searched steps",
        "cache + 50 steps",
    ]
    assert all(row.endswith(" %") for row in rows)
    computed, total = map(int, re.search(r"(\d+) of (\d+)", rows[1]).groups())
    assert 0 < computed < total == 1200
    decibels = float(rows[1].split(str(total))[1].split()[0])
    # Far from equal noise (about 10 dB), not bit-identical (infinite).
    assert 15 < decibels < 100
    assert (tmp_path / "side_by_side.mp4").stat().st_size > 1000
    assert (tmp_path / "side_by_side.png").read_bytes().startswith(b"\x89PNG")


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
