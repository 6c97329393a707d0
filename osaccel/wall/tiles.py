# SPDX-License-Identifier: Apache-2.0
"""Deals the tiles of a tiled VAE decode over the ranks of a sequence-parallel group.

Invariant: on every rank the model's own `tiled_decode` blends the very tiles that it would have decoded itself, in its
own order; and when a tile fails on one rank, the decode fails on all of them.
"""

import contextlib
import hashlib
import logging
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from osaccel.attaching import is_rank_zero, wrap_method
from osaccel.wall.ranks import Ranks

logger = logging.getLogger("osaccel")


class TileError(RuntimeError):
    """A tile could not be decoded on one rank, so no rank has the video; the message names tile, rank and error."""


class Layout(NamedTuple):
    """What a rank must know of a tile that another one decodes: (B, 3, T, H, W) and its type."""

    shape: Tuple[int, ...]
    dtype: torch.dtype


class Failure(NamedTuple):
    """The tile at which a rank failed, and the error."""

    number: int
    error: Exception

    def describe(self) -> str:
        return f"tile {self.number} could not be decoded: {type(self.error).__name__}: {self.error}"


def attach(pipeline: Any, group: Optional[Any], wanted: Optional[bool] = None) -> Optional[Callable[[], None]]:
    """Make the tiled decode of `pipeline.vae.vae` common work of the group's ranks; returns what undoes it.

    Args:
        group: the sequence-parallel process group, whose ranks hold the same latents when they decode, or None.
        wanted: False leaves everything alone; True says in the log why it does not apply, None does not.

    Returns None, having done nothing, without a group of several ranks or a VAE that decodes in tiles.
    """
    if wanted is False:
        return None
    vae: Any = getattr(getattr(pipeline, "vae", None), "vae", None)
    reason = _obstacle(vae, group)
    if reason is None:
        return wrap_method(vae, "tiled_decode", vae.tiled_decode, TiledDecode(vae, Ranks(group)))
    if wanted and is_rank_zero():
        logger.info("VAE: not dealt over ranks, %s", reason)
    return None


def _obstacle(vae: Any, group: Optional[Any]) -> Optional[str]:
    if group is None or torch.distributed.get_world_size(group) < 2:
        return "because there is no sequence parallelism"
    if not all(callable(getattr(vae, name, None)) for name in ("tiled_decode", "get_decoder")):
        return f"because {type(vae).__name__} has no tiled_decode and get_decoder"
    if not {*map(id, vae.get_decoder())} <= {*map(id, vae.children())}:
        return f"because the decoder of {type(vae).__name__} is not a part of its own"
    if not getattr(vae, "use_tiling", False):
        return "because tiling is off (--enable_tiling)"
    return None


def deal(costs: Sequence[float], ranks: int) -> List[int]:
    """The rank that takes each item: the dearest first, each to the rank that has least so far.

    No rank gets more than 4/3 of what the best distribution gives its busiest one (Graham 1969).
    """
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners


class StandIn(torch.nn.Module):
    """Takes the place of a module of the VAE, whose own hooks and compilation then see nothing of it."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.forward = forward  # type: ignore[method-assign]


@contextlib.contextmanager
def standing_in(vae: Any, decode: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While it lasts, `decode(tile of latents)` stands for all that a tile passes in `vae.tiled_decode`."""
    passed = vae.get_decoder()
    own = {name: module for name, module in vae.named_children() if any(module is each for each in passed)}
    try:
        for name, module in own.items():
            setattr(vae, name, StandIn(decode if module is passed[-1] else lambda tile: tile))
        yield
    finally:
        for name, module in own.items():
            setattr(vae, name, module)


def list_tiles(vae: Any, tiled_decode: Callable[[], torch.Tensor]) -> List[torch.Tensor]:
    """The tiles of latents (B, C, T, H, W), as views, in the order in which `tiled_decode` decodes them."""
    tiles: List[torch.Tensor] = []

    def record(tile: torch.Tensor) -> torch.Tensor:
        tiles.append(tile)
        # The dry pass blends and joins as always, so it gets tiles of one pixel and without memory.
        return torch.empty((*tile.shape[:3], 1, 1), dtype=tile.dtype, device="meta")

    with standing_in(vae, record):
        tiled_decode()
    return tiles


class TiledDecode:
    """A wrapt wrapper for one VAE's `tiled_decode`: the ranks decode a share of the tiles each."""

    def __init__(self, vae: Any, ranks: Ranks):
        self.vae, self.ranks = vae, ranks

    def __call__(self, wrapped: Callable, instance: Any, args: tuple, kwargs: dict) -> torch.Tensor:
        def tiled_decode() -> torch.Tensor:
            return wrapped(*args, **kwargs)

        started = time.perf_counter()
        tiles = self._list_tiles(tiled_decode)
        if len(tiles) < 2 or not self._agree_on(tiles):
            return tiled_decode()
        shared = SharedDecode(self.vae, self.ranks, tiles)
        shared.decode_share()
        shared.exchange_layouts()
        with standing_in(self.vae, shared.next_tile):
            video = tiled_decode()
        if is_rank_zero():
            logger.info("VAE: %s, %.2f s", shared, time.perf_counter() - started)
        return video

    def _list_tiles(self, tiled_decode: Callable[[], torch.Tensor]) -> List[torch.Tensor]:
        try:
            return list_tiles(self.vae, tiled_decode)
        except Exception as error:  # Blending other than the known one need not bear tiles of one pixel.
            if is_rank_zero():
                logger.warning("VAE: its tiles cannot be listed (%s), so each rank decodes all of them", error)
            return []

    def _agree_on(self, tiles: Sequence[torch.Tensor]) -> bool:
        """Whether all ranks are about to decode the same: others' tiles of another video would be wrong."""
        agree = len(set(self.ranks.gather(_digest(tiles)))) == 1
        if not agree and is_rank_zero():
            logger.warning("VAE: the ranks hold different latents, so each decodes all of its own")
        return agree


class SharedDecode:
    """One decode: every rank calls `decode_share`, `exchange_layouts`, and `next_tile` as often as there are tiles.

    A tile travels when the blending asks for it, so beside its own share a rank holds no more than the model's own
    tiled decode does.

    Args:
        vae: has `get_decoder()`, the modules that a tile passes.
        ranks: who decodes.
        tiles: all tiles of latents (B, C, T, H, W), the same on every rank.
    """

    def __init__(self, vae: Any, ranks: Ranks, tiles: Sequence[torch.Tensor]):
        self.vae, self.ranks, self.tiles = vae, ranks, tiles
        self.owners = deal([tile.numel() for tile in tiles], ranks.size)
        self._decoded: Dict[int, torch.Tensor] = {}
        self._layouts: Dict[int, Layout] = {}
        self._failure: Optional[Failure] = None
        self._numbers = iter(range(len(tiles)))

    def __str__(self) -> str:
        most = max(self.owners.count(number) for number in range(self.ranks.size))
        return f"{len(self.tiles)} tiles over {self.ranks.size} ranks, at most {most} each"

    def decode_share(self) -> None:
        """Decode this rank's tiles; an error is kept until all ranks can be told."""
        alarm = self.ranks.new_alarm()
        for number, owner in enumerate(self.owners):
            if owner != self.ranks.number:
                continue
            if alarm.rings():
                return
            try:
                self._decoded[number] = self._decode(self.tiles[number])
            except Exception as error:  # Whatever it is: the other ranks wait for this tile and must be told.
                self._failure = Failure(number, error)
                alarm.ring()
                return

    def _decode(self, tile: torch.Tensor) -> torch.Tensor:
        for module in self.vae.get_decoder():
            tile = module(tile)
        return tile.contiguous()

    def exchange_layouts(self) -> None:
        """Learn the layout of every tile; raises TileError on all ranks when one of them has failed."""
        own = {number: Layout(tuple(tile.shape), tile.dtype) for number, tile in self._decoded.items()}
        everyone = self.ranks.gather((own, self._failure and self._failure.describe()))
        for number, (layouts, failure) in enumerate(everyone):
            if failure is not None:
                raise TileError(
                    f"VAE: on rank {self.ranks.members[number]} {failure}. All ranks of the sequence-parallel group "
                    "stop, because each needs every tile."
                ) from (self._failure and self._failure.error)
            self._layouts.update(layouts)

    def next_tile(self, _: torch.Tensor) -> torch.Tensor:
        """The next decoded tile (B, 3, T, H, W), on every rank, for the model to blend in place and then to drop."""
        number = next(self._numbers)
        tile = self._decoded.pop(number, None)
        if tile is None:
            shape, dtype = self._layouts[number]
            tile = torch.empty(shape, dtype=dtype, device=self.tiles[number].device)
        self.ranks.hand_out(tile, self.owners[number])
        return tile


def _digest(tiles: Sequence[torch.Tensor]) -> str:
    """A digest of the tiles' bytes, shapes and types."""
    digest = hashlib.sha256()
    for tile in tiles:
        digest.update(repr((tuple(tile.shape), tile.dtype)).encode())
        digest.update(tile.contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
