# SPDX-License-Identifier: Apache-2.0
"""A page in Chinese, NAME.zh.md, says what NAME.md says, and no link is dead."""

import re
from pathlib import Path
from typing import NamedTuple, Tuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)]+)\)")
PAGES = sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/*.md")) + sorted(ROOT.glob("benchmarks/**/*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TRANSLATED = [name for name in NAMES if name.endswith(".zh.md")]


class Section(NamedTuple):
    """What a translation must not change, between two headings."""

    level: int
    fences: Tuple[str, ...]
    code: frozenset
    links: frozenset
    rows: Tuple[Tuple[str, ...], ...]  # the numbers of every table row
    decimals: Tuple[str, ...]


def sections(text):
    fences = FENCE.findall(text)
    # Headings inside a fence are none.
    pieces = re.split(r"^(#+) .*$", FENCE.sub("\0", text), flags=re.MULTILINE)[1:]
    for marks, body in zip(pieces[::2], pieces[1::2]):
        count = body.count("\0")
        yield section(len(marks), fences[:count], body)
        del fences[:count]


def section(level, fences, body):
    prose = " ".join(body.split())
    code = re.findall(r"`([^`]+)`", prose)
    links = [target.replace(".zh.md", ".md") for target in LINK.findall(prose)]
    rows = [re.findall(r"\d*\.?\d+", line) for line in body.splitlines() if line.startswith("|")]
    decimals = re.findall(r"\d*\.\d+", re.sub(r"`[^`]+`|^\|.*$", "", body, flags=re.MULTILINE))
    return Section(
        level, tuple(fences), frozenset(code), frozenset(links), tuple(map(tuple, rows)), tuple(sorted(decimals)),
    )  # fmt: skip


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def english(name):
    return name.replace(".zh.md", ".md")


def both(name):
    return list(sections(text(name))), list(sections(text(english(name))))


PAIRS = [(name, number) for name in TRANSLATED for number in range(len(both(name)[1]))]


@pytest.mark.parametrize("name", TRANSLATED)
def test_the_chinese_page_has_the_same_headings(name):
    chinese, original = both(name)
    assert [section.level for section in chinese] == [section.level for section in original]


@pytest.mark.parametrize("name", TRANSLATED)
def test_the_chinese_page_is_in_chinese_and_as_long(name):
    prose = re.sub(r"`[^`]+`", "", FENCE.sub("", text(english(name))))
    assert len(re.findall("[\u4e00-\u9fff]", text(name))) > len(re.findall("[A-Za-z]{2,}", prose))


@pytest.mark.parametrize("name, number", PAIRS)
def test_the_chinese_page_has_the_same_commands_names_links_and_numbers(name, number):
    chinese, original = both(name)
    assert chinese[number] == original[number]


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_chinese_page_and_its_original_lead_to_each_other_and_else_stay_in_their_language(name):
    links, others = (set(LINK.findall(text(page))) for page in (name, english(name)))
    assert Path(english(name)).name in links and Path(name).name in others
    folder = (ROOT / name).parent
    for target in links - {Path(english(name)).name}:
        assert target.endswith(".zh.md") or not (folder / target.replace(".md", ".zh.md")).exists(), target
    assert [target for target in others if target.endswith(".zh.md")] == [Path(name).name]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in LINK.findall(FENCE.sub("", text(name))):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            page = (ROOT / name).parent / file if file else ROOT / name
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), target


def anchors(page):
    """What the headings of a page can be linked by."""
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_every_page_of_the_docs_is_linked_from_another_one():
    linked = {(ROOT / name).parent / target.partition("#")[0] for name in NAMES for target in LINK.findall(text(name))}
    assert [name for name in NAMES if name.startswith("docs/") and ROOT / name not in linked] == []
