# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.demo`: the miniature upstream, unmodified, run plain and accelerated through `osaccel.run`."""

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

from osaccel import __version__
from osaccel.messages import closest

# What the extra `demo` brings, by the names under which it is imported.
EXTRA = ("accelerate", "diffusers", "einops", "imageio", "imageio_ffmpeg", "matplotlib", "safetensors", "scipy", "tqdm",
         "transformers")  # fmt: skip

OPTIONS = ("--out", "--fast", "--search", "--seed", "--version", "--help")


def problem(out: Path) -> Optional[str]:
    """What would go wrong after minutes of sampling, in one line."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        return f"{', '.join(missing)} {verb} not installed; the extra 'demo' has them: pip install -e \".[demo]\""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return None
    except OSError as error:
        return f"--out {out} cannot be written: {error.strerror}"


def run(out: Path, number: int, seed: int) -> None:
    """Sample with every arm, in turns, and write what can be looked at."""
    from osaccel.demo.arms import PLAN_STEPS, Outcome, all_prompts, arms, sample, table
    from osaccel.demo.compare import write_picture, write_video

    prompts = all_prompts()[:number]
    outcomes = {arm: Outcome() for arm in arms(PLAN_STEPS)}
    for index, prompt in enumerate(prompts):
        # What the machine does meanwhile falls on all arms alike, and none is always the first.
        for arm in list(outcomes)[:: -1 if index % 2 else 1]:
            print(f"sampling {index + 1} of {number}: {arm.name} ...", flush=True)
            sample(arm, prompt, out / arm.name.replace(", ", "_").replace(" ", "_") / str(index), seed + index,
                   outcomes[arm])  # fmt: skip
    print(table(outcomes, prompts))
    by_name = {arm.name: outcome.videos for arm, outcome in outcomes.items()}
    write_video(out / "side_by_side.mp4", by_name)
    write_picture(out / "side_by_side.png", by_name, prompts[:3])
    print(f"videos, side_by_side.mp4 and side_by_side.png: {out}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m osaccel.demo", description=__doc__)
    parser.add_argument("--version", action="version", version=f"osaccel {__version__}")
    parser.add_argument("--out", type=Path, default=Path("osaccel_demo"), help="folder for the videos (osaccel_demo)")
    parser.add_argument("--fast", action="store_true", help="two prompts instead of four")
    parser.add_argument(
        "--search", nargs="?", const="2x", metavar="TARGET",
        help="search a plan for this target (2x) on four other prompts and draw its report, and nothing else",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    arguments, unknown = parser.parse_known_args()
    if unknown:
        found: Optional[str] = f"{unknown[0]}: unknown option. {closest(unknown[0], OPTIONS)}"
    else:
        found = problem(arguments.out)
    if found is not None:
        print(f"osaccel.demo: {found}", file=sys.stderr)
        return 2
    if arguments.search:
        from osaccel.demo.arms import search

        return search(arguments.search, arguments.out, arguments.seed)
    run(arguments.out, 2 if arguments.fast else 4, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
