"""The Hugging Face hub: models from there, and ours to there."""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from fnmatch import fnmatch
from pathlib import Path

from zoo.catalogue import did_you_mean
from zoo.extras import require
from zoo.files import is_file, read_json

CARD = "README.md"
HASHES = "sha256.json"
# The revision is a branch, a tag, a commit or "refs/pr/1", as git has them.
REVISION = r"\w[\w.+-]*(?:/\w[\w.+-]*)*"
ADDRESS = re.compile(rf"hf://([\w.-]+)/([\w.-]+?)(?:@({REVISION}))?")
# Of these the first that a model has are its weights; all else that it needs is small.
WEIGHTS = (
    ("*.weights.h5", "model.weights.json"),
    ("model*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
SMALL = (
    "*.json",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
    "assets/**",
    "LICENSE*",
    CARD,
)
PICKLES = (".bin", ".pt", ".pth", ".pkl")


def download(address, weights=True):
    """A folder with a model of the hub, from the cache if it is there already.

    The cache is the hub's own (`HF_HOME`). A download that was interrupted goes on where it
    stopped; large files are checked against their SHA-256 when they have arrived.

    Args:
        address: "hf://owner/model", or "hf://owner/model@revision", where the revision is a
            branch, a tag, a commit or "refs/pr/1".
        weights: whether they are wanted, and not only the small files beside them.

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
    from huggingface_hub import errors

    owner, name, revision = parts.groups()
    repository = f"{owner}/{name}"
    try:
        return _fetched(address, repository, revision, weights)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ValueError(
            f"The hub has no model {address!r}, or keeps it to itself.{did_you_mean(address)}"
        ) from error
    except (
        errors.HTTPError,  # also what fails before there is an answer
        errors.XetDownloadError,
        errors.LocalEntryNotFoundError,
        ConnectionError,  # and this is what it is to be offline
    ) as error:
        folder = _cached(repository, revision, weights)
        if folder is None:
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            raise OSError(
                f"{address!r} cannot be downloaded ({type(error).__name__}: {reason}) and is not "
                f"in the cache; what had arrived is kept.{did_you_mean(address)}"
            ) from error
        return folder


def _fetched(address, repository, revision, weights):
    """The folder of a model in the cache, downloaded and checked as far as it is not there."""
    import huggingface_hub
    from huggingface_hub import constants

    info = huggingface_hub.HfApi().model_info(repository, revision=revision)
    there = [file.rfilename for file in info.siblings]
    first = next((p for p in WEIGHTS if any(fnmatch(f, p[0]) for f in there)), ())
    cache = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    blobs, unchecked = cache / "blobs", cache / "unchecked"
    is_known = not unchecked.exists() and blobs.is_dir()
    known = {blob.name for blob in blobs.iterdir()} if is_known else set()
    cache.mkdir(parents=True, exist_ok=True)
    unchecked.touch()  # and if nobody comes to take it away, the next one checks everything
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[*SMALL, *(first if weights else ())],
        )
    except Exception:
        _check(address, cache / "snapshots" / info.sha, known)
        raise
    _check(address, Path(folder), known)
    unchecked.unlink(missing_ok=True)
    return Path(folder)


def _check(address, folder, known):
    """Checks the large files of a snapshot, which the cache names by their SHA-256."""
    for path in folder.rglob("*"):
        blob = path.resolve()
        is_new = blob.is_file() and blob.name not in known
        if is_new and re.fullmatch("[0-9a-f]{64}", blob.name) and sha256(blob) != blob.name:
            blob.unlink()  # so that it is downloaded again
            raise ValueError(f"A file of {address!r} arrived damaged and was removed; try again")


def _cached(repository, revision, weights):
    """The folder in the cache, if it is whole."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    for patterns in WEIGHTS if weights else [()]:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[*SMALL, *patterns],
                local_files_only=True,
            )
            if _is_whole(Path(folder), *patterns):
                return Path(folder)
    return None


def _is_whole(folder, weights=None, index=None):
    """Whether the config is there, and the weights, and all of them that an index names."""
    names = ["config.json"]
    if index and (folder / index).is_file():
        weight_map = read_json(folder / index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index!r} must have a `weight_map`. Received: {str(folder)!r}")
        for shards in weight_map.values():
            names += [shards] if isinstance(shards, str) else shards  # Keras may have a list
    elif weights and not any(folder.glob(weights)):
        return False
    return all((folder / name).is_file() for name in set(names))


def sha256(path):
    """SHA-256 of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hashes(folder, with_weights=True):
    """Checks the files of a preset against its `sha256.json`, if it has one.

    Args:
        folder: a `Path`.
        with_weights: whether those, too.

    Raises:
        ValueError: if a file is missing, another or damaged.
    """
    path = folder / HASHES
    if not is_file(path):
        return
    hashes = read_json(path)
    digits = re.compile("[0-9a-f]{64}")
    if not all(isinstance(x, str) and digits.fullmatch(x) for x in hashes.values()):
        raise ValueError(
            f"{HASHES!r} must have the SHA-256 of each file, in hexadecimal digits. "
            f"Received: preset={str(folder)!r}"
        )
    for name, expected in hashes.items():
        file = folder / name
        if not with_weights and file.suffix == ".h5":
            continue
        is_inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if not (is_inside and os.path.isfile(file) and sha256(file) == expected):
            raise ValueError(
                f"`preset` must hold the files that were saved, and {name!r} is missing, another "
                f"or damaged. Received: preset={str(folder)!r}"
            )


def upload(folder, address):
    """Uploads a preset's folder, with its model card, to the hub.

    Args:
        folder: of a preset, see `zoo.save_preset`; its files are checked first.
        address: "hf://owner/model".

    Raises:
        ValueError: if the address is none or has a revision, or if the folder is of no preset,
            holds pickles, or a file in it is missing, another or damaged.
        ImportError: if `huggingface_hub` is not installed.
    """
    folder = Path(folder)
    parts = ADDRESS.fullmatch(address)
    if parts is None or parts[3]:
        raise ValueError(
            "`address` must look like 'hf://owner/model', without a revision. "
            f"Received: {address!r}"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            "`folder` must be that of a saved preset, with a `config.json` in it. "
            f"Received: folder={str(folder)!r}"
        )
    if pickles := sorted(file.name for file in folder.rglob("*") if file.suffix in PICKLES):
        raise ValueError(
            f"`folder` must not hold pickles, which may run code, such as {pickles[0]!r}. "
            f"Received: folder={str(folder)!r}"
        )
    check_hashes(folder)
    require("huggingface_hub", "hub")
    import huggingface_hub
    import keras_hub

    beside = folder.parent if os.access(folder.parent, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=beside) as temporary:
        # KerasHub puts a card of its own into the folder, uploads and removes it.
        copy = shutil.copytree(folder, Path(temporary, "preset"), copy_function=_link)
        keras_hub.upload_preset(address, str(copy))
    card = folder / CARD
    if card.is_file():
        huggingface_hub.HfApi().upload_file(
            path_or_fileobj=card, path_in_repo=CARD, repo_id=f"{parts[1]}/{parts[2]}"
        )


def _link(source, target):
    """A file once more, without a copy of its content where that need not be."""
    if Path(source).name != CARD:  # which may be written to
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copy2(source, target)
