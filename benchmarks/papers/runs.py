"""What the papers' experiments share: runs that are kept one by one, and the command line.

An experiment that was interrupted goes on with the same command; what is in its file of results is
not run again. To run something anew, take its lines out of the file.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.claims import claimed

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("runs") / "papers_quick"


class Runs:
    """The runs of an experiment, each a line of JSON in a file.

    Example:

    ```python
    runs = Runs(folder / "balancing_2017.jsonl")
    result = runs(train, losses="both", seed=3)  # of train(losses="both", seed=3), now or earlier
    ```

    Args:
        path: of the file. Two processes may write to it at once.
        others: paths of other experiments' files; a run that is there is not run again.
    """

    def __init__(self, path, others=()):
        self.path = Path(path)
        self.others = [Path(other) for other in others]
        self.results = {}
        self._read()

    def __call__(self, run, /, **settings):
        """The result of `run(**settings)`; both it and the settings are what JSON can hold."""
        key = _key(settings)
        if key not in self.results:
            start = time.perf_counter()
            result = run(**settings)
            line = json.dumps(
                {
                    "settings": settings,
                    "result": result,
                    "seconds": round(time.perf_counter() - start, 1),
                    "versions": {package: version(package) for package in ("keras-moe", "keras")},
                }
            )
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                # After what an interruption left of a line a new one begins.
                file.write(("" if self._ends_a_line() else "\n") + line + "\n")
            self.results[key] = json.loads(line)["result"]
        return self.results[key]

    def ahead(self, run, settings):
        """Runs what is not there yet of a list of settings.

        What another process is running is left to it, and waited for in the end: two processes of
        one experiment share the work. A process that dies leaves nothing behind.
        """
        while missing := [each for each in settings if not self._is_known(each)]:
            ran = False
            for each in missing:
                with claimed(self.path.with_suffix(".lock"), _key(each)) as is_free:
                    if is_free and not self._is_known(each):
                        self(run, **each)
                        ran = True
            if not ran:
                time.sleep(1)

    def _ends_a_line(self):
        return not self.path.exists() or self.path.read_text()[-1:] in ("", "\n")

    def _is_known(self, settings):
        if _key(settings) not in self.results:
            self._read()
        return _key(settings) in self.results

    def _read(self):
        """What is in the files, also from other processes."""
        for path in (*self.others, self.path):
            for line in path.read_text().splitlines() if path.exists() else ():
                try:
                    record = json.loads(line)
                except ValueError:  # interrupted while it was written, or not yet at its end
                    continue
                self.results[_key(record["settings"])] = record["result"]


def _key(settings):
    return json.dumps(settings, sort_keys=True)


def options(experiment, description, data, arguments=None, times=False):
    """The command line of an experiment.

    Args:
        experiment: name of its module.
        description: what `--help` says.
        data: name of its folder in ../shared/data.
        arguments: list of strings; `None`: those of the process.
        times: whether the seconds of its steps can be measured apart from its runs.

    Returns:
        A namespace: `data`, a folder; `into`, the folder of the results; `quick`; `time`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.papers.{experiment}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data", data), help="folder")
    parser.add_argument("--into", type=Path, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="whether it runs, not what it finds")
    if times:
        parser.add_argument("--time", action="store_true", help="only measure the seconds of steps")
    chosen = parser.parse_args(arguments)
    if not chosen.data.is_dir():
        parser.error(f"`--data` must be a folder that is there. Received: {chosen.data}")
    chosen.into = chosen.into or (QUICK_RESULTS if chosen.quick else RESULTS)
    return chosen
