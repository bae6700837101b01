"""Names stay text in Markdown: in cells, in code, and in the tables that commands write."""

import pytest

from wadi.extras.control.agreement import Score
from wadi.extras.control.agreement import table as control_table
from wadi.io.markdown import code, table, text

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


@pytest.mark.parametrize("write", [text, code])
def test_a_name_is_one_cell_of_one_row(write):
    lines = table(["", "x"], [[write(HOSTILE), 1]]).splitlines()
    assert len(lines) == 3
    assert [len(cells(line)) for line in lines] == [2, 2, 2]


def test_markup_is_text():
    shown = text(HOSTILE)
    assert "<" not in shown
    assert "](" not in shown.replace("\\](", "")
    assert text("a student, 25 steps_1 ± 2") == "a student, 25 steps_1 ± 2"


def test_code_holds_backticks():
    assert code("a `b` c") == "`` a `b` c ``"
    assert code("wadi eval x") == "`wadi eval x`"


def test_tables_of_the_commands_keep_their_columns():
    score = Score(HOSTILE, 0.5, 0.1, 1.0, 0.1, None, None, 3.0, 0.1)
    lines = control_table([score], HOSTILE).splitlines()
    assert len(lines) == 3
    assert len({len(cells(line)) for line in lines}) == 1
