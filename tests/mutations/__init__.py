"""Faults planted on purpose, to see whether the tests notice; see `__main__.py`."""
