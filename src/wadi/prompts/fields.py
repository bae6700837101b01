"""Find the prompt in a row of a file: by the field's name, or by the names that data sets usually use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from wadi.errors import WadiError

Text = str | list[Any] | None  # the prompt of a row, several captions of one image, or no prompt
USUAL_FIELDS = ("Task2.Caption", "prompt", "caption", "text")  # tried in this order; the first is JourneyDB's


class Field:
    """Gets the prompt from each row.

    Without a name it uses the first of `USUAL_FIELDS` that a row has, and keeps to it for all later rows.

    Attributes:
        name: name of the field, with dots for a nested field; None while it is unknown.
        columns: the fields of the first row, for the message of `check`.
    """

    def __init__(self, name: str | None) -> None:
        self.name, self.has_values = name, False
        self.columns: dict[str, Any] = {}

    def __call__(self, row: Mapping[str, Any]) -> Text:
        if self.name is None:
            self.name = next((usual for usual in USUAL_FIELDS if self._value(row, usual) is not None), None)
        if not self.columns:
            self.columns.update(row)
        value = self._value(row, self.name) if self.name is not None else None
        self.has_values = self.has_values or value is not None
        return value if isinstance(value, (str, list)) else None

    @staticmethod
    def _value(row: Any, name: str) -> Any:
        """Return ``row[name]``, or the value that a dotted name leads to; None if there is none."""
        if isinstance(row, Mapping) and name in row:
            return row[name]
        for part in name.split("."):
            row = row.get(part) if isinstance(row, Mapping) else None
        return row

    def check(self, source: object) -> None:
        """Raise `WadiError` if no row of ``source`` had the field."""
        if not self.has_values and self.columns:
            missing = repr(self.name) if self.name else f"any of {', '.join(USUAL_FIELDS)}"
            raise WadiError(
                f"No row of {str(source)!r} has the field {missing}. Its fields are {', '.join(map(str, self.columns))}. "
                "Set --prompts-field to one of them."
            )
