# SPDX-License-Identifier: Apache-2.0
"""Where osaccel's lines go: into the application's own log where it has one, else to standard error; always once."""

import logging
import os
import sys

from osaccel.settings import LOG_LEVELS

logger = logging.getLogger("osaccel")


class _UnlessConfigured(logging.Handler):
    """Writes to standard error what no handler of the application takes; asked anew for each line.

    Scripts configure no logging, or do so after they have imported the pipeline.
    """

    def emit(self, record: logging.LogRecord) -> None:
        handlers = logger.handlers + (logging.getLogger().handlers if logger.propagate else [])
        if any(_takes(handler, record) for handler in handlers if handler is not self):
            return
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except (OSError, ValueError):
            # Standard error was closed, or its reader is gone: nobody is there to be told.
            pass


def _takes(handler: logging.Handler, record: logging.LogRecord) -> bool:
    return not isinstance(handler, logging.NullHandler) and record.levelno >= handler.level


def prepare() -> None:
    """Make osaccel's lines visible; twice is harmless."""
    # dictConfig and fileConfig disable every logger that is there already, unless they are told not to.
    logger.disabled = False
    if any(isinstance(handler, _UnlessConfigured) for handler in logger.handlers):
        return
    handler = _UnlessConfigured()
    handler.setFormatter(logging.Formatter("[osaccel] %(message)s"))
    logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        level = os.environ.get("OSACCEL_LOG", "INFO").upper()
        logger.setLevel(level if level in LOG_LEVELS else "INFO")


def flush_streams() -> None:
    """Before os._exit, which flushes nothing; a stream may be closed, or never have been there."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            continue
