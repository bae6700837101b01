"""Numbers with bounds, for command-line options and for settings.

For an option: ``add("--count", type=COUNT, default=1)``. For a setting: ``COUNT.check("count", value)``. The error names the
option, the value and the bounds. NaN and infinity are never accepted.
"""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from dataclasses import dataclass

from wadi.errors import WadiError

SEEDS = 2**63  # torch generators take seeds below this


@dataclass(frozen=True)
class Whole:
    """Parse a whole number from ``low`` to ``high``, both included."""

    low: int
    high: int

    def __call__(self, value: object) -> int:
        text = "" if isinstance(value, bool) else str(value).strip()
        number = int(text) if re.fullmatch(r"[+-]?[0-9]{1,30}", text) else None
        if number is None or not self.low <= number <= self.high:
            raise ArgumentTypeError(f"{_short(value)} is not a {self!r}")
        return number

    def check(self, name: str, value: object) -> None:
        """Raise `WadiError` if ``value`` is out of bounds."""
        _check(self, name, value)

    def __repr__(self) -> str:
        return f"whole number from {self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Number:
    """Parse a finite number from ``low`` to ``high``, both included. With ``above``, ``low`` itself is not allowed."""

    low: float
    high: float
    above: bool = False

    def __call__(self, value: object) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(str(value))
        except ValueError:
            number = math.nan
        if not (self.low < number if self.above else self.low <= number) or not number <= self.high:
            raise ArgumentTypeError(f"{_short(value)} is not a {self!r}")
        return number

    def accepts(self, value: object) -> bool:
        """Return whether ``value`` is a number within the bounds."""
        try:
            self(value)
        except ArgumentTypeError:
            return False
        return True

    def check(self, name: str, value: object) -> None:
        """Raise `WadiError` if ``value`` is out of bounds."""
        _check(self, name, value)

    def __repr__(self) -> str:
        return f"number {'above' if self.above else 'from'} {self.low:g} {'and up to' if self.above else 'to'} {self.high:g}"


def _check(bounds: Whole | Number, name: str, value: object) -> None:
    try:
        bounds(value)
    except ArgumentTypeError as error:
        raise WadiError(f"{name} is {_short(value)}. It must be a {bounds!r}: set --{name.replace('_', '-')}.") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


COUNT = Whole(1, 10_000_000)  # images, prompts, rows
BATCH = Whole(1, 65_536)  # images or prompts at once
SEED = Whole(0, SEEDS - 1)
STEPS = Whole(1, 1000)  # steps of a sampler; schedules have 1000 timesteps, see `wadi.sampling` for shorter ones
UPDATES = Whole(1, 100_000_000)  # steps of a training run
RANK = Whole(1, 65_536)
SIDE = Whole(1, 65_536)  # side of an image in pixels, or of a matrix in rows
PROCESSES = Whole(1, 65_536)
THREADS = Whole(1, 4096)
ROUNDS = Whole(1, 10_000)  # repetitions of a measurement
TIMESTEP = Whole(0, 1_000_000)
GUIDANCE = Number(-1000, 1000)
RATE = Number(0, 1e30, above=True)  # learning rate
SCALE = Number(-1000, 1000)
ADAPTER_SCALE = Number(-4, 4)  # of a LoRA or LoRaD; larger than any in common use
SHARE = Number(0, 1)
