"""Prompts out of the files that people have: every reader yields ``(place, text)`` row by row, and holds one row.

``place`` names file and line (or row) for a message. ``text`` is a list where an image has several captions, and None in a row
without a prompt: its field is missing, null or something else.
"""

from __future__ import annotations

import csv
import glob
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from wadi.errors import WadiError
from wadi.io.records import JSON_BYTES, decoded, is_json, parse_json, read_json
from wadi.io.regular import open_regular, regular
from wadi.zoo.paths import NAME as ZOO
from wadi.zoo.prompts import training_prompts

Text = str | list[Any] | None  # of a row: a prompt, several captions of one image, or none
Rows = Iterator[tuple[str, Text]]

HUB = "hf://"
LONGEST_LINE = 64 * 2**20  # bytes; a "line" beyond that is no text file
USUAL_FIELDS = ("Task2.Caption", "prompt", "caption", "text")  # looked for in this order; the first is JourneyDB's


def files_of(source: str) -> list[Path]:
    """The files that a path or a glob pattern names, sorted by name.

    Raises:
        WadiError: if there is none.
    """
    if Path(source).exists() or not glob.has_magic(source):
        return [Path(source)]
    found = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
    if not found:
        raise WadiError(f"No file matches the prompts pattern {source!r}. Expected at least one: check the path.")
    return found


def rows_of(source: str, field: str | None) -> Rows:
    """Rows of a file, of all files that a pattern names, of a data set (``hf://NAME?split=train``), or of the zoo's captions.

    Raises:
        WadiError: if one cannot be read, is not what its name says, or lacks ``field``.
    """
    if source.startswith(HUB):
        yield from dataset_rows(source, field)
        return
    if source == ZOO:
        yield from zoo_rows(field)
        return
    for path in files_of(source):
        if remedy := UNREADABLE.get(path.suffix.lower()):
            raise WadiError(f"Prompts file {str(path)!r} {remedy}")
        yield from READERS.get(path.suffix.lower(), text_rows)(path, field)


def zoo_rows(field: str | None) -> Rows:
    """The captions that the embedded teacher was trained on.

    Raises:
        WadiError: if a ``field`` is given: captions have none.
    """
    if field is not None:
        raise WadiError(f"prompts_field is {field!r}, and the captions of {ZOO!r} have no fields. Leave out --prompts_field.")
    yield from ((f"caption {number} of {ZOO!r}", caption) for number, caption in enumerate(training_prompts(), 1))


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """``(place, line)`` of a UTF-8 text file, lines with their ends.

    Raises:
        WadiError: if the file cannot be read, is not UTF-8, or has no lines.
    """
    where = f"Prompts file {str(path)!r}"
    try:
        with open_regular(path, what="Prompts file") as stream:
            number = 0
            while line := stream.readline(LONGEST_LINE):
                number += 1
                place = f"{str(path)!r} line {number}"
                if len(line) == LONGEST_LINE:
                    raise WadiError(f"Prompts file {place} is longer than {LONGEST_LINE:,} bytes. Expected one prompt a line.")
                yield place, decoded(line, where, number)
    except OSError as error:
        raise WadiError(f"{where} cannot be read: {error.strerror}. Expected a text file.") from error


def text_rows(path: Path, field: str | None) -> Rows:
    """One prompt a line, blank lines left out.

    Raises:
        WadiError: if a ``field`` is given: lines of text have none.
    """
    if field is not None:
        raise WadiError(f"prompts_field is {field!r}, and {str(path)!r} has one prompt a line. Leave out --prompts_field.")
    for place, line in lines_of(path):
        for part in line.splitlines():
            if part.strip():
                yield place, part


def json_rows(path: Path, field: str | None) -> Rows:
    """One JSON object a line, as JourneyDB's annotations are; ``field`` may be dotted for nested objects.

    A file that is one JSON document is read as well: a list of objects or strings, or COCO's captions.
    """
    get = Field(field)
    for place, row in _document(path) if path.suffix.lower() == ".json" and _is_document(path) else _json_lines(path):
        if isinstance(row, str):
            yield place, row
        elif isinstance(row, dict):
            yield place, get(row)
        else:
            raise WadiError(f"Prompts file {place} holds a {type(row).__name__}. Expected one JSON object a line.")
    get.check(path)


def csv_rows(path: Path, field: str | None) -> Rows:
    """Columns named by the first line, separated by commas (tabs in ``.tsv``); quoted prompts may hold line breaks."""
    get, last = Field(field), [str(path)]
    csv.field_size_limit(min(sys.maxsize, LONGEST_LINE))

    def lines() -> Iterator[str]:
        for place, line in lines_of(path):
            last[0] = place
            yield line

    try:
        for row in csv.DictReader(lines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ","):
            yield last[0], get(row)
    except csv.Error as error:
        raise WadiError(f"Prompts file {last[0]} is no CSV: {error}. Expected columns named by the first line.") from error
    get.check(path)


def parquet_rows(path: Path, field: str | None) -> Rows:
    """The column ``field`` of a Parquet file, a batch of rows in memory at a time; other columns are not read."""
    parquet: Any = _extra("pyarrow.parquet", "data", "read Parquet files")
    regular(path, what="Prompts file")
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            get = Field(field or next((name for name in USUAL_FIELDS if name.partition(".")[0] in names), None))
            column = (get.name or "").partition(".")[0]
            get.seen.update(dict.fromkeys(names))
            number = 0
            for batch in table.iter_batches(columns=[column] if column in names else []):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{str(path)!r} row {number}", get(row)
    except WadiError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise WadiError(f"Prompts file {str(path)!r} cannot be read: {_first(error)}. Expected a Parquet file.") from error
    get.check(path)


def dataset_rows(source: str, field: str | None) -> Rows:
    """A data set by name, streamed: ``hf://owner/name?config=en&split=train``; ``hf:///folder`` for files on disk.

    Raises:
        WadiError: without the extra ``datasets``, or if the data set cannot be had.
    """
    datasets: Any = _extra("datasets", "datasets", "read a data set by name")
    parts = urlsplit(source)
    wanted = {"split": "train", **dict(parse_qsl(parts.query))}
    if unknown := wanted.keys() - {"split", "config", "revision"}:
        raise WadiError(f"prompts is {source!r}, with {sorted(unknown)[0]!r}. Expected ?split=, &config= and &revision= only.")
    name = parts.netloc + parts.path.rstrip("/") if parts.netloc else parts.path
    try:
        rows = datasets.load_dataset(
            name, wanted.get("config"), split=wanted["split"], revision=wanted.get("revision"), streaming=True
        )
        first: dict[str, Any] = next(iter(rows), {})
        get = Field(field or next((usual for usual in USUAL_FIELDS if Field(usual)(first) is not None), None))
        get.seen.update(first)
        if column := (get.name or "").partition(".")[0]:
            rows = rows.select_columns([column]) if column in first else []  # pictures beside it are not fetched
        for number, row in enumerate(rows if column else (), 1):
            yield f"{source!r} row {number}", get(row)
    except WadiError:
        raise
    except Exception as error:  # whatever the network, the Hub or a file format can raise
        raise WadiError(
            f"Data set {source!r} cannot be read: {_first(error)}. Expected hf://OWNER/NAME?split=train, and the network."
        ) from error
    get.check(source)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for place, line in lines_of(path):
        if line.strip():
            yield place, parse_json(line, Any, f"Prompts file {place}", "Expected one JSON object a line.")


def _is_document(path: Path) -> bool:
    """Whether the file is one JSON value rather than one a line: its first line is all there is, or is not JSON by itself."""
    with open_regular(path, what="Prompts file") as stream:
        first = stream.readline(JSON_BYTES)
        rest = any(stream.readline(LONGEST_LINE).strip() for _ in range(8))
    return not rest or not is_json(first.removeprefix(b"\xef\xbb\xbf"))


def _document(path: Path) -> Iterator[tuple[str, Any]]:
    remedy = "Expected a list of objects or strings, or COCO's captions; or one JSON object a line (.jsonl)."
    content = read_json(path, Any, "Prompts file", remedy=remedy)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):  # COCO's captions_*.json
        content = content["annotations"]
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, 1):
        yield f"{str(path)!r} row {number}", row


# Suffixes of what is not read, and what to do.
_PICKLE = "is a pickle, which can run code when it is loaded; it is never loaded. Save the prompts as text, JSON lines or CSV."
_PACKED = "is compressed. Unpack it first."
UNREADABLE = {
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".joblib"), _PICKLE),
    **dict.fromkeys((".gz", ".xz", ".bz2", ".zst", ".zip", ".tar", ".tgz", ".7z"), _PACKED),
}

READERS: dict[str, Callable[[Path, str | None], Rows]] = {
    ".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows,
}  # fmt: skip


class Field:
    """Gets a prompt out of a row; without a name, out of the first of `USUAL_FIELDS` that a row has, from then on."""

    def __init__(self, name: str | None) -> None:
        self.name, self.found = name, False
        self.seen: dict[str, Any] = {}

    def __call__(self, row: Mapping[str, Any]) -> Text:
        if self.name is None:
            self.name = next((usual for usual in USUAL_FIELDS if self._in(row, usual) is not None), None)
        if not self.seen:
            self.seen.update(row)
        value = self._in(row, self.name) if self.name is not None else None
        self.found = self.found or value is not None
        return value if isinstance(value, (str, list)) else None

    @staticmethod
    def _in(row: Any, name: str) -> Any:
        """``row[name]``, or for a dotted name what it leads to; None if it leads nowhere."""
        if isinstance(row, Mapping) and name in row:
            return row[name]
        for part in name.split("."):
            row = row.get(part) if isinstance(row, Mapping) else None
        return row

    def check(self, source: object) -> None:
        """Raise `WadiError` if no row had the field."""
        if not self.found and self.seen:
            wanted = repr(self.name) if self.name else f"any of {', '.join(USUAL_FIELDS)}"
            raise WadiError(
                f"No row of {str(source)!r} has the field {wanted}. Its fields are {', '.join(map(str, self.seen))}. "
                "Expected one of them: set --prompts_field."
            )


def _extra(module: str, extra: str, purpose: str) -> Any:
    """A library that only some need."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise WadiError(
            f"{module.partition('.')[0]} is not installed, which it takes to {purpose}. Expected the extra {extra!r}: "
            f"pip install 'wadi-onestep[{extra}]'."
        ) from error


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
