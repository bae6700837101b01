"""Prepare the sources of the docs site: the pages of `docs`, the help of the commands, and the Python names.

    python docs/_site/prepare.py build/docs

A link to a file outside of `docs`, such as ``../src/wadi/distill``, works in a clone and on a code host. The site has no such
file, so the link becomes the file's path. A path that does not exist is an error.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)#\s]+)(?:#[^)]*)?\)")


def main(out: Path) -> None:
    """Write all pages and images to ``out``, which is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(DOCS, out, ignore=shutil.ignore_patterns("_site"))
    for page in out.rglob("*.md"):
        page.write_text(OUTSIDE.sub(lambda match, page=page: path_of(match, page.relative_to(out)), page.read_text()))
    (out / "commands.md").write_text(commands())
    (out / "python.md").write_text(python_names())


def path_of(match: re.Match[str], page: Path) -> str:
    """Return what a page shows in place of a link to a file outside of `docs`."""
    text, target = match.groups()
    place = (DOCS / page.parent / target).resolve()
    if not place.exists():
        sys.exit(f"docs/{page} links to {target}, which does not exist.")
    path = place.relative_to(ROOT.resolve())
    return f"`{path}`" if text.strip("`") in (str(path), path.name) else f"{text} (`{path}`)"


def commands() -> str:
    """Return the help of every command, as a page."""
    from wadi.cli.main import COMMANDS

    os.environ["COLUMNS"] = "100"
    parts = ["# Commands\n\nThe help of every command, as `wadi COMMAND --help` prints it.\n", _block(help_of([]))]
    for name, summary in COMMANDS.items():
        parts.append(f"## wadi {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n{_block(help_of([name]))}")
        parts += [f"### wadi {name} {sub}\n\n{_block(help_of([name, sub]))}" for sub in subcommands(name)]
    return "\n".join(parts)


def subcommands(name: str) -> list[str]:
    """Return the names of a command's subcommands."""
    return list(getattr(importlib.import_module(f"wadi.cli.{name.replace('-', '_')}"), "SUBCOMMANDS", {}))


def help_of(words: list[str]) -> str:
    """Return what ``wadi WORDS --help`` prints."""
    from wadi.cli.main import main

    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed):
        try:
            code = main([*words, "--help"])
        except SystemExit as ended:  # the parser's help ends the process
            code = int(ended.code or 0)
    if code != 0 or not printed.getvalue():
        sys.exit(f"wadi {' '.join(words)} --help ended with code {code}.")
    return printed.getvalue()


def python_names() -> str:
    """Return the page of the names that ``import wadi`` offers, from their docstrings."""
    import wadi

    header = "# Python names\n\nThe names that `import wadi` offers. Other modules may change between versions.\n"
    homes = {"WadiError": "wadi.errors", **wadi._HOMES}
    return "\n".join([header, *(f"::: {homes[name]}.{name}\n" for name in wadi.__all__)])


def _block(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
