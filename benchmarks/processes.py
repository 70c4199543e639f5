"""Every measurement in a process of its own: Keras chooses its backend once, and memory adds up."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
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


def save(path, sizes, backend, figures):
    """Writes a backend's figures; those of other backends stay if they are of the same sizes.

    Returns:
        What the file now holds.
    """
    results = json.loads(path.read_text()) if path.exists() else {}
    if results.get("sizes") != sizes:
        results = {"sizes": sizes, "backends": {}}
    versions = {package: version(package) for package in ("keras", backend)}
    results["backends"][backend] = {"versions": versions, **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return results
