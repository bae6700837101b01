"""Print diffusers' message about a prompt that is too long once per process. diffusers logs it at every call."""

from __future__ import annotations

import logging

TRUNCATED = "truncated"  # in each of these messages, which also contain all the text that was cut
SHOWN = 300  # characters


class TruncationOnce(logging.Filter):
    """Pass the first message about a truncated prompt, shortened, and drop the later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first: logging.LogRecord | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether ``record`` is printed."""
        message = record.getMessage()
        if TRUNCATED not in message or record is self.first:  # several handlers receive the same record
            return True
        if self.first is not None:
            return False
        shortened = message if len(message) <= SHOWN else f"{message[:SHOWN]}..."
        record.msg, record.args = f"{shortened} This message is not repeated for later prompts.", ()
        self.first = record
        return True


_ONCE = TruncationOnce()


def print_truncation_once() -> None:
    """Add the filter to diffusers' own log handlers. The user's own loggers are not changed."""
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(_ONCE)  # the logging module ignores a filter that the handler has already
