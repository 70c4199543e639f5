"""What the papers' experiments share: runs that are kept one by one, and the command line.

An experiment that was interrupted goes on with the same command; what is in its file of results is
not run again. To run something anew, take its lines out of the file.
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path

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
    """

    def __init__(self, path):
        self.path = Path(path)
        self.results = {}
        if self.path.exists():
            text = self.path.read_text()
            whole_lines = text[: text.rfind("\n") + 1]
            if whole_lines != text:  # interrupted while it was written
                self.path.write_text(whole_lines)
            for line in whole_lines.splitlines():
                record = json.loads(line)
                self.results[_key(record["settings"])] = record["result"]

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
                file.write(line + "\n")
            self.results[key] = json.loads(line)["result"]
        return self.results[key]


def _key(settings):
    return json.dumps(settings, sort_keys=True)


def options(experiment, description, data, arguments=None):
    """The command line of an experiment.

    Args:
        experiment: name of its module.
        description: what `--help` says.
        data: name of its folder in ../shared/data.
        arguments: list of strings; `None`: those of the process.

    Returns:
        A namespace: `data`, a folder; `into`, the folder of the results; `quick`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.papers.{experiment}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data", data), help="folder")
    parser.add_argument("--into", type=Path, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="whether it runs, not what it finds")
    chosen = parser.parse_args(arguments)
    if not chosen.data.is_dir():
        parser.error(f"`--data` must be a folder that is there. Received: {chosen.data}")
    chosen.into = chosen.into or (QUICK_RESULTS if chosen.quick else RESULTS)
    return chosen
