"""Entries of transformers' `config.json`, of the kind that they must be of."""

import math

REQUIRED = object()


def integer(config, name, default=REQUIRED, least=1):
    """An integer, of at least `least`; where the entry is missing or null, the default.

    Raises:
        ValueError: if it is another, or there is neither entry nor default.
    """
    kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
    return _entry(config, name, default, kind, lambda value: type(value) is int and value >= least)


def real(config, name, default=REQUIRED, positive=False):
    """A number that is not negative, or is positive; see `integer`."""
    kind = "a positive number" if positive else "a number that is not negative"
    return _entry(
        config,
        name,
        default,
        kind,
        lambda value: (
            type(value) in (int, float)
            and math.isfinite(value)
            and (value > 0 if positive else value >= 0)
        ),
    )


def flag(config, name, default=REQUIRED):
    """A boolean; see `integer`."""
    return _entry(config, name, default, "true or false", lambda value: type(value) is bool)


def choice(config, name, options, default=REQUIRED):
    """One of the options, which are strings; see `integer`."""
    kind = f"one of {', '.join(options)}"
    return _entry(
        config, name, default, kind, lambda value: isinstance(value, str) and value in options
    )


def _entry(config, name, default, kind, fits):
    value = config.get(name)
    if value is None and default is not REQUIRED:
        return default
    if not fits(value):
        raise ValueError(f"`{name}` must be {kind}. Received: {name}={value!r}")
    return value
