"""Eight devices against one. Every group of checks is a process, see `jax_checks.py`."""

import functools
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("JAX's engine", allow_module_level=True)

FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_multi_thread_eigen=false "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile fast
)
MESHES = (
    {"data": 2, "experts": 4},
    {"data": 1, "experts": 8},
    {"data": 2, "experts": 2, "model": 2},
)
KINDS = ("switch", "top2", "choice")
EVERYWHERE = pytest.mark.parametrize("mesh", MESHES, ids=str)


@functools.cache
def checked(*arguments):
    """What a function of `jax_checks.py` returns."""
    command = [sys.executable, "-m", "tests.keras_moe.distribution.jax_checks", *arguments]
    environment = {**os.environ, "KERAS_BACKEND": "jax", "XLA_FLAGS": FLAGS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", KINDS)
@EVERYWHERE
def test_devices_do_not_change_the_losses(kind, mesh):
    one, many = checked("curves", kind)["one"], checked("curves", kind)[str(mesh)]
    assert len(one["losses"]) == 20
    assert one["losses"][-1] < 0.7 * one["losses"][0]
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(many["evaluated"], one["evaluated"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(many["predicted"], one["predicted"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
@EVERYWHERE
def test_devices_do_not_change_figures_and_auxiliary_losses(kind, mesh):
    one, many = checked("curves", kind)["one"], checked("curves", kind)[str(mesh)]
    assert one["figures"].keys() == many["figures"].keys()
    assert len(one["figures"]) > 10
    for name, value in one["figures"].items():
        np.testing.assert_allclose(many["figures"][name], value, rtol=0, atol=1e-5, err_msg=name)
    assert one["auxiliary"] > 0
    np.testing.assert_allclose(many["auxiliary"], one["auxiliary"], rtol=0, atol=1e-5)


@EVERYWHERE
def test_each_device_has_its_share_of_experts_and_moments(mesh):
    shards = checked("curves", "switch")[str(mesh)]["shards"]
    assert len(shards) == 3 * (4 + 5 + 4)  # kernels and biases of 3 layers, one gated, and 2 moments
    for path, (total, least, most) in shards.items():
        share = mesh["experts"] * (1 if "bias_out" in path else mesh.get("model", 1))
        assert least == most == total // share, path
