# SPDX-License-Identifier: Apache-2.0
"""What is said about a wrong setting: one printable line of bounded length, whatever the setting holds."""

import difflib
import reprlib
from typing import Any, Iterable

LONGEST_MESSAGE = 2000
LONGEST_NAME = 100


class SettingsError(ValueError):
    """A setting or file is wrong; the message names the place, the key, the value and what is allowed."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` in one line that any stream can take: its middle cut out when it is long, what does not print escaped."""
    text = _cut(text)
    return text if text.isprintable() else _cut("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _cut(text: str) -> str:
    half = LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxtuple, _short.maxdict = 2, 8, 8, 8
_short.maxstring, _short.maxother, _short.maxlong = 120, 120, 60


def shown(value: Any) -> str:
    """`repr(value)`, cut where it is long."""
    return _short.repr(value)


def closest(name: str, allowed: Iterable[str]) -> str:
    """' Did you mean ...?' for a misspelt name, or the list of what is allowed."""
    choices = list(allowed)
    near = difflib.get_close_matches(name[:LONGEST_NAME], choices, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(choices)}."


def kind(value: Any) -> str:
    """The type of a value that JSON or YAML can hold, in words."""
    names = {dict: "a mapping", list: "a list", str: "text", bool: "a boolean", type(None): "nothing"}
    return names.get(type(value), f"a number of type {type(value).__name__}")
