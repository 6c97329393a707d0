# SPDX-License-Identifier: Apache-2.0
"""The files a search writes for its user are never a reason to lose a result; settings have tried them beforehand."""

import json
import logging
from typing import Any, Callable

logger = logging.getLogger("osaccel")


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
