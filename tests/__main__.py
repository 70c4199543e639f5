"""Runs the whole suite once per backend, each in a process of its own.

python -m tests                             all three backends
python -m tests jax torch                   only these
python -m tests tensorflow -- -k dispatch   what follows `--` goes to pytest
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
from xml.etree import ElementTree

BACKENDS = ("tensorflow", "jax", "torch")


def run(backend, pytest_arguments):
    """Runs pytest on one backend; returns `(passed, summary)`."""
    print(f"\n=== {backend} ===", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", f"--junit-xml={report}", *pytest_arguments]
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", **os.environ}
        code = subprocess.run(command, env={**quiet, "KERAS_BACKEND": backend}).returncode
        if not report.exists():
            return False, f"pytest stopped with exit code {code}"
        suite = ElementTree.parse(report).find("testsuite")
    tests, failures, errors, skipped = (
        int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")
    )
    ran = tests - skipped
    summary = (
        f"{ran - failures - errors} passed, {failures} failed, {errors} errors, "
        f"{skipped} skipped in {float(suite.get('time')):.0f} s"
    )
    return code == 0 and ran > 0, summary


def main():
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m tests", description="Runs the tests once per backend."
    )
    parser.add_argument("backends", nargs="*", metavar="backend", help=", ".join(BACKENDS))
    backends = parser.parse_args(arguments[:split]).backends or BACKENDS
    for backend in backends:
        if backend not in BACKENDS:
            parser.error(f"`backend` must be one of {', '.join(BACKENDS)}. Received: {backend}")

    results = {backend: run(backend, arguments[split + 1 :]) for backend in backends}
    print()
    for backend, (passed, summary) in results.items():
        print(f"{backend:<12}{'ok' if passed else 'FAILED':<8}{summary}")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
