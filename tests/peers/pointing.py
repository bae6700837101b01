"""Point a test class of another suite at LoRaD: replace its case tables, drop the tests that have none."""

import types

import pytest


def pointed(
    cls: type,
    tables: list[tuple[object, list]],
    rows: dict[str, list] | None = None,
    need_hub: tuple[str, ...] = (),
    **attributes,
) -> type:
    """A subclass of ``cls`` that runs only the tests whose cases are ours.

    ``tables`` pairs a case table of ``cls``, recognised by identity, with what replaces it; ``rows`` gives the
    cases of single tests whose tables are written in place. Tests in ``need_hub`` read a file of the Hub and may
    fail. ``attributes`` become attributes of the new class.
    """
    namespace = dict(attributes)
    for name in dir(cls):
        test = getattr(cls, name)
        if not name.startswith("test_") or not isinstance(test, types.FunctionType):
            continue
        marks = [_replaced(mark, tables, (rows or {}).get(name)) for mark in getattr(test, "pytestmark", [])]
        ours = any(new is not old for new, old in zip(marks, getattr(test, "pytestmark", []), strict=True))
        if name in need_hub:
            marks.append(pytest.mark.xfail(reason="reads a file of the Hub").mark)
        namespace[name] = _copy(test, marks) if ours else None
    return type(cls.__name__, (cls,), namespace)


def _replaced(mark: pytest.Mark, tables: list[tuple[object, list]], rows: list | None) -> pytest.Mark:
    if mark.name != "parametrize":
        return mark
    for old, new in tables:
        if mark.args[1] is old:
            return pytest.mark.parametrize(mark.args[0], new).mark
    return mark if rows is None else pytest.mark.parametrize(mark.args[0], rows).mark


def _copy(test: types.FunctionType, marks: list[pytest.Mark]) -> types.FunctionType:
    copy = types.FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__kwdefaults__ = test.__kwdefaults__
    copy.__dict__.update(test.__dict__, pytestmark=marks)
    return copy
