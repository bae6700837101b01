"""The package's error classes, and two helpers that shorten text for error messages."""


class WadiError(ValueError):
    """The error for bad input, or for a state that the user can repair.

    The message names the fault, the value that was received, and the remedy. The command line prints it as one line and exits
    with code 2. Library code can catch it as a ``ValueError``.
    """


class Interrupted(Exception):
    """A signal stopped the command after everything was saved. ``signal`` is the signal's number."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message: at most 300 characters, without the full stop at the end.

    An error without a message gives the name of its class.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def short_repr(value: object) -> str:
    """Return ``repr(value)``, cut to at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # for example an integer with thousands of digits
        return f"a very long {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
