# SPDX-License-Identifier: Apache-2.0
"""The four numbers of a DiT cache configuration, as msModelSlim names and checks them; needs no torch."""

from dataclasses import asdict, dataclass
from typing import Any, Dict, Iterator, Tuple

CACHE_KEYS = ("cache_block_start", "cache_num_blocks", "cache_step_start", "cache_step_interval")


def check_cache_value(key: str, value: Any) -> None:
    """Raise ValueError, in msModelSlim's words, when `value` is not allowed for `key`."""
    positive = key == "cache_step_interval"
    if isinstance(value, bool) or not isinstance(value, int) or value < int(positive):
        raise ValueError(f"{key} must be a {'positive' if positive else 'non-negative'} integer")


@dataclass
class DitCacheConfig:
    """One region of blocks and the steps at which it is not computed.

    Args:
        cache_step_start: number of first steps that always compute (warm-up), >= 0.
        cache_step_interval: from there on every interval-th step computes and stores, the others reuse, >= 1.
        cache_block_start: index of the region's first block, >= 0.
        cache_num_blocks: number of blocks in the region; 0 means no caching.

    Raises:
        ValueError: a value is not an integer of its range.

    The file format is msModelSlim's `dit_cache_config.json`: exactly these four keys.
    """

    cache_step_start: int = None  # type: ignore[assignment]
    cache_step_interval: int = None  # type: ignore[assignment]
    cache_block_start: int = None  # type: ignore[assignment]
    cache_num_blocks: int = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        for key, value in asdict(self).items():
            check_cache_value(key, value)

    def __iter__(self) -> Iterator[Tuple[str, int]]:
        """Pairs of key and value, so that `dict(config)` works."""
        return iter(self.to_dict().items())

    def to_dict(self) -> Dict[str, int]:
        return asdict(self)
