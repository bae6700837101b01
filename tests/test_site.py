"""The docs site: every page is in its navigation, and links out of `docs` become paths of files that exist."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SITE = runpy.run_path(str(ROOT / "docs" / "_site" / "prepare.py"))
GENERATED = {"commands.md", "python.md"}


def test_the_navigation_has_every_page_once():
    listed = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted({path.name for path in (ROOT / "docs").glob("*.md")} | GENERATED)


def test_a_link_to_the_code_becomes_its_path():
    def shown(text):
        return SITE["OUTSIDE"].sub(lambda match: SITE["path_of"](match, Path("lorad.md")), text)

    assert shown("see [the layer](../src/wadi/lorad/layer.py).") == "see the layer (`src/wadi/lorad/layer.py`)."
    assert shown("[`wadi/lorad`](../src/wadi/lorad/__init__.py)") == "`wadi/lorad` (`src/wadi/lorad/__init__.py`)"
    assert shown("[layer.py](../src/wadi/lorad/layer.py#L3)") == "`src/wadi/lorad/layer.py`"
    for kept in ("[page](zoo.md#its-students)", "![image](images/demo.png)", "[site](https://example.org/../x)"):
        assert shown(kept) == kept
    with pytest.raises(SystemExit, match=r"lorad\.md.*gone\.py"):
        shown("[x](../src/wadi/gone.py)")


def test_the_reference_has_every_command_and_every_name():
    import wadi
    from wadi.cli.main import COMMANDS

    page = SITE["commands"]()
    headings = re.findall(r"^##+ wadi (.+)$", page, re.MULTILINE)
    assert [name for name in headings if " " not in name] == list(COMMANDS)
    assert {"control train", "zoo prompts"} <= set(headings)
    assert "--student.timesteps" in page
    assert re.findall(r"^::: \S+\.(\w+)$", SITE["python_names"](), re.MULTILINE) == wadi.__all__
