"""Phrases that depend on a number."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 step``, ``4 steps``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
