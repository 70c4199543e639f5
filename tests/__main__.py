"""Runs the test suite, one backend after the other, each with two or more pytest workers.

python -m tests                             the default suite: what CI runs
python -m tests --full                      every test on every backend, tutorials at full size
python -m tests jax tests/zoo               only these backends, files or folders
python -m tests tensorflow -- -k dispatch   what follows `--` goes to pytest

PyTorch runs every test, because it compiles nothing and is quickest. TensorFlow and JAX run the
tests marked `every_backend`.
"""

import argparse
import importlib.util
import os
import pathlib
import subprocess
import sys

BACKENDS = ("torch", "jax", "tensorflow")
NEEDED = ("pytest", "pytest_timeout", "xdist")
INTERRUPTED, NO_TESTS_COLLECTED = 2, 5  # exit codes of pytest
MOST_WORKERS = 8  # a worker takes up to 3 GB


def run(backend, full, pytest_arguments):
    """Runs pytest on one backend and returns its exit code."""
    command = [sys.executable, "-m", "pytest", "--dist=loadfile", f"-n{workers()}"]
    command += ["--no-loadscope-reorder", "--max-worker-restart=2"]
    if full:
        command += ["--full", "--timeout=900", "-o", "faulthandler_timeout=1000"]
    elif backend != "torch":
        command += ["-m", "every_backend"]
    print(f"\n=== {backend} ===", flush=True)
    environment = {**os.environ, "KERAS_BACKEND": backend}
    process = subprocess.Popen([*command, *pytest_arguments], env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:  # which pytest received, too
        return process.wait()


def workers():
    """Number of pytest workers."""
    return min(MOST_WORKERS, os.cpu_count() or 1)


def parse(arguments):
    """Splits the command line.

    Returns:
        Tuple of the backends to run, whether the full suite is wanted, and pytest's arguments.
    """
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m tests", description=__doc__.split("\n")[0])
    parser.add_argument(
        "chosen", nargs="*", metavar="backend|path", help=f"{', '.join(BACKENDS)}, or a test file"
    )
    parser.add_argument("--full", action="store_true", help="run every test on every backend")
    parsed = parser.parse_args(arguments[:split])
    backends = [name for name in BACKENDS if name in parsed.chosen] or list(BACKENDS)
    paths = [name for name in parsed.chosen if name not in BACKENDS]
    for path in paths:
        if not pathlib.Path(path.partition("::")[0]).exists():
            parser.error(f"expected one of {', '.join(BACKENDS)}, or a path. Received: {path}")
    missing = [name for name in (*NEEDED, *backends) if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(
            f"{', '.join(missing)} must be installed "
            "(`pip install -c constraints.txt -e '.[all,test]'`), or name only installed backends"
        )
    return backends, parsed.full, [*paths, *arguments[split + 1 :]]


def main():
    backends, full, pytest_arguments = parse(sys.argv[1:])
    codes = {}
    for backend in backends:
        codes[backend] = run(backend, full, pytest_arguments)
        if codes[backend] == INTERRUPTED:
            break
    print()
    for backend, code in codes.items():
        passed = code in (0, NO_TESTS_COLLECTED)
        print(f"{backend:<12}{'ok' if passed else f'FAILED (exit code {code} of pytest)'}")
    if set(codes.values()) == {NO_TESTS_COLLECTED}:
        print("No test was selected.")
        return NO_TESTS_COLLECTED
    return 0 if set(codes.values()) <= {0, NO_TESTS_COLLECTED} else 1


if __name__ == "__main__":
    sys.exit(main())
