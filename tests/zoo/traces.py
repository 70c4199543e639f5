"""How often a backend traces a step."""

import contextlib

import keras
import pytest


@contextlib.contextmanager
def counted_traces():
    """A list that grows with every call of `train_step`: one a trace, or a step on PyTorch."""
    calls, original = [], keras.Model.train_step

    def train_step(self, *args, **kwargs):
        calls.append(self)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "train_step", train_step)
        yield calls
