# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.run [options] [--] COMMAND...`: check every setting, then become COMMAND with osaccel inside."""

import argparse
import contextlib
import os
import shutil
import sys
from typing import Dict, List, Mapping, NoReturn, Optional, Sequence, Tuple

from osaccel import __version__, log, settings
from osaccel.command import asked_for, is_script, refusals
from osaccel.messages import SettingsError, closest

BOOTSTRAP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_bootstrap")
USAGE_ERROR, NOT_FOUND, NOT_EXECUTABLE = 2, 127, 126
# Python's switches under which it ignores PYTHONPATH or sitecustomize.
DISABLING_FLAGS = "SEI"


# msModelSlim's options of its example scripts, and what stands for each in front of an unmodified script.
FORMER_OPTIONS = {
    "--dit_cache_config": "--cache-config FILE",
    "--schedule_timestep": "--timesteps FILE",
    "--search_type": "--search dit_cache, or --search restep",
    "--cache_ratio": "--cache-ratio RATIO",
    "--cache_save_path": "--search dit_cache --cache-config FILE; the search writes FILE",
    "--save_dir": "--search restep --timesteps FILE; the search writes FILE",
    "--videos_path": "--calibration-videos DIR",
    "--neighbour_type": "nothing; osaccel.ReStepAdaptor has it",
    "--monte_carlo_iters": "nothing; osaccel.ReStepAdaptor has it",
}
_GROUPS = {"apply": "what is applied", "search": "search instead", "behaviour": "behaviour"}


class Parser(argparse.ArgumentParser):
    """Answers a misspelt or former option with the one that is meant."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        name = unknown[0].partition("=")[0] if unknown else ""
        if name in FORMER_OPTIONS:
            message = f"{name} is msModelSlim's; here it is {FORMER_OPTIONS[name]}."
        elif name:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            message = f"{name}: unknown option. {closest(name, options)}"
        say(f"error: {message}")
        sys.exit(USAGE_ERROR)


def make_parser(module: str, description: str) -> argparse.ArgumentParser:
    """The settings as options, each shown once with its variable."""
    parser = Parser(
        prog=f"python -m {module}",
        usage="%(prog)s [options] [--] COMMAND...",
        description=description,
        epilog="Every option has the environment variable in brackets; the option wins, then the variable, then the "
        "YAML file.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"osaccel {__version__}")
    groups = {name: parser.add_argument_group(title) for name, title in _GROUPS.items()}
    for setting in settings.TABLE:
        text = f"{setting.help} [{setting.variable}]".replace("%", "%%")
        if setting.is_flag:
            groups[setting.group].add_argument(setting.option, action="store_true", default=None, help=text)
        else:
            groups[setting.group].add_argument(setting.option, metavar=setting.metavar, help=text)
    return parser


def split_command(arguments: Sequence[str], with_value: Sequence[str] = ()) -> Tuple[List[str], List[str]]:
    """Our options, and the command behind them; `--` ends the options, so does the first word that is none of ours.

    Args:
        with_value: options besides the settings' that take a value.
    """
    takes_value = {setting.option for setting in settings.TABLE if not setting.is_flag} | {*with_value}
    index = 0
    while index < len(arguments):
        word = arguments[index]
        if word == "--":
            return list(arguments[:index]), list(arguments[index + 1 :])
        if not word.startswith("--") and word != "-h":
            break
        index += 2 if word in takes_value else 1
    return list(arguments[:index]), list(arguments[index:])


def as_executable(command: Sequence[str]) -> List[str]:
    """`-m module` and `script.py` run under this Python; anything else is a program of its own."""
    if command[0] == "-m" or command[0].endswith((".py", ".pyc")):
        return [sys.executable, *command]
    return list(command)


def child_environment(options: Mapping[str, Optional[str]], environ: Mapping[str, str]) -> Dict[str, str]:
    """`environ` with the settings as variables, and our sitecustomize first on PYTHONPATH (once)."""
    child = dict(environ)
    child.update(settings.exported(options, environ))
    given = child.get("PYTHONPATH", "")
    # An empty entry, of `PYTHONPATH=$PYTHONPATH:/x`, is the current directory; an empty variable has no entry.
    entries = [entry for entry in given.split(os.pathsep) if entry != BOOTSTRAP] if given else []
    child["PYTHONPATH"] = os.pathsep.join([BOOTSTRAP, *entries])
    return child


def say(message: str) -> None:
    """One line on standard error, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"osaccel: {message}", file=sys.stderr)


def disabling_flag(words: Sequence[str]) -> Optional[str]:
    """The first of Python's own options -S, -E and -I among the words behind `python`, before its script."""
    rest = iter(words)
    for word in rest:
        if word == "--check-hash-based-pycs":
            next(rest, None)
        elif not word.startswith("--"):
            if len(word) < 2 or word[0] != "-":
                return None
            for place, letter in enumerate(word):
                if letter in DISABLING_FLAGS:
                    return letter
                if letter in "cm":
                    return None
                if letter in "WX":
                    # Its value is the rest of this word, or the next one.
                    if place == len(word) - 1:
                        next(rest, None)
                    break
    return None


def python_options(command: Sequence[str], path: Optional[str]) -> Sequence[str]:
    """The words behind `python`, of the command itself or of the first line of the script that it names."""
    if os.path.basename(command[0]).startswith("python"):
        return command[1:]
    program = shutil.which(command[0], path=path)
    try:
        with open(program or os.devnull, "rb") as file:
            line = file.readline(256) if file.read(2) == b"#!" else b""
    except OSError:
        return ()
    words = os.fsdecode(line).split()
    pythons = [place for place, word in enumerate(words) if os.path.basename(word).startswith("python")]
    return words[pythons[0] + 1 :] if pythons else ()


def warn_if_python_ignores_us(command: Sequence[str], path: Optional[str] = None) -> None:
    """`python -S`, `-E` and `-I` skip sitecustomize or PYTHONPATH, and with them osaccel."""
    flag = disabling_flag(python_options(command, path))
    if flag is not None:
        say(
            f"warning: python -{flag} ignores PYTHONPATH or sitecustomize, so osaccel will not be active; leave the "
            "flag out or add `import osaccel.auto` to the script."
        )


def check(options: Mapping[str, Optional[str]], command: Sequence[str]) -> bool:
    """Whether settings and files are right, and fit what the command's own options say; says what is not."""
    try:
        values = settings.gather(os.environ, options)
        unread = settings.unread(values)
        if unread:
            say(f"warning: {unread}")
        # What a shell or a wrapper makes of its words is left to the doctor.
        asked = asked_for(command) if is_script(command) else {}
        refused = refusals(settings.check(values, os.environ), asked)
    except SettingsError as error:
        refused = [str(error)]
    if refused:
        say(f"error: {refused[0]}")
    return not refused


def become(command: List[str], environ: Dict[str, str]) -> int:
    """Replace this process by `command`, so that signals and the exit status are its own; returns only on failure."""
    program = shutil.which(command[0], path=environ.get("PATH"))
    if program is None:
        say(f"error: command not found: {command[0]}")
        return NOT_FOUND
    log.flush_streams()
    if os.name == "nt":
        # There exec returns to the shell at once and the status is lost.
        import subprocess

        return subprocess.call([program, *command[1:]], env=environ)
    try:
        os.execve(program, command, environ)
    except OSError as error:
        say(f"error: cannot run {command[0]}: {error.strerror}")
    return NOT_EXECUTABLE


def main(arguments: Optional[Sequence[str]] = None) -> int:
    ours, command = split_command(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser(
        "osaccel.run",
        "Run COMMAND with osaccel active in every Python process below it. COMMAND is what you would type without "
        "osaccel: torchrun ..., python ..., -m module ..., script.py ..., bash script.sh ...",
    )
    options = vars(parser.parse_args(ours))
    if not command:
        parser.error(f"no COMMAND given; {parser.format_usage().strip()}; --help lists the options.")
    if not check(options, command):
        return USAGE_ERROR
    command = as_executable(command)
    warn_if_python_ignores_us(command, os.environ.get("PATH"))
    return become(command, child_environment(options, os.environ))


if __name__ == "__main__":
    sys.exit(main())
