"""What holds for all tests."""

import gc

import keras
import pytest

# Graphs and compiled programs are millions of objects that live on, and Keras collects garbage
# whenever it clears a session or quantizes a layer. That is the cheaper, the fewer it goes through.
gc.set_threshold(10_000, 20, 20)


def pytest_addoption(parser):
    parser.addoption(
        "--shared",
        action="store_true",
        help="leave out tests marked `one_backend`, but on that backend (PyTorch if none is named)",
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--shared"):
        return
    others = []
    for item in items:
        mark = item.get_closest_marker("one_backend")
        if mark and keras.backend.backend() != (mark.args or ("torch",))[0]:
            others.append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


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
