# SPDX-License-Identifier: Apache-2.0
"""Write the averaged networks of a training folder as the demo's checkpoint.

`python -m benchmarks.reference.export --out DIR [--to FOLDER]`; works at any time of the training.
"""

import argparse
from pathlib import Path

import torch

from . import data
from .paths import CHECKPOINT
from .train import Config, autoencoder_loop, make_tokenizer, transformer_loop


def export(config: Config, out: Path, target: Path) -> int:
    """Returns the training step the transformer comes from."""
    autoencoder, denoiser = autoencoder_loop(config, out, read_only=True), transformer_loop(config, out, read_only=True)
    autoencoder.average.save_pretrained(target / "vae")
    denoiser.average.transformer.save_pretrained(target / "model")
    denoiser.average.text_encoder.save_pretrained(target / "text_encoder")
    make_tokenizer().save_pretrained(str(target / "text_encoder"))
    prompts = [scene.caption for scene in data.scenes("heldout")]
    (target / "prompts.txt").write_text("\n".join(prompts) + "\n")
    return denoiser.step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training")
    parser.add_argument("--to", type=Path, default=CHECKPOINT, help="folder of the checkpoint (the demo's)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"exported step {export(Config(), args.out, args.to)} to {args.to}")


if __name__ == "__main__":
    main()
