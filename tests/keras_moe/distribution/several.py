"""Checks of several devices and processes: a backend counts them when it starts."""

import functools
import json
import os
import socket
import subprocess
import sys

import keras

from tests.conftest import XLA_FLAGS

MESH = {"data": 2, "experts": 2, "model": 2}  # all three axes


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
    return subprocess.run(command, env=environment(8), capture_output=True, text=True, timeout=500)


def environment(devices):
    """Of a process with so many devices on JAX; on TensorFlow it makes them itself."""
    flags = [*XLA_FLAGS, f"--xla_force_host_platform_device_count={devices}"]  # the last one wins
    return {**os.environ, "KERAS_BACKEND": keras.backend.backend(), "XLA_FLAGS": " ".join(flags)}


def launched(*program, processes=1, devices=1):
    """What each of several processes, joined by `keras_moe.launch`, prints last: JSON."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "keras_moe.launch", "--timeout", "120"]
    command += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes)]
    started = [
        subprocess.Popen(
            [*command, "--process-id", str(number), *map(str, program)],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        ended = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors[-4000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in ended]
