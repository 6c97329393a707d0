# SPDX-License-Identifier: Apache-2.0
"""Who is there: processes that leave their names in files, touch them while they live, and may be on other machines."""

import os
import platform
import socket
import tempfile
import threading
import time
import uuid
from dataclasses import asdict, dataclass, fields
from typing import Any, Callable, Dict, List, Optional, Tuple

# A file is touched this often; one that was not for so long is of a process that is taken for dead. In seconds.
BEAT, LIMIT = 5.0, 60.0


@dataclass(frozen=True)
class Owner:
    """A process, as others name it.

    Attributes:
        pid, host: for people.
        machine: the same where process numbers mean the same processes: one boot, one container.
        begun: when the process began, in the machine's own unit: process numbers come back.
        since: when it wrote this, seconds since 1970.
        token: different in everything that is owned.
    """

    pid: int
    host: str
    machine: str
    begun: str
    since: float
    token: str

    @classmethod
    def here(cls) -> "Owner":
        """This process."""
        pid = os.getpid()
        return cls(pid, socket.gethostname(), _machine(), _begun(pid) or "", time.time(), uuid.uuid4().hex[:16])

    @classmethod
    def from_json(cls, content: Any) -> "Owner":
        """Raises ValueError when it is not what `to_json` gave."""
        if not isinstance(content, dict) or set(content) != {item.name for item in fields(cls)}:
            raise ValueError("this is nobody's name")
        return cls(**content)

    def to_json(self) -> Dict[str, Any]:
        return asdict(self)

    @property
    def is_here(self) -> bool:
        """Whether it is this process."""
        return self.is_local and self.pid == os.getpid() and self.begun == (_begun(self.pid) or "")

    @property
    def is_local(self) -> bool:
        """Whether this process can see whether that one lives."""
        return self.machine == _machine() and os.name == "posix"

    def is_gone(self, path: str) -> bool:
        """Whether the process has ended, or, on another machine, has not touched `path` for LIMIT seconds."""
        if self.is_local:
            return not _is_running(self.pid) or (_begun(self.pid) or "") != self.begun
        return silence(path) > LIMIT

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def silence(path: str) -> float:
    """Seconds since a file was touched, by its own file system's clock: machines' clocks differ. 0 if it is gone."""
    handle, probe = _probe(path)
    try:
        return max(0.0, os.fstat(handle).st_mtime - os.stat(path).st_mtime)
    except FileNotFoundError:
        return 0.0
    finally:
        os.close(handle)
        os.unlink(probe)


def _probe(path: str) -> Tuple[int, str]:
    """An empty file beside `path`, and a handle to it."""
    directory, name = os.path.split(os.path.abspath(path))
    return tempfile.mkstemp(prefix=name + ".", suffix=".part", dir=directory)


class Heart:
    """Touches a file every BEAT seconds, in a thread of its own, until `stop` or for as long as `goes_on` says so."""

    def __init__(self, path: str, goes_on: Callable[[], bool] = lambda: True):
        self.path, self._goes_on = path, goes_on
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="osaccel-heart", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not threading.current_thread():
            # Not for long: a file system that hangs may hold it.
            self._thread.join(1.0)

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT):
            try:
                if not self._goes_on():
                    return
                os.utime(self.path)
            except OSError:
                # A file system that is away for a moment; the next beat may succeed.
                continue


def _machine() -> str:
    """The boot and the space of process numbers, or the best that is known of them."""
    parts = [socket.gethostname()]
    for read in (_boot, _process_space):
        parts.append(read() or "")
    return " ".join(parts)


def _boot() -> Optional[str]:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return platform.node()


def _process_space() -> Optional[str]:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _stat(pid: int) -> Optional[List[str]]:
    """The words of /proc/PID/stat behind the name, or None where there is no such thing."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def _begun(pid: int) -> Optional[str]:
    words = _stat(pid)
    return words[19] if words else None


def _is_running(pid: int) -> bool:
    words = _stat(pid)
    if words is not None:
        # A zombie has ended; nobody has asked for its status yet.
        return words[0] not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
