import collections
import os
import pathlib
import re
import runpy
import subprocess
import sys

import keras
import pytest

from tutorials.__main__ import FOLDER, scripts
from tutorials.notebooks import cells

SCRIPTS = scripts()
NAMES = [path.stem for path in SCRIPTS]
BACKEND = keras.backend.backend()
AS_IT_IS = BACKEND == "torch"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a tutorial in this process, from top to bottom, in a folder of its own.

    One that trains for minutes is run as it is on one backend alone; on the others with the lines
    of `quick` in place of its own.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def run(name, quick=None):
        text = (FOLDER / f"{name}.py").read_text()
        for long, short in {} if AS_IT_IS else (quick or {}).items():
            assert long in text
            text = text.replace(long, short)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return runpy.run_path(str(path))

    return run


def test_every_tutorial_has_a_test():
    tests = {name.removeprefix("test_") for name in globals()}
    assert tests.issuperset(NAMES) and NAMES


def test_first_moe_layer(run, capsys):
    names = run("first_moe_layer")
    for model in ("switch", "choice"):
        assert names[model].history.history["val_accuracy"][-1] > 0.9
    assert "difference after loading: 0.0" in capsys.readouterr().out


def test_four_papers(run, tmp_path):
    names = run("four_papers")
    errors, trained = names["errors"], names["trained"]
    for better in ("2017", "1991, wide"):
        assert errors[better] < errors["dense"] < 0.15
    assert max(errors.values()) < 0.2
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


def test_reading_a_router(run, tmp_path):
    names = run("reading_a_router")
    tokens = sum(map(len, names["words"]))
    for layers in names["seen"].values():
        assert [load.sum() for load in layers.values()] == [tokens] * 2
    # Words have their experts: most go where that word goes most often.
    choices = collections.defaultdict(collections.Counter)
    for row, weights in zip(names["words"], names["weights"], strict=True):
        for word, weight in zip(row, weights, strict=False):
            choices[word][weight.argmax()] += 1
    assert sum(max(experts.values()) for experts in choices.values()) > 0.7 * tokens
    switch, training, choice = names["histograms"].values()
    assert switch.sum() == training.sum() == choice.sum() == 2 * tokens
    assert switch[2:].sum() == 0 and training[0] > switch[0]
    assert 1.5 < choice @ range(9) / choice.sum() < 3
    assert {path.name for path in tmp_path.rglob("*.png")} == {
        "router_loads.png",
        "router_tokens.png",
        "experts_per_token.png",
    }


def test_finetune_on_glue(run):
    """The pretrained model learns what the same from scratch does not."""
    names = run(
        "finetune_on_glue", quick={'"max_examples": 2000, "epochs": 3': '"max_examples": 64'}
    )
    assert names["scores"].keys() == {"scratch", "pretrained"}
    if AS_IT_IS:
        assert names["scores"]["pretrained"] > names["scores"]["scratch"] + 0.1


def test_superglue_text_to_text(run, tmp_path):
    """It writes the right one of two words."""
    sizes = '("train", 2000), ("val", 400), ("test", 400)'
    names = run("superglue_text_to_text", quick={sizes: '("train", 64), ("val", 8), ("test", 8)'})
    new = {re.sub("_[0-9]$", "", path.split("/")[1]) for path in names["report"].kept}
    # The mixtures' statistics are no weights.
    assert new == {"cross_attention", "cross_attention_norm", "feed_forward", "encoder_moe"}
    assert not any("decoder_block_1/feed" in path for path in names["report"].kept)
    lines = (tmp_path / "runs" / "submission" / "BoolQ.jsonl").read_text().splitlines()
    assert len(lines) == len(names["test"].inputs) and lines[0].startswith('{"idx": 0, "label": ')
    if AS_IT_IS:
        assert names["scores"]["accuracy"] > 0.9
        assert set(names["written"]) <= {"true", "false"}


def test_sharding_experts(tmp_path):
    """In a process of its own, since backends count their devices when they start."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    script = FOLDER / "sharding_experts.py"
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    if BACKEND == "torch":
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert re.match(r"\w+Error: `ExpertParallel` .*torch", last), done.stderr
        return
    assert done.returncode == 0, done.stderr
    alone, together, *table = done.stdout.splitlines()
    for one, many in zip(alone.split()[-3:], together.split()[-3:], strict=True):
        assert abs(float(one) - float(many)) < 2e-4
    kernel = next(line for line in table if line.startswith("mixture/experts/kernel_in"))
    assert kernel.split()[-1] == f"{8 * 32 * 128 * 4 // 4:,}"


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
class TestText:
    def test_opens_with_the_command_the_result_the_time_and_the_memory(self, path):
        opening = path.read_text().partition("\n# %%\n")[0]
        assert f"\n#     KERAS_BACKEND=jax python tutorials/{path.name}\n" in opening
        for word in ("Expected:", "minute", " GB"):
            assert word in opening, word

    def test_what_it_links_to_is_there(self, path):
        text = "\n".join(text for kind, text in cells(path.read_text()) if kind == "markdown")
        for target in re.findall(r"\]\((?!http)(.+?)\)", text):
            assert (FOLDER / target).is_file(), target


def test_no_figure_is_left_over():
    shown = {f for path in SCRIPTS for f in re.findall(r"\(figures/(.+?)\)", path.read_text())}
    assert shown == {path.name for path in pathlib.Path(FOLDER, "figures").glob("*")}
