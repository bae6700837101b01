"""The one error class of the package."""


class WadiError(ValueError):
    """Bad input or a state the user can mend.

    The message says, in this order, what was received, what was expected and what to do. The command
    line prints it as one line and exits with code 2; a library caller catches it as a ``ValueError``.
    """
