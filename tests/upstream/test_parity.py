# SPDX-License-Identifier: Apache-2.0
"""The miniature's checkpoint in the unmodified upstream OpenSoraT2V gives the miniature's own output.

OSACCEL_UPSTREAM names a checkout of Open-Sora-Plan v1.2.0; both packages are called `opensora`, so each runs in a
process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

DEMO = Path(__file__).resolve().parents[2] / "osaccel" / "demo"
UPSTREAM = os.environ.get("OSACCEL_UPSTREAM")
pytestmark = pytest.mark.skipif(
    not UPSTREAM or not os.path.isdir(os.path.join(UPSTREAM, "opensora")),
    reason="OSACCEL_UPSTREAM names no checkout of Open-Sora-Plan v1.2.0",
)

FORWARD = """
import sys
import torch
from opensora.models.diffusion.opensora import modeling_opensora
assert modeling_opensora.__file__.startswith(sys.argv[1]), modeling_opensora.__file__
model = modeling_opensora.OpenSoraT2V.from_pretrained(sys.argv[2]).eval()
draw = torch.Generator().manual_seed(0)
results = []
for frames, images in ((5, 0), (1, 0), (3, 2)):
    latents = torch.randn(2, 8, frames + images, 8, 8, generator=draw)
    text = torch.randn(2, 1 + images, 12, 96, generator=draw)
    words = (torch.rand(2, 1 + images, 12, generator=draw) > 0.3).long()
    words[..., 0] = 1
    for hidden in (0, 1):
        mask = torch.ones(2, frames + images, 8, 8)
        if hidden:
            mask[0, :, 4:] = 0
        with torch.no_grad():
            results.append(model(latents, timestep=torch.tensor([33, 870]), encoder_hidden_states=text,
                                 attention_mask=mask, encoder_attention_mask=words, use_image_num=images,
                                 return_dict=False)[0])
torch.save(results, sys.argv[3])
"""


def _outputs(package_root, checkpoint, target):
    environment = {**os.environ, "PYTHONPATH": str(package_root), "PYTHONHASHSEED": "3"}
    command = [sys.executable, "-c", FORWARD, str(package_root), str(checkpoint), str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(target, weights_only=True)


def test_same_checkpoint_same_output(tmp_path):
    checkpoint = DEMO / "checkpoint" / "model"
    mine = _outputs(DEMO, checkpoint, tmp_path / "mine.pt")
    theirs = _outputs(os.path.abspath(UPSTREAM), checkpoint, tmp_path / "theirs.pt")
    assert [a.shape for a in mine] == [b.shape for b in theirs]
    assert max((a - b).abs().max().item() for a, b in zip(mine, theirs)) < 1e-4


def test_same_parameter_names_and_config_keys(tmp_path):
    listing = (
        "import sys, json, inspect\n"
        "from opensora.models.diffusion.opensora.modeling_opensora import OpenSoraT2V as M\n"
        "m = M.from_pretrained(sys.argv[1])\n"
        "keys = sorted(k for k in m.config if not k.startswith('_'))\n"
        "known = sorted(p for p in inspect.signature(M.__init__).parameters if p != 'self')\n"
        "call = list(inspect.signature(M.forward).parameters)\n"
        "open(sys.argv[2], 'w').write(json.dumps([sorted(m.state_dict()), known, call]))"
    )
    texts = []
    for number, root in enumerate((DEMO, os.path.abspath(UPSTREAM))):
        target = tmp_path / f"{number}.json"
        environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "3"}
        command = [sys.executable, "-c", listing, str(DEMO / "checkpoint" / "model"), str(target)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        texts.append(target.read_text())
    assert texts[0] == texts[1]
