# SPDX-License-Identifier: Apache-2.0
"""The files users keep (cache configuration, timestep list), read with exact error messages and written atomically."""

import difflib
import json
import math
import os
import tempfile
from typing import Any, Callable, Dict, Iterable, List, Sequence, Tuple

from osaccel.dit_cache_config import CACHE_KEYS, DitCacheConfig, check_cache_value
from osaccel.plan import FORMAT, Correction, Plan, Region, of_dit_cache

YAML_SUFFIXES = (".yaml", ".yml")
# The time axis Open-Sora-Plan is trained on: a searched value x in [0, 1] stands for the timestep 1000 * x.
NUM_TRAIN_TIMESTEPS = 1000


class SettingsError(ValueError):
    """A setting or file is wrong; the message names the place, the key, the value and what is allowed."""


def closest(name: str, allowed: Iterable[str]) -> str:
    """' Did you mean ...?' for a misspelt name, or the list of what is allowed."""
    choices = list(allowed)
    near = difflib.get_close_matches(name, choices, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(choices)}."


def check_keys(mapping: Any, allowed: Sequence[str], place: str) -> Dict[str, Any]:
    """`mapping` itself, when it is one and has only `allowed` keys."""
    if not isinstance(mapping, dict):
        raise SettingsError(f"{place}: expected a mapping with {', '.join(allowed)}, got {_kind(mapping)}.")
    for key in mapping:
        if key not in allowed:
            raise SettingsError(f"{place}: unknown key {key!r}. {closest(str(key), allowed)}")
    return mapping


def read_file(path: str) -> Any:
    """The content of a JSON or YAML file (by its ending; YAML is loaded safely)."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    return _parse_yaml(path, text) if path.endswith(YAML_SUFFIXES) else _parse_json(path, text)


def _parse_json(path: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}: not valid JSON: {error}.") from None
    except _DuplicateKey as error:
        raise SettingsError(f"{path}: the key {error} stands there twice.") from None


class _DuplicateKey(Exception):
    """A JSON object repeats a key."""


def _no_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise _DuplicateKey(repr(key))
    return dict(pairs)


def _parse_yaml(path: str, text: str) -> Any:
    # Imported here: processes that need no YAML should not pay for it.
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from None


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
            raise SettingsError(f"{place}: {error}, got {mapping[key]!r} ({_kind(mapping[key])}).") from None
    return DitCacheConfig(**mapping)


def read_cache_config(path: str) -> DitCacheConfig:
    """Read a `dit_cache_config.json` (msModelSlim's four keys), or the same keys in YAML."""
    return parse_cache_config(read_file(path), path)


def write_cache_config(path: str, config: DitCacheConfig) -> None:
    """Write exactly the four keys, so that the file loads in msModelSlim too."""
    write_json(path, config.to_dict())


_PLAN_KEYS = ("format", "steps", "skip", "conditional_only", "regions", "correction", "made_for", "measured")
_REGION_KEYS = ("start", "stop", "reuse", "order")
_CORRECTION_KEYS = ("predictor", "corrector")


def parse_plan(content: Any, place: str) -> Plan:
    """A `Plan` from the mapping of a plan file, or from msModelSlim's four keys; `place` opens every error message."""
    if isinstance(content, dict) and "format" not in content and set(content) & set(CACHE_KEYS):
        return of_dit_cache(parse_cache_config(content, place))
    mapping = check_keys(content, _PLAN_KEYS, place)
    if mapping.get("format") != FORMAT:
        raise SettingsError(f"{place}: format must be {FORMAT!r}, got {_shown(mapping.get('format'))}.")
    steps = _whole_number(mapping, "steps", place, minimum=1)
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


def _whole_number(mapping: Dict[str, Any], key: str, place: str, minimum: int = 0) -> int:
    if key not in mapping:
        raise SettingsError(f"{place}: missing key {key}.")
    value = mapping[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise SettingsError(f"{place}: {key} must be an integer of at least {minimum}, got {_shown(value)}.")
    return value


def _list(mapping: Dict[str, Any], key: str, place: str, what: str) -> List[Any]:
    value = mapping.get(key, [])
    if not isinstance(value, list):
        raise SettingsError(f"{place}: {key} must be {what}, got {_shown(value)}.")
    return value


def _steps(mapping: Dict[str, Any], key: str, place: str) -> Tuple[int, ...]:
    steps = _list(mapping, key, place, "a list of step indices")
    for step in steps:
        if isinstance(step, bool) or not isinstance(step, int):
            raise SettingsError(f"{place}: {key}: a step must be an integer, got {_shown(step)}.")
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
        raise SettingsError(f"{place}: {key} must be a mapping, got {_shown(value)}.")
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
    if plan.correction.is_used:
        pairs = ((key, getattr(plan.correction, key)) for key in _CORRECTION_KEYS)
        content["correction"] = {key: list(value) if isinstance(value, tuple) else value for key, value in pairs}
    return {**content, "made_for": dict(plan.made_for), "measured": dict(plan.measured)}


def write_plan(path: str, plan: Plan) -> None:
    """Write a plan file, JSON."""
    write_json(path, plan_content(plan))


def parse_timesteps(content: Any, place: str) -> Tuple[float, ...]:
    """Timesteps, descending, from msModelSlim's ascending list of at least two numbers in [0, 1]."""
    if not isinstance(content, list):
        raise SettingsError(f"{place}: expected a list of numbers in [0, 1], ascending, got {_kind(content)}.")
    if len(content) < 2:
        raise SettingsError(f"{place}: a list of at least two timesteps is needed, got {len(content)}.")
    for index, value in enumerate(content):
        _check_timestep(content, index, value, place)
    # 1000 itself is past the last trained timestep; msModelSlim's files hold it, samplers clip it.
    return tuple(NUM_TRAIN_TIMESTEPS * float(value) for value in reversed(content))


def _check_timestep(content: List[Any], index: int, value: Any, place: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SettingsError(f"{place}: entry {index} must be a number in [0, 1], got {value!r} ({_kind(value)}).")
    if not math.isfinite(value) or not 0 <= value <= 1:
        raise SettingsError(f"{place}: entry {index} must be in [0, 1], got {value!r}.")
    if index and value == content[index - 1]:
        raise SettingsError(f"{place}: entries {index - 1} and {index} are the same timestep, {value!r}.")
    if index and value < content[index - 1]:
        raise SettingsError(
            f"{place}: the list must ascend, but entry {index} ({value!r}) is below entry {index - 1} "
            f"({content[index - 1]!r})."
        )


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


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a boolean", type(None): "nothing"}
    return names.get(type(value), f"a number of type {type(value).__name__}")


def _shown(value: Any) -> str:
    return f"{value!r} ({_kind(value)})"
