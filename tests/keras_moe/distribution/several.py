"""Programs that run as several processes."""

import json
import os
import socket
import subprocess
import sys

import keras

from tests.conftest import XLA_FLAGS

MESH = {"data": 2, "experts": 2, "model": 2}  # all three axes


def environment(devices):
    """Environment of a process with `devices` devices; a program makes TensorFlow's itself."""
    flags = [*XLA_FLAGS, f"--xla_force_host_platform_device_count={devices}"]  # the last one wins
    return {**os.environ, "KERAS_BACKEND": keras.backend.backend(), "XLA_FLAGS": " ".join(flags)}


def launched(*program, processes=1, devices=1):
    """Runs a program as several processes, which `keras_moe.launch` joins.

    Returns:
        List of what each process printed last, read as JSON.
    """
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
