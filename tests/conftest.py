"""What holds for all tests: backend settings, the `full` marker and garbage collection."""

import gc
import os

import pytest

BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")
DEVICES = 8

# A test compiles small programs and runs each for milliseconds: it gains nothing from threads or
# from an optimizing compiler. A user's own `XLA_FLAGS` come last and win.
XLA_FLAGS = (
    f"--xla_force_host_platform_device_count={DEVICES}",
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker inherits the flags
    os.environ["XLA_FLAGS"] = " ".join([*XLA_FLAGS, os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

LONG_FILES = (
    "tests/tutorials/test_tutorials.py",
    "tests/test_end_to_end.py",
    "tests/keras_moe/distribution/",
    "tests/keras_moe/test_moe.py",
    "tests/zoo/test_hub.py",
)

# Graphs and compiled programs are millions of objects that stay alive, and Keras collects garbage
# whenever it clears a session or quantizes a layer. Collecting is cheaper when it visits fewer.
gc.set_threshold(10_000, 20, 20)


def pytest_addoption(parser):
    parser.addoption(
        "--full",
        action="store_true",
        help="also run tests marked `full`, and the tutorials at full size",
    )


def pytest_configure(config):
    is_controller = getattr(config.option, "numprocesses", None) is not None
    if BACKEND == "tensorflow" and not is_controller:
        _start_tensorflow(optimizes_graphs=config.getoption("--full"))


def pytest_collection_modifyitems(config, items):
    # A worker takes whole files, in this order: a long file at the end would leave the others idle.
    items.sort(key=lambda item: not item.nodeid.startswith(LONG_FILES))
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish():
    _collect()


@pytest.fixture(autouse=True, scope="module")
def collected():
    yield
    _collect()


@pytest.fixture(scope="session")
def full(pytestconfig):
    """Whether the full suite runs."""
    return pytestconfig.getoption("--full")


def _collect():
    """Collects garbage, and takes the objects that are left out of later collections."""
    gc.collect()
    gc.freeze()


def _start_tensorflow(optimizes_graphs):
    """Makes virtual devices: TensorFlow fixes them when it starts, JAX reads `XLA_FLAGS`.

    Args:
        optimizes_graphs: whether Grappler optimizes graphs, which is TensorFlow's default. It takes
            half of the time to the first step on a mesh, and a fifth of it on one device.
    """
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    kind = tf.config.LogicalDeviceConfiguration
    tf.config.set_logical_device_configuration(cpu, [kind()] * DEVICES)
    tf.config.threading.set_inter_op_parallelism_threads(16)  # each device waits for the others
    if not optimizes_graphs:
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    # DTensor starts before the first tensor of a process, which another test file may make.
    tf.experimental.dtensor.initialize_accelerator_system()
