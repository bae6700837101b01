"""Read our own JSON and YAML into types: the only place that parses either.

A file is checked in this order: it is a regular file, not too large, UTF-8 (a byte-order mark is accepted), well formed, not
nested too deeply, and of the wanted type (msgspec). What fails becomes one `WadiError` with the file, the field and the value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import msgspec

from wadi.errors import WadiError
from wadi.io.regular import read_bytes

asdict = msgspec.structs.asdict  # of a `Record`

JSON_BYTES = 256 * 2**20  # an analysis or a result with a row per layer has some MiB
YAML_BYTES = 2**20
REMEDY = "Restore the file as it was written."
DEPTH = 64  # levels of nesting; ours have at most six
NODES = 100_000  # of a YAML file, aliases written out

Record = msgspec.Struct  # base of the types of files; fields that are not named in a type are ignored
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
        remedy: what to do, at the end of a message.
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
    """Return the objects of a file with one JSON value a line; blank lines are left out.

    Args:
        half_last_line: leave out a last line that is not JSON: a killed process leaves half a line.
        bounded: whether files above `JSON_BYTES` are refused.
    Raises:
        WadiError: see the module; the line is named.
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
        rows.append(parse_json(decoded(line, where, number + 1), kind, f"{where} line {number + 1}", remedy))
    return rows


def parse_json(data: bytes | str, kind: Any, where: str, remedy: str = REMEDY) -> Any:
    """Return JSON text as ``kind``; ``where`` starts the message of an error.

    Raises:
        WadiError: see the module.
    """
    text = data if isinstance(data, str) else decoded(data, where)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise WadiError(f"{where} is not JSON: {error.msg} ({place}). {remedy}") from error
    except RecursionError as error:
        raise WadiError(f"{where} is nested too deeply. At most {DEPTH} levels are read.") from error
    except ValueError as error:  # a number of thousands of digits
        raise WadiError(f"{where} holds a number that is too long: {_first(error)}. {remedy}") from error
    _refuse_deep(value, where)
    if "\\u" in text:
        _refuse_surrogates(value, where)
    return convert(value, kind, where, remedy)


def convert(value: Any, kind: Any, where: str, remedy: str = REMEDY) -> Any:
    """Return plain lists, dictionaries and scalars as ``kind``.

    Raises:
        WadiError: with the field and the value, if one has another type or is out of range.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        _refuse(error, value, where, remedy)
    except OverflowError as error:  # an integer that no float holds
        raise WadiError(f"{where} holds a number that is too large. {remedy}") from error


def written(value: Any) -> Any:
    """Return a value as JSON gives it back: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value))


def decoded(data: bytes, where: str, first_line: int = 1) -> str:
    """Return UTF-8 text without its byte-order mark; ``first_line`` is the number of its first line in the file.

    Raises:
        WadiError: with the line and the byte, and the encoding if a byte-order mark names another.
    """
    marks = ((b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
    for mark, name in marks:
        if data.startswith(mark):
            raise WadiError(f"{where} is {name} text. Only UTF-8 is read: save it as UTF-8 (iconv -f {name} -t UTF-8).")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + first_line
        column = error.start - data.rfind(b"\n", 0, error.start)
        value = data[error.start]
        raise WadiError(
            f"{where} is not UTF-8 text: byte 0x{value:02x} in line {line}, byte {column}. Only UTF-8 is read: save it as "
            "UTF-8 (for Western European files: iconv -f LATIN1 -t UTF-8)."
        ) from error


# --- YAML -------------------------------------------------------------------------------------------------------------------


def read_yaml(path: str | Path, what: str = "File") -> Any:
    """Return the contents of a YAML file as plain dictionaries, lists and scalars.

    Raises:
        WadiError: see the module; or if aliases contain themselves or stand for more than `NODES` values.
    """
    where = f"{what} {str(path)!r}"
    return parse_yaml(decoded(read_bytes(path, YAML_BYTES, what), where), where)


def parse_yaml(text: str, where: str) -> Any:
    """`read_yaml` of text.

    Raises:
        WadiError: see `read_yaml`.
    """
    import yaml

    try:
        _refuse_deep_yaml(text, where)
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _refuse_large(node, where)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise WadiError(f"{where} is not YAML: {error.problem or error.context}{place}. Correct the file.") from error
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError) as error:
        if isinstance(error, WadiError):
            raise
        raise WadiError(f"{where} cannot be read as YAML: {_first(error)}. Correct the file.") from error
    return value


def refuse_boundless_yaml(text: str, where: str) -> None:
    """Check YAML that a library is about to parse: deep nesting crashes its parser, aliases of aliases fill the memory.

    Text that is not YAML passes.

    Raises:
        WadiError: if it is nested too deeply, or if aliases contain themselves or stand for more than `NODES` values.
    """
    import yaml

    try:
        _refuse_deep_yaml(text, where)
        if (node := yaml.compose(text, yaml.SafeLoader)) is not None:
            _refuse_large(node, where)
    except yaml.YAMLError:
        pass


def _refuse_deep_yaml(text: str, where: str) -> None:
    """Read the events alone, which takes no recursion."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise WadiError(f"{where} is nested too deeply. At most {DEPTH} levels are read: correct the file.")


def _refuse_large(root: Any, where: str) -> None:
    """Count the values with every alias written out; a node that is being counted already contains itself."""
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if id(node) in sizes:
            if not sizes[id(node)]:
                line = node.start_mark.line + 1
                raise WadiError(f"{where} has an alias that contains itself (line {line}). Write the values out instead.")
            return sizes[id(node)]
        sizes[id(node)] = 0
        value = node.value if isinstance(node.value, list) else ()
        parts = [part for item in value for part in (item if isinstance(item, tuple) else (item,))]
        sizes[id(node)] = 1 + sum(size(part) for part in parts)
        return sizes[id(node)]

    if (count := size(root)) > NODES:
        raise WadiError(f"{where} has {count:,} values with its aliases written out. At most {NODES:,} are read.")


# --- what is wrong ----------------------------------------------------------------------------------------------------------


def _refuse(error: msgspec.ValidationError, value: Any, where: str, remedy: str) -> NoReturn:
    """Raise `WadiError` from msgspec's message: ``Expected `int`, got `str` - at `$.rows[0].images` ``."""
    problem, _, path = str(error).partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    field = f" in field {path!r}" if path else ""
    found = _at(value, path)
    received = "" if found is _NOWHERE else f" It is {shortened(found)}."
    raise WadiError(f"{where} is not valid{field}: {problem.replace('`', '')}.{received} {remedy}") from error


_NOWHERE = object()


def _at(value: Any, path: str) -> Any:
    """What a path such as ``rows[0].images`` leads to; where msgspec does not say which value of a dictionary, all of it."""
    for name, index in re.findall(r"([^.\[\]]+)|\[([^\]]*)\]", path.partition("[...]")[0]):
        try:
            value = value[name] if name else value[int(index)]
        except (KeyError, IndexError, TypeError, ValueError):
            return _NOWHERE
    return _NOWHERE if isinstance(value, (dict, list)) and not path else value


def shortened(value: object) -> str:
    """Return ``repr`` of a value in at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a very long {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_deep(value: Any, where: str) -> None:
    level, depth = [value], 0
    while level := [
        child
        for item in level
        if isinstance(item, (dict, list))
        for child in (item.values() if isinstance(item, dict) else item)
    ]:
        depth += 1
        if depth > DEPTH:
            raise WadiError(f"{where} is nested too deeply. At most {DEPTH} levels are read.")


def _refuse_surrogates(value: Any, where: str) -> None:
    """A lone surrogate (``\\ud800``) is no character: no tokenizer and no file takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start : error.start + 1].encode("unicode_escape").decode()
        raise WadiError(
            f"{where} holds {bad}, half of a surrogate pair. Only whole characters are read: correct the text."
        ) from error


def is_json(line: bytes) -> bool:
    """Return whether bytes are one JSON value, of whatever depth."""
    try:
        json.loads(line)
    except RecursionError:
        return True
    except ValueError:  # not UTF-8 included
        return False
    return True


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200].rstrip(".")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
