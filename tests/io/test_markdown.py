"""Names stay text in Markdown: in cells, in code, and in the tables that commands write."""

import pytest

from wadi.errors import WadiError
from wadi.extras.control.agreement import Score, score_table
from wadi.io.markdown import code_span, escape, split_at_markers, table, write_between_markers

HOSTILE = "a | b\n| c | <img src=x onerror=alert(1)> [x](javascript:y) `z` **w** \\\\|"


def cells(line: str) -> list[str]:
    """The cells of a table's row, split where GitHub's Markdown splits: at bars without a backslash before them."""
    out, escaped = [""], False
    for character in line.strip().strip("|"):
        if character == "|" and not escaped:
            out.append("")
        else:
            out[-1] += character
        escaped = character == "\\" and not escaped
    return [cell.strip() for cell in out]


@pytest.mark.parametrize("write", [escape, code_span])
def test_a_name_is_one_cell_of_one_row(write):
    lines = table(["", "x"], [[write(HOSTILE), 1]]).splitlines()
    assert len(lines) == 3
    assert [len(cells(line)) for line in lines] == [2, 2, 2]


def test_markup_is_text():
    shown = escape(HOSTILE)
    assert "<" not in shown
    assert "](" not in shown.replace("\\](", "")
    assert escape("a student, 25 steps_1 ± 2") == "a student, 25 steps_1 ± 2"


def test_code_holds_backticks():
    assert code_span("a `b` c") == "`` a `b` c ``"
    assert code_span("wadi eval x") == "`wadi eval x`"


def test_tables_of_the_commands_keep_their_columns():
    score = Score(HOSTILE, 0.5, 0.1, 1.0, 0.1, None, None, 3.0, 0.1)
    lines = score_table([score], HOSTILE).splitlines()
    assert len(lines) == 3
    assert len({len(cells(line)) for line in lines}) == 1


PAGE = "before\n<!-- a -->\nold\n<!-- /a -->\nafter\n"


def test_a_table_replaces_only_what_is_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    write_between_markers(page, "<!-- a -->", "<!-- /a -->", "new")
    assert page.read_text() == PAGE.replace("old", "new")
    assert split_at_markers(page, "<!-- a -->", "<!-- /a -->") == ("before\n", "\nafter\n")


@pytest.mark.parametrize("content", ["text", "<!-- /a --> <!-- b -->", "<!-- a -->", "<!-- /a --> before <!-- a -->", None])
def test_a_page_without_both_markers_is_an_error_and_stays_as_it_is(tmp_path, content):
    page = tmp_path / "page.md"
    if content is not None:
        page.write_text(content)
    with pytest.raises(WadiError) as caught:
        write_between_markers(page, "<!-- a -->", "<!-- /a -->", "new")
    assert all(word in str(caught.value) for word in ("page.md", "<!-- a -->", "<!-- /a -->"))
    assert (page.read_text() if page.exists() else None) == content
