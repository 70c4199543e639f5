"""Plants faults in a copy of the packages, one at a time, and reports which ones the tests miss.

python -m tests.mutations                        all faults, two at a time
python -m tests.mutations --only routing/        those whose file or description contains the text
python -m tests.mutations --list                 what there is

Each fault of `layers.py` and `models.py` is a plausible mistake in one file. It runs against the
tests that mirror that file and, for a layer, against `tests/test_end_to_end.py`, which stop at the
first failure. The same tests must pass without the fault, which is checked first. At least 95 % of
the faults must be caught. All of them take about MINUTES minutes on two cores.

To add a fault, add a row to the table. A fault must change behaviour; one that only breaks the
import counts as invalid. A fault that survives needs a test.
"""

import argparse
import os
import pathlib
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from tests.mutations import layers, models
from tests.mutations.fault import ROOT

FAULTS = (*layers.FAULTS, *models.FAULTS)
PASSED, FAILED = 0, 1  # exit codes of pytest
SECONDS = 400  # after which tests hang
COPIED = ("keras_moe", "zoo", "tests", "tutorials", "benchmarks", "setup.cfg", "pyproject.toml")
CAUGHT = 0.95  # of the faults


def copy(folder):
    """A copy of the repository that tests can run in."""
    for name in COPIED:
        source, target = ROOT / name, pathlib.Path(folder, name)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    for name in ("README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(folder, backend, paths):
    """Runs tests in a copy.

    Returns:
        Tuple of pytest's exit code, `None` for tests that hang, and the first test that failed.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--durations=0"]
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, *paths],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return None, "a test that hangs"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, lines[0].split(" - ")[0].partition(" ")[2] if lines else ""


def verdict(folder, fault):
    """What the tests make of one fault: its outcome, and the test that caught it."""
    path = pathlib.Path(folder, fault.file)
    text = fault.plant(folder)
    try:
        code, test = run(folder, fault.backend, fault.commands())
    finally:
        path.write_text(text)
    if code in (FAILED, None):
        return "caught", test
    return ("SURVIVED", "") if code == PASSED else ("INVALID", f"pytest ended with {code}: {test}")


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", default="", help="text in a fault's file or description")
    parser.add_argument("--jobs", type=int, default=2, help="number of faults at a time")
    parser.add_argument("--list", action="store_true", help="list the faults and stop")
    parser.add_argument("--skip-baseline", action="store_true", help="trust the unchanged code")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in fault.name]
    if not faults:
        parser.error(f"`--only` must occur in a fault. Received: {arguments.only}")
    if arguments.list:
        print("\n".join(fault.name for fault in faults))
        return 0

    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(arguments.jobs) as pool:
        folders = queue.SimpleQueue()
        for number in range(arguments.jobs):
            folder = pathlib.Path(root, str(number))
            folder.mkdir()
            folders.put(copy(folder))

        def within_a_copy(function, *args):
            folder, start = folders.get(), time.monotonic()
            try:
                return *function(folder, *args), time.monotonic() - start
            finally:
                folders.put(folder)

        if not arguments.skip_baseline:
            sets = dict.fromkeys((fault.backend, fault.commands()) for fault in faults)
            for (backend, paths), (code, test, _) in zip(
                sets, pool.map(lambda args: within_a_copy(run, *args), sets), strict=True
            ):
                if code != PASSED:
                    print(f"Without a fault {test or ' '.join(paths)} must pass on {backend}.")
                    return 1

        outcomes = []
        results = pool.map(lambda fault: within_a_copy(verdict, fault), faults)
        for fault, (outcome, test, seconds) in zip(faults, results, strict=True):
            outcomes.append(outcome)
            print(f"{outcome:<9}{seconds:4.0f} s  {fault.name}  {test}", flush=True)
    count = {name: outcomes.count(name) for name in ("caught", "SURVIVED", "INVALID")}
    print(f"{len(faults)} faults: " + ", ".join(f"{n} {name}" for name, n in count.items()))
    return 0 if count["caught"] >= CAUGHT * len(faults) and not count["INVALID"] else 1


if __name__ == "__main__":
    sys.exit(main())
