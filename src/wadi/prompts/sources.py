"""Read prompts from files and data sets. Each reader yields ``(place, text)`` row by row, and keeps one row in memory.

``place`` is the file and line (or row) for error messages. ``text`` is a list if an image has several captions. It is None for
a row without a prompt: its field is missing, null or of another type.
"""

from __future__ import annotations

import csv
import glob
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from wadi.errors import WadiError, first_line
from wadi.io.records import JSON_BYTES, decode_utf8, is_json, parse_json, read_json
from wadi.io.regular import open_regular, require_file
from wadi.prompts.fields import USUAL_FIELDS, Field, Text
from wadi.zoo.paths import NAME as ZOO
from wadi.zoo.prompts import training_prompts

Rows = Iterator[tuple[str, Text]]

HUB = "hf://"
LONGEST_LINE = 64 * 2**20  # bytes; a file with a longer line is not a text file


def matching_files(source: str) -> list[Path]:
    """Return the files that match a path or a glob pattern, sorted by name.

    Raises:
        WadiError: if there is none.
    """
    if Path(source).exists() or not glob.has_magic(source):
        return [Path(source)]
    paths = sorted(Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file())
    if not paths:
        raise WadiError(f"No file matches the prompts pattern {source!r}. Check the path.")
    return paths


def rows_of(source: str, field: str | None) -> Rows:
    """Yield the rows of a file, of all files that match a pattern, of a data set (``hf://NAME?split=train``) or of 'zoo'.

    Raises:
        WadiError: if a file cannot be read, has another format than its suffix says, or lacks ``field``.
    """
    if source.startswith(HUB):
        yield from dataset_rows(source, field)
        return
    if source == ZOO:
        yield from zoo_rows(field)
        return
    for path in matching_files(source):
        if remedy := UNSUPPORTED.get(path.suffix.lower()):
            raise WadiError(f"Prompts file {str(path)!r} {remedy}")
        yield from READERS.get(path.suffix.lower(), text_rows)(path, field)


def zoo_rows(field: str | None) -> Rows:
    """Yield the captions that the embedded teacher was trained on.

    Raises:
        WadiError: if a ``field`` is given: the captions have no fields.
    """
    if field is not None:
        raise WadiError(f"prompts_field is {field!r}, but the captions of {ZOO!r} have no fields. Leave out --prompts-field.")
    yield from ((f"caption {number} of {ZOO!r}", caption) for number, caption in enumerate(training_prompts(), 1))


def lines_of(path: Path) -> Iterator[tuple[str, str]]:
    """Yield ``(place, line)`` of a UTF-8 text file. Lines keep their line ends.

    Raises:
        WadiError: if the file cannot be read, is not UTF-8, or has no line ends.
    """
    where = f"Prompts file {str(path)!r}"
    try:
        with open_regular(path, what="Prompts file") as stream:
            number = 0
            while line := stream.readline(LONGEST_LINE):
                number += 1
                place = f"{str(path)!r} line {number}"
                if len(line) == LONGEST_LINE:
                    raise WadiError(f"Prompts file {place} is longer than {LONGEST_LINE:,} bytes. Write one prompt per line.")
                yield place, decode_utf8(line, where, number)
    except OSError as error:
        raise WadiError(f"{where} cannot be read: {error.strerror}. Give a text file.") from error


def text_rows(path: Path, field: str | None) -> Rows:
    """Yield one prompt per line. Blank lines are skipped.

    Raises:
        WadiError: if a ``field`` is given: lines of text have no fields.
    """
    if field is not None:
        raise WadiError(f"prompts_field is {field!r}, but {str(path)!r} is a text file. Leave out --prompts-field.")
    for place, line in lines_of(path):
        for part in line.splitlines():
            if part.strip():
                yield place, part


def json_rows(path: Path, field: str | None) -> Rows:
    """Yield the prompts of a file with one JSON object per line, such as JourneyDB's annotations.

    A file that is one JSON document is read too: a list of objects or strings, or COCO's captions.
    """
    get = Field(field)
    for place, row in _document(path) if path.suffix.lower() == ".json" and _is_document(path) else _json_lines(path):
        if isinstance(row, str):
            yield place, row
        elif isinstance(row, dict):
            yield place, get(row)
        else:
            raise WadiError(f"Prompts file {place} contains a {type(row).__name__}. Write one JSON object per line.")
    get.check(path)


def csv_rows(path: Path, field: str | None) -> Rows:
    """Yield the prompts of a CSV file whose first line names the columns (``.tsv``: separated by tabs).

    Quoted prompts may contain line breaks.
    """
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
        raise WadiError(f"Prompts file {last[0]} is not CSV: {error}. The first line must name the columns.") from error
    get.check(path)


def parquet_rows(path: Path, field: str | None) -> Rows:
    """Yield the column ``field`` of a Parquet file. One batch of rows is in memory at a time; other columns are not read."""
    parquet: Any = _import_extra("pyarrow.parquet", "data", "read Parquet files")
    require_file(path, what="Prompts file")
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            get = Field(field or next((name for name in USUAL_FIELDS if name.partition(".")[0] in names), None))
            column = (get.name or "").partition(".")[0]
            get.columns.update(dict.fromkeys(names))
            number = 0
            for batch in table.iter_batches(columns=[column] if column in names else []):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{str(path)!r} row {number}", get(row)
    except WadiError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise WadiError(f"Prompts file {str(path)!r} cannot be read: {first_line(error)}. Give a Parquet file.") from error
    get.check(path)


def dataset_rows(source: str, field: str | None) -> Rows:
    """Stream a data set by name: ``hf://owner/name?config=en&split=train``, or ``hf:///folder`` for files on disk.

    Raises:
        WadiError: if the extra ``datasets`` is not installed, or the data set cannot be read.
    """
    datasets: Any = _import_extra("datasets", "datasets", "read a data set by name")
    parts = urlsplit(source)
    options = {"split": "train", **dict(parse_qsl(parts.query))}
    if unknown := options.keys() - {"split", "config", "revision"}:
        raise WadiError(
            f"prompts is {source!r}, with the unknown option {sorted(unknown)[0]!r}. Use only ?split=, &config= and &revision=."
        )
    name = parts.netloc + parts.path.rstrip("/") if parts.netloc else parts.path
    try:
        rows = datasets.load_dataset(
            name, options.get("config"), split=options["split"], revision=options.get("revision"), streaming=True
        )
        first: dict[str, Any] = next(iter(rows), {})
        get = Field(field or next((usual for usual in USUAL_FIELDS if Field(usual)(first) is not None), None))
        get.columns.update(first)
        if column := (get.name or "").partition(".")[0]:
            rows = rows.select_columns([column]) if column in first else []  # do not download the images in other columns
        for number, row in enumerate(rows if column else (), 1):
            yield f"{source!r} row {number}", get(row)
    except WadiError:
        raise
    except Exception as error:  # the network, the Hub and the file formats raise many types of error
        raise WadiError(
            f"Data set {source!r} cannot be read: {first_line(error)}. Check the name (hf://OWNER/NAME?split=train) and the "
            "network."
        ) from error
    get.check(source)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for place, line in lines_of(path):
        if line.strip():
            yield place, parse_json(line, Any, f"Prompts file {place}", "Write one JSON object per line.")


def _is_document(path: Path) -> bool:
    """Return whether the file is one JSON value, not one per line: the first line is the whole file, or not valid JSON."""
    with open_regular(path, what="Prompts file") as stream:
        first = stream.readline(JSON_BYTES)
        rest = any(stream.readline(LONGEST_LINE).strip() for _ in range(8))
    return not rest or not is_json(first.removeprefix(b"\xef\xbb\xbf"))


def _document(path: Path) -> Iterator[tuple[str, Any]]:
    remedy = "Give a list of objects or strings, or COCO's captions; or one JSON object per line (.jsonl)."
    content = read_json(path, Any, "Prompts file", remedy=remedy)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):  # COCO's captions_*.json
        content = content["annotations"]
    rows = content if isinstance(content, list) else [content]
    for number, row in enumerate(rows, 1):
        yield f"{str(path)!r} row {number}", row


# What to do about files that we do not read, by suffix.
_PICKLE = "is a pickle, which can run code when it is loaded; it is never loaded. Save the prompts as text, JSON lines or CSV."
_PACKED = "is compressed. Unpack it first."
UNSUPPORTED = {
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".pth", ".joblib"), _PICKLE),
    **dict.fromkeys((".gz", ".xz", ".bz2", ".zst", ".zip", ".tar", ".tgz", ".7z"), _PACKED),
}

READERS: dict[str, Callable[[Path, str | None], Rows]] = {
    ".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".tsv": csv_rows, ".parquet": parquet_rows,
}  # fmt: skip


def _import_extra(module: str, extra: str, purpose: str) -> Any:
    """Return a library that only some users need.

    Raises:
        WadiError: if it is not installed. The message says how to install the ``extra``.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise WadiError(
            f"{module.partition('.')[0]} is not installed. It is needed to {purpose}: pip install 'wadi-onestep[{extra}]'."
        ) from error
