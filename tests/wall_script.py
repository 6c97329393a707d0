# SPDX-License-Identifier: Apache-2.0
"""Run by tests under torchrun: a small VAE that decodes in tiles, decoded by gloo ranks together."""

import sys
import time
import types

import torch
import torch.distributed as dist
from torch import nn

from osaccel.wall import tiles

TILE, STRIDE, SCALE = 6, 5, 2


class TiledVAE(nn.Module):
    """Latents (B, 4, T, H, W) to (B, 3, T, 2H, 2W), in tiles that overlap in width and are blended in place."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.post_quant_conv = nn.Conv3d(4, 4, 1)
        self.decoder = nn.Sequential(
            nn.Conv3d(4, 8, 3, padding=1), nn.SiLU(), nn.ConvTranspose3d(8, 3, (1, 2, 2), (1, 2, 2))
        )
        self.use_tiling = True
        self.to(dtype)

    def get_decoder(self):
        return [self.post_quant_conv, self.decoder]

    def tiled_decode(self, z):
        starts = range(0, z.shape[-1], STRIDE)
        row = [self.decoder(self.post_quant_conv(z[..., start : start + TILE])) for start in starts]
        for left, right in zip(row, row[1:]):
            overlap = min(left.shape[-1], right.shape[-1], (TILE - STRIDE) * SCALE)
            for x in range(overlap):
                right[..., x] = left[..., x - overlap] * (1 - x / overlap) + right[..., x] * (x / overlap)
        return torch.cat([tile[..., : STRIDE * SCALE] for tile in row], dim=-1)


def pipeline_of(vae):
    return types.SimpleNamespace(vae=types.SimpleNamespace(vae=vae))


def latents(width, seed=0, dtype=torch.float32):
    return torch.randn(1, 4, 3, 6, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check_bits(group):
    """Tiles that divide evenly and do not, fewer tiles than ranks, a narrow last one; float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        for width in (5, 6, 11, 15, 21, 33):
            vae = TiledVAE(dtype)
            plain = vae.tiled_decode(latents(width, dtype=dtype))
            calls = []
            vae.decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            undo = tiles.attach(pipeline_of(vae), group, True)
            assert torch.equal(vae.tiled_decode(latents(width, dtype=dtype)), plain)
            undo()
            assert "tiled_decode" not in vae.__dict__ and "forward" not in vae.decoder.__dict__
            assert torch.equal(vae.tiled_decode(latents(width, dtype=dtype)), plain)


def check_different_latents(group):
    """Ranks that are not in sequence parallelism after all get their own videos."""
    vae, own = TiledVAE(), latents(21, seed=dist.get_rank())
    plain = vae.tiled_decode(own)
    undo = tiles.attach(pipeline_of(vae), group)
    assert torch.equal(vae.tiled_decode(own), plain)
    undo()


def check_failure(group):
    """Rank 1's first tile fails: the others, whose tiles are slow, stop early, and all raise the same."""
    vae, decoded = TiledVAE(), []
    plain = vae.tiled_decode(latents(101))

    def on_tile(*_):
        if dist.get_rank() == 1:
            raise ValueError("a bad tile")
        time.sleep(0.2)
        decoded.append(1)

    handle = vae.post_quant_conv.register_forward_hook(on_tile)
    undo = tiles.attach(pipeline_of(vae), group)
    try:
        vae.tiled_decode(latents(101))
    except tiles.TileError as error:
        message = str(error)
        assert (error.__cause__ is not None) == (dist.get_rank() == 1)
    assert "VAE: on rank 1 tile 1 could not be decoded: ValueError: a bad tile. All ranks" in message, message
    assert len(decoded) <= 3, len(decoded)
    handle.remove()
    assert torch.equal(vae.tiled_decode(latents(101)), plain)
    undo()


def main():
    dist.init_process_group("gloo")
    groups = [dist.new_group([0]), dist.new_group([1, 2])]
    with torch.no_grad():
        check_bits(dist.group.WORLD)
        if dist.get_rank():
            check_bits(groups[1])
        else:
            assert tiles.attach(pipeline_of(TiledVAE()), groups[0], True) is None
        check_different_latents(dist.group.WORLD)
        check_failure(dist.group.WORLD)
    print(f"rank {dist.get_rank()} done", file=sys.stderr)
    # Else gloo's threads may still hold tensors when Python ends, and abort it. They go with the last reference.
    groups.clear()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
