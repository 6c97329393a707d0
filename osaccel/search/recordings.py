# SPDX-License-Identifier: Apache-2.0
"""The recorded calls of a search in its journal: recorded once, read back after a kill, and lent to helpers."""

from typing import Any, Dict, List, Mapping, Optional, Sequence

from osaccel.binding import digest_of
from osaccel.search.errors import SearchError
from osaccel.search.journal import Journal
from osaccel.search.recording.replay import Call, Replay
from osaccel.search.team import Team


def name_of(number: int, member: int) -> str:
    """Where the n-th recorded call of one rank of the team is."""
    return f"recording-{number}-{member}"


def keep(journal: Journal, team: Team, number: int, replay: Replay, observed: Mapping[str, Any]) -> None:
    """Keep a call that was recorded, and what was observed meanwhile: plain values and tensors."""
    content = {"call": digest_of(replay.call.arguments), "replay": replay.content(), "observed": dict(observed)}
    journal.save(name_of(number, team.member), content)


def resume(journal: Journal, team: Team, number: int, replay: Replay) -> Optional[Dict[str, Any]]:
    """Read a kept recording back into `replay`; what was observed, or None when some rank has none of this call."""
    known = journal.load(name_of(number, team.member))
    if not team.all_agree(known is not None and known["call"] == digest_of(replay.call.arguments)):
        return None
    replay.load(known["replay"])
    return known["observed"]


def shared(replays: Sequence[Replay]) -> Dict[str, Any]:
    """What a helper needs to run the recorded calls on its own pipeline; for `Workers.publish`."""
    return {
        "calls": [{"args": replay.call.args, "kwargs": replay.call.kwargs} for replay in replays],
        "timesteps": replays[0].timesteps,
    }


def adopt(journal: Journal, team: Team, call: Call, context: Mapping[str, Any]) -> List[Replay]:
    """Rank 0's recorded calls as this rank's own, on its pipeline and device, with rank 0's noise."""
    device = {"device": call.kwargs["device"]} if "device" in call.kwargs else {}
    replays = []
    for number, content in enumerate(context["calls"]):
        kwargs = {**content["kwargs"], **device}
        replay = Replay(Call(call.function, call.pipeline, content["args"], kwargs, call.target), context["timesteps"])
        known = journal.load(name_of(number, team.member))
        if known is None:
            raise SearchError(f"{journal.directory}: rank 0's recording {number + 1} cannot be read.")
        replay.load(known["replay"])
        replays.append(replay)
    return replays
