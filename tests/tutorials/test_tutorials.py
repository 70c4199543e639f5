import runpy
from pathlib import Path

import pytest

TUTORIALS = sorted((Path(__file__).parents[2] / "tutorials").glob("*.py"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(path))
    if path.stem == "sparse_layers":
        for model in ("switch", "choice"):
            assert names[model].history.history["val_accuracy"][-1] > 0.9
        assert "difference after loading: 0.0" in capsys.readouterr().out


def test_there_are_tutorials():
    assert TUTORIALS
