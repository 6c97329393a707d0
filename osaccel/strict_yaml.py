# SPDX-License-Identifier: Apache-2.0
"""The part of YAML that settings need: mappings, lists and plain scalars, numbers and booleans as YAML 1.2 has them.

No aliases (a few lines of them expand to gigabytes), no tags, no repeated keys, no deep nesting; and none of YAML 1.1's
surprises: `010`, `1:30`, `0x1F`, `1_000`, `2024-01-01`, `on` and `yes` are text.
"""

import re
from typing import Any, Dict

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from osaccel.messages import shown

DEEPEST = 20
_TOO_DEEP = f"nested more than {DEEPEST} levels deep"


class InvalidYaml(ValueError):
    """The text is not YAML, or not of the part that is read here; the message says where."""


class _Composer(Reader, Scanner, Parser, Composer, BaseResolver):
    """PyYAML's composer in Python: the one in C has no limit to its recursion."""

    def __init__(self, text: str):
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        # The scanner looks 1,024 characters ahead of the composer, and a bracket costs it time for all that are open.
        if self.flow_level >= DEEPEST:
            raise InvalidYaml(f"line {self.line + 1}: {_TOO_DEEP}")
        super().fetch_flow_collection_start(token_class)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _at(event, f"the alias *{event.anchor} is not allowed")
        if event.tag is not None:
            raise _at(event, f"the tag {shown(event.tag)} is not allowed")
        self.depth += 1
        if self.depth > DEEPEST:
            raise _at(event, _TOO_DEEP)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_PREFIX = "tag:yaml.org,2002:"
# Tag, pattern, the characters that a scalar of this kind starts with.
_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][-+]?[0-9]+)?", list("-+0123456789.")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
)
for _name, _pattern, _first in _SCALARS:
    _Composer.add_implicit_resolver(_PREFIX + _name, re.compile(f"(?:{_pattern})\\Z"), _first)


def parse(text: str) -> Any:
    """The one document in `text`, None when there is none; raises InvalidYaml."""
    try:
        node = _Composer(text).get_single_node()
    except yaml.YAMLError as error:
        raise InvalidYaml(" ".join(str(error).split())) from None
    # PyYAML's scanner lets through what chr() and int() say of escapes and version numbers.
    except (ValueError, OverflowError) as error:
        raise error if isinstance(error, InvalidYaml) else InvalidYaml(str(error)) from None
    return None if node is None else _value(node)


def _value(node: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node)
    kind = node.tag[len(_PREFIX) :]
    if kind == "int":
        return int(node.value)
    if kind == "float":
        return _float(node.value)
    if kind in ("null", "bool"):
        return None if kind == "null" else node.value.lower() == "true"
    return node.value


def _mapping(node: Any) -> Dict[Any, Any]:
    mapping: Dict[Any, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise _at(key_node, "a key must be one word")
        key = _value(key_node)
        if key in mapping:
            raise _at(key_node, f"the key {shown(key)} stands there twice")
        mapping[key] = _value(value_node)
    return mapping


def _float(text: str) -> Any:
    """A number, or the text where only a sign, a point or an exponent stands."""
    try:
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except ValueError:
        return text


def _at(place: Any, message: str) -> InvalidYaml:
    return InvalidYaml(f"line {place.start_mark.line + 1}: {message}")
