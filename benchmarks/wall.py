# SPDX-License-Identifier: Apache-2.0
"""One video taken apart: text, denoising, VAE and saving on every rank, plain and with every setting, in one run.

    python -m benchmarks.wall miniature
    python -m benchmarks.wall upstream CHECKOUT --ranks 2 4
    python -m benchmarks.wall steps --size 29x480p 93x720p --device cuda [--checkout CHECKOUT]

`miniature` samples with the demo, `upstream` with the unmodified v1.2.0 sample_t2v_sp and the tiny checkpoints in
CHECKOUT/../tiny on gloo ranks (both on a CPU); `steps` times single denoising steps, see benchmarks/wall_steps.py.
Seconds are medians over videos and repeats, arms take turns, and every arm is also given as a ratio to plain. The last
column has the seconds for which the VAE part kept the rank's processor busy, which other programs on it do not prolong.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from benchmarks import wall_steps
from benchmarks.wall_rank import PARTS, PROCESSOR
from osaccel.demo import arms as demo

ROOT = Path(__file__).resolve().parents[1]
# The tiny checkpoint has 6 blocks; all but the first rest at every other step.
CACHE = {"cache_block_start": 1, "cache_num_blocks": 5, "cache_step_start": 2, "cache_step_interval": 2}
LIMIT = 900


class Arm(NamedTuple):
    """One way to sample: what the table calls it, and the options of osaccel.run, None without osaccel."""

    name: str
    options: Optional[Tuple[str, ...]]


class Script(NamedTuple):
    """A sample script: the folder of its package `opensora`, its module and options, and its number of ranks."""

    package: str
    module: str
    options: Tuple[str, ...]
    ranks: int = 1


Videos = List[List[Dict[str, Any]]]  # by rank, then by video


def miniature_arms(steps: int) -> List[Arm]:
    """The demo's own; its searched list brings its own number of steps, and its plan fits one number only."""
    fitting = [arm for arm in demo.arms(steps)[1:] if "--plan" not in arm.options or steps == demo.PLAN_STEPS]
    return [Arm("plain", None), *(Arm(arm.name, arm.options) for arm in fitting)]


def upstream_arms(folder: Path) -> List[Arm]:
    file = folder / "dit_cache_config.json"
    file.write_text(json.dumps(CACHE))
    cache, tiles = ("--cache-config", str(file)), ("--parallel-vae", "1")
    return [
        Arm("plain", None),
        Arm("mask left out", ("--attention", "auto", "--parallel-vae", "0")),
        Arm("tiles dealt", tiles),
        Arm("cache", (*cache, "--parallel-vae", "0")),
        Arm("together", (*cache, *tiles)),
    ]


def words(options: Dict[str, Any]) -> Tuple[str, ...]:
    return tuple(word for name, value in options.items() for word in (f"--{name}", str(value)))


def miniature(steps: int, prompts: Sequence[str]) -> Script:
    checkpoint = demo.CHECKPOINT
    options = {
        "model_path": checkpoint / "model", "ae_path": checkpoint / "vae",
        "text_encoder_name": checkpoint / "text_encoder", "num_sampling_steps": steps, "seed": 5,
    }  # fmt: skip
    return Script(str(demo.HERE), "opensora.sample.sample_t2v", (*words(options), "--text_prompt", *prompts))


def upstream(checkout: str, ranks: int, arguments: argparse.Namespace) -> Script:
    tiny = Path(checkout).resolve().parent / "tiny"
    if not (tiny / "model").is_dir():
        tiny = Path(checkout).resolve() / "tiny"
    options = {
        "model_path": tiny / "model", "ae": "CausalVAEModel_D4_4x8x8", "ae_path": tiny / "vae",
        "text_encoder_name": tiny / "mt5", "text_prompt": tiny / "prompts.txt", "num_frames": arguments.frames,
        "height": arguments.height, "width": arguments.width, "num_sampling_steps": arguments.steps,
        "guidance_scale": 7.5, "max_sequence_length": 32, "sample_method": "EulerAncestralDiscrete", "fps": 8,
    }  # fmt: skip
    module = "opensora.sample.sample_t2v_sp"
    return Script(str(checkout), module, (*words(options), "--enable_tiling", "--save_memory"), ranks)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def take_apart(script: Script, arm: Arm, folder: Path) -> Videos:
    """Run the script once; raises RuntimeError with its output when it does not end well."""
    folder.mkdir(parents=True)
    command = [sys.executable]
    if script.ranks > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(script.ranks), "--master_port", free_port()]
    command += ["-m", "benchmarks.wall_rank", str(folder), script.module, *script.options]
    command += ["--save_img_path", str(folder / "videos"), "--cache_dir", str(folder / "cache")]
    if arm.options is not None:
        command = [sys.executable, "-m", "osaccel.run", *arm.options, "--", *command]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OSACCEL_")}
    path = os.pathsep.join([script.package, str(ROOT)])
    environ.update(PYTHONPATH=path, OMP_NUM_THREADS="1", PYTHONHASHSEED="3", UPSTREAM_SEED="5", FAKE_CUDA_ON_CPU="1")
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT)
    files = [folder / f"rank_{rank}.json" for rank in range(script.ranks)]
    if done.returncode or not all(file.exists() for file in files):
        raise RuntimeError(f"{arm.name}: {' '.join(command)} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return [json.loads(file.read_text()) for file in files]


def measure(script: Script, arms: Sequence[Arm], repeats: int, folder: Path) -> Dict[str, List[Videos]]:
    """Every arm `repeats` times, in turns and in every other turn backwards."""
    runs: Dict[str, List[Videos]] = {arm.name: [] for arm in arms}
    for repeat in range(repeats):
        for number, arm in enumerate(arms if repeat % 2 == 0 else arms[::-1]):
            print(f"{script.ranks} ranks, turn {repeat + 1} of {repeats}: {arm.name}", file=sys.stderr, flush=True)
            runs[arm.name].append(take_apart(script, arm, folder / f"{script.ranks}_{repeat}_{number}"))
    return runs


def seconds(runs: List[Videos], rank: int) -> Dict[str, float]:
    """Median seconds of each part, and of the whole, on one rank."""
    videos = [video for run in runs for video in run[rank]]
    parts = {part: float(np.median([video[part] for video in videos])) for part in (*PARTS, PROCESSOR)}
    return {**parts, "whole": float(np.median([sum(video[part] for part in PARTS) for video in videos]))}


def digests(runs: List[Videos]) -> List[List[str]]:
    return [[video["digest"] for video in rank] for run in runs for rank in run]


def table(runs: Dict[str, List[Videos]], ranks: int) -> str:
    """Markdown: a row per arm and rank; seconds, and in brackets the ratio to plain on the same rank."""
    columns = (*PARTS, "whole", PROCESSOR)
    lines = [f"| {ranks} ranks | rank | {' | '.join(columns)} | frames |", "|---" * (len(columns) + 3) + "|"]
    plain = [seconds(runs["plain"], rank) for rank in range(ranks)]
    for name, own in runs.items():
        same = "as plain" if {*map(tuple, digests(own))} == {*map(tuple, digests(runs["plain"]))} else "others"
        for rank in range(ranks):
            found = seconds(own, rank)
            cells = [f"{found[part]:.2f} ({found[part] / max(plain[rank][part], 1e-9):.2f})" for part in columns]
            lines.append(f"| {name} | {rank} | {' | '.join(cells)} | {same} |")
    return "\n".join(lines)


def parse_args(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    small = modes.add_parser("miniature")
    small.add_argument("--prompts", type=int, default=2)
    tiny = modes.add_parser("upstream")
    tiny.add_argument(
        "checkout", help="an unpacked checkout of Open-Sora-Plan v1.2.0, tiny checkpoints beside or in it"
    )
    tiny.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    tiny.add_argument("--frames", type=int, default=57)
    tiny.add_argument("--height", type=int, default=64)
    tiny.add_argument("--width", type=int, default=272)
    for mode, steps in ((small, 100), (tiny, 8)):
        mode.add_argument("--steps", type=int, default=steps)
        mode.add_argument("--repeats", type=int, default=2)
        mode.add_argument(
            "--arms", nargs="+", metavar="NAME", help="only these, and plain, by their names in the table"
        )
        mode.add_argument("--json", help="also write every video's numbers to this file")
    wall_steps.add_arguments(modes.add_parser("steps"))
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_args()
    if arguments.mode == "steps":
        wall_steps.main(arguments)
        return
    everything = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.mode == "miniature":
            prompts = (demo.CHECKPOINT / "prompts.txt").read_text().splitlines()[: arguments.prompts]
            scripts, arms = [miniature(arguments.steps, prompts)], miniature_arms(arguments.steps)
        else:
            scripts = [upstream(arguments.checkout, ranks, arguments) for ranks in arguments.ranks]
            arms = upstream_arms(folder)
        arms = [arm for arm in arms if not arguments.arms or arm.name in ("plain", *arguments.arms)]
        for script in scripts:
            runs = measure(script, arms, arguments.repeats, folder)
            everything[script.ranks] = runs
            print(table(runs, script.ranks), end="\n\n", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(everything))


if __name__ == "__main__":
    main()
