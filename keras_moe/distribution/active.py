"""Whose scope we are in. All that the layers know of devices."""

import contextlib
import contextvars

_active = contextvars.ContextVar("active", default=None)
_bank = contextvars.ContextVar("bank", default=None)


def active():
    """The engine of the `ExpertParallel` within whose scope we are; `None`: there is none."""
    return _active.get()


def activated(engine):
    """Within, `active()` is this engine."""
    return _within(_active, engine)


@contextlib.contextmanager
def sharding(experts, path, router=None):
    """Within, the weights that are made are those of a bank of experts, to be sharded.

    Args:
        experts: the bank.
        path: of the layer that it is made for.
        router: which sends it tokens; `None`: none does.

    Raises:
        ValueError: if there are devices to share the experts and they cannot.
    """
    if active() is not None:
        active().check(experts, path, router)
    with _within(_bank, experts):
        yield
        if active() is not None:
            active().place(experts)


def by_groups(function, *inputs):
    """`function(*inputs)`; with devices that share the groups, each computes its own.

    The compiler cannot see that a gather or scatter by computed positions stays within a group.
    The function is called outside of any scope: it is on one device.

    Args:
        function: of tensors to tensors, all `[groups, ...]`, that computes each group by itself.
        *inputs: such tensors, or `None`.

    Returns:
        What the function returns.
    """
    if active() is None:
        return function(*inputs)
    return active().by_groups(outside(function), *inputs)


def gathered(x):
    """`x` whole on every device, where the engine cannot compute on parts of it what follows."""
    return x if active() is None or x is None else active().gathered(x)


def seats_for_all(tokens):
    """Slots per expert that seat all tokens of a group; `None`: experts have what they need."""
    return None if active() is None else active().seats_for_all(tokens)


def check_generation():
    """Raises a ValueError where the engine cannot write texts on its mesh."""
    if active() is not None:
        active().check_generation()


def outside(function):
    """A function that is called outside of any scope."""

    def call(*inputs):
        with activated(None):
            return function(*inputs)

    return call


def bank():
    """The bank of experts whose weights are being made; `None`: others are."""
    return _bank.get()


@contextlib.contextmanager
def _within(variable, value):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
