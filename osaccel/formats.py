# SPDX-License-Identifier: Apache-2.0
"""The files users keep (cache configuration, timestep list), read with exact error messages and written atomically."""

import json
import os
import struct
import tempfile
from typing import Any, Callable, Dict, List, Sequence, Tuple

from osaccel.dit_cache_config import CACHE_KEYS, DitCacheConfig, check_cache_value
from osaccel.messages import SettingsError, closest, kind, shown
from osaccel.reading import read_file

# The time axis Open-Sora-Plan is trained on: a searched value x in [0, 1] stands for the timestep 1000 * x.
NUM_TRAIN_TIMESTEPS = 1000
MOST_TIMESTEPS = 10_000
# Beyond every model's blocks and every run's steps: what is larger is a slip, or was made to do harm.
LARGEST_CACHE_VALUE = 1_000_000


def check_keys(mapping: Any, allowed: Sequence[str], place: str) -> Dict[str, Any]:
    """`mapping` itself, when it is one and has only `allowed` keys."""
    if not isinstance(mapping, dict):
        raise SettingsError(f"{place}: expected a mapping with {', '.join(allowed)}, got {kind(mapping)}.")
    for key in mapping:
        if key not in allowed:
            raise SettingsError(f"{place}: unknown key {shown(key)}. {closest(str(key), allowed)}")
    return mapping


def parse_cache_config(content: Any, place: str) -> DitCacheConfig:
    """A `DitCacheConfig` from a mapping with exactly msModelSlim's four keys; `place` opens every error message."""
    mapping = check_keys(content, CACHE_KEYS, place)
    missing = [key for key in CACHE_KEYS if key not in mapping]
    if missing:
        raise SettingsError(f"{place}: missing key{'s' * (len(missing) > 1)} {', '.join(missing)}.")
    for key in CACHE_KEYS:
        try:
            check_cache_value(key, mapping[key])
        except ValueError as error:
            raise SettingsError(f"{place}: {error}, got {shown(mapping[key])} ({kind(mapping[key])}).") from None
        if mapping[key] > LARGEST_CACHE_VALUE:
            raise SettingsError(f"{place}: {key} must be at most {LARGEST_CACHE_VALUE}, got {shown(mapping[key])}.")
    return DitCacheConfig(**mapping)


def read_cache_config(path: str) -> DitCacheConfig:
    """Read a `dit_cache_config.json` (msModelSlim's four keys), or the same keys in YAML."""
    return parse_cache_config(read_file(path), path)


def write_cache_config(path: str, config: DitCacheConfig) -> None:
    """Write exactly the four keys, so that the file loads in msModelSlim too."""
    write_json(path, config.to_dict())


def parse_timesteps(content: Any, place: str) -> Tuple[float, ...]:
    """Timesteps, descending, from msModelSlim's ascending list of at least two numbers in [0, 1]."""
    if not isinstance(content, list):
        raise SettingsError(f"{place}: expected a list of numbers in [0, 1], ascending, got {kind(content)}.")
    if not 2 <= len(content) <= MOST_TIMESTEPS:
        wanted = "at least two" if len(content) < 2 else f"at most {MOST_TIMESTEPS}"
        raise SettingsError(f"{place}: a list of {wanted} timesteps is needed, got {len(content)}.")
    for index, value in enumerate(content):
        _check_timestep(content, index, value, place)
    _check_stored(content, place)
    # 1000 itself is past the last trained timestep; msModelSlim's files hold it, samplers clip it.
    return tuple(NUM_TRAIN_TIMESTEPS * float(value) for value in reversed(content))


def _check_timestep(content: List[Any], index: int, value: Any, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SettingsError(f"{place}: entry {index} must be a number in [0, 1], got {shown(value)} ({kind(value)}).")
    if not 0 <= value <= 1:
        raise SettingsError(f"{place}: entry {index} must be in [0, 1], got {shown(value)}.")
    if index and value == content[index - 1]:
        raise SettingsError(f"{place}: entries {index - 1} and {index} are the same timestep, {value!r}.")
    if index and value < content[index - 1]:
        raise SettingsError(
            f"{place}: the list must ascend, but entry {index} ({value!r}) is below entry {index - 1} "
            f"({content[index - 1]!r})."
        )


def _check_stored(content: List[Any], place: str) -> None:
    """What osaccel.sampling.levels.checked_timesteps refuses, found before a model is loaded."""
    last = NUM_TRAIN_TIMESTEPS - 1
    stored = [_float32(min(NUM_TRAIN_TIMESTEPS * float(value), last)) for value in content]
    for index in range(1, len(stored)):
        if stored[index] == stored[index - 1]:
            raise SettingsError(
                f"{place}: entries {index - 1} and {index}, {content[index - 1]!r} and {content[index]!r}, are both "
                f"the timestep {stored[index]:.10g} for a sampler, which keeps 1000 x in float32 and at most {last}."
            )


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def read_timesteps(path: str) -> Tuple[float, ...]:
    """Read a `searched_schedule.txt` (msModelSlim's JSON list): timesteps, descending, in [0, 1000]."""
    return parse_timesteps(read_file(path), path)


def write_timesteps(path: str, timesteps: Sequence[float]) -> None:
    """Write descending timesteps in [0, 1000] as msModelSlim's ascending JSON list in [0, 1]."""
    write_json(path, [value / NUM_TRAIN_TIMESTEPS for value in reversed(timesteps)])


def write_json(path: str, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never a part."""
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=2, allow_nan=False) + "\n"))


def write_atomically(path: str, write: Callable[[Any], Any]) -> None:
    """Call `write(file)` on a temporary file beside `path`, then rename it."""
    directory = os.path.dirname(os.path.abspath(path))
    os.makedirs(directory, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=os.path.basename(path) + ".", dir=directory)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            write(file)
        # mkstemp makes files private; these are as readable as any other file the user writes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
