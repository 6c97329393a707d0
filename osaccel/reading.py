# SPDX-License-Identifier: Apache-2.0
"""Reads the small JSON and YAML files that settings name, whatever lies there: bounded in size, depth, digits and time.

Every file is refused or parsed; what is wrong with it becomes a SettingsError and nothing else.
"""

import json
import os
import re
import stat
from typing import Any, Dict, List, Tuple

from osaccel.messages import SettingsError, shown

YAML_SUFFIXES = (".yaml", ".yml")
# In bytes. The largest files of ours are reports. PyYAML needs up to 20 microseconds a byte.
LARGEST_JSON, LARGEST_YAML = 2 << 20, 32 << 10
# Comments are looked for in what a person wrote.
MOST_WITH_COMMENTS = 32 << 10
# Converting n digits costs n squared, and Python itself refuses above 4,300.
MOST_DIGITS = 400
_LONG_NUMBER = re.compile(f"[0-9]{{{MOST_DIGITS + 1}}}")
_KINDS = (
    (stat.S_ISFIFO, "a FIFO or pipe"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
)


def read_file(path: str) -> Any:
    """The content of a JSON or YAML file, by its ending; SettingsError for whatever cannot be read as such."""
    is_yaml = path.lower().endswith(YAML_SUFFIXES)
    text = read_text(path, LARGEST_YAML if is_yaml else LARGEST_JSON)
    if _LONG_NUMBER.search(text):
        raise SettingsError(f"{path}: holds a number of more than {MOST_DIGITS} digits.")
    return _parse_yaml(path, text) if is_yaml else _parse_json(path, text)


def read_text(path: str, most: int) -> str:
    """The text of a regular UTF-8 file of at most `most` bytes; what is larger, or no file, is not opened."""
    try:
        check_regular(path)
        # A file may be replaced by a FIFO in between, which would keep us waiting for a writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            size = os.fstat(handle).st_size
            data = b"" if size > most else file.read(most + 1) or b""
    except (OSError, ValueError) as error:
        raise cannot_be_read(path, error) from None
    if max(size, len(data)) > most:
        raise SettingsError(f"{path}: cannot be read: it is larger than {most} bytes.")
    try:
        # Editors on Windows put a byte order mark before the text.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SettingsError(f"{path}: cannot be read: it is not a text file (UTF-8).") from None


def check_regular(path: str) -> None:
    """Raise OSError or ValueError unless a regular file is at `path`; opening a device could set something off."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError("Is a directory")
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise OSError(f"{name}, not a regular file")


def cannot_be_read(path: str, error: Exception) -> SettingsError:
    """The message for a path that the system refuses: OSError, or ValueError for NUL and what is no file name."""
    return SettingsError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.")


def _parse_json(path: str, text: str) -> Any:
    try:
        return _loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}: not valid JSON: {error}.") from None
    except RecursionError:
        raise SettingsError(f"{path}: not valid JSON here: nested too deeply.") from None
    except _DuplicateKey as error:
        raise SettingsError(f"{path}: the key {error} stands there twice.") from None


def _loads(text: str) -> Any:
    """JSON; where it is none, without the comments that msModelSlim's documentation has in its example."""
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError:
        if len(text) > MOST_WITH_COMMENTS or not ("#" in text or "//" in text):
            raise
        lines = "\n".join(_without_comment(line) for line in text.split("\n"))
        return json.loads(lines, object_pairs_hook=_no_duplicates)


def _without_comment(line: str) -> str:
    """The line up to `#` or `//` outside of a text; places in it stay what they are."""
    is_text = is_escaped = False
    for place, letter in enumerate(line):
        if is_escaped:
            is_escaped = False
        elif is_text and letter == "\\":
            is_escaped = True
        elif letter == '"':
            is_text = not is_text
        elif not is_text and (letter == "#" or line.startswith("//", place)):
            return line[:place]
    return line


class _DuplicateKey(Exception):
    """A JSON object repeats a key."""


def _no_duplicates(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen = set()  # type: ignore[var-annotated]
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKey(shown(key))
            seen.add(key)
    return mapping


def _parse_yaml(path: str, text: str) -> Any:
    # Imported here: processes that need no YAML should not pay for it.
    from osaccel.strict_yaml import InvalidYaml, parse

    try:
        return parse(text)
    except InvalidYaml as error:
        raise SettingsError(f"{path}: not valid YAML: {error}.") from None
