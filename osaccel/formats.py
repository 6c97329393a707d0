# SPDX-License-Identifier: Apache-2.0
"""The files users keep (cache configuration, timestep list), read with exact error messages and written atomically."""

import contextlib
import json
import logging
import os
import stat
import struct
import tempfile
from typing import Any, Callable, Dict, List, Sequence, Tuple

from osaccel.dit_cache_config import CACHE_KEYS, DitCacheConfig, check_cache_value
from osaccel.messages import SettingsError, closest, kind, shown
from osaccel.plan import FORMAT, Correction, Plan, Region, Strengths, of_dit_cache
from osaccel.reading import cannot_be_read, check_regular, read_file

logger = logging.getLogger("osaccel")

# The time axis Open-Sora-Plan is trained on: a searched value x in [0, 1] stands for the timestep 1000 * x.
NUM_TRAIN_TIMESTEPS = 1000
MOST_TIMESTEPS = 10_000
# Beyond every model's blocks and every run's steps: what is larger is a slip, or was made to do harm.
LARGEST_CACHE_VALUE = 1_000_000
# What a search writes beside its output.
REPORT = ".report.json"
# A search writes less than this beside its output before it has found something.
_PROBE = b"\0" * (1 << 16)
# How many calibration videos a search takes.
FEWEST_VIDEOS, MOST_VIDEOS = 5, 20


def check_keys(mapping: Any, allowed: Sequence[str], place: str) -> Dict[str, Any]:
    """`mapping` itself, when it is one and has only `allowed` keys."""
    if not isinstance(mapping, dict):
        raise SettingsError(f"{place}: expected a mapping with {', '.join(allowed)}, got {kind(mapping)}.")
    for key in mapping:
        if key not in allowed:
            raise SettingsError(f"{place}: unknown key {shown(key)}. {closest(str(key), allowed)}")
    return mapping


def kinds_of(content: Any) -> Tuple[str, ...]:
    """The settings that take a file of this content, by its looks; empty where they say nothing."""
    if isinstance(content, list):
        return ("timesteps",)
    keys = set(content) if isinstance(content, dict) else set()
    if keys & set(CACHE_KEYS):
        return ("cache_config", "plan")
    return ("plan",) if "format" in keys or keys & _MARKS_OF_MINDIE else ()


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


_PLAN_KEYS = ("format", "steps", "skip", "conditional_only", "regions", "correction", "made_for", "measured")
_REGION_KEYS = ("start", "stop", "reuse", "order")
_CORRECTION_KEYS = Strengths._fields


def parse_plan(content: Any, place: str) -> Plan:
    """A `Plan` from the mapping of a plan file, or from another tool's cache configuration.

    Those are msModelSlim's four keys and MindIE-SD's eight. `place` opens every error message.
    """
    if isinstance(content, dict) and "format" not in content:
        if set(content) & set(CACHE_KEYS):
            return of_dit_cache(parse_cache_config(content, place))
        if set(content) & _MARKS_OF_MINDIE:
            return _of_mindie(content, place)
    mapping = check_keys(content, _PLAN_KEYS, place)
    if mapping.get("format") != FORMAT:
        raise SettingsError(f"{place}: format must be {FORMAT!r}, got {_described(mapping.get('format'))}.")
    steps = _whole_number(mapping, "steps", place, minimum=1)
    _check_most_steps("steps", steps, place)
    regions = _list(mapping, "regions", place, "a list of regions")
    try:
        return Plan(
            steps=steps,
            skip=_steps(mapping, "skip", place),
            conditional_only=_steps(mapping, "conditional_only", place),
            regions=tuple(_region(item, f"{place}: regions[{number}]") for number, item in enumerate(regions)),
            correction=_correction(mapping.get("correction", {}), f"{place}: correction"),
            made_for=_mapping(mapping, "made_for", place),
            measured=_mapping(mapping, "measured", place),
        )
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"{place}: {error}") from None


# MindIE-SD's CacheConfig, with its defaults; None where it has none.
_MINDIE_KEYS = {
    "blocks_count": None, "steps_count": None, "step_start": 0, "step_interval": 1, "step_end": MOST_TIMESTEPS,
    "block_start": 0, "block_end": LARGEST_CACHE_VALUE,
}  # fmt: skip
_MARKS_OF_MINDIE = {"method", "blocks_count", "steps_count"}


def _of_mindie(content: Dict[str, Any], place: str) -> Plan:
    """Blocks `block_start .. block_end - 1` reuse from `step_start` until `step_end`, but at every interval-th step."""
    mapping = check_keys(content, ("method", *_MINDIE_KEYS), place)
    if mapping.get("method") != "dit_block_cache":
        raise SettingsError(
            f"{place}: method must be 'dit_block_cache', got {_described(mapping.get('method'))}; a plan says "
            "nothing of attention layers."
        )
    given = {**{key: value for key, value in _MINDIE_KEYS.items() if value is not None}, **mapping}
    positive = ("blocks_count", "steps_count", "step_interval")
    blocks, steps, first, every, end, start, stop = (
        _whole_number(given, key, place, minimum=int(key in positive)) for key in _MINDIE_KEYS
    )
    _check_most_steps("steps_count", steps, place)
    reuse = tuple(step for step in range(first, min(end, steps)) if (step - first) % every)
    stop = min(stop, blocks)
    regions = (Region(start, stop, reuse),) if reuse and start < stop else ()
    return Plan(steps=steps, regions=regions, made_for={"steps": steps, "blocks": blocks})


def _described(value: Any) -> str:
    return f"{shown(value)} ({kind(value)})"


def _whole_number(mapping: Dict[str, Any], key: str, place: str, minimum: int = 0) -> int:
    if key not in mapping:
        raise SettingsError(f"{place}: missing key {key}.")
    value = mapping[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise SettingsError(f"{place}: {key} must be an integer of at least {minimum}, got {_described(value)}.")
    return value


def _list(mapping: Dict[str, Any], key: str, place: str, what: str) -> List[Any]:
    value = mapping.get(key, [])
    if not isinstance(value, list):
        raise SettingsError(f"{place}: {key} must be {what}, got {_described(value)}.")
    return value


def _check_most_steps(key: str, steps: int, place: str) -> None:
    if steps > MOST_TIMESTEPS:
        raise SettingsError(f"{place}: {key} must be at most {MOST_TIMESTEPS}, got {shown(steps)}.")


def _steps(mapping: Dict[str, Any], key: str, place: str) -> Tuple[int, ...]:
    steps = _list(mapping, key, place, "a list of step indices")
    for step in steps:
        if isinstance(step, bool) or not isinstance(step, int):
            raise SettingsError(f"{place}: {key}: a step must be an integer, got {_described(step)}.")
    return tuple(sorted(steps))


def _region(content: Any, place: str) -> Region:
    mapping = check_keys(content, _REGION_KEYS, place)
    start, stop = (_whole_number(mapping, key, place) for key in ("start", "stop"))
    order = _whole_number(mapping, "order", place) if "order" in mapping else 0
    return Region(start, stop, _steps(mapping, "reuse", place), order)


def _correction(content: Any, place: str) -> Correction:
    mapping = check_keys(content, _CORRECTION_KEYS, place)
    return Correction(**{key: tuple(value) if isinstance(value, list) else value for key, value in mapping.items()})


def _mapping(mapping: Dict[str, Any], key: str, place: str) -> Dict[str, Any]:
    value = mapping.get(key, {})
    if not isinstance(value, dict):
        raise SettingsError(f"{place}: {key} must be a mapping, got {_described(value)}.")
    return value


def read_plan(path: str) -> Plan:
    """Read a plan file (JSON or YAML), or one with msModelSlim's four keys."""
    return parse_plan(read_file(path), path)


def plan_content(plan: Plan) -> Dict[str, Any]:
    """The mapping of a plan file; the plan must name its steps (`osaccel.plan.for_steps`)."""
    content: Dict[str, Any] = {"format": FORMAT, "steps": plan.steps}
    for key in ("skip", "conditional_only"):
        if getattr(plan, key):
            content[key] = list(getattr(plan, key))
    if plan.regions:
        content["regions"] = [
            {"start": region.start, "stop": region.stop, "reuse": list(region.reuse), "order": region.order}
            for region in plan.regions
        ]
    if plan.correction != Correction():
        pairs = ((key, getattr(plan.correction, key)) for key in _CORRECTION_KEYS)
        content["correction"] = {key: list(value) if isinstance(value, tuple) else value for key, value in pairs}
    return {**content, "made_for": dict(plan.made_for), "measured": dict(plan.measured)}


def write_plan(path: str, plan: Plan) -> None:
    """Write a plan file, JSON."""
    write_json(path, plan_content(plan))


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
    """Call `write(file)` on a temporary file beside `path`, then rename it: a crash leaves the old file or the new."""
    # Renaming onto a link would replace the link and leave the file that its reader opens.
    path = os.path.realpath(path)
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".osaccel-", suffix=".part", dir=directory)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        make_readable(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)


def make_readable(path: str) -> None:
    """Give a file of mkstemp's, which are private, the mode of any other file that the user writes."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def _sync_directory(directory: str) -> None:
    """Let the rename outlive a power cut too, on the file systems that can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def report_path(path: str) -> str:
    """The report of what a search wrote, beside it."""
    return path + REPORT


def frames_path(path: str) -> str:
    """The frames that the report shows, beside it."""
    return path + ".report.npz"


def check_writable(path: str, place: str) -> None:
    """Raise SettingsError unless `path` and its report can be written later: called before the first forward.

    A file without a name is written beside them and gone at once, which finds a full disk too; no folder is made.
    """
    for output in (path, report_path(path)):
        try:
            _check_replaceable(output)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise SettingsError(f"{place}: {output} cannot be written: {reason}.") from None


def _check_replaceable(path: str) -> None:
    path = os.path.realpath(path)
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):
            raise OSError("Is a directory" if stat.S_ISDIR(mode) else "it is not a regular file")
    directory, names = os.path.dirname(path), [os.path.basename(path)]
    while not os.path.lexists(directory):
        directory, name = os.path.split(directory)
        names.append(name)
    for name in names:
        # What is too long for a name shows here, and a folder that is a file.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(os.path.join(directory, name))
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(_PROBE)
        file.flush()
        os.fsync(file.fileno())


def find_videos(directory: str, place: str) -> List[str]:
    """The mp4 files of a directory, sorted; SettingsError unless there are 5 to 20, all of them files with content."""
    try:
        names = sorted(name for name in os.listdir(directory) if name.lower().endswith(".mp4"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{place}: {directory} is no directory of mp4 files: {reason}.") from None
    if not FEWEST_VIDEOS <= len(names) <= MOST_VIDEOS:
        raise SettingsError(
            f"{place}: {directory}: found {len(names)} mp4 files, but {FEWEST_VIDEOS} to {MOST_VIDEOS} are needed."
        )
    paths = [os.path.join(directory, name) for name in names]
    for path in paths:
        try:
            check_regular(path)
            if os.path.getsize(path) == 0:
                raise OSError("the file is empty")
        except OSError as error:
            raise cannot_be_read(f"{place}: {path}", error) from None
    return paths
