# SPDX-License-Identifier: Apache-2.0
"""A two-layer transformer over words; `encoder(input_ids, attention_mask=mask)[0]` is (B, L, dim)."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class TextLayer(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x, bias):
        parts = self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.feed(self.norm_feed(x))


class TextEncoder(ModelMixin, ConfigMixin):
    """Words past `max_length` have no position and are refused by the embedding, so tokenizers truncate."""

    @register_to_config
    def __init__(self, vocab_size: int = 64, dim: int = 96, num_layers: int = 2, heads: int = 4, max_length: int = 64):
        super().__init__()
        self.words = nn.Embedding(vocab_size, dim)
        self.places = nn.Embedding(max_length, dim)
        self.layers = nn.ModuleList([TextLayer(dim, heads) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(dim)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        bias = (1.0 - mask[:, None, None, :].to(self.dtype)) * -10000.0
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        # Places past the table belong to padding, which the mask hides.
        x = self.words(input_ids) + self.places(places.clamp(max=self.config.max_length - 1))
        for layer in self.layers:
            x = layer(x, bias)
        return (self.norm(x),)
