# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.demo`: the miniature upstream, unmodified, run plain and accelerated through `osaccel.run`."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from osaccel.demo.compare import ssim, write_picture, write_video
from osaccel.demo.parser import score
from osaccel.formats import read_timesteps
from osaccel.search.frames import psnr

HERE = Path(__file__).resolve().parent
CHECKPOINT, CONFIGS = HERE / "checkpoint", HERE / "configs"
# Found with OSACCEL_SEARCH=1 on a calibration prompt (100 steps), and OSACCEL_SEARCH=all on four (50 steps), ratio 1.5.
CACHE, CACHE_50 = CONFIGS / "dit_cache_config.json", CONFIGS / "dit_cache_config_50.json"
TIMESTEPS = CONFIGS / "searched_schedule.txt"


class Arm(NamedTuple):
    """One way to sample: options of `osaccel.run`, and the script's own number of steps."""

    name: str
    options: Tuple[str, ...]
    steps: int
    same_noise: bool  # as the plain run, step by step: only then does a pixel comparison mean anything


class Outcome(NamedTuple):
    videos: List[np.ndarray]
    seconds: float
    computed: Optional[int]
    total: Optional[int]


def arms(steps: int) -> List[Arm]:
    fewer = ("--timesteps", str(TIMESTEPS))
    number = len(read_timesteps(str(TIMESTEPS)))
    return [
        Arm(f"plain, {steps} steps", (), steps, True),
        Arm("DiT cache", ("--cache-config", str(CACHE)), steps, True),
        Arm(f"{number} searched steps", fewer, steps, False),
        Arm(f"cache + {number} steps", ("--cache-config", str(CACHE_50), *fewer), steps, False),
    ]


def sample(arm: Arm, prompts: Sequence[str], out: Path, seed: int) -> Outcome:
    """Run the sample script in a process of its own, through the launcher; raises RuntimeError with its output."""
    folder = out / re.sub(r"\W+", "_", arm.name)
    command = [
        sys.executable, "-m", "osaccel.run", *arm.options, "--", sys.executable, "-m", "opensora.sample.sample_t2v",
        "--model_path", str(CHECKPOINT / "model"), "--ae_path", str(CHECKPOINT / "vae"),
        "--text_encoder_name", str(CHECKPOINT / "text_encoder"), "--save_img_path", str(folder),
        "--num_sampling_steps", str(arm.steps), "--seed", str(seed), "--save_frames", "--text_prompt", *prompts,
    ]  # fmt: skip
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OSACCEL_")}
    environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *environ.get("PYTHONPATH", "").split(os.pathsep)])
    result = subprocess.run(command, env=environ, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{arm.name} failed with status {result.returncode}:\n{result.stdout}{result.stderr}")
    blocks = re.findall(r"(\d+) of (\d+) blocks computed", result.stderr)
    seconds = [float(found) for found in re.findall(r"^video \d+: ([\d.]+) s$", result.stdout, re.MULTILINE)]
    return Outcome(
        [np.load(folder / f"{index}.npy") for index in range(len(prompts))],
        # The first video of a process also pays for what every process pays once.
        float(np.median(seconds[1:] or seconds)),
        *([int(blocks[-1][0]), int(blocks[-1][1])] if blocks else [None, None]),
    )


def table(outcomes: Dict[Arm, Outcome], prompts: Sequence[str]) -> str:
    plain = next(iter(outcomes.values()))
    lines = [f"{'':<20}{'s/video':>9}{'speed-up':>10}{'blocks':>15}{'PSNR dB':>9}{'SSIM':>7}{'as prompted':>13}"]
    for arm, found in outcomes.items():
        blocks = "all" if found.computed is None else f"{found.computed} of {found.total}"
        pairs = list(zip(found.videos, plain.videos)) if arm.same_noise and found is not plain else []
        quality = f"{np.mean([psnr(*pair) for pair in pairs]):>9.2f}" if pairs else f"{'-':>9}"
        likeness = f"{np.mean([ssim(*pair) for pair in pairs]):>7.3f}" if pairs else f"{'-':>7}"
        prompted = f"{100 * score(found.videos, prompts)['valid']:.0f} %"
        speed = f"{plain.seconds / found.seconds:.2f}x"
        lines.append(f"{arm.name:<20}{found.seconds:>9.2f}{speed:>10}{blocks:>15}{quality}{likeness}{prompted:>13}")
    lines.append("PSNR and SSIM: against the plain run from the same noise; '-' where the noise differs by design.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m osaccel.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("osaccel_demo"), help="folder for the videos (osaccel_demo)")
    parser.add_argument("--fast", action="store_true", help="two prompts instead of six")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    prompts = (CHECKPOINT / "prompts.txt").read_text().splitlines()[: 2 if arguments.fast else 6]
    outcomes = {}
    for arm in arms(steps=100):
        print(f"sampling: {arm.name} ...", flush=True)
        outcomes[arm] = sample(arm, prompts, arguments.out, arguments.seed)
    print(table(outcomes, prompts))
    by_name = {arm.name: outcome.videos for arm, outcome in outcomes.items()}
    write_video(arguments.out / "side_by_side.mp4", by_name)
    write_picture(arguments.out / "side_by_side.png", by_name, prompts[:3])
    print(f"videos, side_by_side.mp4 and side_by_side.png: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
