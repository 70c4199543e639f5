"""Faults of `keras_moe`."""

from tests.mutations.fault import Fault

FAULTS = (
    Fault(
        "keras_moe/moe.py",
        "mask = inputs_mask if mask is None else mask",
        "pass",
        "an upstream mask is lost when token ids are given",
    ),
)
