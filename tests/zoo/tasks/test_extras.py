import sys

import pytest

from zoo.tasks import evaluate, load, prepare
from zoo.tasks.extras import require


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
    with pytest.raises(ImportError, match=r"keras-moe\[glue\]") as error:
        call(tmp_path)
    assert f"the package {package!r}" in str(error.value)
