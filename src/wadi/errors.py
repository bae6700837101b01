"""The one error class of the package, and what ends a command after a signal."""


class WadiError(ValueError):
    """Bad input or a state the user can mend.

    The message says, in this order, what was received, what was expected and what to do. The command
    line prints it as one line and exits with code 2; a library caller catches it as a ``ValueError``.
    """


class Interrupted(Exception):
    """A signal asked for a stop; everything is saved. ``signal`` is its number."""

    def __init__(self, signal: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal
