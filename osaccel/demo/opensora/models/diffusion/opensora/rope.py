# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding over (frame, row, column): a third of every head turns with each axis."""

import functools

import torch


@functools.lru_cache(maxsize=16)
def rotation(frame, height, width, head_dim, scale_thw, device, dtype):
    """Cosines and signed sines, each (frame * height * width, head_dim), for `rotate`."""
    third = head_dim // 3
    frequency = 1.0 / 10000.0 ** (torch.arange(0, third, 2, dtype=torch.float32) / third)
    axes = torch.meshgrid(*(torch.arange(size) for size in (frame, height, width)), indexing="ij")
    angles = [axis.reshape(-1, 1) / scale * frequency for axis, scale in zip(axes, scale_thw)]
    cos = torch.cat([angle.cos() for angle in angles for _ in range(2)], dim=1)
    sin = torch.cat([sign * angle.sin() for angle in angles for sign in (-1, 1)], dim=1)
    return cos.to(device, dtype), sin.to(device, dtype)


def rotate(x, cos, sin):
    """Turn x (batch, heads, tokens, head_dim): within each third, dimension i pairs with i + third / 2."""
    halves = x.chunk(6, dim=-1)
    swapped = torch.cat([halves[index] for index in (1, 0, 3, 2, 5, 4)], dim=-1)
    return x * cos + swapped * sin
