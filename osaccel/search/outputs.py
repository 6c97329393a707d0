# SPDX-License-Identifier: Apache-2.0
"""The files a search writes for its user: tried before anything is computed, and never a reason to lose a result."""

import json
import logging
import os
import tempfile
from typing import Any, Callable

from osaccel.search.errors import SearchError

logger = logging.getLogger("osaccel")


def check(path: str) -> None:
    """Raise SearchError when `path` cannot be written as it looks now; directories above it are made."""
    if os.path.lexists(path) and not os.path.isfile(path):
        kind = "a directory" if os.path.isdir(path) else "no regular file"
        raise SearchError(f"{path}: the search writes what it finds there, but it is {kind}; name a file.")
    directory = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(directory, exist_ok=True)
        handle, probe = tempfile.mkstemp(prefix=os.path.basename(path) + ".", suffix=".part", dir=directory)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise SearchError(
            f"{path}: the search writes what it finds there, but that will not work: {error.strerror}; name a file in "
            "a directory that can be written to."
        ) from None


def deliver(path: str, content: Any, write: Callable[[], Any]) -> bool:
    """Call `write()`; where that fails, log `content`, JSON-able, in one line. Returns whether it was written."""
    try:
        write()
    except OSError as error:
        logger.error(
            "%s cannot be written: %s. This is what was found: %s", path, error.strerror or error, json.dumps(content)
        )
        return False
    return True
