import json
import os
import subprocess
import sys

import pytest

from zoo import cli


def test_prepare_bad_folder(tmp_path, capsys):
    for tasks in ([], ["glue/cola"]):
        arguments = ["prepare", *tasks, "--from", str(tmp_path), "--data-dir", str(tmp_path / "o")]
        assert cli.main(arguments) == 2
        assert "`source` must hold" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["glue/colla"], "did you mean 'glue/cola'"),
        (["--model", "no/such/folder"], "`model` must be one of"),
        (["--size", "huge"], "`size` must be one of"),
        (["--epochs", "0"], "`epochs` must be a positive integer"),
    ],
)
def test_finetune_bad_input(tmp_path, capsys, arguments, message):
    output = tmp_path / "run"
    assert cli.main(["finetune", *arguments, "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("zoo: ") and message in error and error.count("\n") == 1
    assert not output.exists()


def test_folder_without_the_task(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli.sys.stdout, "isatty", lambda: False, raising=False)
    arguments = [
        "finetune",
        "glue/rte",
        "--data-dir",
        str(tmp_path),
        "--output",
        str(tmp_path / "r"),
    ]
    assert cli.main(arguments) == 2
    assert "python -m zoo prepare" in capsys.readouterr().err


def test_missing_backend(capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["finetune"]) == 2
    assert "pip install 'keras-moe[" in capsys.readouterr().err


def test_interrupt(capsys, monkeypatch):
    import zoo.training

    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo.training, "finetune", interrupted)
    assert cli.main(["finetune"]) == 130
    assert "goes on from here" in capsys.readouterr().err


def test_unknown_command_and_backend_exit_with_2():
    for arguments in (["fly"], ["finetune", "--backend", "numpy"], []):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2


def test_command_line_trains_the_embedded_default_on_the_backend_asked_for(tmp_path):
    """The whole path in a process of its own, without KERAS_BACKEND."""
    environment = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    command = [sys.executable, "-m", "zoo", "finetune", "--backend", backend, "--epochs", "1"]
    command += ["--max-examples", "64", "--max-length", "16", "--output", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "generated from the project's own grammar" in done.stdout
    assert "best epoch 1 of 1: val_matthews" in done.stdout
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["backend"] == backend
