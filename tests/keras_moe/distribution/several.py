"""Checks of several devices: a backend counts them when it starts, so each has a process."""

import functools
import json
import os
import subprocess
import sys

import keras

from tests.__main__ import QUICK

MESHES = (
    {"data": 2, "experts": 4},
    {"data": 1, "experts": 8},
    {"data": 2, "experts": 2, "model": 2},
)
FLAGS = f"{QUICK['XLA_FLAGS']} --xla_force_host_platform_device_count=8"


def checked(*arguments):
    """What a function of `jax_checks.py` or `tensorflow_checks.py`, by the backend, returns.

    Args:
        *arguments: its name, and strings for it.
    """
    done = _run(arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache  # failures too
def _run(arguments):
    backend = keras.backend.backend()
    command = [sys.executable, "-m", f"tests.keras_moe.distribution.{backend}_checks", *arguments]
    environment = {**os.environ, "KERAS_BACKEND": backend, "XLA_FLAGS": FLAGS}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
