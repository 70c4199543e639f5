"""Every measurement in a process of its own: Keras chooses its backend once, and memory adds up."""

import json
import os
import subprocess
import sys
from pathlib import Path

BACKENDS = ("tensorflow", "jax", "torch")
RESULTS = Path(__file__).parent / "results"


def measured(module, backend, arguments):
    """What `python -m benchmarks.<module> <arguments>` prints as its last line, read as JSON."""
    output = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
    ).stdout
    return json.loads(output.splitlines()[-1])
