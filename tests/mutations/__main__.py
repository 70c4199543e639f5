"""Plants faults in a copy of the packages, one at a time, and reports which ones the tests miss.

python -m tests.mutations                        all faults, two at a time
python -m tests.mutations --only routing/        those whose file or description contains the text
python -m tests.mutations --list                 what there is

Each fault of `layers.py` and `models.py` is a plausible mistake in one file. It runs against the
tests that mirror that file and then, for a layer, against `tests/test_end_to_end.py`, which stop at
the first failure. The same tests must pass without the fault, which is checked first. All faults
take about an hour on two cores.

One line tells what became of a fault:

* `caught`: a test failed, or the tests hang: they take three times as long as without the fault,
  and at least five minutes.
* `SURVIVED`: all tests passed. Either a test is missing, or the fault changes nothing.
* `INVALID`: the tests could not be imported, which says nothing about what they check.
* `UNKNOWN`: the tests fail without the fault.

The exit code is 0 if at least 95 % of the faults were caught and the last two did not occur.

To add a fault, add a row to the table and run it with `--only`. The text to replace must occur once
in the file. A fault must change behaviour; one that only breaks the import is invalid.
"""

import argparse
import collections
import importlib.util
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.mutations import layers, models
from tests.mutations.fault import ROOT

FAULTS = (*layers.FAULTS, *models.FAULTS)
NOT_COPIED = (".*", "__pycache__", "*.egg-info", "runs")
SECONDS = 300  # after which tests hang, or three times what they take without a fault
CAUGHT = 0.95  # of the faults


class Outcome(NamedTuple):
    """What pytest made of some tests."""

    kind: str  # "passed", "failed", "hang" or "invalid"
    test: str = ""  # the first that failed
    seconds: float = 0.0


class Copy:
    """A copy of the repository that tests can run in.

    Args:
        folder: path of the copy, which is made.
    """

    def __init__(self, folder):
        self.folder = folder
        self.process = None
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))

    def is_imported(self):
        """Whether tests here import these packages, and not the installed ones."""
        program = "import keras_moe, zoo; print(keras_moe.__file__, zoo.__file__, sep='\\n')"
        options = {"cwd": self.folder, "env": self._environment("torch"), "text": True}
        files = subprocess.check_output([sys.executable, "-c", program], **options).splitlines()
        return all(self.folder in pathlib.Path(file).parents for file in files)

    def run(self, paths, backend, seconds):
        """Runs tests, for `seconds` at most; returns the `Outcome`."""
        command = [sys.executable, "-m", "pytest", "-x", "--tb=no", "-p", "no:cacheprovider"]
        start = time.monotonic()
        self.process = subprocess.Popen(
            [*command, *paths],
            cwd=self.folder,
            env=self._environment(backend),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a test may have started processes, too
        )
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.stop()
            return Outcome("hang", "tests that hang", time.monotonic() - start)
        return Outcome(*read(self.process.returncode, output), time.monotonic() - start)

    def stop(self):
        """Ends the tests that are running."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def write(self, file, text):
        """Writes a file; what Python has compiled of it must not be taken for the new one."""
        path = self.folder / file
        path.write_text(text)
        pathlib.Path(importlib.util.cache_from_source(path)).unlink(missing_ok=True)

    def _environment(self, backend):
        return {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(self.folder)}


def read(code, output):
    """Kind and test of an `Outcome`, from the exit code and the output of pytest."""
    if code == 0 and re.search(r"^\d+ passed", output, re.MULTILINE):
        return "passed", ""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    if lines:
        test = lines[0].split(" - ")[0].partition(" ")[2]
        return ("failed" if "::" in test else "invalid"), test
    # No test has failed, but pytest: a crash, or nothing that it could begin with.
    return ("failed" if code < 0 or code == 1 else "invalid"), f"exit code {code} of pytest"


class Baselines:
    """Outcomes of tests without a fault; each is found out once."""

    def __init__(self):
        self._outcomes = {}
        self._locks = collections.defaultdict(threading.Lock)

    def of(self, copy, paths, backend):
        with self._locks[paths, backend]:
            if (paths, backend) not in self._outcomes:
                self._outcomes[paths, backend] = copy.run(paths, backend, 10 * SECONDS)
            return self._outcomes[paths, backend]


def verdict(fault, copy, baselines):
    """Runs the tests of a fault; returns the word for it and the `Outcome`."""
    total = 0.0
    text, planted = fault.plant(copy.folder)
    for paths in fault.commands():
        baseline = baselines.of(copy, paths, fault.backend)
        if baseline.kind != "passed":
            return "UNKNOWN", baseline
        copy.write(fault.file, planted)
        try:
            outcome = copy.run(paths, fault.backend, max(SECONDS, 3 * baseline.seconds))
        finally:
            copy.write(fault.file, text)
        total += outcome.seconds
        if outcome.kind != "passed":
            break
    words = {"passed": "SURVIVED", "invalid": "INVALID"}
    return words.get(outcome.kind, "caught"), outcome._replace(seconds=total)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--only", default="", help="text in a fault's file or description")
    parser.add_argument("--jobs", type=int, default=2, help="number of faults at a time")
    parser.add_argument("--list", action="store_true", help="list the faults and stop")
    arguments = parser.parse_args()
    faults = [fault for fault in FAULTS if arguments.only in fault.name]
    if not faults:
        parser.error(f"`--only` must occur in a fault. Received: {arguments.only}")
    for fault in faults:
        try:
            fault.plant(ROOT)
        except (OSError, ValueError) as error:
            parser.error(f"{fault.name}: {error}")
    if arguments.list:
        print("\n".join(fault.name for fault in faults))
        return 0

    baselines, idle, words = Baselines(), queue.SimpleQueue(), collections.Counter()

    def judge(fault):
        copy = idle.get()
        try:
            word, outcome = verdict(fault, copy, baselines)
        finally:
            idle.put(copy)
        words[word] += 1
        print(f"{word:<9}{outcome.seconds:4.0f} s  {fault.name}  {outcome.test}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutations-") as root:
        folders = [pathlib.Path(root, str(number)).resolve() for number in range(arguments.jobs)]
        copies = [Copy(folder) for folder in folders]
        for copy in copies:
            idle.put(copy)
        if not copies[0].is_imported():
            raise RuntimeError(f"Python must import the packages in {folders[0]}")
        pool = ThreadPoolExecutor(arguments.jobs)
        try:
            list(pool.map(judge, faults))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for copy in copies:
                copy.stop()
    counts = ", ".join(
        f"{words[word]} {word.lower()}"
        for word in ("caught", "SURVIVED", "INVALID", "UNKNOWN")
        if words[word] or word in ("caught", "SURVIVED")
    )
    print(f"\n{len(faults)} faults, {counts}")
    is_good = words["caught"] >= CAUGHT * len(faults)
    return 0 if is_good and not words["INVALID"] + words["UNKNOWN"] else 1


if __name__ == "__main__":
    sys.exit(main())
