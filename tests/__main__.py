"""Runs the whole suite once per backend, each in a process of its own, two at once.

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
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

BACKENDS = ("tensorflow", "jax", "torch")
AT_ONCE = 2
# Compiling and small shapes gain nothing by threads, and processes that run at once lose by them.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}


def run(backend, pytest_arguments, alone):
    """Runs pytest on one backend; returns `(passed, summary)`.

    Its output is shown at the end, unless it runs alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, output = pathlib.Path(folder, "report.xml"), pathlib.Path(folder, "output")
        command = [sys.executable, "-m", "pytest", f"--junit-xml={report}", *pytest_arguments]
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": backend}
        if alone:
            print(f"\n=== {backend} ===", flush=True)
            code = subprocess.run(command, env={**os.environ, **quiet}).returncode
        else:
            with output.open("w") as file:
                code = subprocess.run(
                    command,
                    env={**ONE_THREAD, **os.environ, **quiet},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                ).returncode
            print(f"\n=== {backend} ===\n{output.read_text(errors='replace')}", flush=True)
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

    at_once = min(AT_ONCE, len(backends), os.cpu_count() or 1)
    with ThreadPoolExecutor(at_once) as pool:
        running = {
            backend: pool.submit(run, backend, arguments[split + 1 :], at_once == 1)
            for backend in backends
        }
        try:
            results = {backend: result.result() for backend, result in running.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print()
    for backend, (passed, summary) in results.items():
        print(f"{backend:<12}{'ok' if passed else 'FAILED':<8}{summary}")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
