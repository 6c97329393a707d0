# SPDX-License-Identifier: Apache-2.0
"""README.zh.md says what README.md, docs/migration.md and docs/troubleshooting.md say."""

import re
from pathlib import Path
from typing import NamedTuple, Tuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


class Section(NamedTuple):
    """What a translation must not change, between two headings."""

    level: int
    fences: Tuple[str, ...]
    code: frozenset
    links: frozenset
    rows: Tuple[Tuple[str, ...], ...]  # the numbers of every table row
    decimals: Tuple[str, ...]


def sections(text, deeper=0):
    fences = FENCE.findall(text)
    # Headings inside a fence are none.
    pieces = re.split(r"^(#+) .*$", FENCE.sub("\0", text), flags=re.MULTILINE)[1:]
    for marks, body in zip(pieces[::2], pieces[1::2]):
        count = body.count("\0")
        yield section(len(marks) + deeper, fences[:count], body)
        del fences[:count]


def section(level, fences, body):
    prose = " ".join(body.split())
    code = re.findall(r"`([^`]+)`", prose)
    links = [Path(target).name for target in re.findall(r"\]\(([^)]+)\)", prose)]
    rows = [re.findall(r"\d*\.?\d+", line) for line in body.splitlines() if line.startswith("|")]
    decimals = re.findall(r"\d*\.\d+", re.sub(r"`[^`]+`|^\|.*$", "", body, flags=re.MULTILINE))
    return Section(
        level, tuple(fences), frozenset(code), frozenset(links) - {"README.md", "README.zh.md"},
        tuple(map(tuple, rows)), tuple(sorted(decimals)),
    )  # fmt: skip


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


ENGLISH = [
    *sections(text("README.md")),
    *sections(text("docs/migration.md"), deeper=1),
    *sections(text("docs/troubleshooting.md"), deeper=1),
]
CHINESE = list(sections(text("README.zh.md")))


def test_the_chinese_page_has_the_same_headings():
    assert [section.level for section in CHINESE] == [section.level for section in ENGLISH]
    assert len(re.findall("[\u4e00-\u9fff]", text("README.zh.md"))) > 3000


@pytest.mark.parametrize("number", range(len(ENGLISH)))
def test_the_chinese_page_has_the_same_commands_names_links_and_numbers(number):
    assert CHINESE[number] == ENGLISH[number]
