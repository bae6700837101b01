"""A sequence of prompts whose texts are read one at a time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import overload


class Texts(Sequence[str]):
    """A sequence of texts. A subclass gives its length, and the text of a row."""

    @abstractmethod
    def text(self, row: int) -> str:
        """Return the text of ``row``, from 0 to the length minus 1."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        rows = range(len(self))  # handles negative indices; IndexError past the end
        if isinstance(index, slice):
            return [self.text(row) for row in rows[index]]
        return self.text(rows[int(index)])
