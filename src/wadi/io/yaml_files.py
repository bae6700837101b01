"""Read YAML files into plain dictionaries, lists and scalars. This is the only place that parses YAML.

YAML has two traps that JSON does not have. Deep nesting crashes its parser, and aliases of aliases can fill the memory. Both
are checked before the values are built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from wadi.errors import WadiError, first_line
from wadi.io.records import DEPTH, decode_utf8
from wadi.io.regular import read_bytes

YAML_BYTES = 2**20
NODES = 100_000  # most values in a file, with every alias written out


def read_yaml(path: str | Path, what: str = "File") -> Any:
    """Return the contents of a YAML file.

    Raises:
        WadiError: if it cannot be read or is not YAML; or if it is nested too deeply, or its aliases contain themselves or
            expand to more than `NODES` values.
    """
    where = f"{what} {str(path)!r}"
    return parse_yaml(decode_utf8(read_bytes(path, YAML_BYTES, what), where), where)


def parse_yaml(text: str, where: str) -> Any:
    """Return the contents of YAML text. ``where`` starts the message of an error.

    Raises:
        WadiError: see `read_yaml`.
    """
    import yaml

    try:
        _check_depth(text, where)
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node, where)
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
        raise WadiError(f"{where} cannot be read as YAML: {first_line(error)}. Correct the file.") from error
    return value


def check_yaml_size(text: str, where: str) -> None:
    """Check YAML text that a library is about to parse. Text that is not YAML passes.

    Raises:
        WadiError: if it is nested too deeply, or if aliases contain themselves or expand to more than `NODES` values.
    """
    import yaml

    try:
        _check_depth(text, where)
        if (node := yaml.compose(text, yaml.SafeLoader)) is not None:
            _check_size(node, where)
    except yaml.YAMLError:
        pass


def _check_depth(text: str, where: str) -> None:
    """Check the depth from the parser's events, which needs no recursion."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise WadiError(f"{where} is nested too deeply. The limit is {DEPTH} levels. Correct the file.")


def _check_size(root: Any, where: str) -> None:
    """Count the values with every alias written out. A node that is reached while it is being counted contains itself."""
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
        raise WadiError(f"{where} has {count:,} values with its aliases written out. The limit is {NODES:,}.")
