"""The ``wadi`` command, also as ``python -m wadi``."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command line and exit; Ctrl-C while it is being imported ends like Ctrl-C later."""
    try:
        from wadi.cli.main import main

        code = main()
    except KeyboardInterrupt:
        print("wadi: interrupted.", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    run()
