import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest

from benchmarks.papers import vowels_1991
from benchmarks.papers.runs import RESULTS, Runs
from benchmarks.papers.vowels_1991 import FULL, SYSTEMS, Vowels, fastest, parted, report

ROOT = pathlib.Path(__file__).parents[3]
CENTRES = {"i": (300, 2500), "I": (450, 2100), "A": (800, 1150), "V": (650, 1250), "u": (330, 900)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 speakers who say each of five vowels twice."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("vowels")
    lines = ["type,sex,speaker,vowel,repetition,f0,f1,f2,f3"]
    for speaker in range(1, 61):
        for vowel, centre in CENTRES.items():
            for repetition in (1, 2):
                f1, f2 = (round(f * rng.normal(1, 0.08)) for f in centre)
                lines.append(f"m,m,{speaker},{vowel},{repetition},150,{f1},{f2},3000")
    (folder / "peterson_barney_1952.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_the_data(data):
    vowels = Vowels(data / "peterson_barney_1952.csv")
    assert len(vowels.formants) == 60 * 4 * 2  # without "u"
    assert 0.2 < vowels.formants[:, 0].min() < vowels.formants[:, 1].max() < 3.5  # kHz
    for vowel, target in (("i", 1), ("I", 0), ("A", 1), ("V", 0)):
        assert (vowels.target[vowels.vowel == vowel] == target).all()


def test_splits_are_of_speakers(data):
    vowels = Vowels(data / "peterson_barney_1952.csv")
    splits = [vowels.training(split) for split in range(4)]
    for training in splits:
        known, unknown = set(vowels.speaker[training]), set(vowels.speaker[~training])
        assert len(known) == 50 and len(unknown) == 10 and not known & unknown
    assert set(vowels.speaker[splits[0]]) == set(range(1, 51))
    assert len({training.tobytes() for training in splits}) == 4
    np.testing.assert_array_equal(splits[2], vowels.training(2))


def test_fastest_step_size_is_one_at_which_all_learn():
    results = {
        5: {"epochs": [90, 92], "reached": [True, True]},
        7: {"epochs": [70, 72], "reached": [True, True]},
        10: {"epochs": [10, 100], "reached": [True, False]},
    }
    assert fastest(results) == 7


def result(epochs, learnt=True, **more):
    return {
        "epochs": epochs,
        "reached": [learnt] * len(epochs),
        "train": [0.9] * len(epochs),
        "test": [0.8] * len(epochs),
        "parameters": 24,
        "step_size": 20,
        **more,
    }


def test_report():
    slow, quick = (
        result([100, 102, 104]),
        result([50, 51, 52], active=[2, 2, 3], parted=[1, 1, 0.7]),
    )
    results = {name: [quick if "experts" in name else slow] for name in SYSTEMS}
    tuning = {name: {7: slow, 10: result([60, 90, 90], learnt=False)} for name in SYSTEMS}
    tuning["4 experts"] = {7: quick, 10: quick}
    lines = report(results, tuning).splitlines()
    assert (
        "| 4 experts | 24 | 20 | file order | 51 ± 1 | 51 | 3/3 | 90.0 | 80.0 | 2.33 | 90.0 |"
        in lines
    )
    assert "| BP 6 | 24 | 20 | file order | 102 ± 2 | 102 | 3/3 | 90.0 | 80.0 | | |" in lines
    assert "| 4 experts / BP 6 | 0.50 (p < 0.001) |" in lines
    assert "| 8 experts / 4 experts | 1.00 (p = 1.000) |" in lines
    assert "| BP 6 | **102** | 80 (0/3) |" in lines
    assert "| 4 experts | **51** | 51 |" in lines  # the first of equals
    assert "| 4 experts | 90 | 90 |" in lines  # parted


def test_parted():
    front = np.array([True, True, True, False, False])
    shares = np.array([[0.6, 0.3, 0.1], [0.9, 0.0, 0.1], [0.2, 0.5, 0.3], [0, 1, 0], [0, 1, 0]])
    assert parted(shares, front) == 0.8  # the third front vowel is led by the expert of the back
    assert parted(shares[:, ::-1], front) == 0.8
    shares[:2] = shares[3]
    assert parted(shares, front) == 0


def command(data, into):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.papers.vowels_1991", "--quick"]
        + ["--data", str(data), "--into", str(into)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="it runs on JAX wherever it is called")
def test_quick_run_and_going_on(data, tmp_path):
    run = command(data, tmp_path)
    assert run.returncode == 0, run.stderr
    path = tmp_path / "vowels_1991.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == len(SYSTEMS) * (2 + 2)  # 2 step sizes, 2 splits
    for record in records:
        settings, found = record["settings"], record["result"]
        assert len(found["epochs"]) == len(settings["seeds"]) == 2
        assert all(0 < n <= 800 for n in found["epochs"])
        assert ("active" in found) == ("experts" in settings)
    parameters = {tuple(r["settings"].get(k) for k in ("experts", "hidden")): r for r in records}
    # Weights and biases of linear experts and the gate, or of hidden units and the output.
    for (experts, hidden), record in parameters.items():
        expected = experts * 3 + experts * 3 if experts else hidden * 3 + hidden + 1
        assert record["result"]["parameters"] == expected
    assert (tmp_path / "vowels_1991.png").read_bytes().startswith(b"\x89PNG")

    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    again = command(data, tmp_path)
    assert again.stdout == run.stdout  # and what was run again came out the same
    new = path.read_text().splitlines(keepends=True)
    assert new[:-1] == lines[:-1] and len(new) == len(lines)


def test_the_tables_that_are_shown_are_those_of_the_results_that_are_kept():
    """Of the full protocol, and nothing is missing: a run would fail, since there is no data."""
    runs = Runs(RESULTS / "vowels_1991.jsonl")
    tables = report(*vowels_1991.experiment(runs, None, FULL))
    page = (ROOT / "benchmarks" / "papers" / "README.md").read_text().splitlines()
    for line in filter(None, tables.splitlines()):
        assert line in page
