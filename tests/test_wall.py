# SPDX-License-Identifier: Apache-2.0
"""Dealing tiles, choosing a kernel, leaving out a mask: decisions as functions, and ranks that decode together."""

import copy
import os
import pickle
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from osaccel import settings
from osaccel.formats import SettingsError
from osaccel.wall import attached, attention, tiles

HERE = os.path.dirname(os.path.abspath(__file__))


def loads(costs, ranks):
    owners = tiles.deal(costs, ranks)
    return [sum(cost for cost, owner in zip(costs, owners) if owner == rank) for rank in range(ranks)]


def test_tiles_are_dealt_evenly_where_they_divide():
    assert loads([1.0] * 12, 4) == [3.0] * 4
    assert tiles.deal([1.0] * 3, 4) == [0, 1, 2]


def test_tiles_of_many_sizes_are_balanced():
    """93 frames of 720p: 4 chunks of time, 2 rows, 3 columns, the last ones narrower."""
    costs = [float(t * h * w) for t in (8, 8, 8, 3) for h in (64, 34) for w in (64, 64, 48)]
    for ranks in (2, 4, 8):
        assert max(loads(costs, ranks)) < 1.08 * sum(costs) / ranks
    assert max(loads(costs, 24)) == max(costs)


def test_ranks_decode_together_what_one_decodes_alone():
    """Three gloo ranks and a group of two of them: same bits, other latents, and an error that all raise."""
    environ = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.path.dirname(HERE))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "3", "--standalone"]
    done = subprocess.run(
        [*command, os.path.join(HERE, "wall_script.py")], env=environ, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {rank} done" in done.stderr for rank in range(3))


def test_without_a_group_the_vae_is_untouched():
    vae = types.SimpleNamespace(tiled_decode=lambda z: z, get_decoder=list, use_tiling=True)
    pipeline = types.SimpleNamespace(vae=types.SimpleNamespace(vae=vae))
    assert tiles.attach(pipeline, None, True) is None
    assert tiles.attach(types.SimpleNamespace(), None) is None


GPU = attention.Facts(True, False, "cuda", torch.bfloat16, 96, (9, 0), True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"known": False}, "the transformer is not Open-Sora-Plan v1.2's OpenSoraT2V"),
        ({"own_kernels": True}, "the upstream uses attention kernels that are not torch's"),
        ({"capability": None, "device": "cpu"}, "it needs a GPU, the transformer is on cpu"),
        ({"built": False}, "this torch was built without it"),
        ({"capability": (7, 5)}, "it needs compute capability 8.0, this GPU has 7.5"),
        ({"dtype": torch.float32}, "it needs float16 or bfloat16, the transformer is float32"),
        ({"head_dim": 320}, "it takes heads of at most 256 channels, these have 320"),
    ],
)
def test_what_keeps_flash_from_being_used(change, reason):
    found = attention.obstacle_to_flash(GPU._replace(**change))
    assert (found is None) if reason is None else found.endswith(reason)


class AttnProcessor2_0:  # noqa: N801 - the upstream's name
    attention_mode = "xformers"


class OpenSoraT2V(nn.Module):
    """Answers with the mask and the modes of its processors."""

    def __init__(self):
        super().__init__()
        self.config = types.SimpleNamespace(attention_head_dim=24)
        self.weight = nn.Parameter(torch.zeros(1))
        self.transformer_blocks = []
        for _ in range(2):
            attn1 = types.SimpleNamespace(processor=AttnProcessor2_0(), downsampler=None)
            self.transformer_blocks.append(types.SimpleNamespace(attn1=attn1))

    def forward(self, hidden_states, attention_mask=None):
        return attention_mask, {block.attn1.processor.attention_mode for block in self.transformer_blocks}


VISIBLE, HIDING = torch.ones(2, 3, 4, 4), torch.tensor([1.0, 0.0]).expand(2, 3, 4, 2)


def test_a_mask_that_hides_nothing_is_left_out():
    model = OpenSoraT2V()
    undo = attention.attach(types.SimpleNamespace(transformer=model))
    assert model(VISIBLE, attention_mask=VISIBLE) == (None, {"xformers"})
    assert model(VISIBLE, attention_mask=HIDING)[0] is HIDING
    assert model(VISIBLE, HIDING)[0] is HIDING
    undo()
    assert model(VISIBLE, attention_mask=VISIBLE)[0] is VISIBLE and not model._forward_pre_hooks


def test_a_kernel_serves_only_calls_whose_mask_hides_nothing():
    model = OpenSoraT2V()
    processors = [block.attn1.processor for block in model.transformer_blocks]
    undo = attention.Entry(processors, "flash").attach(model)
    assert model(VISIBLE, attention_mask=VISIBLE) == (None, {"flash"})
    assert model(VISIBLE, attention_mask=HIDING)[1] == {"xformers"}
    assert model(VISIBLE, HIDING)[1] == {"xformers"}
    assert model(VISIBLE, attention_mask=None) == (None, {"flash"})
    undo()
    assert model(VISIBLE)[1] == {"xformers"}


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_meanwhile_have_neither_hook_nor_kernel(duplicate):
    model = OpenSoraT2V()
    undo = attention.Entry([block.attn1.processor for block in model.transformer_blocks], "flash").attach(model)
    assert model(VISIBLE, attention_mask=VISIBLE)[1] == {"flash"}
    copied = duplicate(model)
    assert not copied._forward_pre_hooks and copied(VISIBLE, attention_mask=VISIBLE)[0] is VISIBLE
    assert duplicate is copy.copy or copied(VISIBLE)[1] == {"xformers"}
    assert model(VISIBLE, attention_mask=VISIBLE) == (None, {"flash"})
    undo()
    assert "__getstate__" not in vars(model)


def test_two_generations_at_once_do_not_choose_one_transformer_s_kernel():
    model = OpenSoraT2V()
    processors = [block.attn1.processor for block in model.transformer_blocks]
    undo = attention.Entry(processors, "flash").attach(model)
    with pytest.raises(RuntimeError, match="share a transformer cannot use it at once"):
        attention.Entry(processors, "flash").attach(model)
    assert len(model._forward_pre_hooks) == 1
    undo()
    attention.Entry(processors, "flash").attach(model)()
    assert not model._forward_pre_hooks and model(VISIBLE)[1] == {"xformers"}


def test_what_is_attached_is_detached_when_the_next_one_fails():
    model = OpenSoraT2V()
    pipeline = types.SimpleNamespace(transformer=model)
    with pytest.raises((AttributeError, ValueError, TypeError)):
        with attached(pipeline, "no group", settings.load({"OSACCEL_PARALLEL_VAE": "1"})):
            pass
    assert not model._forward_pre_hooks


def test_another_transformer_is_untouched():
    class Other(OpenSoraT2V):
        pass

    downsampling, other = OpenSoraT2V(), Other()
    downsampling.transformer_blocks[1].attn1.downsampler = object()
    for model in (downsampling, other):
        assert attention.attach(types.SimpleNamespace(transformer=model), "auto") is None
        assert not attention.facts_of(model).known


def test_flash_that_does_not_apply_is_refused_and_leaves_nothing():
    model = OpenSoraT2V()
    pipeline = types.SimpleNamespace(transformer=model)
    loaded = settings.load({"OSACCEL_ATTENTION": "flash"})
    with pytest.raises(SettingsError, match="^OSACCEL_ATTENTION: flash cannot be used: it needs a GPU, .* Use keep"):
        with attached(pipeline, None, loaded):
            pass
    assert not model._forward_pre_hooks
    with attached(pipeline, None, settings.load({"OSACCEL_ATTENTION": "auto"})):
        assert model(VISIBLE, attention_mask=VISIBLE) == (None, {"xformers"})
    assert not model._forward_pre_hooks


def test_settings(tmp_path):
    assert settings.load({}).parallel_vae is None and settings.load({}).attention == "keep"
    assert settings.load({"OSACCEL_PARALLEL_VAE": "1"}).accelerates
    assert settings.load({"OSACCEL_ATTENTION": "auto"}).accelerates
    off = settings.load({"OSACCEL_PARALLEL_VAE": "0", "OSACCEL_ATTENTION": "keep"})
    assert off.parallel_vae is False and not off.accelerates
    file = tmp_path / "osaccel.yaml"
    file.write_text("wall:\n  parallel_vae: true\n  attention: auto\n")
    loaded = settings.load({"OSACCEL_CONFIG": str(file)})
    assert loaded.parallel_vae is True and loaded.attention == "auto"
    with pytest.raises(SettingsError, match="OSACCEL_ATTENTION: unknown attention 'flsh'. Did you mean 'flash'"):
        settings.load({"OSACCEL_ATTENTION": "flsh"})
    with pytest.raises(SettingsError, match="OSACCEL_PARALLEL_VAE: expected one of"):
        settings.load({"OSACCEL_PARALLEL_VAE": "2 ranks"})
