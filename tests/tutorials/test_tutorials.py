import collections
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys

import keras
import numpy as np
import pytest

import zoo
from tutorials.__main__ import FOLDER, scripts
from tutorials.notebooks import cells

SCRIPTS = scripts()
NAMES = [path.stem for path in SCRIPTS]
BACKEND = keras.backend.backend()


@pytest.fixture
def size(full):
    """`SIZE` of the tutorials: 1 in the full suite, otherwise a tenth, which trains for seconds."""
    return 1.0 if full else 0.1


@pytest.fixture
def transformer_size(size):
    """`SIZE` of the tutorials that train a Transformer for minutes: 1 on PyTorch only.

    Without XLA's optimizations, which the tests switch off, the other backends take much longer.
    """
    return size if BACKEND == "torch" else 0.1


@pytest.fixture
def script(tmp_path):
    """Copies a tutorial into a folder of its own, with another value in its line `SIZE = 1.0`."""

    def script(name, size):
        text = (FOLDER / f"{name}.py").read_text()
        text, lines = re.subn(r"^SIZE = 1\.0\b.*$", f"SIZE = {size}", text, flags=re.MULTILINE)
        assert lines == 1
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return str(path)

    return script


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """Runs a tutorial in this process, from top to bottom, and returns its variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return lambda name, size: runpy.run_path(script(name, size))


def falls(losses):
    """Whether the last loss is below the first; an epoch in between may rise by chance."""
    return len(losses) > 1 and losses[-1] < losses[0]


def test_every_tutorial_has_a_test():
    tests = {name.removeprefix("test_") for name in globals()}
    assert tests.issuperset(NAMES) and NAMES


def test_first_moe_layer(run, size, capsys, tmp_path):
    names = run("first_moe_layer", size)
    for model in ("switch", "choice"):
        history = names[model].history.history
        assert falls(history["loss"])
        assert history["val_accuracy"][-1] > (0.9 if size == 1 else 0.5)  # a guess is right in 0.25
    experts_per_token = names["choice"].history.history["choice/experts_per_token"]
    assert experts_per_token == pytest.approx([2] * 4)
    assert "difference after loading: 0.0" in capsys.readouterr().out
    assert (tmp_path / "runs" / "choice.keras").is_file()


def test_four_papers(run, size, capsys, tmp_path):
    names = run("four_papers", size)
    errors, trained = names["errors"], names["trained"]
    if size == 1:
        for better in ("2017", "1991, wide"):
            assert errors[better] < errors["dense"] < 0.15
        assert max(errors.values()) < 0.2
    else:  # a model that always predicts the mean has an error of 1
        assert max(errors[name] for name in ("dense", "2017", "2021", "2022")) < 0.5
        assert errors["1991, wide"] < errors["1991"] < 0.9
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["", "---", *names["contestants"]]
    logs = {name: logs for name, (_, logs) in trained.items()}
    assert logs["2017"]["moe/dropped"] == logs["2022"]["moe/dropped"] == 0
    assert logs["2021"]["moe/dropped"] > 0
    assert logs["2022"]["moe/max_share"] == pytest.approx(1)
    # Of width 27: two layers of 16 units, and the last one; gates of 8 experts, and their noise;
    # 1991: eight experts of 4 units, which give one number.
    cost = {name: names["multiplications"](model) for name, (model, _) in trained.items()}
    assert cost["dense"] == 2 * 27 * 16 + 27
    assert cost["2021"] == cost["2022"] == 2 * 27 * 16 + 27 + 27 * 8
    assert cost["2017"] == 2 * 27 * 16 + 27 + 2 * 27 * 8
    assert cost["1991"] == 8 * (27 * 4 + 4) + 27 * 8
    assert (tmp_path / "runs" / "four_papers.png").is_file()


def test_reading_a_router(run, size, tmp_path):
    names = run("reading_a_router", size)
    for model in ("switch", "choice"):
        assert falls(names[model].history.history["loss"])
    assert list(names["seen"]) == [0, 1, 2, 4, 8]
    tokens = sum(map(len, names["words"]))
    for layers in names["seen"].values():
        assert [load.sum() for load in layers.values()] == [tokens] * 2
    # Words have their experts: most go where that word goes most often.
    choices = collections.defaultdict(collections.Counter)
    for row, weights in zip(names["words"], names["weights"], strict=True):
        for word, weight in zip(row, weights, strict=False):
            choices[word][weight.argmax()] += 1
    expected = sum(max(experts.values()) for experts in choices.values())
    assert expected > (0.7 if size == 1 else 0.6) * tokens
    switch, training, choice = names["histograms"].values()
    assert switch.sum() == training.sum() == choice.sum() == 2 * tokens
    assert switch[2:].sum() == 0 and training[0] > switch[0]
    assert 1.5 < choice @ range(9) / choice.sum() < 3
    assert {path.name for path in tmp_path.rglob("*.png")} == {
        "router_loads.png",
        "router_tokens.png",
        "experts_per_token.png",
    }


def test_finetune_on_glue(run, transformer_size, tmp_path):
    """The pretrained model learns what the same model from scratch does not."""
    names = run("finetune_on_glue", transformer_size)
    scores, results = names["scores"], {}
    for name in ("scratch", "pretrained"):
        folder = tmp_path / "runs" / name / "acceptability" / "seed0"
        results[name] = json.loads((folder / "results.json").read_text())
        assert results[name]["training_examples"] == 2000 * transformer_size
        assert len(results[name]["history"]) == (3 if transformer_size == 1 else 1)
        assert scores[name] == results[name]["best"]["val_matthews"]
    first = {name: result["history"][0]["loss"] for name, result in results.items()}
    assert first["pretrained"] < first["scratch"]
    if transformer_size == 1:
        assert scores["pretrained"] > scores["scratch"] + 0.1
    # Of the pretrained weights the experts stay as they are, and all others are trained.
    pretrained = zoo.from_preset("expert_choice_mini_en").backbone.trainable_weights
    tuned = {weight.path: weight for weight in names["classifier"].backbone.weights}
    for weight in pretrained:
        same = np.array_equal(*map(keras.ops.convert_to_numpy, (weight, tuned[weight.path])))
        assert same == ("/experts/" in weight.path), weight.path
    assert names["logits"].shape == (2, 2)


def test_superglue_text_to_text(run, transformer_size, tmp_path):
    """It writes the right one of two words."""
    names = run("superglue_text_to_text", transformer_size)
    sizes = [len(names[split].inputs) for split in names["splits"]]
    assert sizes == [transformer_size * examples for examples in (2000, 400, 400)]
    assert falls(names["model"].history.history["loss"])
    new = {re.sub("_[0-9]$", "", path.split("/")[1]) for path in names["report"].kept}
    # The mixtures' statistics are no weights.
    assert new == {"cross_attention", "cross_attention_norm", "feed_forward", "encoder_moe"}
    assert not any("decoder_block_1/feed" in path for path in names["report"].kept)
    lines = (tmp_path / "runs" / "submission" / "BoolQ.jsonl").read_text().splitlines()
    assert len(lines) == len(names["test"].inputs) and lines[0].startswith('{"idx": 0, "label": ')
    assert set(names["written"]) <= {"true", "false"}
    assert names["scores"]["accuracy"] > (0.9 if transformer_size == 1 else 0.5)


@pytest.mark.every_backend
def test_sharding_experts(script, size, tmp_path):
    """In a process of its own, since backends count their devices when they start."""
    done = subprocess.run(
        [sys.executable, script("sharding_experts", size)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
    )
    if BACKEND == "torch":
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert re.match(r"\w+Error: `ExpertParallel` .*torch", last), done.stderr
        return
    assert done.returncode == 0, done.stderr
    alone, together, *table = done.stdout.splitlines()
    alone, together = ([float(loss) for loss in line.split()[-3:]] for line in (alone, together))
    assert falls(alone)
    assert together == pytest.approx(alone, rel=0, abs=2e-4)
    kernel = next(line for line in table if line.startswith("mixture/experts/kernel_in"))
    assert kernel.split()[-1] == f"{8 * 32 * 128 * 4 // 4:,}"


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
class TestText:
    def test_opens_with_the_command_the_result_the_time_and_the_memory(self, path):
        opening = path.read_text().partition("\n# %%\n")[0]
        assert f"\n#     KERAS_BACKEND=jax python tutorials/{path.name}\n" in opening
        for word in ("Expected:", "minute", " GB"):
            assert word in opening, word

    def test_its_size_is_set_in_the_first_cell_of_code(self, path):
        code = next(text for kind, text in cells(path.read_text()) if kind == "code")
        assert "\nSIZE = 1.0  # " in code

    def test_what_it_links_to_is_there(self, path):
        text = "\n".join(text for kind, text in cells(path.read_text()) if kind == "markdown")
        for target in re.findall(r"\]\((?!http)(.+?)\)", text):
            assert (FOLDER / target).is_file(), target


def test_no_figure_is_left_over():
    shown = {f for path in SCRIPTS for f in re.findall(r"\(figures/(.+?)\)", path.read_text())}
    assert shown == {path.name for path in pathlib.Path(FOLDER, "figures").glob("*")}
