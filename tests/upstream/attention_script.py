# SPDX-License-Identifier: Apache-2.0
"""Run by a test: the kernels by name on the upstream's own small OpenSoraT2V, on a CPU, eager and compiled.

"math" leaves the choice to torch and "flash" allows its flash kernel only; on a CPU they give the same bits.
"""

import torch

from opensora.models.diffusion.opensora import modules
from opensora.models.diffusion.opensora.modeling_opensora import OpenSoraT2V
from osaccel.wall import attention

torch.manual_seed(0)
MODEL = OpenSoraT2V(
    num_layers=2, num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48, in_channels=4, out_channels=4,
    patch_size_t=1, patch_size=2, sample_size=(8, 8), sample_size_t=3, caption_channels=16, attention_bias=True,
    norm_type="ada_norm_single", activation_fn="gelu-approximate", attention_mode="math", use_rope=True,
    interpolation_scale_t=1, interpolation_scale_h=1, interpolation_scale_w=1,
).eval().to(torch.bfloat16)  # fmt: skip
OWN = [block.attn1.processor for block in MODEL.transformer_blocks]
VISIBLE, HIDDEN = torch.ones(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
HIDDEN[0, :, 4:] = 0
# (whether it is self-attention, the mode, whether there is a mask) of each call.
USED = set()


class WatchedProcessor(modules.AttnProcessor2_0):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, frame=8,
                 height=16, width=16):  # fmt: skip
        USED.add((encoder_hidden_states is None, self.attention_mode, attention_mask is not None))
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, frame, height, width)


@torch.no_grad()
def predict(mask, module=MODEL):
    USED.clear()
    draw = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(size, generator=draw).bfloat16() for size in ((2, 4, 3, 8, 8), (2, 1, 6, 16)))
    words = torch.ones(2, 1, 6)
    words[0, :, 3:] = 0
    return module(
        latents, timestep=torch.tensor([500, 500]), encoder_hidden_states=text, attention_mask=mask,
        encoder_attention_mask=words, return_dict=False,
    )[0]  # fmt: skip


def check_calls(plain):
    """Flash where nothing is hidden and else the model's own, with the same result; afterwards nothing is left."""
    undo = attention.Entry(OWN, "flash").attach(MODEL)
    for mask, expected in (
        (VISIBLE, {(True, "flash", False), (False, "math", True)}),
        (HIDDEN, {(True, "math", True), (False, "math", True)}),
        (VISIBLE, {(True, "flash", False), (False, "math", True)}),
    ):
        assert torch.equal(predict(mask), plain[mask]) and expected == USED, USED
    undo()
    assert not MODEL._forward_pre_hooks and {processor.attention_mode for processor in OWN} == {"math"}


def check_compiled(plain):
    """The hook belongs to what torch.compile returned, so the graphs do not see it."""
    compiled = torch.compile(MODEL, backend="eager")
    undo = attention.Entry(OWN, "flash").attach(compiled)
    assert not MODEL._forward_pre_hooks
    for mask in (VISIBLE, HIDDEN, VISIBLE):
        assert torch.equal(predict(mask, compiled), plain[mask])
    undo()
    assert not compiled._forward_pre_hooks


def graph_breaks(mask):
    torch._dynamo.reset()
    return torch._dynamo.explain(predict)(mask).graph_break_count


if __name__ == "__main__":
    facts = attention.facts_of(MODEL)
    assert (facts.known, facts.own_kernels, facts.head_dim, facts.capability) == (True, False, 24, None)
    plain = {mask: predict(mask) for mask in (VISIBLE, HIDDEN)}
    for processor in OWN + [block.attn2.processor for block in MODEL.transformer_blocks]:
        processor.__class__ = WatchedProcessor
    predict(VISIBLE)
    assert USED == {(True, "math", True), (False, "math", True)}
    check_calls(plain)
    for processor in OWN + [block.attn2.processor for block in MODEL.transformer_blocks]:
        processor.__class__ = modules.AttnProcessor2_0
    check_compiled(plain)
    breaks = graph_breaks(VISIBLE), graph_breaks(None)
    print("graph breaks with and without a mask:", *breaks)
    assert breaks[1] < breaks[0]
