"""The order in which the files are read: each imports only from those above it."""

import ast
import pathlib

import pytest

import keras_moe

ORDER = (
    "distribution.active",
    "ops.torch_only",
    "ops.torch_recording",
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
FOLDER = pathlib.Path(keras_moe.__file__).parent
BACKENDS = {"jax", "tensorflow", "torch"}
FILES = pytest.mark.parametrize("name", ORDER)


def tree(name):
    return ast.parse(FOLDER.joinpath(*name.split(".")).with_suffix(".py").read_text())


def imports(name):
    """Dotted names of all that a file imports, wherever in the file."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_order_names_every_file():
    files = (path.relative_to(FOLDER).with_suffix("") for path in FOLDER.rglob("*.py"))
    assert {".".join(file.parts) for file in files} == set(ORDER)


@FILES
def test_imports_only_from_above(name):
    above = ORDER[: ORDER.index(name)]
    for imported in imports(name):
        package, _, rest = imported.partition(".")
        if package == "keras_moe":
            known = [module.removesuffix(".__init__") for module in above]
            modules = (rest, rest.rpartition(".")[0])  # of a name in a module, or the module itself
            assert any(module in known for module in modules), f"{name}.py imports {imported}"


@FILES
def test_only_ops_and_distribution_name_a_backend(name):
    if name.startswith(("ops.", "distribution.")):
        return
    assert BACKENDS.isdisjoint(imported.split(".")[0] for imported in imports(name))
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute):
            assert node.attr != "backend", f"{name}.py, line {node.lineno}"
        if isinstance(node, ast.Constant):
            assert node.value not in BACKENDS, f"{name}.py, line {node.lineno}"


def test_public_names_exist():
    for name in keras_moe.__all__:
        assert hasattr(keras_moe, name)
