import json
import os
import re
import time

import pytest

from benchmarks.claims import claimed
from benchmarks.papers.runs import QUICK_RESULTS, RESULTS, Runs, options


def counted(calls):
    def run(**settings):
        calls.append(settings)
        return {"sum": sum(settings.values()), "seeds": (1, 2)}

    return run


def test_a_run_is_run_once_and_kept(tmp_path):
    calls, path = [], tmp_path / "new" / "runs.jsonl"
    runs = Runs(path)
    first = runs(counted(calls), a=1, b=2)
    assert first == {"sum": 3, "seeds": [1, 2]}  # as JSON would give it back
    assert runs(counted(calls), b=2, a=1) == first
    assert runs(counted(calls), a=1, b=3)["sum"] == 4
    assert calls == [{"a": 1, "b": 2}, {"a": 1, "b": 3}]

    again = Runs(path)
    assert again(counted(calls), a=1, b=2) == first and len(calls) == 2
    record = json.loads(path.read_text().splitlines()[0])
    assert record["settings"] == {"a": 1, "b": 2} and record["result"] == first
    assert record["seconds"] >= 0 and set(record["versions"]) == {"keras-moe", "keras"}


def test_runs_of_another_experiment_are_taken_over(tmp_path):
    calls, other, path = [], tmp_path / "other.jsonl", tmp_path / "runs.jsonl"
    Runs(other)(counted(calls), a=1)
    runs = Runs(path, [other, tmp_path / "not_there.jsonl"])
    runs.ahead(counted(calls), [{"a": 1}, {"a": 2}])
    assert calls == [{"a": 1}, {"a": 2}] and runs(counted(calls), a=1)["sum"] == 1
    assert len(path.read_text().splitlines()) == 1  # only what was run here


def test_what_was_interrupted_is_run_again(tmp_path):
    calls, path = [], tmp_path / "runs.jsonl"
    runs = Runs(path)
    for a in (1, 2):
        runs(counted(calls), a=a)
    path.write_text(path.read_text()[:-9])
    runs = Runs(path)
    for a in (1, 2):
        runs(counted(calls), a=a)
    assert [call["a"] for call in calls] == [1, 2, 2]
    assert len(Runs(path).results) == 2


def test_a_failed_run_leaves_nothing(tmp_path):
    def run(a):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Runs(tmp_path / "runs.jsonl")(run, a=1)
    assert not Runs(tmp_path / "runs.jsonl").results


def test_options(tmp_path, capsys):
    here = ["--data", str(tmp_path)]
    chosen = options("vowels_1991", "", "vowels", here)
    assert (chosen.data, chosen.into, chosen.quick) == (tmp_path, RESULTS, False)
    assert options("vowels_1991", "", "vowels", [*here, "--quick"]).into == QUICK_RESULTS
    assert options("vowels_1991", "", "vowels", [*here, "--quick", "--into", "x"]).into.name == "x"
    with pytest.raises(SystemExit):
        options("vowels_1991", "", "vowels", ["--data", str(tmp_path / "none")])
    assert re.search(f"`--data`.*{tmp_path / 'none'}$", capsys.readouterr().err.strip())


def test_two_processes_share_the_work(tmp_path):
    """The other process, a fork, holds a run; this one takes the rest and then waits for it."""
    path, settings = tmp_path / "runs.jsonl", [{"a": a} for a in range(3)]
    reader, writer = os.pipe()
    if (other := os.fork()) == 0:
        with claimed(path.with_suffix(".lock"), json.dumps(settings[1])) as is_free:
            os.write(writer, b"x" if is_free else b"-")
            time.sleep(1)
            Runs(path)(counted([]), **settings[1])
        os._exit(0)
    assert os.read(reader, 1) == b"x"
    calls = []
    runs = Runs(path)
    runs.ahead(counted(calls), settings)
    os.waitpid(other, 0)
    assert [call["a"] for call in calls] == [0, 2]
    assert len(runs.results) == 3
    runs.ahead(counted(calls), settings)
    assert len(calls) == 2
