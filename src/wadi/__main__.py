"""``python -m wadi``."""

import sys

from wadi.cli import main

sys.exit(main())
