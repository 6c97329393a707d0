# SPDX-License-Identifier: Apache-2.0
"""The search's memory on disk: whatever was finished before a kill is never computed again.

One directory beside the output holds, all written whole or not at all and with checksums:

    journal.json         the format, and the fingerprint of what the search depends on
    KIND-WORKER.jsonl    records, one a line: evaluations and whatever else a search finds
    NAME.npz             tensors and plain values: recordings, final latents (`osaccel.search.stored`)
    NAME.note, .claim, .beat   how the workers of one run meet (`osaccel.search.workers`); the next run forgets them
    damaged/             what could not be read; it is computed again

and DIRECTORY.lock, beside it, the name of the one search that may write. Nothing in these files runs when it is read.
"""

import json
import logging
import os
import re
import shutil
import zlib
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch

from osaccel.search import presence, stored
from osaccel.search.errors import SearchError
from osaccel.search.evaluation import Evaluation
from osaccel.search.lock import Lock, owner_of, place
from osaccel.search.presence import Owner, silence

logger = logging.getLogger("osaccel")

FORMAT = "osaccel.journal/3"
HEADER, DAMAGED = "journal.json", "damaged"
_EVALUATIONS = "evaluations"
_NAME = re.compile(r"[A-Za-z0-9._-]+")
# Of one run only.
_MEETING = (".note", ".claim", ".beat")
_OURS = (".jsonl", ".npz", ".part", *_MEETING)
# What journals without a format number began with.
_HEADER_BEFORE = "fingerprint.json"


class Journal:
    """Finished work of one search in `directory`, valid for one `fingerprint`.

    Args:
        directory: created when missing.
        fingerprint: JSON-able, what the work depends on; when the directory holds another one, it is emptied and
            `started_anew` says in words what changed.
        is_writer: whether this process owns the search. Others read and add: the ranks that generate together with the
            owner, and its helpers.
        lock: the writer's, where it was taken before; by default the journal takes it.

    Raises:
        SearchError: the directory belongs to a search under way, to nobody we know, or cannot be written.
    """

    def __init__(
        self, directory: str, fingerprint: Mapping[str, Any], is_writer: bool = True, lock: Optional[Lock] = None
    ):
        self.directory = directory
        self.fingerprint: Dict[str, Any] = json.loads(json.dumps(fingerprint))
        self.started_anew: Optional[str] = None
        self._seal = _checksum(json.dumps(self.fingerprint, sort_keys=True))
        self._complained = False
        self.lock: Optional[Lock] = None
        if is_writer:
            self.lock = lock or Lock.take(lock_path(directory))
            try:
                self._open()
            except BaseException:
                self.close()
                raise
        holder = owner_of(lock_path(directory))
        # The run it belongs to: what a joined process writes must not get into another one.
        self.run = holder.token if holder else ""

    @classmethod
    def join(cls, directory: str) -> "Journal":
        """The journal of another process's search under way; SearchError when there is none to be read."""
        header = _read_header(os.path.join(directory, HEADER))
        if header.problem is not None:
            raise SearchError(f"{directory}: {header.problem}.")
        return cls(directory, header.fingerprint, is_writer=False)

    # Records

    def append(self, kind: str, record: Any, worker: int = 0) -> bool:
        """Add a JSON-able record of this kind, lasting when this returns; one process writes for each worker.

        Returns whether it could be written. Where it could not, a warning was logged and the search may go on.
        """
        path = self._path(f"{kind}-{worker}.jsonl")
        return self._written(path, lambda: self._append(path, record))

    def _append(self, path: str, record: Any) -> None:
        # A kill or a full disk may have left half a line; the next one must not be glued to it.
        torn = os.path.exists(path) and not _ends_with_newline(path)
        line = _line(record, self._seal)
        with open(path, "a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + line)
            file.flush()
            os.fsync(file.fileno())

    def records(self, kind: str) -> List[Any]:
        """Every whole record of this kind, of all workers, in a fixed order."""
        found: List[Any] = []
        for name in self.names(f"{kind}-", ".jsonl"):
            found.extend(self._lines(os.path.join(self.directory, name)).records)
        return found

    def add(self, evaluation: Evaluation, worker: int = 0) -> bool:
        """Add a finished evaluation; see `append`."""
        return self.append(_EVALUATIONS, evaluation.to_json(), worker)

    def evaluations(self) -> List[Evaluation]:
        """Every finished evaluation, of all workers, in a fixed order; of each configuration the first."""
        found: Dict[str, Evaluation] = {}
        for record in self.records(_EVALUATIONS):
            try:
                evaluation = Evaluation.from_json(record)
            except ValueError as error:
                raise SearchError(f"{self.directory}: {error} Remove the directory to search anew.") from None
            found.setdefault(evaluation.key, evaluation)
        return list(found.values())

    # Tensors

    def save(self, name: str, content: Any) -> bool:
        """Keep nested plain values and tensors (see `stored.write`) under a name; returns as `append` does."""
        path = self._path(f"{name}.npz")
        return self._written(path, lambda: stored.write(path, content, self._seal))

    def load(self, name: str) -> Any:
        """What `save` kept under this name, tensors on the CPU; None when there is nothing that can be used."""
        path = self._path(f"{name}.npz")
        try:
            return stored.read(path, self._seal)
        except FileNotFoundError:
            return None
        except stored.Damaged as error:
            self._set_aside(path, str(error))
            return None

    def save_tensors(self, name: str, tensors: Mapping[str, torch.Tensor], meta: Any = None) -> bool:
        """Keep named tensors and a JSON-able value with them; returns as `append` does."""
        return self.save(name, {"tensors": dict(tensors), "meta": meta})

    def load_tensors(self, name: str) -> Optional[Tuple[Dict[str, torch.Tensor], Any]]:
        """(tensors, meta) as `save_tensors` kept them, or None."""
        content = self.load(name)
        return None if content is None else (content["tensors"], content["meta"])

    def forget(self, *prefixes: str) -> None:
        """Remove the records and tensors whose names begin so."""
        for name in self.names():
            if name.startswith(prefixes) and name.endswith((".jsonl", ".npz")):
                os.unlink(os.path.join(self.directory, name))

    # How workers meet

    def put(self, name: str, note: Any) -> None:
        """Leave a JSON-able note for the other processes of this run."""
        self._check_run()
        self._write_json(self._path(f"{name}.note"), note)

    def get(self, name: str) -> Any:
        """A note of this run, or None while there is none."""
        return self._read_json(self._path(f"{name}.note"))

    def claim(self, name: str, by: Optional[Owner] = None) -> bool:
        """Whether this process is the first of this run to claim `name`."""
        try:
            return place(self._path(f"{name}.claim"), by or Owner.here())
        except FileNotFoundError:
            # The search is over, and took the directory away.
            return False

    def claimant(self, name: str) -> Optional[Owner]:
        """Who claimed it, or None when nobody did or its name cannot be read."""
        return owner_of(self._path(f"{name}.claim"))

    def is_left(self, name: str) -> bool:
        """Whether it was claimed by a process that has ended; on another machine, whose pulse has stopped."""
        path = self._path(f"{name}.claim")
        holder = owner_of(path)
        if holder is None:
            return silence(path) > presence.LIMIT
        return not holder.is_here and holder.is_gone(self.beat_path(holder))

    def beat_path(self, owner: Owner) -> str:
        """The file that a helper touches while it lives."""
        return self._path(f"{owner.token}.beat")

    def names(self, prefix: str = "", suffix: str = "") -> List[str]:
        """Names of the files there are, sorted."""
        try:
            found = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        return sorted(name for name in found if name.startswith(prefix) and name.endswith(suffix))

    # Its end

    def close(self) -> None:
        """Let another search have the directory; what is in it stays."""
        if self.lock is not None:
            self.lock.release()

    def remove(self) -> None:
        """The search is over: remove everything of ours, and leave what is not."""
        if self.lock is None or not self.lock.is_held():
            return
        self._clear()
        try:
            os.rmdir(self.directory)
        except OSError:
            logger.warning("%s stays: there are files in it that are not of this search", self.directory)
        self.close()

    # Opening

    def _open(self) -> None:
        try:
            os.makedirs(self.directory, exist_ok=True)
            self._examine()
            if not os.path.exists(self._path(HEADER)):
                content = {"format": FORMAT, "fingerprint": self.fingerprint}
                self._write_json(self._path(HEADER), content, seal="")
            self._tidy()
        except OSError as error:
            raise SearchError(
                f"{self.directory}: cannot be used: {error.strerror}; a search keeps what it has finished there."
            ) from None

    def _examine(self) -> None:
        """Make room for this search: go on with what is there, empty it, set it aside, or refuse."""
        names = [name for name in self.names() if name != DAMAGED and not name.endswith(".part")]
        if not names:
            return
        if HEADER not in names:
            if _HEADER_BEFORE not in names:
                raise SearchError(
                    f"{self.directory}: this directory is not a search's (it has no {HEADER}), so nothing in it is "
                    "touched; move it away, or give the search another output."
                )
            self._set_all_aside("was written by an older osaccel")
            return
        header = _read_header(self._path(HEADER))
        if header.is_newer:
            raise SearchError(f"{self.directory}: {header.problem}; remove the directory to search anew.")
        if header.problem is not None:
            self._set_all_aside(header.problem)
        elif header.fingerprint != self.fingerprint:
            self.started_anew = describe_difference(header.fingerprint, self.fingerprint)
            self._clear()
            os.makedirs(self.directory, exist_ok=True)

    def _tidy(self) -> None:
        """Forget how the workers of the run before met, and set aside what is damaged in the records."""
        for name in self.names():
            path = os.path.join(self.directory, name)
            if name.endswith((".part", *_MEETING)):
                os.unlink(path)
            elif name.endswith(".jsonl"):
                self._mend(path)

    def _mend(self, path: str) -> None:
        lines = self._lines(path)
        if lines.damaged:
            self._set_aside(path, f"{lines.damaged} of its lines are not what was written")
        if lines.damaged or lines.torn:
            text = "".join(line + "\n" for line in lines.whole)
            stored.write_whole(path, lambda file: file.write(text.encode()))

    def _clear(self) -> None:
        """Remove what is ours; the header last, so that a kill leaves a directory that is known as ours."""
        for name in self.names():
            if name.endswith(_OURS):
                os.unlink(os.path.join(self.directory, name))
        shutil.rmtree(os.path.join(self.directory, DAMAGED), ignore_errors=True)
        if os.path.exists(self._path(HEADER)):
            os.unlink(self._path(HEADER))

    def _set_all_aside(self, why: str) -> None:
        aside = _free_name(self.directory + ".set-aside")
        os.rename(self.directory, aside)
        os.makedirs(self.directory)
        logger.warning("%s %s; it was set aside as %s, and the search starts anew", self.directory, why, aside)

    def _set_aside(self, path: str, why: str) -> None:
        """Keep a copy out of the way of what is computed again."""
        damaged = os.path.join(self.directory, DAMAGED)
        os.makedirs(damaged, exist_ok=True)
        aside = _free_name(os.path.join(damaged, os.path.basename(path)))
        try:
            os.replace(path, aside)
        except FileNotFoundError:
            return
        logger.warning("%s is damaged (%s); it was set aside as %s and is computed again", path, why, aside)

    # Reading and writing

    def _path(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be the name of a file here.")
        return os.path.join(self.directory, name)

    def _check_run(self) -> None:
        """Raise SearchError when the search that this process writes for is not the one that owns the directory."""
        if self.lock is not None:
            self.lock.check()
        holder = owner_of(lock_path(self.directory))
        if holder is None or holder.token != self.run:
            raise SearchError(f"{self.directory}: the search that this process worked for has ended.")

    def _written(self, path: str, write: Any) -> bool:
        self._check_run()
        try:
            write()
        except (OSError, TypeError) as error:
            if not self._complained:
                self._complained = True
                logger.warning(
                    "%s cannot be written: %s; the search goes on, but if it is interrupted, more of it is lost",
                    path, getattr(error, "strerror", None) or error,
                )  # fmt: skip
            return False
        return True

    def _lines(self, path: str) -> "_Lines":
        with open(path, "rb") as file:
            *whole, torn = file.read().split(b"\n")
        found = _Lines([], [], 0, bool(torn))
        for line in whole:
            try:
                # The fingerprint is in the checksum: what a search of another one added is not taken for ours.
                found.records.append(_record(line, self._seal))
                found.whole.append(line.decode())
            except ValueError:
                found = found._replace(damaged=found.damaged + 1)
        return found

    def _write_json(self, path: str, content: Any, seal: Optional[str] = None) -> None:
        whole = _line(content, self._seal if seal is None else seal)
        stored.write_whole(path, lambda file: file.write(whole.encode()))

    def _read_json(self, path: str) -> Any:
        if not os.path.exists(path):
            return None
        records = self._lines(path).records
        return records[0] if records else None


class _Lines(NamedTuple):
    """What a file of records holds: what they say, their lines, how many lines are damaged, and a torn end."""

    records: List[Any]
    whole: List[str]
    damaged: int
    torn: bool


class _Header(NamedTuple):
    """What journal.json says; `problem` in words when that is nothing we can use."""

    fingerprint: Dict[str, Any] = {}
    problem: Optional[str] = None
    is_newer: bool = False


def _read_header(path: str) -> _Header:
    try:
        with open(path, "rb") as file:
            content = _record(file.read(), seal="")
        name, number = content["format"].split("/")
        fingerprint = dict(content["fingerprint"])
    except FileNotFoundError:
        return _Header(problem="there is no search")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return _Header(problem="has a damaged journal.json")
    if content["format"] != FORMAT:
        newer = int(number) > int(FORMAT.split("/")[1])
        return _Header(problem=f"is of the format {name}/{number}, and this osaccel writes {FORMAT}", is_newer=newer)
    return _Header(fingerprint)


def lock_path(directory: str) -> str:
    """Where the lock of a journal is."""
    return directory + ".lock"


def _line(record: Any, seal: str) -> str:
    """A line that holds a record and its checksum."""
    text = json.dumps(record, allow_nan=False)
    return f'{{"sum": "{_checksum(seal + text)}", "record": {text}}}\n'


def _record(line: bytes, seal: str) -> Any:
    """The record in a line; ValueError when it is not what was written with this seal."""
    try:
        content = json.loads(line.decode())
        record = content["record"]
        # What JSON gives back is written as it was: numbers to the last digit, keys in their order.
        if content["sum"] != _checksum(seal + json.dumps(record)):
            raise ValueError("the checksum does not fit")
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"not a record: {error}") from None
    return record


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _ends_with_newline(path: str) -> bool:
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        if file.tell() == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _free_name(path: str) -> str:
    """`path` with the first number behind it that is not taken."""
    number = 1
    while os.path.exists(f"{path}-{number}"):
        number += 1
    return f"{path}-{number}"


def describe_difference(known: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ "steps was 20, is now 30; ..." for what differs between two fingerprints."""
    return "; ".join(
        f"{key} was {known.get(key, 'unknown')!r}, is now {now.get(key, 'unknown')!r}"
        for key in sorted(set(known) | set(now))
        if known.get(key) != now.get(key)
    )


__all__ = ["FORMAT", "Journal", "describe_difference", "lock_path"]
