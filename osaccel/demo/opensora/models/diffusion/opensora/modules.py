# SPDX-License-Identifier: Apache-2.0
"""The parts of OpenSoraT2V, with the upstream's parameter names so that a checkpoint fits both."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .rope import rotate, rotation


class PatchEmbed2D(nn.Module):
    """Patches of every frame to tokens: (B, C, T, H, W) -> (B, T, H/p * W/p, D)."""

    def __init__(self, in_channels, embed_dim, patch_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, latent):
        batch = latent.shape[0]
        tokens = self.proj(latent.transpose(1, 2).flatten(0, 1))
        return tokens.flatten(2).transpose(1, 2).unflatten(0, (batch, -1))


class Attention(nn.Module):
    """Multi-head attention; with `rope_scale_thw` queries and keys are turned by their place in the video."""

    def __init__(self, query_dim, heads, head_dim, context_dim=None, bias=False, dropout=0.0, rope_scale_thw=None):
        super().__init__()
        inner = heads * head_dim
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.rope_scale_thw = rope_scale_thw
        self.to_q = nn.Linear(query_dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim), nn.Dropout(dropout)])

    def forward(self, hidden_states, context=None, attention_mask=None, frame=None, height=None, width=None):
        context = hidden_states if context is None else context
        query, key, value = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.to_q, hidden_states), (self.to_k, context), (self.to_v, context))
        )
        if self.rope_scale_thw is not None:
            place = rotation(frame, height, width, query.shape[-1], self.rope_scale_thw, query.device, query.dtype)
            query, key = rotate(query, *place), rotate(key, *place)
        if attention_mask is not None:
            attention_mask = attention_mask.unsqueeze(1).to(query.dtype)  # (B, 1, 1, keys)
        # Written out: with this few tokens a CPU's fused attention takes longer, most of all in training.
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores if attention_mask is None else scores + attention_mask
        mixed = scores.softmax(dim=-1).to(value.dtype) @ value
        return self.to_out[1](self.to_out[0](mixed.transpose(1, 2).flatten(2)))


class GELU(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x):
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(GELU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; modulated by the timestep (ada_norm_single)."""

    def __init__(self, dim, heads, head_dim, cross_attention_dim, attention_bias, affine, eps, dropout, rope_scale_thw):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=affine, eps=eps)
        self.attn1 = Attention(dim, heads, head_dim, None, attention_bias, dropout, rope_scale_thw)
        # The upstream hands (eps, affine) to LayerNorm by position, and so does whoever must load its weights.
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=affine, eps=eps)
        self.attn2 = Attention(dim, heads, head_dim, cross_attention_dim, attention_bias, dropout)
        self.ff = FeedForward(dim, dropout)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
        frame=None,
        height=None,
        width=None,
    ):
        batch = hidden_states.shape[0]
        table = self.scale_shift_table[None] + timestep.reshape(batch, 6, -1)
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = table.chunk(6, dim=1)
        x = self.norm1(hidden_states) * (1 + scale_attn) + shift_attn
        x = self.attn1(x, attention_mask=attention_mask, frame=frame, height=height, width=width)
        hidden_states = hidden_states + gate_attn * x
        # ada_norm_single puts no norm before the cross-attention; norm2 serves the feed-forward.
        x = self.attn2(hidden_states, encoder_hidden_states, attention_mask=encoder_attention_mask)
        hidden_states = hidden_states + x
        x = self.norm2(hidden_states) * (1 + scale_ff) + shift_ff
        return hidden_states + gate_ff * self.ff(x)


class TimestepEmbedding(nn.Module):
    def __init__(self, dim, frequencies=256):
        super().__init__()
        self.frequencies = frequencies
        self.linear_1 = nn.Linear(frequencies, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep, dtype):
        half = self.frequencies // 2
        powers = torch.arange(half, dtype=torch.float32, device=timestep.device) * (-math.log(10000.0) / half)
        angles = timestep.reshape(-1, 1).float() * powers.exp()
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class AdaLayerNormSingle(nn.Module):
    """The timestep's embedding, and the six modulation vectors all blocks share before their own tables."""

    def __init__(self, dim):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedding(dim)})
        self.linear = nn.Linear(dim, 6 * dim)

    def forward(self, timestep, dtype):
        embedded = self.emb["timestep_embedder"](timestep, dtype)
        return self.linear(F.silu(embedded)), embedded


class TextProjection(nn.Module):
    def __init__(self, in_features, hidden_size):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, caption):
        return self.linear_2(F.gelu(self.linear_1(caption), approximate="tanh"))
