# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.doctor [options] [-- COMMAND...]`: what a run would meet, without running it.

Takes the launcher's options and reads the same variables. Exit status 0, 1 where something is doubtful, 2 where COMMAND
would fail. Nothing of the upstream is imported.
"""

import argparse
import ast
import json
import os
import platform
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence

from osaccel import __version__, formats, run, settings
from osaccel.command import asked_for, refusals, sampler_of, steps_of
from osaccel.messages import SettingsError, printable, shown
from osaccel.settings import Settings, Value
from osaccel.targets import TARGETS

NOTE, WARNING, ERROR = "note", "warning", "error"
STATUS = {NOTE: 0, WARNING: 1, ERROR: 2}
# What osaccel needs, and what the upstream samples with.
NEEDED, USED = ("torch", "numpy", "wrapt", "PyYAML"), ("diffusers", "transformers", "torch_npu", "matplotlib", "jinja2")
_LONGEST_SCRIPT = 1 << 16
# How the text names what a generation would compute.
_ROWS = {"network_work": "network work", "ideal_speed_up": "ideal speed-up", "in_place_of": "in place of"}


class Finding(NamedTuple):
    """Something to know; `level` is NOTE, WARNING or ERROR."""

    level: str
    text: str


@dataclass
class Diagnosis:
    """Everything the doctor found.

    Attributes:
        settings: for every setting that was given, its value and the place it came from.
        upstream: for every module of a target, where it is and whether its class is in it.
        effect: what a generation would compute; empty where it is the plain one or nothing is known.
        command: what COMMAND says of the generation.
    """

    versions: Dict[str, Optional[str]] = field(default_factory=dict)
    settings: Dict[str, Dict[str, str]] = field(default_factory=dict)
    upstream: Dict[str, Dict[str, Any]] = field(default_factory=dict)
    effect: Dict[str, Any] = field(default_factory=dict)
    command: Dict[str, Any] = field(default_factory=dict)
    findings: List[Finding] = field(default_factory=list)

    @property
    def status(self) -> int:
        return max((STATUS[finding.level] for finding in self.findings), default=0)

    def add(self, level: str, text: str) -> None:
        self.findings.append(Finding(level, text))

    def to_json(self) -> Dict[str, Any]:
        findings = [finding._asdict() for finding in self.findings]
        return {**self.__dict__, "findings": findings, "status": self.status}


def diagnose(
    environ: Mapping[str, str], options: Mapping[str, Any], command: Sequence[str], num_blocks: Optional[int] = None
) -> Diagnosis:
    """Look at everything; `options` are the launcher's, by setting name."""
    found = Diagnosis(versions=versions())
    for name in NEEDED:
        if found.versions.get(name) is None:
            found.add(ERROR, f"{name} is not installed in {sys.prefix}.")
    _look_for_upstream(found, command)
    _look_at_command(found, command, environ)
    try:
        values = settings.gather(environ, options)
        unread = settings.unread(values)
        if unread:
            found.add(WARNING, unread)
        given = settings.check(values, environ)
    except SettingsError as error:
        found.add(ERROR, str(error))
        return found
    _show_settings(found, given, values)
    refused = refusals(given, found.command)
    for reason in refused:
        found.add(ERROR, reason)
    if given.disable:
        found.add(NOTE, "osaccel is switched off.")
    elif given.search:
        _look_at_search(found, given)
    elif not given.accelerates:
        _look_at_nothing(found, given)
    else:
        _look_at_plan(found, given, num_blocks, is_refused=bool(refused))
    return found


def versions() -> Dict[str, Optional[str]]:
    """By package, without importing any; None for what is not installed."""
    found: Dict[str, Optional[str]] = {"osaccel": __version__, "python": platform.python_version()}
    found["platform"] = platform.platform()
    for name in NEEDED + USED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


# The upstream


def _look_for_upstream(found: Diagnosis, command: Sequence[str]) -> None:
    scripts = [os.path.dirname(os.path.abspath(word)) for word in command if word.endswith(".py")]
    path = [os.getcwd(), *scripts, *sys.path]
    for module, target in TARGETS.items():
        origin = locate(module, path)
        found.upstream[module] = {"path": origin, "recognised": has_class(origin, target.pipeline_class)}
    if not any(entry["path"] for entry in found.upstream.values()):
        found.add(WARNING, "No Open-Sora-Plan is found from here; run the doctor where you would run COMMAND.")
    for module, entry in found.upstream.items():
        if entry["path"] and not entry["recognised"]:
            name = TARGETS[module].pipeline_class
            found.add(WARNING, f"{entry['path']} has no class {name}, so its generations would run unaccelerated.")


def locate(module: str, path: Sequence[str]) -> Optional[str]:
    """The file of a module; unlike importlib.util.find_spec, no package above it is run."""
    top, *below = module.split(".")
    # An editable install has a finder of its own, which knows nothing of `path`.
    spec = PathFinder.find_spec(top, list(path)) or find_spec(top)
    for part in below:
        places = list(spec.submodule_search_locations or ()) if spec else []
        spec = PathFinder.find_spec(part, places) if places else None
    return spec.origin if spec else None


def has_class(path: Optional[str], name: str) -> bool:
    """Whether a source file defines a class of this name that can be called."""
    try:
        with open(path or "", encoding="utf-8") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return False
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]
    return any(isinstance(item, ast.FunctionDef) and item.name == "__call__" for node in classes for item in node.body)


# The command


def _look_at_command(found: Diagnosis, command: Sequence[str], environ: Mapping[str, str]) -> None:
    if not command:
        return
    words = words_of(command)
    found.command = {"words": list(command), **asked_for(words)}
    program = run.as_executable(command)[0]
    path = shutil.which(program, path=environ.get("PATH"))
    if path is None:
        found.add(ERROR, f"command not found: {program}")
    elif os.path.basename(program).startswith(("python", "torchrun")) and not _same_environment(path):
        found.add(WARNING, f"COMMAND starts {path}, but the versions above are those of {sys.executable}.")
    else:
        _look_for_script(found, command)
    flag = run.disabling_flag(run.python_options(run.as_executable(command), environ.get("PATH")))
    if flag is not None:
        found.add(WARNING, f"python -{flag} ignores PYTHONPATH or sitecustomize, so osaccel would not be active.")
    if any(word.startswith("opensora.sample.") for word in words):
        for name in run.FORMER_OPTIONS:
            if name in words:
                found.add(ERROR, f"{name} is msModelSlim's; before COMMAND it is {run.FORMER_OPTIONS[name]}.")


def _look_for_script(found: Diagnosis, command: Sequence[str]) -> None:
    """That what COMMAND itself names is there, seen from here."""
    for option, name in zip(command, command[1:]):
        if option == "-m" and name.startswith("opensora.") and locate(name, [os.getcwd(), *sys.path]) is None:
            found.add(ERROR, f"no module {name} is found from here, so COMMAND would fail.")
    script = next((word for word in command if word.endswith((".py", ".sh"))), None)
    if script is not None and not os.path.exists(script):
        found.add(WARNING, f"{script} is not found from here; run the doctor where you would run COMMAND.")


def _same_environment(program: str) -> bool:
    return os.path.realpath(os.path.dirname(program)) == os.path.realpath(os.path.dirname(sys.executable))


def words_of(command: Sequence[str]) -> List[str]:
    """The command's words, and those inside a shell script that it runs."""
    words = list(command)
    for word in command:
        if word.endswith(".sh"):
            try:
                with open(word, encoding="utf-8") as file:
                    text = file.read(_LONGEST_SCRIPT)
                words += shlex.split(text.replace("\\\n", " "), comments=True)
            except (OSError, ValueError):
                continue
    return words


def blocks_of(model_path: Optional[str]) -> Optional[int]:
    """The number of transformer blocks that a checkpoint's config.json states; None where there is none to read."""
    try:
        content = formats.read_file(os.path.join(model_path, "config.json")) if model_path else None
    except SettingsError:
        return None
    blocks = content.get("num_layers") if isinstance(content, dict) else None
    return blocks if isinstance(blocks, int) and blocks > 0 else None


# The settings


def _show_settings(found: Diagnosis, given: Settings, values: Mapping[str, Value]) -> None:
    for name, place in given.sources.items():
        found.settings[name] = {"value": printable(_as_written(values[name].raw)), "source": place}


def _as_written(raw: Any) -> str:
    """A raw value as an option or variable has it, or the YAML file."""
    if isinstance(raw, list):
        return ", ".join(map(_as_written, raw))
    return raw if isinstance(raw, str) else json.dumps(raw)


def _look_at_search(found: Diagnosis, given: Settings) -> None:
    outputs = [path for path in (given.plan_output, given.cache_output, given.timesteps_output) if path]
    found.effect = {"search": given.search, "writes": outputs}
    for path in outputs:
        if os.path.exists(path):
            found.add(NOTE, f"{path} is there already; the search replaces it.")


def _look_at_nothing(found: Diagnosis, given: Settings) -> None:
    """Of settings with which a generation is the plain one."""
    is_given = given.plan is not None or given.cache is not None
    reason = f"{given.plan_source} computes every step in full" if is_given else "Nothing is set"
    found.add(NOTE, f"{reason}: COMMAND would run as without osaccel.")


def _look_at_plan(found: Diagnosis, given: Settings, num_blocks: Optional[int], is_refused: bool) -> None:
    plan, asked = given.generation_plan(), found.command
    num_blocks = num_blocks or blocks_of(asked.get("model_path"))
    recorded = _compare(found, given, num_blocks)
    steps = steps_of(asked, plan) or plan.steps or asked.get("num_sampling_steps")
    blocks = num_blocks or recorded.get("blocks")
    found.effect = {"does": plan.describe(), "steps": steps or recorded.get("steps"), "blocks": blocks}
    # What a list saves is that it is shorter than what COMMAND asks for.
    plain_steps = asked.get("num_sampling_steps") if plan.timesteps else None
    if plain_steps:
        found.effect["in_place_of"] = f"{plain_steps} evenly spaced steps"
    try:
        if num_blocks:
            plan.check_blocks(num_blocks)
    except ValueError as error:
        found.add(ERROR, f"{given.plan_source}: {error}")
        return
    if is_refused:
        return
    if plan.regions and blocks is None:
        found.add(NOTE, "The network work depends on the number of transformer blocks; say it with --num-blocks.")
    elif found.effect["steps"]:
        steps = found.effect["steps"]
        work = plan.work(blocks or 1, steps) * steps / (plain_steps or steps)
        found.effect.update(network_work=work, ideal_speed_up=1 / work)


def _compare(found: Diagnosis, given: Settings, num_blocks: Optional[int]) -> Mapping[str, Any]:
    """Report where the files' own generation differs from COMMAND's; returns what the files were made for."""
    try:
        from osaccel import binding
    except ImportError:
        # Without torch, which is an error of its own.
        return {}
    source, recorded = binding.recorded_of(given)
    asked = found.command
    size = [asked.get(name) for name in ("num_frames", "height", "width")]
    timesteps = given.timesteps
    steps = len(timesteps) if timesteps else asked.get("num_sampling_steps")
    call = {
        # A plan's own number of steps is more than a mismatch; `check_steps` says it.
        "steps": None if given.plan is not None and given.plan.steps is not None else steps,
        "blocks": num_blocks,
        "sampler": sampler_of(asked),
        "resolution": size if None not in size else None,
        "timesteps": binding.digest_of(list(timesteps)) if timesteps else binding.DEFAULT_SPACING,
        "guidance_scale": asked.get("guidance_scale"),
    }
    for difference in binding.mismatches(recorded, call):
        found.add(ERROR if given.strict else WARNING, f"{source}: {difference}.")
    return recorded if isinstance(recorded, dict) else {}


# What is printed


def text_of(found: Diagnosis) -> str:
    """Sections of two columns, then one line for each finding."""
    sections = {
        "versions": {name: version or "not installed" for name, version in found.versions.items()},
        "settings": {name: f"{row['value']}  ({row['source']})" for name, row in found.settings.items()},
        "upstream": {name: _where(row) for name, row in found.upstream.items()},
        "command": {name: shown(value) for name, value in found.command.items() if name != "words"},
        "a search" if "search" in found.effect else "a generation": {
            _ROWS.get(name, name): _said(name, value) for name, value in found.effect.items()
        },
    }
    lines = []
    for title, rows in sections.items():
        width = max(map(len, rows), default=0)
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())] if rows else []
    return "\n".join([*lines, *(f"{finding.level}: {finding.text}" for finding in found.findings)])


def _where(row: Mapping[str, Any]) -> str:
    if row["path"] is None:
        return "not found"
    return f"{row['path']}{'' if row['recognised'] else '  (not recognised)'}"


def _said(name: str, value: Any) -> str:
    """As the launcher's lines say it."""
    if value is None:
        return "not known"
    if isinstance(value, float):
        return f"{100 * value:.1f} %" if name == "network_work" else f"{value:.3f}x"
    return ", ".join(value) if isinstance(value, list) else str(value)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    ours, command = run.split_command(sys.argv[1:] if arguments is None else arguments, ("--num-blocks",))
    parser = run.make_parser(
        "osaccel.doctor",
        "Check versions, settings, files and COMMAND without running it; what a bug report should hold. Exit status 0, "
        "1 where something is doubtful, 2 where COMMAND would fail.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--num-blocks", type=_number_of_blocks, metavar="NUMBER", help="transformer blocks of the model"
    )
    options = vars(parser.parse_args(ours))
    as_json, num_blocks = options.pop("json"), options.pop("num_blocks")
    found = diagnose(os.environ, options, command, num_blocks)
    print(json.dumps(found.to_json(), indent=2) if as_json else text_of(found))
    return found.status


def _number_of_blocks(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
