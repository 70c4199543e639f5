"""Entries of transformers' `config.json`, of the kind that they must be of."""

import reprlib

REQUIRED = object()
MOST_LAYERS = 4096  # without weights nothing else says that a number of blocks is wrong
LARGEST = 2**31 - 1  # of every number; backends count places in 32 bits


def integer(config, name, default=REQUIRED, least=1, most=LARGEST):
    """An integer from `least` to `most`; where the entry is missing or null, the default.

    Raises:
        ValueError: if it is another, or there is neither entry nor default.
    """
    kind = "a positive integer" if least == 1 else f"an integer of at least {least}"

    def fits(value):
        return type(value) is int and least <= value <= most

    value = config.get(name)
    if type(value) is int and value > most:
        kind += f", at most {most:,}"
    return _entry(config, name, default, kind, fits)


def real(config, name, default=REQUIRED, positive=False, below=LARGEST):
    """A number that is not negative, or is positive, and below `below`; see `integer`."""
    kind = "a positive number" if positive else "a number that is not negative"
    kind += "" if below == LARGEST else f", below {below}"

    def fits(value):
        is_number = type(value) in (int, float)
        return is_number and 0 <= value < below and not (positive and value == 0)  # NaN is neither

    return _entry(config, name, default, kind, fits)


def flag(config, name, default=REQUIRED):
    """A boolean; see `integer`."""
    return _entry(config, name, default, "true or false", lambda value: type(value) is bool)


def choice(config, name, options, default=REQUIRED):
    """One of the options, which are strings; see `integer`."""
    kind = f"one of {', '.join(options)}"
    return _entry(
        config, name, default, kind, lambda value: isinstance(value, str) and value in options
    )


def shown(value):
    """A value for an error message: its `repr`, shortened where that is long or deep."""
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, 80, 80, 80
    return short.repr(value)


def _entry(config, name, default, kind, fits):
    value = config.get(name)
    if value is None and default is not REQUIRED:
        return default
    if not fits(value):
        raise ValueError(f"`{name}` must be {kind}. Received: {name}={shown(value)}")
    return value
