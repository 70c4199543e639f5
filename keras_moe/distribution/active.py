"""The `ExpertParallel` in whose scope the program is."""

import contextlib
import contextvars

_active = contextvars.ContextVar("expert_parallel", default=None)


def active():
    """The `ExpertParallel` whose scope this is; `None` outside of any."""
    return _active.get()


@contextlib.contextmanager
def activate(parallel):
    """Makes `parallel` the active one."""
    token = _active.set(parallel)
    try:
        yield parallel
    finally:
        _active.reset(token)


def gathered(x):
    """`x` whole on every device; as it is outside of a scope."""
    parallel = active()
    return x if parallel is None or x is None else parallel.gathered(x)


def seats_for_all(tokens):
    """Slots per expert that seat all tokens of a group; `None`: each expert has what it needs."""
    parallel = active()
    return None if parallel is None else parallel.seats_for_all(tokens)
