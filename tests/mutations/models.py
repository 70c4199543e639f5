"""Faults of `zoo`."""

FAULTS = ()
