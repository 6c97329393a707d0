# SPDX-License-Identifier: Apache-2.0
"""Settings from options, environment variables and one YAML file, checked once and then frozen; needs no torch."""

import math
import os
import re
from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Tuple

from osaccel import formats, reading
from osaccel.dit_cache_config import DitCacheConfig
from osaccel.messages import SettingsError, closest, shown
from osaccel.plan import UNDER_SKIP, Correction, Plan, of_dit_cache

PREFIX = "OSACCEL_"
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
# Linux's PATH_MAX.
LONGEST_PATH = 4096
SEARCHES = ("plan", "dit_cache", "restep", "all")
ATTENTIONS = ("keep", "flash", "auto")
# What OSACCEL_CORRECTION=1 stands for; docs/correction.md says where it comes from. Beside a plan that skips steps it
# is UNDER_SKIP: the plain run's own video is the aim, and a predictor leads away from it.
DEFAULT_CORRECTION = Correction(predictor=1.0, corrector=1.0)
# Written out: float() and int() also take "1_000", "010" and other scripts' digits, and need long for very many digits.
_NUMBER = re.compile(r"[-+]?([0-9]{1,30}(\.[0-9]{0,30})?|\.[0-9]{1,30})([eE][-+]?[0-9]{1,3})?")
_WHOLE = re.compile(r"[1-9][0-9]{0,8}")
# Read by the test-suite, not by the package.
_FOREIGN_VARIABLES = ("OSACCEL_UPSTREAM",)


class Value(NamedTuple):
    """A raw value with the place it came from; `base` is the directory its relative paths start from."""

    raw: Any
    place: str
    base: str = ""


# What a goal of each kind is above, and at most.
GOALS = {"speed": (1, 1000), "psnr": (0, 200), "error": (0, 10)}


class Goal(NamedTuple):
    """What a plan search aims at: the least error at a speed-up, or the least work that keeps a PSNR or an error.

    Attributes:
        kind: "speed" (plain network work over the plan's), "psnr" (dB) or "error" (relative L2 of the final latents).
    """

    kind: str
    value: float

    @property
    def is_allowed(self) -> bool:
        """Whether it can be asked for."""
        low, high = GOALS[self.kind]
        return low < self.value <= high

    def __str__(self) -> str:
        return f"{self.value:g}x" if self.kind == "speed" else f"{self.kind}:{self.value:g}"


def _boolean(value: Value) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return words[str(value.raw).lower()]
    except KeyError:
        raise SettingsError(f"{value.place}: expected one of {', '.join(words)}, got {shown(value.raw)}.") from None


def _log_level(value: Value) -> str:
    level = str(value.raw).upper()
    if level not in LOG_LEVELS:
        raise SettingsError(f"{value.place}: unknown log level {shown(value.raw)}. {closest(level, LOG_LEVELS)}")
    return level


def _search(value: Value) -> Optional[str]:
    word = str(value.raw).lower()
    if word in ("0", "false", "no", "off"):
        return None
    name = "dit_cache" if word in ("1", "true", "yes", "on") else word
    if name not in SEARCHES:
        raise SettingsError(f"{value.place}: unknown search {shown(value.raw)}. {closest(name, ('1',) + SEARCHES)}")
    return name


def _number(low: float, high: float, above: bool = False) -> Callable[[Value], float]:
    """A parser for numbers in [low, high], or in (low, high] with `above`."""
    allowed = f"a number in {'(' if above else '['}{low:g}, {high:g}]"

    def parse(value: Value) -> float:
        number = _float(value.raw)
        if not low <= number <= high or (above and number == low):
            raise SettingsError(f"{value.place}: expected {allowed}, got {shown(value.raw)}.")
        return number

    return parse


def _float(raw: Any) -> float:
    """NaN for what is no number, or none that is written plainly."""
    if isinstance(raw, str):
        # strip() takes more off than float() does.
        raw = raw.strip()
        if not _NUMBER.fullmatch(raw):
            return math.nan
    try:
        return math.nan if isinstance(raw, bool) else float(raw)
    except (TypeError, OverflowError):
        return math.nan


def _whole(value: Value) -> int:
    text = str(value.raw).strip()
    if not _WHOLE.fullmatch(text):
        allowed = "at most 9 digits" if text[:10].isdigit() and len(text) > 9 else "at least 1"
        raise SettingsError(f"{value.place}: expected a whole number of {allowed}, got {shown(value.raw)}.")
    return int(text)


def _beside(plan: Plan, correction: Correction) -> Correction:
    """What a correction that was asked for is beside a plan; by identity: whoever names strengths gets them."""
    return UNDER_SKIP if plan.skip and correction is DEFAULT_CORRECTION else correction


def _step_counts(value: Value) -> Tuple[int, ...]:
    parts = value.raw if isinstance(value.raw, list) else str(value.raw).split(",")
    counts = tuple(_whole(value._replace(raw=part)) for part in parts[: formats.NUM_TRAIN_TIMESTEPS])
    most = formats.NUM_TRAIN_TIMESTEPS - 1
    if not counts or min(counts) < 2 or max(counts) > most:
        raise SettingsError(f"{value.place}: a schedule needs 2 to {most} steps, got {shown(value.raw)}.")
    if len(set(counts)) < len(parts):
        raise SettingsError(f"{value.place}: a number of steps stands there twice: {shown(value.raw)}.")
    return counts


def _correction(value: Value) -> Optional[Correction]:
    """1 for the default strengths, 0 for none, or the strengths themselves; the response may be left out."""
    word = str(value.raw).lower()
    if word in ("1", "true", "yes", "on"):
        return DEFAULT_CORRECTION
    if word in ("0", "false", "no", "off"):
        return None
    parts = value.raw if isinstance(value.raw, list) else word.split(",")
    allowed = "expected 1, 0, or numbers in [0, 1], predictor,corrector or predictor,corrector,response"
    if len(parts) not in (2, 3):
        raise SettingsError(f"{value.place}: {allowed}, got {shown(value.raw)}.")
    try:
        strengths = [_number(0, 1)(value._replace(raw=part)) for part in parts]
    except SettingsError:
        raise SettingsError(f"{value.place}: {allowed}, got {shown(value.raw)}.") from None
    return Correction(*strengths)


def _targets(value: Value) -> Tuple[Goal, ...]:
    parts = value.raw if isinstance(value.raw, list) else str(value.raw).split(",")
    found = [_target(value._replace(raw=str(part).strip().lower())) for part in parts]
    for number, goal in enumerate(found):
        if str(goal) in map(str, found[:number]):
            raise SettingsError(f"{value.place}: {goal} is asked for twice; each target's file is named after it.")
    return tuple(found)


def _target(value: Value) -> Goal:
    kind, _, number = value.raw.rpartition(":")
    if value.raw.endswith("x") and not kind:
        kind, number = "speed", value.raw[:-1]
    try:
        low, high = GOALS[kind]
        return Goal(kind, _number(low, high, above=True)(value._replace(raw=number)))
    except (KeyError, SettingsError):
        raise SettingsError(
            f"{value.place}: expected a speed-up such as 2x (above 1), psnr:40 (dB) or error:0.02, got "
            f"{shown(value.raw)}."
        ) from None


def _search_then(value: Value) -> str:
    choices = ("exit", "continue")
    if value.raw not in choices:
        raise SettingsError(f"{value.place}: expected one of {', '.join(choices)}, got {shown(value.raw)}.")
    return str(value.raw)


def _attention(value: Value) -> str:
    if value.raw not in ATTENTIONS:
        raise SettingsError(
            f"{value.place}: unknown attention {shown(value.raw)}. {closest(str(value.raw), ATTENTIONS)}"
        )
    return str(value.raw)


def _path(value: Value) -> str:
    if not isinstance(value.raw, str) or not _is_file_name(value.raw):
        raise SettingsError(f"{value.place}: expected a path, got {shown(value.raw)}.")
    return os.path.join(value.base, os.path.expanduser(value.raw))


def _is_file_name(text: str) -> bool:
    """Whether the system can be asked for a file of this name: not empty, no NUL, no lone surrogate, no megabyte."""
    try:
        return 0 < len(os.fsencode(text)) <= LONGEST_PATH and "\0" not in text
    except UnicodeEncodeError:
        return False


class Setting(NamedTuple):
    """One setting: its attribute in Settings, where it is set, and how a raw value becomes a checked one."""

    name: str
    yaml: Tuple[str, ...]
    parse: Callable[[Value], Any]
    help: str
    metavar: str = ""
    is_path: bool = False

    @property
    def variable(self) -> str:
        return PREFIX + self.name.upper()

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def group(self) -> str:
        """What it is about: "apply", "search" or "behaviour"; as the help shows it."""
        if self.yaml[:1] == ("search",):
            return "search"
        return "behaviour" if self.name in ("strict", "log", "disable") else "apply"

    @property
    def is_flag(self) -> bool:
        return not self.metavar


TABLE: Tuple[Setting, ...] = (
    Setting(
        "config",
        (),
        _path,
        "one YAML file: plan:, correction:, cache:, sampling:, wall:, search:, log:",
        "FILE",
        is_path=True,
    ),
    Setting(
        "plan",
        ("plan",),
        _path,
        "what every step computes: a plan file (JSON or YAML, format osaccel.plan/1), or msModelSlim's four keys",
        "FILE",
        is_path=True,
    ),
    Setting(
        "correction",
        ("correction",),
        _correction,
        "second-order correction of the sampler without any file: 1, or PREDICTOR,CORRECTOR[,RESPONSE] in [0, 1]",
        "WHAT",
    ),
    Setting(
        "cache_config",
        ("cache",),
        _path,
        "DiT cache: msModelSlim's dit_cache_config.json, or the same four keys in YAML",
        "FILE",
        is_path=True,
    ),
    Setting(
        "timesteps",
        ("sampling", "timesteps"),
        _path,
        "searched timesteps: msModelSlim's searched_schedule.txt (JSON list, ascending, in [0, 1])",
        "FILE",
        is_path=True,
    ),
    Setting(
        "parallel_vae",
        ("wall", "parallel_vae"),
        _boolean,
        "deal the VAE's tiles over the ranks of sequence parallelism: 1 or 0 (default: with any other setting)",
        "0|1",
    ),
    Setting(
        "attention",
        ("wall", "attention"),
        _attention,
        "kernel of the self-attention: keep (default, the checkpoint's own), flash, or auto (flash where it applies)",
        "KERNEL",
    ),
    Setting(
        "search", ("search", "mode"), _search, "search instead of sampling: plan; 1 or dit_cache, restep, all", "WHAT"
    ),
    Setting(
        "target",
        ("search", "target"),
        _targets,
        "plan search: 2x (default), psnr:40 or error:0.02, or several with commas",
        "WHAT",
    ),
    Setting(
        "search_prompts", ("search", "prompts"), _whole, "pipeline calls recorded as calibration (default 1)", "NUMBER"
    ),
    Setting(
        "search_probed",
        ("search", "probed"),
        _whole,
        "plan search: how many of these calls are probed, and stand for the others (default 8)",
        "NUMBER",
    ),
    Setting("search_then", ("search", "then"), _search_then, "after the search: exit (default) or continue", "WHAT"),
    Setting(
        "cache_ratio",
        ("search", "cache_ratio"),
        _number(1, 2, above=True),
        "cache search: speed-up the configuration must reach, in (1, 2] (default 1.3)",
        "RATIO",
    ),
    Setting(
        "min_psnr",
        ("search", "min_psnr"),
        _number(0, 200, above=True),
        "cache search: find the fastest configuration that keeps this PSNR, in dB, instead of a ratio",
        "DB",
    ),
    Setting(
        "target_steps",
        ("search", "target_steps"),
        _step_counts,
        "timestep search: number of steps to find, or several with commas (default 50)",
        "NUMBER",
    ),
    Setting(
        "calibration_videos",
        ("search", "calibration_videos"),
        _path,
        "timestep search: directory of 5 to 20 mp4 files to calibrate on, instead of the script's own generations",
        "DIR",
        is_path=True,
    ),
    Setting("strict", ("strict",), _boolean, "what would only be warned of is an error"),
    Setting("log", ("log",), _log_level, "log level: " + ", ".join(LOG_LEVELS) + " (default INFO)", "LEVEL"),
    Setting("disable", ("disable",), _boolean, "run the command as if osaccel were not installed"),
)
BY_NAME = {setting.name: setting for setting in TABLE}


@dataclass(frozen=True)
class Settings:
    """What the user asked for, checked. `sources` tells for each name where its value came from.

    Attributes:
        plan: what a plan file says, or None.
        correction: asked for without a plan file, or None.
        cache: the cache configuration, or None.
        timesteps: timesteps, descending, in [0, 1000], or None.
        cache_file: the file `cache` was read from, None when it stood in the YAML file itself.
        search: one of SEARCHES, or None; the names behind it are its parameters, see TABLE.
        cache_output, timesteps_output, plan_output: where a search writes what it finds; what lies there
            already is not applied.
        parallel_vae: whether VAE tiles are dealt over ranks; None stands for yes in generations that differ anyway.
        attention: one of ATTENTIONS.
        strict, disable: see TABLE.
        log: a level name of `logging`.
    """

    plan: Optional[Plan] = None
    correction: Optional[Correction] = None
    cache: Optional[DitCacheConfig] = None
    timesteps: Optional[Tuple[float, ...]] = None
    cache_file: Optional[str] = None
    search: Optional[str] = None
    cache_output: Optional[str] = None
    timesteps_output: Optional[str] = None
    plan_output: Optional[str] = None
    target: Tuple[Goal, ...] = (Goal("speed", 2.0),)
    parallel_vae: Optional[bool] = None
    attention: str = "keep"
    search_prompts: int = 1
    search_probed: int = 8
    search_then: str = "exit"
    cache_ratio: float = 1.3
    min_psnr: Optional[float] = None
    target_steps: Tuple[int, ...] = (50,)
    calibration_videos: Optional[str] = None
    strict: bool = False
    disable: bool = False
    log: str = "INFO"
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def accelerates(self) -> bool:
        """Whether a generation differs from the plain one, in what it computes or in how."""
        return not self.generation_plan().is_plain or bool(self.parallel_vae) or self.attention != "keep"

    def generation_plan(self) -> Plan:
        """The one plan that all sources together make."""
        plan = self.plan or (of_dit_cache(self.cache) if self.cache else Plan())
        correction = _beside(plan, self.correction or plan.correction)
        return replace(plan, timesteps=self.timesteps, correction=correction)

    @property
    def plan_source(self) -> str:
        """Where what a generation computes comes from, for messages."""
        return next((self.sources[name] for name in ("plan", "cache_config") if name in self.sources), "plan")


def load(environ: Mapping[str, str], options: Optional[Mapping[str, Any]] = None) -> Settings:
    """Settings by precedence: option > environment variable > YAML file > default.

    Args:
        environ: `os.environ` or the like.
        options: raw values by setting name, of the launcher's options; None stands for an option not given.

    Raises:
        SettingsError: a variable, key or value is not allowed, or a file cannot be used.
    """
    return check(gather(environ, options or {}), environ)


def gather(environ: Mapping[str, str], options: Mapping[str, Any]) -> Dict[str, Value]:
    """What is set, by setting name, as it was written; of each setting the value that wins."""
    _check_variables(environ)
    given = _from_options_and_environment(environ, options)
    values = dict(_from_yaml(given["config"])) if "config" in given else {}
    return {**values, **given}


def unread(values: Mapping[str, Value]) -> Optional[str]:
    """What is to be said of settings that only a search reads, where none is asked for; None where there are none.

    A YAML file may hold what several commands read, so nothing is said of it.
    """
    read = [(BY_NAME[name], value.place) for name, value in values.items() if BY_NAME[name].group == "search"]
    places = [place for setting, place in read if place in (setting.option, setting.variable)]
    if not places or "search" in values or _is_disabled(values):
        return None
    search = BY_NAME["search"]
    return f"{', '.join(places)}: only a search reads this, and none is asked for; see {search.variable}."


def check(values: Mapping[str, Value], environ: Mapping[str, str]) -> Settings:
    """Settings from what `gather` found; the rest as in `load`."""
    if _is_disabled(values):
        return Settings(disable=True, sources={"disable": values["disable"].place})
    parsed: Dict[str, Any] = {}
    for name in values:
        if name not in ("config", "cache_config", "timesteps", "plan"):
            parsed[name] = BY_NAME[name].parse(values[name])
    for name, output, searches in _OUTPUTS:
        if parsed.get("search") in searches:
            parsed[output] = _output(values, name)
    if environ.get("RANK", "0") == "0":
        _check_places(values, parsed)
    if "cache_config" in values and not parsed.get("cache_output"):
        parsed["cache"] = _cache(values["cache_config"])
        if isinstance(values["cache_config"].raw, str):
            parsed["cache_file"] = os.path.abspath(_path(values["cache_config"]))
    if "timesteps" in values and not parsed.get("timesteps_output"):
        parsed["timesteps"] = _timesteps(values["timesteps"])
    if "plan" in values and not parsed.get("plan_output"):
        parsed["plan"] = _plan(values["plan"])
        _check_contradictions(values, parsed)
    return Settings(sources={name: value.place for name, value in values.items()}, **parsed)


# A search's output: the setting that names the file, the attribute it becomes, the searches that write it.
_OUTPUTS = (
    ("cache_config", "cache_output", ("dit_cache", "all")),
    ("timesteps", "timesteps_output", ("restep", "all")),
    ("plan", "plan_output", ("plan",)),
)


def _output(values: Mapping[str, Value], name: str) -> str:
    """The path a search writes to; it need not exist."""
    if name not in values:
        raise SettingsError(
            f"{values['search'].place}: the search needs a file to write to: set {BY_NAME[name].variable} or "
            f"{BY_NAME[name].option}."
        )
    if not isinstance(values[name].raw, str):
        raise SettingsError(
            f"{values[name].place}: a search writes to a file; give a path, got {shown(values[name].raw)}."
        )
    return os.path.abspath(_path(values[name]))


def _check_places(values: Mapping[str, Value], parsed: Mapping[str, Any]) -> None:
    """What a search writes and reads must be there before a model is loaded; other ranks' nodes need not have it."""
    outputs = {name: parsed[output] for name, output, _ in _OUTPUTS if parsed.get(output)}
    if outputs and "config" in values:
        outputs["config"] = os.path.abspath(_path(values["config"]))
    for name, path in outputs.items():
        same = [
            other for other in outputs if other != name and os.path.realpath(outputs[other]) == os.path.realpath(path)
        ]
        if same:
            raise SettingsError(f"{values[name].place}: {path} is the file of {values[same[0]].place} too.")
        if name != "config":
            formats.check_writable(path, values[name].place)
    if parsed.get("timesteps_output") and "calibration_videos" in parsed:
        formats.find_videos(parsed["calibration_videos"], values["calibration_videos"].place)


def _is_disabled(values: Mapping[str, Value]) -> bool:
    return "disable" in values and _boolean(values["disable"])


def _check_variables(environ: Mapping[str, str]) -> None:
    known = [setting.variable for setting in TABLE]
    for variable in environ:
        if variable.startswith(PREFIX) and variable not in known and variable not in _FOREIGN_VARIABLES:
            raise SettingsError(f"{variable}: unknown environment variable. {closest(variable, known)}")


def _from_options_and_environment(environ: Mapping[str, str], options: Mapping[str, Any]) -> Dict[str, Value]:
    values = {}
    for setting in TABLE:
        if options.get(setting.name) is not None:
            values[setting.name] = Value(options[setting.name], setting.option)
        elif environ.get(setting.variable, "") != "":
            values[setting.name] = Value(environ[setting.variable], setting.variable)
    return values


def _from_yaml(value: Value) -> Dict[str, Value]:
    path = _path(value)
    if not path.lower().endswith(reading.YAML_SUFFIXES):
        endings = " or ".join(reading.YAML_SUFFIXES)
        raise SettingsError(
            f"{path}: the settings file must end in {endings}. OSACCEL_PLAN, or --plan, takes a plan alone."
        )
    return _read(value, "config", lambda content, place: _collect({} if content is None else content, (), place))


def _collect(content: Any, section: Tuple[str, ...], path: str) -> Dict[str, Value]:
    """The values below one section of the YAML file, by setting name."""
    inside = {
        setting.yaml[len(section)]: setting
        for setting in TABLE
        if setting.yaml[: len(section)] == section != setting.yaml
    }
    place = f"{path}: {'.'.join(section)}" if section else path
    values = {}
    for key, raw in formats.check_keys(content, list(inside), place).items():
        setting = inside[key]
        if raw is None:
            continue
        if setting.yaml == section + (key,):
            values[setting.name] = Value(raw, f"{path}: {'.'.join(setting.yaml)}", os.path.dirname(path))
        else:
            values.update(_collect(raw, section + (key,), path))
    return values


def _read(value: Value, name: str, parse: Callable[[Any, str], Any]) -> Any:
    """What a file says; one of another kind is answered with the setting that takes it."""
    path = _path(value)
    content = formats.read_file(path)
    try:
        return parse(content, path)
    except SettingsError as error:
        takers = formats.kinds_of(content) or (("config",) if _is_settings(content) else ())
        if not takers or name in takers:
            raise
        setting = BY_NAME[takers[0]]
        raise SettingsError(f"{error} {setting.variable}, or {setting.option}, takes such a file.") from None


def _is_settings(content: Any) -> bool:
    keys = {setting.yaml[0] for setting in TABLE if setting.yaml}
    return isinstance(content, dict) and bool(content) and keys.issuperset(content)


def _cache(value: Value) -> DitCacheConfig:
    # In the YAML file the four keys may stand in place of a path.
    if isinstance(value.raw, dict):
        return formats.parse_cache_config(value.raw, value.place)
    return _read(value, "cache_config", formats.parse_cache_config)


def _plan(value: Value) -> Plan:
    if isinstance(value.raw, dict):
        return formats.parse_plan(value.raw, value.place)
    return _read(value, "plan", formats.parse_plan)


def _check_contradictions(values: Mapping[str, Value], parsed: Mapping[str, Any]) -> None:
    """Raise SettingsError when another source says something else of what the plan says."""
    plan, place = parsed["plan"], values["plan"].place
    if parsed.get("cache") is not None:
        raise SettingsError(
            f"{place} and {values['cache_config'].place} both say which blocks compute; give one of them."
        )
    timesteps = parsed.get("timesteps")
    if timesteps is not None and plan.steps not in (None, len(timesteps)):
        raise SettingsError(
            f"{place}: the plan is for {plan.steps} steps, but {values['timesteps'].place} lists {len(timesteps)}; "
            "give a list and a plan of the same length."
        )
    given = parsed.get("correction")
    if plan.correction != Correction() and given is not None and _beside(plan, given) != plan.correction:
        raise SettingsError(f"{place} and {values['correction'].place} ask for different corrections; give one.")


def _timesteps(value: Value) -> Tuple[float, ...]:
    if isinstance(value.raw, list):
        return formats.parse_timesteps(value.raw, value.place)
    return _read(value, "timesteps", formats.parse_timesteps)


def exported(options: Mapping[str, Any], environ: Mapping[str, str]) -> Dict[str, str]:
    """Environment variables that carry options and settings to child processes, paths made absolute."""
    variables = {}
    for name, value in _from_options_and_environment(environ, options).items():
        setting = BY_NAME[name]
        text = "1" if value.raw is True else str(value.raw)
        variables[setting.variable] = os.path.abspath(_path(value)) if setting.is_path else text
    return variables
