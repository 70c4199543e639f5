import json

import pytest

import zoo
from tests.zoo.finetuning import small
from tests.zoo.finetuning.small import run
from zoo.finetuning import batches
from zoo.finetuning import suite as suites
from zoo.finetuning.suite import finetune_suite
from zoo.tasks.data import Examples

TWO = ("glue/cola", "glue/mrpc")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Two tasks of GLUE, two seeds of each, the data of the others missing; and the folder."""

    def load(task, split, data_dir=None):
        if getattr(task, "name", task) not in TWO:
            raise FileNotFoundError(f"no {task}")
        return small.load(task, split)

    folder = tmp_path_factory.mktemp("suite") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches.data, "load", load)
        summary = run(folder, "glue", finetune=finetune_suite, seeds=2, epochs=2)
    return summary, folder


def test_a_suite_leaves_out_what_has_no_data(suite):
    summary, folder = suite
    assert tuple(summary["tasks"]) == TWO and len(summary["left_out"]) == 7
    assert summary["left_out"]["glue/rte"] == "no glue/rte"
    assert summary["averages"]["best"]["sd"] is not None
    assert json.loads((folder / "summary.json").read_text()) == summary
    runs = [run for task in summary["tasks"].values() for run in task["runs"]]
    assert [run["folder"] for run in runs] == [
        f"{task.replace('/', '-')}/seed{seed}" for task in TWO for seed in (0, 1)
    ]
    for entry in runs:
        results = json.loads((folder / entry["folder"] / "results.json").read_text())
        assert results["finished"] and len(results["history"]) == 2
        assert results["settings"]["seed"] == entry["seed"]
        (metric, *_) = results["metrics"]
        assert entry["best"][metric.removeprefix("val_")] == results["best"][metric]
    assert sorted(path.name for path in folder.iterdir()) == [
        "glue-cola",
        "glue-mrpc",
        "summary.json",
    ]


def test_partial_data_is_not_left_out(monkeypatch):
    """Of MNLI's two validation sets one is there, and the task is known to be partial."""

    def load(task, split, data_dir=None):
        if split not in ("train", "validation_matched"):
            raise FileNotFoundError(f"no {split}")

    monkeypatch.setattr(suites.data, "load", load)
    assert suites.missing_data("glue/mnli") == "no validation_mismatched"
    monkeypatch.setattr(
        suites, "validation_splits", lambda *_: (("validation_matched",), ["train"])
    )
    assert suites.missing_data("glue/mnli") is None


def test_a_batch_that_is_too_large_for_a_task_is_refused_before_any_is_trained(
    tmp_path, monkeypatch
):
    def load(task, split, data_dir=None):
        examples = small.load(task, split)
        if getattr(task, "name", task) == "glue/mrpc":  # not the first task of the suite
            columns = tuple(column[:15] for column in examples.texts)
            examples = Examples(columns, examples.labels[:15])
        return examples

    monkeypatch.setattr(batches.data, "load", load)
    with pytest.raises(ValueError, match="`batch_size`.*glue/mrpc, 15.*batch_size=16"):
        run(tmp_path / "run", "glue", finetune=finetune_suite)
    assert not (tmp_path / "run").exists()


def test_runs_differ_in_their_seeds_alone(tmp_path):
    """The second of a suite, which trains the first one's compiled network, is the same alone."""
    run(tmp_path / "suite", finetune=finetune_suite, seeds=2, max_examples=32)
    alone = run(tmp_path / "alone", seed=1, max_examples=32)
    first, other = (
        json.loads((tmp_path / "suite" / "glue-cola" / f"seed{seed}" / "results.json").read_text())
        for seed in (0, 1)
    )
    assert alone["settings"] == other["settings"]
    assert {n for n, v in first["settings"].items() if v != other["settings"][n]} == {"seed"}
    for one, two in zip(alone["history"], other["history"], strict=True):
        for name in set(one) - {"seconds"}:
            assert one[name] == pytest.approx(two[name], abs=1e-5), name
    assert first["history"][0]["loss"] != other["history"][0]["loss"]


def test_finished_runs_are_not_repeated(suite, monkeypatch):
    summary, folder = suite
    monkeypatch.setattr("zoo.finetuning.run.build", None)
    monkeypatch.setattr(batches.data, "load", None)
    options = {"finetune": finetune_suite, "seeds": 2, "epochs": 2}
    again = run(folder, "glue/cola", **options)
    assert again["tasks"]["glue/cola"] == summary["tasks"]["glue/cola"]
    assert again["averages"] is None
    with pytest.raises(ValueError, match="`output`.*epochs=2.*epochs=3"):
        run(folder, "glue/cola", **(options | {"epochs": 3}))
    (folder / "summary.json").write_text(json.dumps(summary))


def test_an_interrupted_suite_goes_on(suite, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def train(self, run, verbose, original=zoo.finetuning.run.Bench.train):
        if run.results["settings"]["seed"] == 1:
            raise Killed
        original(self, run, verbose)

    options = {"finetune": finetune_suite, "seeds": [0, 1], "epochs": 2}
    with monkeypatch.context() as patch:
        patch.setattr("zoo.finetuning.run.Bench.train", train)
        with pytest.raises(Killed):
            run(tmp_path, **options)
    assert not (tmp_path / "summary.json").exists()
    resumed, whole = run(tmp_path, **options)["tasks"]["glue/cola"], suite[0]["tasks"]["glue/cola"]
    assert resumed["best"]["matthews"] == pytest.approx(whole["best"]["matthews"], abs=1e-4)


def test_pairs_are_for_the_tasks_of_a_suite_that_have_some(tmp_path, monkeypatch):
    settled = []

    def settle(task, *args, settle=suites.settle, **options):
        settled.append(settle(task, *args, **options))
        return settled[-1]

    def load(task, split, data_dir=None):
        raise FileNotFoundError("no data")

    monkeypatch.setattr(suites, "settle", settle)
    monkeypatch.setattr(batches.data, "load", load)
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "out", "glue", finetune=finetune_suite, seeds=1, pairs="together")
    how = {settings["task"].removeprefix("glue/"): settings["pairs"] for settings in settled}
    assert how.pop("cola") is how.pop("sst2") is None
    assert len(how) == 7 and set(how.values()) == {"together"}
    with pytest.raises(ValueError, match="`pairs`.*'together'"):
        run(tmp_path / "out", finetune=finetune_suite, pairs="together")


def test_no_data_at_all(tmp_path, monkeypatch):
    def load(task, split, data_dir=None):
        raise FileNotFoundError("no data")

    monkeypatch.setattr(batches.data, "load", load)
    with pytest.raises(FileNotFoundError, match="no data"):
        run(tmp_path / "out", "glue", finetune=finetune_suite)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "`seeds`.*0"),
        ({"seeds": [1, 1]}, r"`seeds`.*\[1, 1\]"),
        ({"seeds": [-1]}, "`seed`.*-1"),
        ({"task": "gluee"}, "`task`.*'gluee'"),
        ({"train": "none"}, "`train`.*'none'"),
    ],
)
def test_argument_out_of_range_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", finetune=finetune_suite, **options)
    assert not (tmp_path / "out").exists()
