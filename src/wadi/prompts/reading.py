"""Read any number of prompts. Their text stays on disk, not in memory."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path

from wadi.errors import WadiError
from wadi.io.progress import console
from wadi.prompts.sources import HUB, rows_of
from wadi.prompts.texts import Texts

LONGEST = 20_000  # characters of a prompt; text encoders read a few hundred tokens


class Prompts(Texts):
    """Texts in an unnamed temporary file that is mapped into memory. Only their positions are in memory: 8 bytes per prompt.

    Attributes:
        digest: hash of all texts in their order.
        left_out: number of rows without a prompt.
        several: number of rows with several captions, of which the first is the prompt.
    """

    def __init__(self, texts: Iterator[str]) -> None:
        """Raises `OSError` if the temporary folder (``TMPDIR``) is full."""
        self._starts, digest = array("q", [0]), hashlib.sha256()
        self.left_out = self.several = 0
        with tempfile.TemporaryFile() as stream:  # the system deletes the file with the map, however the process ends
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

    def text(self, row: int) -> str:
        """Return the text of ``row``."""
        return self._bytes[self._starts[row] : self._starts[row + 1]].decode()


def open_prompts(source: str | Path, field: str | None = None, limit: int | None = None) -> Prompts:
    """Return the prompts of a file, a glob pattern, a data set or 'zoo', without surrounding spaces. See
    `wadi.prompts.sources`.

    Rows without a prompt are skipped. If a row has several captions, the first is used. Both are counted and reported in a line
    on stderr. Duplicates are kept: a prompt that occurs twice is used twice as often.

    Args:
        field: name of the field with the prompt; with dots for a nested field.
        limit: read only the first ``limit`` prompts.
    Raises:
        WadiError: if the source has no prompts or cannot be read.
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
            _check_text(stripped, place)
            yield stripped

    try:
        prompts = Prompts(itertools.islice(texts(), limit))
    except OSError as error:
        raise WadiError(
            f"Prompts {str(source)!r} cannot be copied to {tempfile.gettempdir()!r}: {error.strerror or error}. Free some "
            "space there, or set TMPDIR to a folder with room for their text."
        ) from error
    prompts.left_out, prompts.several = left_out, several
    if not prompts:
        what = "Data set" if str(source).startswith(HUB) else "Prompts file"
        raise WadiError(f"{what} {str(source)!r} contains no prompts. It needs one prompt per line, or a field of prompts.")
    if left_out:
        console.print(f"{left_out:,} rows of {str(source)!r} have no prompt and were left out.", soft_wrap=True, markup=False)
    if several:
        console.print(
            f"{several:,} rows of {str(source)!r} have several captions: the first is used.", soft_wrap=True, markup=False
        )
    return prompts


def _check_text(prompt: str, place: str) -> None:
    """Raise `WadiError` if ``prompt``, read at ``place``, is binary, too long, or has half of a surrogate pair."""
    if "\0" in prompt:
        raise WadiError(f"Prompts file {place} is binary (it contains NUL bytes). Give prompts in UTF-8 text.")
    if len(prompt) > LONGEST:
        raise WadiError(
            f"The prompt in {place} has {len(prompt):,} characters; the limit is {LONGEST:,}. Does the file have one prompt "
            "per line?"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise WadiError(f"The prompt in {place} contains half of a surrogate pair. Correct the text.") from error


def read_prompts(path: str | Path) -> list[str]:
    """Return all prompts in memory; see `open_prompts`."""
    return list(open_prompts(path))
