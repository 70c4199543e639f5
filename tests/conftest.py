"""What holds for all tests."""

import gc

import pytest

# Graphs and compiled programs are millions of objects that live on, and Keras collects garbage
# whenever it clears a session or quantizes a layer. That is the cheaper, the fewer it goes through.
gc.set_threshold(10_000, 20, 20)


def pytest_collection_finish():
    _collect()


@pytest.fixture(autouse=True, scope="module")
def collected():
    yield
    _collect()


def _collect():
    """Of what is left nothing is looked at again."""
    gc.collect()
    gc.freeze()
