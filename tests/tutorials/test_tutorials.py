import os
import pathlib
import re
import runpy
import subprocess
import sys

import keras
import pytest

from tutorials.__main__ import FOLDER, scripts

SCRIPTS = scripts()
NAMES = [path.stem for path in SCRIPTS]
BACKEND = keras.backend.backend()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a tutorial in this process, from top to bottom, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return lambda name: runpy.run_path(str(FOLDER / f"{name}.py"))


def test_every_tutorial_has_a_test():
    tests = {name.removeprefix("test_") for name in globals()}
    assert tests.issuperset(NAMES) and NAMES


def test_first_moe_layer(run, capsys):
    names = run("first_moe_layer")
    for model in ("switch", "choice"):
        assert names[model].history.history["val_accuracy"][-1] > 0.9
    assert "difference after loading: 0.0" in capsys.readouterr().out


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
        for target in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text()):
            assert (FOLDER / target).is_file(), target


def test_no_figure_is_left_over():
    shown = {f for path in SCRIPTS for f in re.findall(r"\(figures/(.+?)\)", path.read_text())}
    assert shown == {path.name for path in pathlib.Path(FOLDER, "figures").glob("*")}
