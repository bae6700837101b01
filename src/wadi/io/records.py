"""Read JSON files into typed objects. This is the only place that parses JSON.

A file is checked in this order: it is a regular file, not too large, UTF-8 (a byte-order mark is accepted), well formed, not
nested too deeply, and has the right type (msgspec). Each failure becomes one `WadiError` with the file, the field and the
value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec

from wadi.errors import WadiError, first_line, short_repr
from wadi.io.regular import read_bytes

asdict = msgspec.structs.asdict  # for a `Record`

JSON_BYTES = 256 * 2**20  # an analysis or a result with a row per layer has a few MiB
REMEDY = "Restore the file as it was written."
DEPTH = 64  # levels of nesting; our own files have at most six

Record = msgspec.Struct  # base class for the contents of files; unknown fields are ignored
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
Finite = Annotated[float, msgspec.Meta(ge=-1.7976931348623157e308, le=1.7976931348623157e308)]
Digest = Annotated[str, msgspec.Meta(max_length=256)]
Side = Annotated[int, msgspec.Meta(ge=1, le=65_536)]  # pixels


def read_json(path: str | Path, kind: Any, what: str = "File", limit: int = JSON_BYTES, remedy: str = REMEDY) -> Any:
    """Return the contents of a JSON file as ``kind`` (a `Record`, or any annotation that msgspec knows).

    Args:
        what: name of the file's contents at the start of a message, such as ``Checkpoint state``.
        limit: largest size in bytes.
        remedy: what the user can do; the end of a message.
    Raises:
        WadiError: see the module.
    """
    where = f"{what} {str(path)!r}"
    return parse_json(read_bytes(path, limit, what), kind, where, remedy)


def read_json_lines(
    path: str | Path,
    kind: Any,
    what: str = "File",
    half_last_line: bool = False,
    remedy: str = REMEDY,
    bounded: bool = True,
) -> list[Any]:
    """Return the objects of a file with one JSON value per line. Blank lines are skipped.

    Args:
        half_last_line: skip a last line that is not JSON, which a killed process may have left unfinished.
        bounded: raise an error for files larger than `JSON_BYTES`.
    Raises:
        WadiError: see the module. The message names the line.
    """
    lines = read_bytes(path, JSON_BYTES if bounded else None, what).split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    rows = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        where = f"{what} {str(path)!r}"
        if half_last_line and number == last and not is_json(line):
            break
        rows.append(parse_json(decode_utf8(line, where, number + 1), kind, f"{where} line {number + 1}", remedy))
    return rows


def parse_json(data: bytes | str, kind: Any, where: str, remedy: str = REMEDY) -> Any:
    """Return JSON text as ``kind``. ``where`` starts the message of an error.

    Raises:
        WadiError: see the module.
    """
    text = data if isinstance(data, str) else decode_utf8(data, where)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise WadiError(f"{where} is not JSON: {error.msg} ({place}). {remedy}") from error
    except RecursionError as error:
        raise WadiError(f"{where} is nested too deeply. The limit is {DEPTH} levels.") from error
    except ValueError as error:  # a number with thousands of digits
        raise WadiError(f"{where} contains a number that is too long: {first_line(error)}. {remedy}") from error
    _check_depth(value, where)
    if "\\u" in text:
        _check_surrogates(value, where)
    return convert(value, kind, where, remedy)


def convert(value: Any, kind: Any, where: str, remedy: str = REMEDY) -> Any:
    """Return plain lists, dictionaries and scalars as ``kind``.

    Raises:
        WadiError: if a value has another type or is out of range. The message names the field and the value.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        _raise_invalid(error, value, where, remedy)
    except OverflowError as error:  # an integer too large for a float
        raise WadiError(f"{where} contains a number that is too large. {remedy}") from error


def as_json(value: Any) -> Any:
    """Return a value as it comes back from JSON: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


def decode_utf8(data: bytes, where: str, first_line_number: int = 1) -> str:
    """Return UTF-8 bytes as text, without the byte-order mark.

    Args:
        first_line_number: number of the first line of ``data`` in its file.
    Raises:
        WadiError: if it is not UTF-8. The message names the line and the byte, or the encoding if a byte-order mark shows it.
    """
    marks = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
    for mark, name in marks:
        if data.startswith(mark):
            raise WadiError(f"{where} is {name} text. Save it as UTF-8 (iconv -f {name} -t UTF-8).")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first_line_number
        column = error.start - data.rfind(b"\n", 0, error.start)
        value = data[error.start]
        raise WadiError(
            f"{where} is not UTF-8 text: byte 0x{value:02x} in line {line}, byte {column}. Save it as UTF-8 (for Western "
            "European files: iconv -f LATIN1 -t UTF-8)."
        ) from error


def is_json(line: bytes) -> bool:
    """Return whether ``line`` is one JSON value, however deeply nested."""
    try:
        json.loads(line)
    except RecursionError:
        return True
    except ValueError:  # also raised for text that is not UTF-8
        return False
    return True


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one dictionary with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


# --- errors -----------------------------------------------------------------------------------------------------------------


def _raise_invalid(error: msgspec.ValidationError, value: Any, where: str, remedy: str) -> NoReturn:
    """Raise `WadiError` from msgspec's message: ``Expected `int`, got `str` - at `$.rows[0].images` ``."""
    problem, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    field = f" in field {path!r}" if path else ""
    wrong = _value_at(value, path)
    received = "" if wrong is _NOWHERE else f" It is {short_repr(wrong)}."
    raise WadiError(f"{where} is not valid{field}: {problem.replace('`', '')}.{received} {remedy}") from error


_NOWHERE = object()


def _value_at(value: Any, path: str) -> Any:
    """Return the value at a path such as ``rows[0].images``.

    If msgspec does not say which value of a dictionary is wrong, return the whole dictionary.
    """
    for name, index in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path.partition("[...]")[0]):
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):
            return _NOWHERE
    return _NOWHERE if isinstance(value, (dict, list)) and not path else value


def _check_depth(value: Any, where: str) -> None:
    level, depth = [value], 0
    while level := [
        child
        for item in level
        if isinstance(item, (dict, list))
        for child in (item.values() if isinstance(item, dict) else item)
    ]:
        depth += 1
        if depth > DEPTH:
            raise WadiError(f"{where} is nested too deeply. The limit is {DEPTH} levels.")


def _check_surrogates(value: Any, where: str) -> None:
    """Raise `WadiError` for a lone surrogate (``\\ud800``): it is half a character, and no tokenizer or file accepts it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        surrogate = error.object[error.start : error.start + 1].encode("unicode_escape").decode()
        raise WadiError(f"{where} contains {surrogate}, half of a surrogate pair. Correct the text.") from error
