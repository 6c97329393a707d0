# SPDX-License-Identifier: Apache-2.0
"""`python -m osaccel.run [options] [--] COMMAND...`: check every setting, then become COMMAND with osaccel inside."""

import argparse
import os
import shutil
import sys
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

from osaccel import settings
from osaccel.formats import SettingsError

BOOTSTRAP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_bootstrap")
USAGE_ERROR, NOT_FOUND, NOT_EXECUTABLE = 2, 127, 126
# Python's switches under which it ignores PYTHONPATH or sitecustomize.
DISABLING_FLAGS = "SEI"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m osaccel.run",
        usage="%(prog)s [options] [--] COMMAND...",
        description="Run COMMAND with osaccel active in every Python process below it. COMMAND is what you would type "
        "without osaccel: torchrun ..., python ..., -m module ..., script.py ..., bash script.sh ...",
        epilog="Every option has an environment variable of the same meaning; the option wins, then the variable, then "
        "the YAML file:\n" + settings.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for setting in settings.TABLE:
        if setting.is_flag:
            parser.add_argument(setting.option, action="store_true", default=None, help=setting.help)
        else:
            parser.add_argument(setting.option, metavar=setting.metavar, help=setting.help)
    return parser


def split_command(arguments: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Our options, and the command behind them; `--` ends the options, so does the first word that is none of ours."""
    takes_value = {setting.option for setting in settings.TABLE if not setting.is_flag}
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


def warn_if_python_ignores_us(command: Sequence[str]) -> None:
    """`python -S`, `-E` and `-I` skip sitecustomize or PYTHONPATH, and with them osaccel."""
    if not os.path.basename(command[0]).startswith("python"):
        return
    for word in command[1:]:
        if not word.startswith("-") or word.startswith("--"):
            return
        flags = word[1:].split("m")[0].split("c")[0]
        found = [flag for flag in DISABLING_FLAGS if flag in flags]
        if found:
            print(
                f"osaccel: warning: python -{found[0]} ignores PYTHONPATH or sitecustomize, so osaccel will not be "
                "active; leave the flag out or add `import osaccel.auto` to the script.",
                file=sys.stderr,
            )
        if flags != word[1:]:
            return


def become(command: List[str], environ: Dict[str, str]) -> int:
    """Replace this process by `command`, so that signals and the exit status are its own; returns only on failure."""
    program = shutil.which(command[0], path=environ.get("PATH"))
    if program is None:
        print(f"osaccel: error: command not found: {command[0]}", file=sys.stderr)
        return NOT_FOUND
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":
        # There exec returns to the shell at once and the status is lost.
        import subprocess

        return subprocess.call([program, *command[1:]], env=environ)
    try:
        os.execve(program, command, environ)
    except OSError as error:
        print(f"osaccel: error: cannot run {command[0]}: {error.strerror}", file=sys.stderr)
    return NOT_EXECUTABLE


def main(arguments: Optional[Sequence[str]] = None) -> int:
    ours, command = split_command(sys.argv[1:] if arguments is None else arguments)
    parser = make_parser()
    options = vars(parser.parse_args(ours))
    if not command:
        parser.error("no COMMAND given")
    try:
        settings.load(os.environ, options)
    except SettingsError as error:
        print(f"osaccel: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    command = as_executable(command)
    warn_if_python_ignores_us(command)
    return become(command, child_environment(options, os.environ))


if __name__ == "__main__":
    sys.exit(main())
