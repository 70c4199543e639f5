import os
import stat

import pytest

from tests.zoo.disk import Killed, each_step, full
from zoo.files import require_absent, written_whole


def write(folder):
    """Writes a folder with a file and a folder in it."""
    with written_whole(folder) as beside:
        (beside / "model").mkdir()
        (beside / "model" / "weights").write_text("weights")
        (beside / "config.json").write_text("config")


def contents(folder):
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_text() for p in paths if p.is_file()}


WHOLE = {"config.json": "config", "model/weights": "weights"}


def test_folder_is_there_when_everything_is_written(tmp_path):
    folder = tmp_path / "new" / "parents" / "folder"
    with written_whole(str(folder)) as beside:
        (beside / "file").write_text("text")
        assert not folder.exists()
        assert beside.parent == folder.parent  # on the same disk, so that a rename is one step
    assert contents(folder) == {"file": "text"}
    assert os.listdir(folder.parent) == ["folder"]


def test_everybody_may_read_the_folder(tmp_path):
    """A temporary folder is its owner's alone."""
    write(tmp_path / "folder")
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("folder")
    assert contents(tmp_path / "folder") == WHOLE


@pytest.mark.parametrize("kind", ["file", "empty folder"])
def test_folder_must_not_exist(tmp_path, kind):
    folder = tmp_path / "there"
    if kind == "file":
        folder.write_text("of the user")
    else:
        folder.mkdir()
    for refuse in (require_absent, write):
        for path in (folder, str(folder)):
            with pytest.raises(ValueError, match=f"`folder`.*{folder}"):
                refuse(path)
    assert os.listdir(tmp_path) == ["there"]
    require_absent(tmp_path / "absent")


@pytest.mark.parametrize("error", [Killed, KeyboardInterrupt, full])
def test_failure_at_any_step_leaves_no_half_folder(tmp_path, error):
    """A killed process may leave its temporary folder. It does not stop the next attempt."""
    for disk in each_step(error):
        parent = tmp_path / str(disk.number)
        with disk:
            write(parent / "folder")
        if not disk.failed:
            assert contents(parent / "folder") == WHOLE
            return
        assert not (parent / "folder").exists()
        if error is not Killed:
            assert not parent.exists() or os.listdir(parent) == []
        write(parent / "folder")
        assert contents(parent / "folder") == WHOLE


def test_folder_that_another_program_makes_meanwhile_is_kept(tmp_path):
    with pytest.raises(OSError, match="folder"), written_whole(tmp_path / "folder") as beside:
        (beside / "file").write_text("ours")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_text("theirs")
    assert contents(tmp_path / "folder") == {"file": "theirs"}
    assert os.listdir(tmp_path) == ["folder"]
