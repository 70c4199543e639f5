"""Downloads from a small hub of our own, over HTTP, in processes of their own."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import huggingface_hub
import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("no backend takes part in a download", allow_module_level=True)

import torch
import transformers

import zoo
from tests.zoo.conversion.small_t5 import pickled
from zoo.hub import ADDRESS, HASHES, WEIGHTS, check_hashes, sha256
from zoo.hub import download as downloaded
from zoo.train_tokenizer import train

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
def python(hub, tmp_path):
    """`python(code)` in a process that knows no other hub; its last line, or its error."""

    def run(code, online=True):
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
{textwrap.indent(textwrap.dedent(code), "    ")}
except (OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
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


@pytest.fixture
def download(python):
    """`download(address)` in such a process, after `code`, if there is any."""

    def run(address=f"hf://{REPOSITORY}", online=True, code="", **options):
        code = f"""
import huggingface_hub
from huggingface_hub import snapshot_download
from zoo import hub
{textwrap.dedent(code)}
print(hub.download({address!r}, **{options}))
"""
        return python(code, online)

    return run


def test_hashes_of_a_preset(tmp_path):
    folder = tmp_path / "preset"
    folder.mkdir()
    weights, outside = folder / "model.weights.h5", tmp_path / "other.json"
    for path in (weights, outside):
        path.write_bytes(BIG)
    (folder / HASHES).write_text(json.dumps({weights.name: sha256(weights)}))
    check_hashes(folder)
    weights.write_bytes(BIG[::-1])
    check_hashes(folder, with_weights=False)
    with pytest.raises(ValueError, match=f"'{weights.name}'.* Received: .*{folder.name}"):
        check_hashes(folder)
    for name in ("../other.json", str(outside)):
        (folder / HASHES).write_text(json.dumps({name: sha256(outside)}))
        with pytest.raises(ValueError, match=f"'{re.escape(name)}'"):
            check_hashes(folder)
    for content in ({weights.name: 3}, {weights.name: "abc"}, {"a" * 300: None}):
        (folder / HASHES).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"'{HASHES}' must have the SHA-256.*{folder.name}"):
            check_hashes(folder)
    (folder / HASHES).write_text(json.dumps({"a" * 300: sha256(outside)}))  # no name of a file
    with pytest.raises(ValueError, match="'aaa.*' is missing"):
        check_hashes(folder)


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


NOT_DOWNLOADED = f"OSError .*'hf://{REPOSITORY}'"
DAMAGED = f"ValueError .*'hf://{REPOSITORY}'.*damaged"


def test_without_network(download):
    assert re.match(f"{NOT_DOWNLOADED}.*OfflineModeIsEnabled.*cache", download(online=False))
    suggestion = "'hf://google/switch-base-8'"
    assert suggestion in download("hf://google/switch-base8", online=False)
    assert suggestion not in download("hf://google/switch-base-8@main", online=False)
    folder = download()
    assert download(online=False) == folder  # from the cache


def test_no_such_model(download):
    message = download("hf://owner/another")
    assert re.match("ValueError .*'hf://owner/another'", message) and message.count("hf://") == 1
    message = download("hf://google/switch-base8")
    assert re.match("ValueError .*'hf://google/switch-base8'.*'hf://google/switch-base-8'", message)


REVISIONS = ["main", "feature/x-1", "v1.0+cpu", "c" * 40, "refs/pr/1"]


def test_revisions(hub, download):
    assert [ADDRESS.fullmatch(f"hf://a/b@{revision}")[3] for revision in REVISIONS] == REVISIONS
    for revision in ("refs/pr/1", "feature/x-1"):
        hub.asked.clear()
        folder = download(f"hf://{REPOSITORY}@{revision}")
        assert Path(folder, "model.safetensors").read_bytes() == BIG
        asked = f"/api/models/{REPOSITORY}/revision/{revision.replace('/', '%2F')}"
        assert asked in {path.partition("?")[0] for _, path in hub.asked}
        assert download(f"hf://{REPOSITORY}@{revision}", online=False) == folder


NO_REVISIONS = [
    f"hf://a/b@{end}" for end in ("", "/x", "x/", "x//y", "..", "../x", "x/../y", "a b")
]


@pytest.mark.parametrize("address", ["hf://model", "hf://a/b/c", *NO_REVISIONS])
def test_no_address(download, address):
    assert re.match(f"ValueError `preset`.*{address!r}$", download(address))


def test_an_interrupted_download_goes_on(hub, download):
    hub.cut = 30_000
    assert re.match(NOT_DOWNLOADED, download())
    hub.cut = None
    with open(os.path.join(download(), "model.safetensors"), "rb") as file:
        assert file.read() == BIG


def test_a_tampered_file_does_not_stay(hub, download):
    hub.files["model.safetensors"] = BIG[:-1] + b"x"
    assert re.match(DAMAGED, download())
    hub.files["model.safetensors"] = BIG
    with open(os.path.join(download(), "model.safetensors"), "rb") as file:
        assert file.read() == BIG


def test_what_arrived_damaged_before_a_failure_does_not_stay(hub, download):
    hub.files["model-1.safetensors"] = BIG[1:] + b"x"
    hub.cut = 30_000
    assert re.match(DAMAGED, download())
    hub.files, hub.cut = dict(FILES), None
    with open(os.path.join(download(), "model-1.safetensors"), "rb") as file:
        assert file.read() == BIG[::-1]


INTERRUPTED = """
def interrupted(*args, **kwargs):
    snapshot_download(*args, **kwargs)
    hub.sha256 = None  # which nobody calls then
    raise KeyboardInterrupt
huggingface_hub.snapshot_download = interrupted
"""


def test_whoever_interrupts_does_not_wait_for_a_check_and_the_next_one_makes_it(hub, download):
    hub.files["model.safetensors"] = BIG[:-1] + b"x"
    assert download(code=INTERRUPTED) == "KeyboardInterrupt "
    assert re.match(DAMAGED, download())
    hub.files["model.safetensors"] = BIG
    folder = download()
    assert Path(folder, "model.safetensors").read_bytes() == BIG
    nothing_new = "hub.sha256 = None"
    assert download(code=nothing_new) == folder


def test_what_another_process_downloads_meanwhile_is_its_own(download):
    other = """
def with_another(*args, **kwargs):
    folder = snapshot_download(*args, **kwargs)
    hub.Path(folder, "../../blobs/" + 64 * "0").resolve().write_text("half of it")
    return folder
huggingface_hub.snapshot_download = with_another
"""
    folder = Path(download(code=other))
    assert (folder / "../../blobs" / (64 * "0")).resolve().read_text() == "half of it"


@pytest.mark.parametrize("error", ["OSError(28, 'No space left on device')", "RuntimeError('bug')"])
def test_other_errors_go_through(download, error):
    code = f"""
def fails(*args, **kwargs):
    raise {error}
huggingface_hub.snapshot_download = fails
"""
    expected = eval(error)
    assert download(code=code) == f"{type(expected).__name__} {expected}"


def test_without_weights(hub, download):
    folder = download(weights=False)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json"]
    assert download(weights=False, online=False) == folder
    assert re.match(NOT_DOWNLOADED, download(online=False))


@pytest.mark.parametrize(
    ("patterns", "weight_map"),
    [
        (WEIGHTS[0], {"a": "1.weights.h5", "b": ["1.weights.h5", "2.weights.h5"]}),
        (WEIGHTS[1], {"a": "model-1.safetensors", "b": "model-2.safetensors"}),
        (WEIGHTS[2], {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}),
    ],
)
def test_a_folder_is_whole_with_all_that_its_index_names(
    tmp_path, monkeypatch, patterns, weight_map
):
    """Offline, a folder of the cache is taken if it is whole."""

    def offline(*_, **__):
        raise ConnectionError

    def is_whole(weights=True):
        try:
            return downloaded(f"hf://{REPOSITORY}", weights) == tmp_path
        except OSError:
            return False

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    first, last = weight_map["a"], weight_map["b"]
    last = last[-1] if isinstance(last, list) else last
    (tmp_path / first).touch()
    assert not is_whole()
    (tmp_path / "config.json").touch()
    assert is_whole() and is_whole(weights=False)
    (tmp_path / patterns[1]).write_text(json.dumps({"weight_map": weight_map}))
    assert not is_whole() and is_whole(weights=False)
    (tmp_path / last).touch()
    assert is_whole()


def test_a_model_of_shards_and_its_tokenizer_from_the_hub_to_a_text(hub, python, tmp_path):
    """As Switch models are there: pickles in shards with an index, and a SentencePiece model."""
    torch.manual_seed(0)
    tokenizer = train(["The cat number 19 sat!", "A dog named Rex ran to a bar."] * 20, 60)
    options = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2}
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 2}
    config = transformers.SwitchTransformersConfig(
        vocab_size=200, num_decoder_layers=2, **options, **sparse
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    pickled(model, tmp_path)
    (tmp_path / "spiece.model").write_bytes(tokenizer)
    hub.files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    load = f"import zoo; model = zoo.from_preset('hf://{REPOSITORY}', load_weights="
    assert python(f"{load}False); print(model.count_params())").isdigit()
    assert not [path for _, path in hub.asked if path.endswith(".bin")]
    text = python(f"{load}True); print(repr(model.generate('a <extra_id_0>.', max_length=9)))")
    local = zoo.from_preset(tmp_path)
    assert text == repr(local.generate("a <extra_id_0>.", max_length=9))
    asked = {path.rpartition("/")[2] for _, path in hub.asked if "resolve" in path}
    assert asked == set(hub.files)
    table = keras.ops.convert_to_numpy(local.backbone.token_embedding.embeddings)
    np.testing.assert_array_equal(table, model.shared.weight.detach().numpy())
