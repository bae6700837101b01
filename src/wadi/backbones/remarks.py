"""What diffusers remarks at every call, said once per process: that a prompt is longer than the text encoder reads."""

from __future__ import annotations

import logging

TRUNCATED = "truncated"  # in each such remark of diffusers' pipelines, which also prints all that was cut
SHOWN = 300  # characters


class TruncationOnce(logging.Filter):
    """Passes the first remark about a truncated prompt, shortened, and drops the later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first: logging.LogRecord | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether ``record`` is printed."""
        message = record.getMessage()
        if TRUNCATED not in message or record is self.first:  # several handlers see the same record
            return True
        if self.first is not None:
            return False
        shortened = message if len(message) <= SHOWN else f"{message[:SHOWN]}..."
        record.msg, record.args = f"{shortened} This is not repeated for later prompts.", ()
        self.first = record
        return True


_ONCE = TruncationOnce()


def quieten_truncation() -> None:
    """Print diffusers' remark about long prompts once in this process; loggers of the user's own stay as they are."""
    for handler in logging.getLogger("diffusers").handlers:
        handler.addFilter(_ONCE)  # no second time: the logging module compares filters
