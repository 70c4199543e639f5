import re

import pytest

from zoo.conversion.config import choice, flag, integer, real

OPTIONS = {"relu": 1, "silu": 2}  # any collection


def read(kind, value, *options, **others):
    return kind({"it": value, "other": "no"}, "it", *options, **others)


@pytest.mark.parametrize(
    ("value", "kind", "options"),
    [
        (1, integer, {}),
        (0, integer, {"least": 0}),
        (4, integer, {"least": 4}),
        (0, real, {}),
        (0.0, real, {}),
        (2.5, real, {}),
        (3, real, {"positive": True}),
        (True, flag, {}),
        (False, flag, {}),
        ("silu", choice, {"options": OPTIONS}),
    ],
)
def test_an_entry_is_read_as_it_is(value, kind, options):
    for default in ({}, {"default": 7}):
        ours = read(kind, value, **options, **default)
        assert ours == value and type(ours) is type(value)


@pytest.mark.parametrize("kind", [integer, real, flag])
def test_the_default_is_for_what_is_missing_or_null(kind):
    assert kind({}, "it", "mine") == read(kind, None, "mine") == "mine"
    assert kind({}, "it", None) is None
    assert choice({}, "it", OPTIONS, "mine") == read(choice, None, OPTIONS, "mine") == "mine"


@pytest.mark.parametrize(
    ("kind", "options", "refused", "allowed"),
    [
        (integer, {}, (None, 0, -1, 1.0, True, "1", [1]), "positive integer"),
        (integer, {"least": 4}, (None, 3, False, 4.0), "integer.*4"),
        (integer, {"least": 0}, (None, -1, False), "integer.*0"),
        (
            real,
            {},
            (None, -0.1, float("nan"), float("inf"), True, "0.1"),
            "number",
        ),
        (real, {"positive": True}, (None, 0, 0.0, -1, float("inf")), "positive number"),
        (flag, {}, (None, 0, 1, "true"), "true.*false"),
        (choice, {"options": OPTIONS}, (None, "gelu", 1, ["relu"], {}), "relu.*silu"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(kind, options, refused, allowed):
    """What is missing, too, where there is no default; a wrong entry never becomes the default."""
    for value in refused:
        for default in ({}, {"default": 7}):
            if value is None and default:
                continue
            message = f"^`it`.*{allowed}.*it={re.escape(repr(value))}$"
            with pytest.raises(ValueError, match=message):
                read(kind, value, **options, **default)
    with pytest.raises(ValueError, match="^`it`.*it=None$"):
        kind({}, "it", **options)
