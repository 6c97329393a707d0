# SPDX-License-Identifier: Apache-2.0
"""What a page says, whatever kind of search it tells of; `page.html` is its only reader."""

import os
import shlex
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from osaccel.report import words
from osaccel.report.figures import Figure


class Table(NamedTuple):
    """Rows under column names; rows whose number is in `marked` are what was chosen."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[int] = ()


@dataclass
class Content:
    """A page.

    Args:
        title: what kind of search; found: sentences that say what it found.
        following: what to do next; command: what applies the result, empty where that is of no use.
        facts: headings with what is known, label by label, below the pictures.
        prompts: what the search looked at.
    """

    title: str
    found: List[str]
    following: str
    command: str
    figures: List[Figure]
    tables: List[Table] = field(default_factory=list)
    facts: Dict[str, Mapping[str, Any]] = field(default_factory=dict)
    prompts: List[str] = field(default_factory=list)
    date: str = ""
    versions: str = ""


def without_empty_columns(table: Table) -> Table:
    """Without the columns in which no row knows anything, such as PSNR where no frames were decoded."""
    kept = [n for n in range(len(table.columns)) if any(row[n] != words.UNKNOWN for row in table.rows)]
    columns = [table.columns[n] for n in kept]
    return table._replace(columns=columns, rows=[[row[n] for n in kept] for row in table.rows])


def command(option: str, report: Mapping[str, Any]) -> str:
    """The launcher with the file that a search wrote."""
    return f"python -m osaccel.run {option} {shlex.quote(os.path.abspath(report['stem']))} -- COMMAND..."


def compare(other: str, file: str, report: Mapping[str, Any]) -> str:
    """How to judge what was found; what to do where it is not good enough goes on from here."""
    if report.get("frames"):
        return (
            f"Compare the frames below. If the {other} ones are as good to you as the plain ones, run your command "
            f"with the {file}. If not,"
        )
    return f"Run your command with the {file}. If the videos are not as good to you as the plain ones,"


def prompts_of(report: Mapping[str, Any]) -> List[str]:
    """The prompts, one by one; a call may have had several."""
    found: List[str] = []
    for prompt in report.get("prompts") or ():
        found += prompt if isinstance(prompt, list) else [prompt] if isinstance(prompt, str) else []
    return found


def known(facts: Mapping[str, Any]) -> Dict[str, Any]:
    """The facts that there are."""
    return {label: value for label, value in facts.items() if value not in (None, "")}


def made_for(bound: Mapping[str, Any]) -> Dict[str, Any]:
    """What a result is bound to, in words."""
    return known(
        {
            "steps": bound.get("steps"),
            "transformer blocks": bound.get("blocks"),
            "sampler": bound.get("sampler"),
            "guidance scale": bound.get("guidance_scale"),
            "video": words.resolution(bound),
            "model": bound.get("model") and f"weights {bound['model']}",
            "timesteps": bound.get("timesteps"),
        }
    )


def spent(cost: Mapping[str, Any]) -> Dict[str, Any]:
    """What a search took, in words."""
    forms: Dict[str, Tuple[str, Callable[[Any], str]]] = {
        "plain_generations": ("network work", lambda n: f"{n:.2f} plain generations, the recorded ones counted in"),
        "seconds": ("time", words.duration),
        "plain_seconds": ("of it the plain generations", words.duration),
        "block_forwards": ("block forwards", lambda n: f"{n:g}"),
        "recording_bytes": ("recordings kept", words.size),
        "instrument_bytes": ("kept on the device at most", words.size),
    }
    return {label: form(cost[key]) for key, (label, form) in forms.items() if cost.get(key) is not None}
