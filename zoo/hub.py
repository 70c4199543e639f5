"""The Hugging Face hub: models from there, and ours to there."""

import contextlib
import hashlib
import re
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from zoo.tasks.extras import require

CARD = "README.md"
ADDRESS = re.compile(r"hf://([\w.-]+)/([\w.-]+?)(?:@([\w.-]+))?")
# Of these the first that a model has are its weights; all else that it needs is small.
WEIGHTS = (
    ("*.weights.h5", "model.weights.json"),
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
SMALL = ("*.json", "spiece.model", "tokenizer.model", "assets/**", "LICENSE*", CARD)


def download(address):
    """A folder with a model of the hub, from the cache if it is there already.

    The cache is the hub's own (`HF_HOME`). A download that was interrupted goes on where it
    stopped; large files are checked against their SHA-256 when they arrive.

    Args:
        address: "hf://owner/model", or "hf://owner/model@revision".

    Returns:
        A `Path`.

    Raises:
        ValueError: if the address is none, the hub has no such model, or a file arrived damaged.
        OSError: if the hub cannot be reached and the cache does not have the model.
        ImportError: if `huggingface_hub` is not installed.
    """
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise ValueError(f"`preset` must look like 'hf://owner/model'. Received: {address!r}")
    require("huggingface_hub", "hub")
    from huggingface_hub import constants

    owner, name, revision = parts.groups()
    repository = f"{owner}/{name}"
    blobs = Path(constants.HF_HUB_CACHE, f"models--{owner}--{name}", "blobs")
    before = set(blobs.iterdir()) if blobs.is_dir() else set()
    try:
        return _fetched(address, repository, revision)
    finally:  # also what arrived before a failure
        if blobs.is_dir():
            _check(address, set(blobs.iterdir()) - before)


def _fetched(address, repository, revision):
    """The folder of a model in the cache, downloaded as far as it is not there."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        there = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
        weights = next((p for p in WEIGHTS if any(fnmatch(f, p[0]) for f in there)), ())
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=[*SMALL, *weights]
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ValueError(f"The hub has no model {address!r}, or keeps it to itself") from error
    except Exception as error:
        folder = _cached(repository, revision)
        if folder is None:
            raise OSError(
                f"{address!r} cannot be downloaded ({type(error).__name__}) and is not in the "
                "cache; what had arrived is kept"
            ) from error
    return Path(folder)


def _cached(repository, revision):
    """The folder in the cache, if it is whole."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    for weights in WEIGHTS:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[*SMALL, *weights],
                local_files_only=True,
            )
            if any(Path(folder).glob(weights[0])):
                return folder
    return None


def _check(address, blobs):
    """The cache names large files by their SHA-256."""
    for blob in blobs:
        if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
            blob.unlink()  # so that it is downloaded again
            raise ValueError(f"A file of {address!r} arrived damaged and was removed; try again")


def sha256(path):
    """SHA-256 of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def upload(folder, address):
    """Uploads a preset's folder, with its model card, to the hub.

    Args:
        folder: of a preset, see `zoo.save_preset`.
        address: "hf://owner/model".

    Raises:
        ValueError: if the address is none.
        ImportError: if `huggingface_hub` is not installed.
    """
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise ValueError(f"`address` must look like 'hf://owner/model'. Received: {address!r}")
    require("huggingface_hub", "hub")
    import huggingface_hub
    import keras_hub

    with tempfile.TemporaryDirectory() as temporary:
        # KerasHub puts a card of its own into the folder, uploads and removes it.
        copy = shutil.copytree(folder, Path(temporary, "preset"))
        keras_hub.upload_preset(address, str(copy))
    card = Path(folder, CARD)
    if card.is_file():
        owner, name, _ = parts.groups()
        huggingface_hub.HfApi().upload_file(
            path_or_fileobj=card, path_in_repo=CARD, repo_id=f"{owner}/{name}"
        )
