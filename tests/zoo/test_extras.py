import contextlib
import logging
import sys

import pytest

from zoo.extras import quiet_datasets, require
from zoo.tasks import evaluate, load, prepare


@pytest.fixture
def missing(monkeypatch):
    """Makes a package look as if it were not installed."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)


def test_require_imports():
    assert require("os.path").join("a", "b")


@pytest.mark.parametrize(
    ("package", "module", "call"),
    [
        ("sklearn", "sklearn.metrics", lambda out: evaluate("glue/rte", [0, 1], [[1, 0], [1, 0]])),
        ("scipy", "scipy.stats", lambda out: evaluate("glue/stsb", [0, 1], [[1], [0]])),
        (
            "tensorflow_datasets",
            "tensorflow_datasets",
            lambda out: load("glue/rte", "train", out),
        ),
        (
            "tensorflow_datasets",
            "tensorflow_datasets",
            lambda out: prepare("glue/rte", out, out),
        ),
    ],
)
def test_a_missing_package_names_the_extra(missing, tmp_path, package, module, call):
    missing(package)
    missing(module)
    with pytest.raises(ImportError, match=rf"{package!r}.*keras-moe\[glue\]"):
        call(tmp_path)


def test_a_missing_package_that_another_needs_is_the_one_named(missing, tmp_path, monkeypatch):
    (tmp_path / "stands_on_scipy.py").write_text("import scipy")
    monkeypatch.syspath_prepend(tmp_path)
    missing("scipy")
    with pytest.raises(ImportError, match=r"'scipy'.*keras-moe\[glue\]"):
        require("stands_on_scipy")


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_quiet_datasets_changes_nothing_for_good(error):
    tqdm = pytest.importorskip("tensorflow_datasets.core.utils.tqdm_utils")
    log = logging.getLogger("absl")
    before = log.level
    with contextlib.suppress(RuntimeError), quiet_datasets():
        assert log.level == logging.ERROR and not tqdm._active
        if error:
            raise error
    assert log.level == before and tqdm._active
    with quiet_datasets(bars=True):
        assert tqdm._active
