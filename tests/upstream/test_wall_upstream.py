# SPDX-License-Identifier: Apache-2.0
"""VAE tiles dealt over ranks and masks left out, on the unmodified v1.2.0 scripts: every bit is the upstream's."""

import json
import os
import subprocess
import sys
import time
from typing import NamedTuple, Tuple

import pytest

CHECKOUT = os.environ.get("OSACCEL_UPSTREAM", "")
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LAUNCHER = ("python", "-m", "osaccel.run")
# Ways to save work in four steps, by the variable that takes the file.
SAVING = {
    "OSACCEL_CACHE_CONFIG": {
        "cache_block_start": 1, "cache_num_blocks": 4, "cache_step_start": 0, "cache_step_interval": 2
    },
    "OSACCEL_PLAN": {"format": "osaccel.plan/1", "steps": 4, "skip": [2], "conditional_only": [1, 3]},
}  # fmt: skip
# The user's own sitecustomize notes what goes into the VAE and what comes out, before that is rounded to 8 bits, and
# which attention calls got a mask. A second round, which would overwrite the first one's videos, waits to be stopped.
WATCH = """
import hashlib, json, os, time, wrapt

def note(name, line):
    with open(os.path.join(os.environ["COUNT_DIR"], name + os.environ.get("RANK", "0")), "a") as file:
        print(line, file=file)

def digest(tensor):
    import torch
    return hashlib.sha256(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()

@wrapt.when_imported("opensora.models.causalvideovae.model.causal_vae")
def watch_vae(module):
    @wrapt.patch_function_wrapper(module, "CausalVAEModelWrapper.decode")
    def decode(wrapped, instance, args, kwargs):
        video = wrapped(*args, **kwargs)
        note("vae_", json.dumps([digest(args[0]), str(video.dtype), list(video.shape), digest(video)]))
        return video

@wrapt.when_imported("opensora.sample.pipeline_opensora_sp")
def watch_rounds(module):
    rounds = []
    @wrapt.patch_function_wrapper(module, "OpenSoraPipeline.__init__")
    def init(wrapped, instance, args, kwargs):
        rounds.append(1)
        time.sleep(600 if len(rounds) > 1 else 0)
        return wrapped(*args, **kwargs)

@wrapt.when_imported("opensora.models.diffusion.opensora.modeling_opensora")
def watch_attention(module):
    @wrapt.patch_function_wrapper("opensora.models.diffusion.opensora.modules", "AttnProcessor2_0.__call__")
    def call(wrapped, instance, args, kwargs):
        kind = "self" if kwargs.get("encoder_hidden_states") is None else "cross"
        note("attention_", kind + (" unmasked" if kwargs.get("attention_mask") is None else " masked"))
        return wrapped(*args, **kwargs)
"""
FAIL = """
import os, wrapt

@wrapt.when_imported("opensora.models.causalvideovae.model.causal_vae.modeling_causalvae")
def fail(module):
    @wrapt.patch_function_wrapper(module, "Decoder.forward")
    def forward(wrapped, instance, args, kwargs):
        if os.environ["RANK"] == "1":
            {failure}
        return wrapped(*args, **kwargs)
"""


class Case(NamedTuple):
    """Options of the script for the smallest video with so many tiles; each rank denoises some latents of its own."""

    tiles: int
    ranks: int
    frames: int
    extra: Tuple[str, ...] = ()


TILING = ("--enable_tiling",)
WIDE = ("--enable_tiling", "--save_memory", "--width", "272")
CASES = {
    "divides": Case(2, 2, 33, TILING),
    "does not divide": Case(3, 2, 57, TILING),
    "image": Case(2, 2, 1, WIDE),
    "divides, 4 ranks": Case(4, 4, 33, WIDE),
    "does not divide, 4 ranks": Case(6, 4, 49, WIDE),
    "image, 4 ranks": Case(2, 4, 1, WIDE),
}


def run(upstream, case, prefix=(), sitecustomize=WATCH, steps=2, **environ):
    options = {"frames": case.frames, "extra": case.extra, "ranks": case.ranks}
    return upstream.run("sample_t2v_sp", prefix, sitecustomize, steps, **options, **environ)


def notes(result, name):
    """The lines that each rank has noted under a name, by file."""
    return {path.name: path.read_text().splitlines() for path in sorted(result.out.glob(name + "_*"))}


def decoded(result, ranks):
    """What rank 0's VAE took and gave for the two videos, and so did all ranks'."""
    found = {name: [json.loads(line) for line in lines] for name, lines in notes(result, "vae").items()}
    assert len(found) == ranks and len(found["vae_0"]) == 2, result.log[-3000:]
    # When rank 0 has saved its videos the run is stopped, and another rank may still be at the second one.
    assert all(each and each == found["vae_0"][: len(each)] for each in found.values())
    return found["vae_0"]


@pytest.mark.parametrize("name", CASES)
def test_dealt_tiles_give_the_same_bits_on_every_rank(upstream, name):
    case = CASES[name]
    plain = run(upstream, case)
    dealt = run(upstream, case, LAUNCHER, OSACCEL_PARALLEL_VAE="1")
    videos = decoded(plain, case.ranks)
    assert decoded(dealt, case.ranks) == videos and videos[0][1] == "torch.bfloat16"
    assert dealt.videos == plain.videos and len(plain.videos) == 2
    assert f"VAE: {case.tiles} tiles over {case.ranks} ranks" in dealt.log and "VAE: " not in plain.log


@pytest.mark.parametrize("variable", SAVING)
def test_with_less_work_the_latents_are_those_of_less_work_alone(upstream, tmp_path, variable):
    file, case = tmp_path / "saving.json", CASES["does not divide"]
    file.write_text(json.dumps(SAVING[variable]))
    alone = run(upstream, case, LAUNCHER, steps=4, OSACCEL_PARALLEL_VAE="0", **{variable: str(file)})
    both = run(upstream, case, LAUNCHER, steps=4, **{variable: str(file)})
    assert decoded(both, 2) == decoded(alone, 2) != decoded(run(upstream, case, steps=4), 2)
    assert both.videos == alone.videos
    assert "VAE: 3 tiles over 2 ranks, at most 2 each" in both.log and "VAE: " not in alone.log


def test_without_tiling_nothing_is_dealt(upstream):
    case = Case(1, 2, 5)
    plain = run(upstream, case)
    asked = run(upstream, case, LAUNCHER, OSACCEL_PARALLEL_VAE="1")
    assert decoded(asked, 2) == decoded(plain, 2) and asked.videos == plain.videos
    assert "VAE: not dealt over ranks, because tiling is off (--enable_tiling)" in asked.log


def test_a_tile_that_fails_on_one_rank_is_an_error_on_all(upstream):
    started = time.time()
    failing = FAIL.format(failure="raise MemoryError('no room for this tile')")
    result = run(upstream, CASES["does not divide"], LAUNCHER, failing, OSACCEL_PARALLEL_VAE="1")
    assert result.status != 0 and time.time() - started < 60 and not result.videos
    for rank in (0, 1):
        message = "TileError: VAE: on rank 1 tile 1 could not be decoded: MemoryError: no room for this tile. All ranks"
        assert any(line.startswith(f"[rank{rank}]") and message in line for line in result.log.splitlines()), result.log


def test_a_rank_killed_in_its_tile_ends_the_others(upstream):
    started = time.time()
    failing = FAIL.format(failure="os.kill(os.getpid(), 9)")
    result = run(upstream, CASES["does not divide"], LAUNCHER, failing, OSACCEL_PARALLEL_VAE="1")
    assert result.status != 0 and time.time() - started < 60 and not result.videos


@pytest.mark.parametrize("script", ["sample_t2v", "sample_t2v_sp"])
def test_the_mask_is_left_out_of_self_attention_only(upstream, script):
    plain, active = (
        upstream.run(script, prefix, WATCH, steps=2, **environ)
        for prefix, environ in (((), {}), (LAUNCHER, {"OSACCEL_PARALLEL_VAE": "1"}))
    )
    assert active.videos == plain.videos and len(plain.videos) == 2, active.log[-3000:]
    before, after = ({line for line in notes(run, "attention")["attention_0"]} for run in (plain, active))
    assert before == {"self masked", "cross masked"} and after == {"self unmasked", "cross masked"}


def test_flash_where_it_applies(upstream):
    plain = upstream.run(steps=2)
    auto = upstream.run(prefix=LAUNCHER, steps=2, OSACCEL_ATTENTION="auto")
    assert len(auto.videos) == 2, auto.log[-3000:]
    if upstream.on_cpu:
        assert auto.videos == plain.videos
        assert "attention: kept, because flash cannot be used: it needs a GPU, the transformer is on cpu" in auto.log
    else:
        assert "attention: flash" in auto.log
        assert upstream.run(prefix=LAUNCHER, steps=2, OSACCEL_ATTENTION="flash").videos == auto.videos


def test_flash_is_refused_with_the_reason(upstream):
    if not upstream.on_cpu:
        pytest.skip("a GPU has the kernel")
    result = upstream.run(prefix=LAUNCHER, steps=2, OSACCEL_ATTENTION="flash")
    assert result.status != 0 and not result.videos
    assert "OSACCEL_ATTENTION: flash cannot be used: it needs a GPU, the transformer is on cpu. Use keep" in result.log


def test_the_named_kernel_serves_self_attention_with_a_visible_mask():
    environ = dict(os.environ, PYTHONPATH=os.pathsep.join([CHECKOUT, ROOT]), PYTHONHASHSEED="3", OMP_NUM_THREADS="1")
    script = os.path.join(os.path.dirname(__file__), "attention_script.py")
    done = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_benchmark_takes_a_video_apart_on_every_rank(upstream, tmp_path):
    if not upstream.on_cpu:
        pytest.skip("it runs the ranks on a CPU")
    from benchmarks import wall

    arguments = wall.parse_args(["upstream", CHECKOUT, "--frames", "33", "--width", "64", "--steps", "2"])
    arms = [wall.Arm("plain", None), wall.Arm("tiles dealt", ("--parallel-vae", "1"))]
    runs = wall.measure(wall.upstream(CHECKOUT, 2, arguments), arms, 1, tmp_path)
    assert wall.digests(runs["plain"]) == wall.digests(runs["tiles dealt"])
    for (run,) in runs.values():
        assert [len(videos) for videos in run] == [2, 2]
        assert all(video[part] > 0 for videos in run for video in videos for part in ("text", "denoising", "VAE"))
        assert run[0][0]["saving"] > 0 == run[1][0]["saving"]
