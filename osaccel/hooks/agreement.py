# SPDX-License-Identifier: Apache-2.0
"""Ranks of a sequence-parallel group sample alike, or all end with the same error: one must not skip another's block.

Every rank in which osaccel is active takes part at its first pipeline call, also one that asks for nothing. They meet
in the store of the default process group, which is polled: nothing hangs on a rank that does not come.
"""

import logging
import os
import pickle
import sys
import threading
import time
from dataclasses import asdict, replace
from typing import Any, Dict, List, Sequence, Union

from osaccel import __version__
from osaccel.messages import SettingsError, shown
from osaccel.settings import TABLE, Settings

logger = logging.getLogger("osaccel")

# Seconds for which a rank is waited for; longer when it has announced itself and may still be loading its model.
LIMIT, PATIENCE = 60.0, 1800.0
# Seconds for which a rank that is about to fail lets the others read why.
_LINGER = 5.0
# Ranks that differ only in these sample alike; `strict` is shared.
_NEUTRAL = ("sources", "log", "strict")
_SEARCH_ONLY = tuple(setting.name for setting in TABLE if setting.yaml[:1] == ("search",))

Own = Union[Settings, SettingsError]
_settled = False


def is_settled() -> bool:
    """Whether this process has agreed with its group, which happens once."""
    return _settled


def announce() -> None:
    """Tell the other ranks, as soon as there is a process group, that osaccel is active in this one."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        threading.Thread(target=_announce, name="osaccel-announce", daemon=True).start()


def _announce() -> None:
    while not _settled:
        # Looked up, not imported: the main thread may be in the middle of importing it.
        dist = sys.modules.get("torch.distributed")
        try:
            if dist is not None and dist.is_available() and dist.is_initialized():
                store = _store()
                if store is not None:
                    store.add(f"active/{dist.get_rank()}", 1)
                return
        except (AttributeError, ImportError, RuntimeError, ValueError):
            # Half imported, or ended already. Unannounced, this rank has a minute like any other.
            pass
        time.sleep(0.2)


def agree(own: Own, group: Any) -> Settings:
    """What this rank samples with: its own settings, or those of the others where it has none.

    Args:
        own: this rank's settings, or what is wrong with them.
        group: the sequence-parallel process group.

    Raises:
        SettingsError: on every rank, when the ranks would not sample alike or one does not take part. Scripts that
            split prompts over ranks need no agreement: their ranks never wait for each other inside a generation.
    """
    global _settled
    import torch.distributed as dist

    ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
    try:
        settings = _exchange(_store(), own, ranks, me)
    except RuntimeError as error:
        raise SettingsError(
            f"The ranks cannot compare their osaccel settings; another one has ended: {error}"
        ) from None
    _settled = True
    return settings


def _exchange(store: Any, own: Own, ranks: Sequence[int], me: int) -> Settings:
    if store is None:
        logger.warning("this process group has no store: the ranks' osaccel settings are not compared")
        return decide({me: own}, [me], me)
    store.set(f"said/{me}", pickle.dumps((__version__, own)))
    store.add(f"spoke/{me}", 1)
    said = _listen(store, ranks)
    store.add(f"heard/{me}", 1)
    try:
        return decide(said, ranks, me)
    except SettingsError:
        # The store ends with the process that holds it.
        _wait(store, "heard", list(said), _LINGER)
        raise


def _store() -> Any:
    """The store in which the process group was made; None with a backend that needs none, as MPI's."""
    from torch.distributed import PrefixStore
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    return None if store is None else PrefixStore("osaccel", store)


def _listen(store: Any, ranks: Sequence[int]) -> Dict[int, Own]:
    """What each rank said; a rank that does not come in time is left out."""
    waited, missing = 0.0, _wait(store, "spoke", ranks, min(LIMIT, 10.0))
    while missing:
        waited += min(LIMIT, 10.0)
        silent = _wait(store, "active", missing, 0.0)
        if waited >= (LIMIT if silent else PATIENCE):
            break
        logger.info("waiting for rank %s at its first pipeline call", _listed(missing))
        missing = _wait(store, "spoke", missing, min(LIMIT, 10.0))
    return {rank: _read(store, rank) for rank in ranks if rank not in missing}


def _wait(store: Any, what: str, ranks: Sequence[int], seconds: float) -> List[int]:
    """The ranks that have not counted up `what` when `seconds` are over."""
    until, pause, missing = time.monotonic() + seconds, 0.01, list(ranks)
    while True:
        # Adding nothing reads a counter without waiting for it, in every kind and version of store.
        missing = [rank for rank in missing if store.add(f"{what}/{rank}", 0) == 0]
        if not missing or time.monotonic() >= until:
            return missing
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


def _read(store: Any, rank: int) -> Own:
    # From ranks of this job, through the store on which torch.distributed itself exchanges pickles.
    try:
        version, own = pickle.loads(store.get(f"said/{rank}"))
    except (AttributeError, ImportError, TypeError, ValueError, pickle.UnpicklingError):
        version, own = "another", SettingsError("")
    if version != __version__:
        return SettingsError(
            f"osaccel is of version {version} there, {__version__} here; install the same on every node."
        )
    return own


def decide(said: Dict[int, Own], ranks: Sequence[int], me: int) -> Settings:
    """The settings of rank `me`, from what all have said; every rank comes to the same decision or SettingsError."""
    for rank, own in said.items():
        if isinstance(own, SettingsError):
            raise SettingsError(f"Rank {rank} of the sequence-parallel group cannot sample: {own}")
    settings = {rank: own for rank, own in said.items() if isinstance(own, Settings)}
    speakers = [rank for rank, own in settings.items() if _says_something(own)]
    missing = [rank for rank in ranks if rank not in said]
    if missing and any(own.accelerates or own.search for own in settings.values()):
        raise SettingsError(
            f"Rank {_listed(missing)} of the sequence-parallel group did not compare its settings within {LIMIT:g} s, "
            f"but rank {_listed(speakers)} asks osaccel for something. There osaccel is not active: OSACCEL_DISABLE is "
            "set, or neither PYTHONPATH nor the OSACCEL_* variables got there. Give every node the same environment."
        )
    for rank in speakers:
        _compare(speakers[0], settings[speakers[0]], rank, settings[rank])
    chosen = settings[me] if me in speakers or not speakers else settings[speakers[0]]
    without = [rank for rank in settings if rank not in speakers]
    if without and speakers and me == speakers[0] and (chosen.accelerates or chosen.search):
        logger.warning("rank %s has no osaccel settings and takes those of rank %d", _listed(without), me)
    return replace(chosen, strict=any(own.strict for own in settings.values()))


def _says_something(settings: Settings) -> bool:
    """Whether anything that changes the samples was set, be it to change nothing."""
    parameters = set(_SEARCH_ONLY) - {"search"}
    return any(name not in ("config", *_NEUTRAL, *parameters) for name in settings.sources)


def what_matters(settings: Settings) -> Dict[str, Any]:
    """Everything that ranks must have in common: contents, not the paths they were read from."""
    found = {name: value for name, value in asdict(settings).items() if name not in _NEUTRAL and name[-5:] != "_file"}
    if settings.cache is not None and not settings.cache.cache_num_blocks:
        found["cache"] = None
    if settings.search is None:
        found = {name: value for name, value in found.items() if name not in _SEARCH_ONLY}
    return found


def _compare(first: int, one: Settings, rank: int, other: Settings) -> None:
    ours, theirs = what_matters(one), what_matters(other)
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if names:
        differences = "; ".join(
            f"{name}: rank {first} has {shown(ours.get(name))}, rank {rank} has {shown(theirs.get(name))}"
            for name in names
        )
        raise SettingsError(
            f"The ranks of one sequence-parallel group have different osaccel settings: {differences}. Give every node "
            "the same variables and files."
        )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
