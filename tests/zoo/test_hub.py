"""Downloads from a small hub of our own, over HTTP, in processes of their own."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import keras
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("no backend takes part in a download", allow_module_level=True)

REPOSITORY, COMMIT = "owner/model", "c" * 40
BIG = bytes(range(256)) * 400
FILES = {
    "config.json": b"{}",
    "README.md": b"# model",
    "model-1.safetensors": BIG[::-1],
    "model.safetensors": BIG,
    "pytorch_model.bin": b"the same again",
    "flax_model.msgpack": b"and again",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """What `huggingface_hub` asks for; files are shared with the tests by the server."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        self.server.asked.append((self.command, self.path))
        path, _, _ = self.path.partition("?")
        if path.startswith(f"/api/models/{REPOSITORY}"):
            files = [{"type": "file", "path": f, "size": 1, "oid": "0"} for f in self.server.files]
            info = {"id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT}
            info["siblings"] = [{"rfilename": name} for name in self.server.files]
            self.send(json.dumps(files if "/tree/" in path else info).encode(), with_body)
        elif path.startswith(f"/{REPOSITORY}/resolve/"):
            self.send_file(path.split("/", 5)[5], with_body)
        else:
            self.send(b"{}", with_body, 404, {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name, with_body):
        content = self.server.files[name]
        digest = hashlib.sha256(FILES[name]).hexdigest() if name.endswith("safetensors") else name
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(content[start:], with_body, 206 if start else 200, headers)

    def send(self, body, with_body, status=200, headers=None):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        if with_body:
            cut = self.server.cut if self.path.endswith("/model.safetensors") else None
            self.wfile.write(body[:cut])
            if cut:
                self.connection.close()


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.asked, server.cut = dict(FILES), [], None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def download(hub, tmp_path):
    """`download(address)` in a process that knows no other hub; its last line, or its error."""

    def run(address=f"hf://{REPOSITORY}", online=True):
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_address[1]}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0" if online else "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "2",
            "HF_HUB_ETAG_TIMEOUT": "2",
        }
        code = f"""
try:
    from zoo.hub import download
    print(download({address!r}))
except (OSError, ValueError) as error:
    print(type(error).__name__, error)
"""
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.stdout, ran.stderr
        return ran.stdout.splitlines()[-1]

    return run


def test_only_what_is_needed_and_only_once(hub, download):
    folder = download()
    assert sorted(os.listdir(folder)) == sorted(
        set(FILES) - {"pytorch_model.bin", "flax_model.msgpack"}
    )
    with open(os.path.join(folder, "model.safetensors"), "rb") as file:
        assert file.read() == BIG
    hub.asked.clear()
    assert download() == folder
    assert not [path for command, path in hub.asked if command == "GET" and "resolve" in path]


def test_pickles_where_there_is_nothing_else(hub, download):
    del hub.files["model.safetensors"], hub.files["model-1.safetensors"]
    assert sorted(os.listdir(download())) == ["README.md", "config.json", "pytorch_model.bin"]


def test_without_network(download):
    message = download(online=False)
    assert message.startswith(f"OSError 'hf://{REPOSITORY}' cannot be downloaded (")
    folder = download()
    assert download(online=False) == folder  # from the cache


def test_no_such_model(download):
    assert download("hf://owner/another") == (
        "ValueError The hub has no model 'hf://owner/another', or keeps it to itself"
    )


@pytest.mark.parametrize("address", ["hf://model", "hf://a/b/c", "hf://a/b@"])
def test_no_address(download, address):
    message = f"ValueError `preset` must look like 'hf://owner/model'. Received: {address!r}"
    assert download(address) == message


def test_an_interrupted_download_goes_on(hub, download):
    hub.cut = 30_000
    assert "cannot be downloaded" in download()
    hub.cut = None
    with open(os.path.join(download(), "model.safetensors"), "rb") as file:
        assert file.read() == BIG


def test_a_tampered_file_does_not_stay(hub, download):
    hub.files["model.safetensors"] = BIG[:-1] + b"x"
    assert download() == (
        f"ValueError A file of 'hf://{REPOSITORY}' arrived damaged and was removed; try again"
    )
    hub.files["model.safetensors"] = BIG
    with open(os.path.join(download(), "model.safetensors"), "rb") as file:
        assert file.read() == BIG


def test_what_arrived_damaged_before_a_failure_does_not_stay(hub, download):
    hub.files["model-1.safetensors"] = BIG[1:] + b"x"
    hub.cut = 30_000
    assert "arrived damaged and was removed" in download()
    hub.files, hub.cut = dict(FILES), None
    with open(os.path.join(download(), "model-1.safetensors"), "rb") as file:
        assert file.read() == BIG[::-1]
