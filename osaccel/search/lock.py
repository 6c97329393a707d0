# SPDX-License-Identifier: Apache-2.0
"""One search at a time on one output: a file that names its owner, touched while the owner lives."""

import json
import logging
import os
import tempfile
import time
from typing import Optional

from osaccel.search import presence
from osaccel.search.errors import SearchError
from osaccel.search.presence import Heart, Owner, silence

logger = logging.getLogger("osaccel")


class Lock:
    """Held until `release`, or until another search takes it over because this process is taken for dead.

    Made by `take`. A second search of the same process takes over too: it is the one that is wanted now.
    """

    def __init__(self, path: str, owner: Owner):
        self.path, self.owner = path, owner
        self._heart = Heart(path, self._may_be_held)

    @classmethod
    def take(cls, path: str) -> "Lock":
        """Take the lock, from a search that has ended too.

        Raises:
            SearchError: a living search has it, or it cannot be written.
        """
        owner = Owner.here()
        try:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            while not place(path, owner):
                _make_way(path)
        except OSError as error:
            raise SearchError(f"{path}: cannot be written: {error.strerror}; a search keeps its files there.") from None
        return cls(path, owner)

    def is_held(self) -> bool:
        """Whether it is still ours."""
        holder = owner_of(self.path)
        return holder is not None and holder.token == self.owner.token

    def _may_be_held(self) -> bool:
        # A file system that is away for a moment is no reason to stop the heart.
        holder = owner_of(self.path)
        return holder is None or holder.token == self.owner.token

    def check(self) -> None:
        """Raise SearchError when another search has taken over: what this one would write does not belong there."""
        if not self.is_held():
            raise SearchError(
                f"{self.path}: {owner_of(self.path) or 'somebody'} has taken this search over; it ends here."
            )

    def release(self) -> None:
        """Let others have it."""
        self._heart.stop()
        if self.is_held():
            os.unlink(self.path)


def owner_of(path: str) -> Optional[Owner]:
    """Who has the lock; None when there is none, or when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return Owner.from_json(json.loads(file.read().decode()))
    except (OSError, ValueError):
        return None


def place(path: str, owner: Owner) -> bool:
    """Put a file with the owner's name at `path` unless there is one; whether it was put there."""
    directory, name = os.path.split(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(prefix=name + ".", suffix=".part", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(json.dumps(owner.to_json()).encode())
            file.flush()
            os.fsync(file.fileno())
        return _linked(temporary, path)
    finally:
        os.unlink(temporary)


def _linked(mine: str, path: str) -> bool:
    """In one step, so that it is never seen half written."""
    try:
        os.link(mine, path)
        return True
    except FileExistsError:
        return False
    except OSError:
        # No hard links here: it may be seen empty for a moment, which is taken for one that is held.
        return _copied(mine, path)


def _copied(mine: str, path: str) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file, open(mine, "rb") as source:
        file.write(source.read())
    return True


def _make_way(path: str) -> None:
    """Remove a lock whose owner has ended; SearchError when it lives."""
    holder = owner_of(path)
    if holder is None and not os.path.exists(path):
        return
    if not _is_free(path, holder):
        whose = f"{holder}, since {_ago(holder)}" if holder else "a process whose name cannot be read"
        raise SearchError(
            f"{path}: another search has this output: {whose}, heard from {silence(path):.0f} s ago. Two searches on "
            "one output would mix; wait for it, end it, or give this one another output."
        )
    aside = f"{path}.{os.getpid()}.part"
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    now = owner_of(aside)
    if now != holder:
        # Between reading and renaming somebody else was faster: it is theirs.
        _linked(aside, path)
    elif holder is not None and not holder.is_here:
        logger.info("%s has ended without finishing its search; this one takes over", holder)
    os.unlink(aside)


def _is_free(path: str, holder: Optional[Owner]) -> bool:
    """Whether the owner has ended. Of one on another machine only the pulse can tell, which takes up to a minute."""
    if holder is not None and holder.is_local:
        return holder.is_here or holder.is_gone(path)
    touched, has_said = _touched(path), False
    while silence(path) <= presence.LIMIT:
        now = _touched(path)
        if now is None or now != touched:
            return now is None
        if not has_said:
            has_said = True
            logger.info("%s: waiting for a sign of life of %s", path, holder or "whoever has it")
        time.sleep(min(1.0, presence.BEAT))
    return True


def _touched(path: str) -> Optional[float]:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return None


def _ago(holder: Owner) -> str:
    seconds = max(0.0, time.time() - holder.since)
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
