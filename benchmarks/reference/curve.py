# SPDX-License-Identifier: Apache-2.0
"""Plot the loss curves of a training folder: `python -m benchmarks.reference.curve --out DIR` writes DIR/loss.png."""

import argparse
import json
from pathlib import Path

import numpy as np


def smooth(values: np.ndarray, width: int = 50) -> np.ndarray:
    width = min(width, len(values))
    return np.convolve(values, np.ones(width) / width, mode="valid")


def plot(out: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, stage in zip(axes, ("autoencoder", "transformer")):
        path = out / f"{stage}.jsonl"
        if path.exists():
            losses = np.array([json.loads(line)["loss"] for line in path.read_text().splitlines()])
            axis.plot(losses, alpha=0.25)
            axis.plot(np.arange(len(smooth(losses))) + len(losses) - len(smooth(losses)), smooth(losses))
        axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)
    return out / "loss.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    print(plot(parser.parse_args().out))


if __name__ == "__main__":
    main()
