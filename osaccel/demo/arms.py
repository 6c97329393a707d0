# SPDX-License-Identifier: Apache-2.0
"""The ways in which the demo samples, one process for each video, and what each of them took."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from osaccel.demo.compare import ssim
from osaccel.demo.parser import score
from osaccel.formats import read_timesteps
from osaccel.search.frames import psnr

HERE = Path(__file__).resolve().parent
CHECKPOINT, CONFIGS = HERE / "checkpoint", HERE / "configs"
# Found at 100 steps on prompts that the demo does not show: the plan on 24, the others on one and four.
PLAN, CACHE = CONFIGS / "plan.json", CONFIGS / "dit_cache_config.json"
TIMESTEPS = CONFIGS / "searched_schedule.txt"
PLAN_STEPS = 100
# How many calls a search looks at.
CALLS = 4


class Arm(NamedTuple):
    """One way to sample: options of `osaccel.run`, and the script's own number of steps."""

    name: str
    options: Tuple[str, ...]
    steps: int
    same_noise: bool  # as the plain run, step by step: only then does a pixel comparison mean anything


@dataclass
class Outcome:
    """What an arm gave: one entry for each prompt, the steps of a video and the share of their blocks computed."""

    videos: List[np.ndarray] = field(default_factory=list)
    wall: List[float] = field(default_factory=list)
    processor: List[float] = field(default_factory=list)
    steps: int = 0
    share: float = 1.0

    def seconds(self, kind: str) -> float:
        return float(np.median(getattr(self, kind)))


def arms(steps: int) -> List[Arm]:
    """The plain run first, the plan second; the plan is for 100 steps."""
    return [
        Arm(f"plain, {steps} steps", (), steps, True),
        Arm("plan, 2x", ("--plan", str(PLAN)), steps, True),
        Arm("DiT cache", ("--cache-config", str(CACHE)), steps, True),
        Arm(f"{len(read_timesteps(str(TIMESTEPS)))} searched steps", ("--timesteps", str(TIMESTEPS)), steps, False),
    ]


def sample(arm: Arm, prompt: str, folder: Path, seed: int, outcome: Outcome) -> None:
    """Run the sample script in a process of its own, through the launcher, and add what came to `outcome`.

    Raises:
        RuntimeError: it failed; the message is its output.
    """
    command = _command(arm.options, [prompt], folder, arm.steps, seed)
    result = subprocess.run(command, env=_environ(), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{arm.name} failed with status {result.returncode}:\n{result.stdout}{result.stderr}")
    ((wall, processor),) = re.findall(r"^video 0: ([\d.]+) s, ([\d.]+) s CPU$", result.stdout, re.MULTILINE)
    outcome.videos.append(np.load(folder / "0.npy"))
    outcome.wall.append(float(wall))
    outcome.processor.append(float(processor))
    # The plain arm, where nothing is set, says nothing.
    steps = re.findall(r"generation: (\d+) steps", result.stderr)
    shares = re.findall(r" ([\d.]+) of ([\d.]+) blocks computed", result.stderr)
    outcome.steps = int(steps[-1]) if steps else arm.steps
    outcome.share = float(shares[-1][0]) / float(shares[-1][1]) if shares else 1.0


def all_prompts() -> List[str]:
    """Those of the checkpoint's that no training video shows."""
    return (CHECKPOINT / "prompts.txt").read_text().splitlines()


def search(target: str, out: Path, seed: int) -> int:
    """Search a plan as a user does, on prompts that no video of the demo shows, and draw its report.

    What both say is seen. Returns the exit status.
    """
    plan, prompts = str(out / "plan.json"), all_prompts()[-CALLS:]
    options = ("--search", "plan", "--target", target, "--search-prompts", str(len(prompts)), "--plan", plan)
    command = _command(options, prompts, out / "calibration", PLAN_STEPS, seed)
    print(" ".join(map(shlex.quote, command)), flush=True)
    status = subprocess.run(command, env=_environ()).returncode
    return status or subprocess.run([sys.executable, "-m", "osaccel.report", plan], env=_environ()).returncode


def _command(options: Sequence[str], prompts: Sequence[str], folder: Path, steps: int, seed: int) -> List[str]:
    """The sample script under `osaccel.run` with these options."""
    return [
        sys.executable, "-m", "osaccel.run", *options, "--", sys.executable, "-m", "opensora.sample.sample_t2v",
        "--model_path", str(CHECKPOINT / "model"), "--ae_path", str(CHECKPOINT / "vae"),
        "--text_encoder_name", str(CHECKPOINT / "text_encoder"), "--save_img_path", str(folder),
        "--num_sampling_steps", str(steps), "--seed", str(seed), "--save_frames", "--text_prompt", *prompts,
    ]  # fmt: skip


def _environ() -> Dict[str, str]:
    """Of the script's process: without settings of the user's own, and with the miniature upstream on its path."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OSACCEL_")}
    environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *environ.get("PYTHONPATH", "").split(os.pathsep)])
    # So small a network gains nothing from threads, and on a busy machine they wait for each other most of the time.
    environ.setdefault("OMP_NUM_THREADS", "1")
    return environ


def table(outcomes: Dict[Arm, Outcome], prompts: Sequence[str]) -> str:
    """Seconds are medians of the videos; a speed-up is a ratio of these, and ideal is what the network work allows."""
    plain = next(iter(outcomes.values()))
    columns = (
        ("wall s", 9),
        ("CPU s", 8),
        ("ideal", 8),
        ("wall", 9),
        ("CPU", 9),
        ("work", 9),
        ("PSNR dB", 9),
        ("SSIM", 7),
    )
    lines = [
        f"{'':<20}{'per video':>17}{'speed-up':>26}{'network':>9}",
        f"{'':<20}" + "".join(f"{name:>{width}}" for name, width in columns) + f"{'as prompted':>13}",
    ]
    for arm, found in outcomes.items():
        work = found.share * found.steps / plain.steps
        wall, processor = (found.seconds(kind) for kind in ("wall", "processor"))
        speeds = plain.seconds("wall") / wall, plain.seconds("processor") / processor
        pairs = list(zip(found.videos, plain.videos)) if arm.same_noise and found is not plain else []
        quality = f"{np.mean([psnr(*pair) for pair in pairs]):>9.1f}" if pairs else f"{'-':>9}"
        likeness = f"{np.mean([ssim(*pair) for pair in pairs]):>7.3f}" if pairs else f"{'-':>7}"
        prompted = f"{100 * score(found.videos, prompts)['valid']:.0f} %"
        lines.append(
            f"{arm.name:<20}{wall:>9.2f}{processor:>8.2f}{1 / work:>7.2f}x{speeds[0]:>8.2f}x{speeds[1]:>8.2f}x"
            f"{100 * work:>7.1f} %{quality}{likeness}{prompted:>13}"
        )
    notes = (
        "PSNR and SSIM: against the plain run of the same seed; '-' where the noise is another.",
        "as prompted: videos that show what the prompt names, by its shapes, colours and motion.",
    )
    return "\n".join([*lines, *notes])
