"""Runs the suite once per backend, a part of `tests/` to a process, two at once.

python -m tests                             all three backends
python -m tests jax torch                   only these
python -m tests tensorflow -- -k dispatch   what follows `--` goes to pytest

With all three, tests marked `one_backend` run on one alone, on the quickest, PyTorch, unless the
mark names another: they take seconds where a backend traces and compiles, and look at what is the
same on all of them; what they compute on the way, another test computes on every backend. With
fewer backends, with `--`, and by `pytest` itself, they run on every backend.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from xml.etree import ElementTree

import pytest

BACKENDS = ("tensorflow", "jax", "torch")
AT_ONCE = 2
# Compiling and small shapes gain nothing by threads, and processes that run at once lose by them;
# programs that run for milliseconds gain nothing by a compiler that takes its time.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
QUICK = {
    **ONE_THREAD,
    "XLA_FLAGS": f"{ONE_THREAD['XLA_FLAGS']} --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
}
LONG = "tests/tutorials"  # whose programs run for minutes
# Folders of a folder that have processes of their own: the programs that a process has compiled it
# holds, at the end of all of tests/zoo 8 GB on TensorFlow.
SPLIT = {"zoo": ("models", "conversion", "finetuning", "pretraining")}
SLOWEST = ("--durations=12", "--durations-min=5")  # for whoever makes the suite faster
NO_TESTS = pytest.ExitCode.NO_TESTS_COLLECTED
FIGURES = ("tests", "failures", "errors", "skipped", "time")


def run(backend, pytest_arguments, alone):
    """Runs pytest on one backend, and shows its output at the end, unless it runs alone.

    Returns:
        Tuple of its exit code and its figures; `None` if it has none.
    """
    with tempfile.TemporaryDirectory() as folder:
        report, output = pathlib.Path(folder, "report.xml"), pathlib.Path(folder, "output")
        command = [sys.executable, "-m", "pytest", f"--junit-xml={report}", *SLOWEST]
        command += pytest_arguments
        is_long = any(argument.startswith(LONG) for argument in pytest_arguments)
        flags = ONE_THREAD if is_long else QUICK
        environment = {"TF_CPP_MIN_LOG_LEVEL": "2", **flags, **os.environ, "KERAS_BACKEND": backend}
        title = f"\n=== {backend} {' '.join(pytest_arguments)} ==="
        if alone:
            print(title, flush=True)
            code = subprocess.run(command, env=environment).returncode
        else:
            with output.open("w") as file:
                code = subprocess.run(
                    command, env=environment, stdout=file, stderr=subprocess.STDOUT
                ).returncode
            print(f"{title}\n{output.read_text(errors='replace')}", flush=True)
        if not report.exists():
            return code, None
        suite = ElementTree.parse(report).find("testsuite")
    return code, {name: float(suite.get(name)) for name in FIGURES}


def summary(ran):
    """Whether a backend's parts passed, and a line that says so; a part may have had no test."""
    stopped = [code for code, figures in ran if figures is None]
    if stopped:
        return False, f"pytest stopped with exit code {stopped[0]}"
    total = {name: sum(figures[name] for _, figures in ran) for name in FIGURES}
    failed = total["failures"] + total["errors"]
    passed = total["tests"] - total["skipped"] - failed
    line = (
        f"{passed:.0f} passed, {total['failures']:.0f} failed, {total['errors']:.0f} errors, "
        f"{total['skipped']:.0f} skipped in {total['time']:.0f} s"
    )
    return passed > 0 and all(code in (0, NO_TESTS) for code, _ in ran), line


def parts():
    """What pytest is told to run in each process, the longest first."""
    folders = (file.parent.name for file in pathlib.Path(__file__).parent.glob("*/__init__.py"))
    found = []
    for folder in sorted(folders, reverse=True):
        own = [f"tests/{folder}/{name}" for name in SPLIT.get(folder, ())]
        found += [[path] for path in own]
        found.append([f"tests/{folder}", *(f"--ignore={path}" for path in own)])
    return found


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

    to_run = [arguments[split + 1 :]] if arguments[split + 1 :] else parts()
    is_whole = len(backends) == len(BACKENDS) and not arguments[split + 1 :]
    shared = ["--shared"] if is_whole else []
    at_once = min(AT_ONCE, len(backends) * len(to_run), os.cpu_count() or 1)
    with ThreadPoolExecutor(at_once) as pool:
        running = [
            (backend, pool.submit(run, backend, [*shared, *part], at_once == 1))
            for part in to_run
            for backend in backends
        ]
        try:
            results = {backend: [] for backend in backends}
            for backend, ran in running:
                results[backend].append(ran.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    print()
    verdicts = {backend: summary(ran) for backend, ran in results.items()}
    for backend, (passed, line) in verdicts.items():
        print(f"{backend:<12}{'ok' if passed else 'FAILED':<8}{line}")
    return 0 if all(passed for passed, _ in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
