"""What a visitor may send to the page. Every fault is named with its value, before anything is loaded."""

import math

import pytest

from raising import raises_naming
from wadi.app.request import LAST_SEED, Limits, checked, prompt_text

FIELDS = {
    "prompt": "red apple", "model": "zoo", "seed": 0, "count": 1, "width": 0, "height": 0, "steps": 0, "teacher": False,
    "teacher_steps": 25, "init": None, "strength": 0.8, "control": "none", "condition": None, "condition_kind": "canny",
    "control_scale": 1,
}  # fmt: skip


def request(**changes):
    return checked({**FIELDS, **changes}, Limits())


def test_the_fields_of_the_page_become_a_request():
    plain = request()
    assert (plain.size, plain.steps, plain.teacher_steps, plain.control, plain.strength) == (None, None, None, None, 1.0)
    other = request(prompt="  fox ", seed=7.0, count=8, width=96, height=64, steps=4, init="x.png", strength=0.5)
    assert (other.prompt, other.seed, other.count, other.size, other.steps) == ("fox", 7, 8, (64, 96), 4)
    assert (other.init, other.strength) == ("x.png", 0.5)
    assert request(teacher=True, teacher_steps=3).teacher_steps == 3
    controlled = request(control="zoo", condition="x.png", control_scale=0.5)
    assert (controlled.control, controlled.condition, controlled.control_scale) == ("zoo", "x.png", 0.5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("count", 10**9), ("count", 0), ("count", -1), ("count", 2.5), ("count", None), ("count", "3"), ("count", True),
        ("count", math.nan), ("count", math.inf), ("width", 10**6), ("width", -64), ("height", 10**6), ("seed", -1),
        ("seed", 2**63), ("seed", LAST_SEED + 1), ("seed", 10**400), ("steps", 51), ("steps", 10**9), ("strength", math.nan),
        ("strength", 0), ("strength", "a lot"), ("control_scale", 2.1), ("control_scale", None), ("condition_kind", "depth"),
        ("condition_kind", ["canny"]), ("model", None), ("prompt", 3), ("prompt", {"path": "/etc/passwd"}),
    ],
)  # fmt: skip
def test_a_value_out_of_bounds_is_named(field, value):
    fields = {"init": "x.png"} if field == "strength" else {"control": "zoo", "condition": "x.png"}
    with raises_naming(repr(value) if value != 10**400 else "Seed") as caught:
        request(**fields, **{field: value})
    assert len(str(caught.value)) < 300


def test_seeds_of_all_images_are_whole_numbers_of_the_page():
    assert request(seed=LAST_SEED - 7, count=8).seed == LAST_SEED - 7
    with raises_naming(LAST_SEED - 6):
        request(seed=LAST_SEED - 6, count=8)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 64}, "64 x 0"), ({"width": 4, "height": 64}, "4 x 64"), ({"control": "zoo"}, "zoo"),
        ({"condition": "x.png"}, "control"), ({"teacher": True, "init": "x.png"}, "Teacher"),
        ({"teacher": True, "width": 64, "height": 64}, "Teacher"), ({"teacher": True, "teacher_steps": 0}, "0"),
        ({"teacher": True, "control": "zoo", "condition": "x.png"}, "Teacher"),
    ],
)  # fmt: skip
def test_fields_that_do_not_go_together(changes, named):
    with raises_naming(named):
        request(**changes)


def test_a_prompt_is_text_of_bounded_length():
    assert prompt_text(" " + "x" * 1000, 1000) == "x" * 1000
    for prompt, named in (("", "empty"), (" \n ", "empty"), ("x" * 2**20, f"{2**20:,}"), ("\ud800", "\\ud800")):
        with raises_naming(named) as caught:
            prompt_text(prompt, 1000)
        assert len(str(caught.value)) < 200
