"""Prompts of any number, on disk rather than in memory, in an order that depends on seed and position alone."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import torch

from wadi.errors import WadiError
from wadi.io.progress import console
from wadi.prompts.sources import HUB, rows_of

LONGEST = 20_000  # characters of a prompt; encoders read some hundred tokens


class Prompts(Sequence[str]):
    """Texts in one nameless temporary file, mapped into memory, and where each begins: 8 bytes a prompt are held.

    Attributes:
        digest: hash of all texts in their order.
        left_out: rows that had no prompt.
        several: rows that had several captions, of which the first is the prompt.
    """

    def __init__(self, texts: Iterator[str]) -> None:
        """Raises `OSError` if the temporary folder (``TMPDIR``) is full."""
        self._starts, digest = array("q", [0]), hashlib.sha256()
        self.left_out = self.several = 0
        with tempfile.TemporaryFile() as stream:  # the file goes when the map does, however the process ends
            for text in texts:
                content = text.encode()
                stream.write(content)
                self._starts.append(self._starts[-1] + len(content))
                digest.update(len(content).to_bytes(8, "little") + content)
            stream.flush()
            self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""
        self.digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = range(len(self))[int(index)]  # negative ones too; IndexError past the end
        return self._bytes[self._starts[row] : self._starts[row + 1]].decode()


def open_prompts(source: str | Path, field: str | None = None, limit: int | None = None) -> Prompts:
    """The prompts of a file, a glob pattern, a data set or 'zoo', stripped; see `wadi.prompts.sources` for what is read.

    Rows without a prompt are left out. Of a row with a list of captions the first is used. Both are counted, and a line on
    stderr says how many. Duplicates stay: a prompt that is there twice is used twice as often.

    Args:
        field: of rows that have several; dotted for nested ones.
        limit: only so many from the start.
    Raises:
        WadiError: if there is none, or the source cannot be read.
    """
    left_out = several = 0

    def texts() -> Iterator[str]:
        nonlocal left_out, several
        for place, text in rows_of(str(source), field):
            if isinstance(text, list):
                captions = [caption for caption in text if isinstance(caption, str) and caption.strip()]
                several += len(captions) > 1
                text = captions[0] if captions else None
            stripped = (text or "").strip()
            if not stripped:
                left_out += 1
                continue
            if "\0" in stripped:
                raise WadiError(f"Prompts file {place} is binary (it holds NUL bytes). Expected prompts in UTF-8.")
            if len(stripped) > LONGEST:
                raise WadiError(
                    f"The prompt in {place} has {len(stripped):,} characters. Expected at most {LONGEST:,}: is it one a line?"
                )
            if not _is_whole(stripped):
                raise WadiError(
                    f"The prompt in {place} holds half of a surrogate pair. Only whole characters are read: correct it."
                )
            yield stripped

    try:
        prompts = Prompts(itertools.islice(texts(), limit))
    except OSError as error:
        raise WadiError(
            f"Prompts {str(source)!r} cannot be copied to {tempfile.gettempdir()!r}: {error.strerror or error}. Expected room "
            "for their text there: set TMPDIR."
        ) from error
    prompts.left_out, prompts.several = left_out, several
    if not prompts:
        what = "Data set" if str(source).startswith(HUB) else "Prompts file"
        raise WadiError(f"{what} {str(source)!r} holds no prompt. Expected one prompt a line, or a field of prompts.")
    if left_out:
        console.print(f"{left_out:,} rows of {str(source)!r} have no prompt and were left out.", soft_wrap=True, markup=False)
    if several:
        console.print(
            f"{several:,} rows of {str(source)!r} have several captions: the first is used.", soft_wrap=True, markup=False
        )
    return prompts


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_prompts(path: str | Path) -> list[str]:
    """All of them in memory: see `open_prompts`."""
    return list(open_prompts(path))


class PromptOrder:
    """Row indices batch by batch: every epoch a fresh shuffle, a function of ``(seed, epoch)``.

    Position is a count of rows drawn, so a resumed run continues where it stopped without replaying.

    Args:
        count: number of prompts; may be less than a batch.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, self.count)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return int(self._order[offset])

    def rows(self, position: int, batch: int) -> torch.Tensor:
        """Indices of the ``batch`` prompts from ``position`` on, shape ``(batch,)``."""
        return torch.tensor([self._row(position + i) for i in range(batch)], dtype=torch.long)
