import ast

import pytest

import keras_moe
from tests.house import House

ORDER = (
    "distribution.active",
    "ops.torch_only",
    "ops.torch_recording",
    "ops.jax_gradients",
    "ops.jax_top_k",
    "ops.sizes",
    "ops.state",
    "ops.gradients",
    "ops.rows",
    "ops.noise",
    "ops.products",
    "ops.calls",
    "ops.arrays",
    "ops.recorded",
    "ops.__init__",
    "capped",
    "slots",
    "losses.balance",
    "losses.mixture",
    "losses.__init__",
    "routing.base",
    "routing.token_choice",
    "routing.noisy",
    "routing.hashing",
    "routing.loss_free",
    "routing.softmax",
    "routing.expert_choice",
    "routing.strict",
    "routing.__init__",
    "dispatch",
    "experts",
    "metrics",
    "distribution.tensorflow_replicas",
    "distribution.cluster",
    "distribution.layouts",
    "distribution.engine",
    "distribution.jax_engine",
    "distribution.tensorflow_engine",
    "distribution.parallel",
    "distribution.jax_files",
    "distribution.tensorflow_files",
    "distribution.backup",
    "distribution.__init__",
    "moe",
    "hierarchical",
    "soft",
    "reading",
    "callbacks",
    "plots",
    "optimizers",
    "surgery.distil",
    "surgery.__init__",
    "launch",
    "__init__",
)
HOUSE = House("keras_moe", ORDER)
BACKENDS = {"jax", "tensorflow", "torch"}
FILES = pytest.mark.parametrize("name", ORDER)


def test_the_order_names_every_file():
    assert HOUSE.files() == set(ORDER)


@FILES
def test_imports_only_from_above(name):
    assert list(HOUSE.not_from_above(name)) == []


@FILES
def test_only_ops_and_distribution_name_a_backend(name):
    if name.startswith(("ops.", "distribution.")):
        return
    assert BACKENDS.isdisjoint(imported.split(".")[0] for imported in HOUSE.imports(name))
    for node in ast.walk(HOUSE.tree(name)):
        if isinstance(node, ast.Attribute):
            assert node.attr != "backend", f"{name}.py, line {node.lineno}"
        if isinstance(node, ast.Constant):
            assert node.value not in BACKENDS, f"{name}.py, line {node.lineno}"


def test_public_names_exist():
    for name in keras_moe.__all__:
        assert hasattr(keras_moe, name)
