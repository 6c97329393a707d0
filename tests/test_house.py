# SPDX-License-Identifier: Apache-2.0
"""The house's own rules, read from the source: what may import what, no circles, and functions that fit on a page."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
LONGEST = 50
# Rooms of the search that each hold one search; what they share is on the search's ground floor.
WINGS = ("dit_cache", "plan", "timesteps")
# The search's ground floor, and above it what knows more than one wing.
SEARCH_ORDER = (
    ("combined",),
    WINGS,
    ("planned",),
    ("journalled", "measure"),
    ("session", "recordings"),
    ("workers", "outputs"),
    ("journal",),
    ("recording", "team", "lock", "presence", "stored", "evaluation", "progress"),
    ("errors", "limits", "places"),
)


def modules():
    """path of every module, by dotted name; the demo stands for an upstream and is no part of the house."""
    found = {}
    for path in (ROOT / "osaccel").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path):
    """osaccel's modules that a module imports, anywhere in it: an arrow inside a function is one too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "osaccel")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "osaccel":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


ARROWS = {name: sorted(set(imported(path))) for name, path in MODULES.items()}


def room(module):
    return (module.split(".") + [""])[1]


def documented_order():
    """The line of the page that says which way imports point: groups of rooms, from the top down."""
    (line,) = re.findall(r"^Imports point one way: `(.+)`", PAGE, re.MULTILINE)
    return [group.split() for group in line.split(" > ")]


def crossed(name, levels, place_of):
    """Arrows from this module that point up."""
    height = {place: level for level, places in enumerate(levels) for place in places}
    here = height.get(place_of(name))
    found = [target for target in ARROWS[name] if place_of(target) in height]
    return [] if here is None else [f"{name} -> {target}" for target in found if height[place_of(target)] < here]


def test_every_room_is_in_the_documented_order_and_in_the_table_of_rooms():
    rooms = {room(name) for name in MODULES} - {"", "demo"}
    assert {place for group in documented_order() for place in group} == rooms
    table = " ".join(re.findall(r"^\| `osaccel/.*", PAGE, re.MULTILINE))
    assert [place for place in rooms if f"{place}.py`" not in table and f"{place}/`" not in table] == []


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name):
    if room(name) != "demo":
        assert crossed(name, documented_order(), room) == []
        assert "demo" not in map(room, ARROWS[name])


def test_the_wings_of_the_search_know_the_ground_floor_and_not_each_other():
    def place(module):
        return module.split(".")[2] if module.startswith("osaccel.search.") else ""

    for name in ARROWS:
        assert crossed(name, SEARCH_ORDER, place) == []
        others = [wing for wing in WINGS if wing != place(name)] if place(name) in WINGS else []
        assert not {place(target) for target in ARROWS[name]} & {*others}, name


def test_no_import_leads_back_to_where_it_began():
    def below(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for target in ARROWS.get(name, ()):
                below(target, [*path, name])
            done.add(name)

    done = set()
    for name in MODULES:
        below(name, [])


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_function_is_longer_than_a_page(name):
    # The demo's upstream keeps the upstream's own shape.
    if name.startswith("osaccel.demo.opensora"):
        return
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < LONGEST, node.name
