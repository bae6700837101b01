"""What a visitor of the page sends, and the bounds on it. Nothing from outside is used before `checked` has seen it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wadi.errors import WadiError, short_repr
from wadi.extras.steps import MOST

CONDITION_KINDS = ("canny", "scribble", "none")  # those that need no further network
NO_CONTROL = "none"
LAST_SEED = 2**53 - 1  # JavaScript, and so the page, has no larger whole numbers without gaps
TEACHER_STEPS = 25
SMALLEST = 8  # pixels of a side: the autoencoder of every family has at least 8 per latent


@dataclass(frozen=True)
class Limits:
    """Bounds on one request and on the server.

    Attributes:
        prompt: characters of a prompt.
        count: images per request.
        steps: of the student, and of the teacher.
        side: pixels of a side; None = twice the longer side that the student was trained for.
        upload: bytes of an uploaded image.
        queue: requests that may wait.
    """

    prompt: int = 1000
    count: int = 8
    steps: int = MOST
    side: int | None = None
    upload: int = 20 * 2**20
    queue: int = 100


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        model: name of a student on the page.
        seed: of the first image; it counts up.
        count: number of images.
        size: ``(height, width)`` in pixels; None = the size that the student was trained for.
        steps: of the student; None = those that it was trained for.
        teacher_steps: steps of the teacher to show beside the student; None = no teacher.
        init: path of the uploaded image to start from.
        strength: how far to leave ``init``, above 0 up to 1.
        control: name of a control on the page; None = none.
        condition: path of the uploaded image for the control.
        condition_kind: one of `CONDITION_KINDS`; 'none' = the image is a condition already.
        control_scale: strength of the control, 0 to 2.
    """

    model: str
    prompt: str
    seed: int = 0
    count: int = 1
    size: tuple[int, int] | None = None
    steps: int | None = None
    teacher_steps: int | None = None
    init: str | None = None
    strength: float = 0.8
    control: str | None = None
    condition: str | None = None
    condition_kind: str = "canny"
    control_scale: float = 1.0


def checked(values: Mapping[str, Any], limits: Limits) -> Request:
    """Return the fields of the page as a `Request`. 0 for a size or the steps means the student's own.

    Args:
        values: by the names of the page's fields (`wadi.app.page.FIELDS`).
    Raises:
        WadiError: with the field and its value, if one is missing, of another type, or out of bounds.
    """
    prompt = prompt_text(values["prompt"], limits.prompt)
    count = whole("Number of images", values["count"], 1, limits.count)
    largest = 2**16 if limits.side is None else limits.side  # the studio knows the student's own size
    width, height = (whole(name, values[name.lower()] or 0, 0, largest) for name in ("Width", "Height"))
    teacher = None
    if values["teacher"]:
        teacher = whole("Teacher's steps", values["teacher_steps"], 1, limits.steps)
    control, condition = _control(values["control"], values["condition"])
    init = values["init"]
    if teacher is not None and (init is not None or control is not None or width or height):
        raise WadiError(
            "The teacher is shown for prompts at its own size only. Clear 'Teacher beside', or the size, the start image and "
            "the control."
        )
    kind = values["condition_kind"]
    if kind not in CONDITION_KINDS:
        raise WadiError(f"The kind of condition is {short_repr(kind)}. Choose one of {', '.join(CONDITION_KINDS)}.")
    return Request(
        model=_text("Model", values["model"]),
        prompt=prompt,
        seed=whole("Seed", values["seed"], 0, LAST_SEED - count + 1),
        count=count,
        size=_size(width, height),
        steps=whole("Steps", values["steps"] or 0, 0, limits.steps) or None,
        teacher_steps=teacher,
        init=init,
        strength=number("Strength", values["strength"], 0.01, 1) if init is not None else 1.0,
        control=control,
        condition=condition,
        condition_kind=kind,
        control_scale=number("Strength of the control", values["control_scale"], 0, 2),
    )


def prompt_text(value: object, longest: int) -> str:
    """Return a prompt without spaces around it.

    Raises:
        WadiError: if it is not text, empty, too long, or not Unicode (half a surrogate pair).
    """
    text = _text("Prompt", value).strip()
    if not text:
        raise WadiError("The prompt is empty. Write what the image should show.")
    if len(text) > longest:
        raise WadiError(f"The prompt has {len(text):,} characters. Write at most {longest:,}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise WadiError(f"The prompt is not Unicode text: {short_repr(text)}. Type it again.") from error
    return text


def whole(name: str, value: object, low: int, high: int) -> int:
    """Return a whole number from ``low`` to ``high``. Raise `WadiError` with ``name`` for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and int(value) == value:
        return int(value)
    raise WadiError(f"{name} is {short_repr(value)}. Give a whole number from {low:,} to {high:,}.")


def number(name: str, value: object, low: float, high: float) -> float:
    """Return a finite number from ``low`` to ``high``. Raise `WadiError` with ``name`` for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high:
        return float(value)
    raise WadiError(f"{name} is {short_repr(value)}. Give a number from {low:g} to {high:g}.")


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise WadiError(f"{name} is {short_repr(value)}. Give text.")
    return value


def _size(width: int, height: int) -> tuple[int, int] | None:
    if not width and not height:
        return None
    if width < SMALLEST or height < SMALLEST:
        raise WadiError(f"The size is {width} x {height}. Give both sides at least {SMALLEST} pixels, or 0 for both.")
    return height, width


def _control(control: object, condition: Any) -> tuple[str | None, str | None]:
    if control in (None, "", NO_CONTROL):
        if condition is not None:
            raise WadiError("There is an image for the control, and no control is chosen. Choose one, or remove the image.")
        return None, None
    name = _text("Control", control)
    if condition is None:
        raise WadiError(f"Control {short_repr(name)} is chosen without an image. Upload one, or choose '{NO_CONTROL}'.")
    return name, condition
