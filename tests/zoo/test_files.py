import os
import re
import stat

import pytest

from tests.zoo.disk import Killed, each_step, full
from zoo.files import MOST, is_file, parse_json, read_json, require_absent, written_whole


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


class TestJson:
    @pytest.mark.parametrize(
        ("text", "kind", "content"),
        [
            ('{"a": [1, "\u00e9"]}', dict, {"a": [1, "\u00e9"]}),
            ("[]", list, []),
            ("null", object, None),
        ],
    )
    def test_content_is_read(self, text, kind, content, tmp_path):
        path = tmp_path / "it.json"
        path.write_text(text, encoding="utf-8")
        assert read_json(path, kind) == content
        assert parse_json(text) == parse_json(text.encode()) == content

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[1]",
            b"3",
            b"\xe0{}",
            b"[" * 10**5 + b"]" * 10**5,
            b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
            b"9" * 10**4,
            b"\0" * (MOST + 1),
        ],
        ids=["nothing", "half", "list", "number", "bytes", "lists", "objects", "digits", "large"],
    )
    def test_what_is_no_object_is_refused_in_one_sentence(self, content, tmp_path):
        path = tmp_path / "it.json"
        path.write_bytes(content)
        message = f"^'it.json' must hold a JSON object. Received: '{re.escape(str(path))}', but .+$"
        with pytest.raises(ValueError, match=message) as error:
            read_json(path)
        assert "\n" not in str(error.value)

    def test_nothing_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="^'it.json' must be a file.*nothing"):
            read_json(tmp_path / "it.json")


def test_only_files_are_there(tmp_path):
    """What is no file is not taken for one that is missing."""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe")
    assert is_file(tmp_path / "file") and is_file(str(tmp_path / "link"))
    assert not is_file(tmp_path / "nothing")
    for name, kind in (("folder", "folder"), ("broken", "broken link"), ("pipe", "device")):
        with pytest.raises(ValueError, match=f"^'{name}' must be a file. Received: a {kind}"):
            is_file(tmp_path / name)
