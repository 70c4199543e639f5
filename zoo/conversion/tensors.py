"""The weights in a folder of transformers' format, one at a time.

Such a folder holds `model.safetensors` or `pytorch_model.bin`, or several shards of one of them
with an index, `<file>.index.json`, that says which shard has which weight.
"""

import contextlib
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from keras_moe.ops import empty
from zoo.extras import require

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
}
# A weight that layers share has several names, and a file that has it once any of them: safetensors
# itself keeps the first of the alphabet.
ALIASES = {"shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}


class Weight(NamedTuple):
    """A weight here, and what it is called there."""

    variable: Any
    names: tuple  # one, or those of all experts
    transposed: bool = False

    def shape_there(self):
        """Shape of each of the named weights."""
        shape = tuple(self.variable.shape)[1 if len(self.names) > 1 else 0 :]
        return shape[::-1] if self.transposed else shape


class Tensors:
    """The weights of a checkpoint by name; at most one shard is open at a time.

    Pickled shards are read by PyTorch with `weights_only`, so that nothing in them is run.

    Example:

    ```python
    with Tensors(folder) as tensors:
        tensors.read("shared.weight")  # a NumPy array
    ```

    Args:
        folder: path of the checkpoint.

    Raises:
        ValueError: if there are no weights, or if a shard is missing or damaged.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self._open_path, self._shard = None, None
        self.shard_of = self._index()
        self._called = {}  # there, what is missing under its own name
        for name, others in ALIASES.items():
            there = [other for other in others if other in self.shard_of]
            if there and name not in self.shard_of:
                self.shard_of[name] = self.shard_of[there[0]]
                self._called[name] = there[0]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._close()

    def _close(self):
        if self._shard is not None:
            self._shard.close()
        self._open_path, self._shard = None, None

    @property
    def names(self):
        """Names of all weights."""
        return set(self.shard_of)

    def shape(self, name):
        """Shape of a weight, as its file says."""
        with self._turned_to_that_of(name) as (shard, name):
            return shard.shape(name)

    def dtype(self, name):
        """Its dtype."""
        with self._turned_to_that_of(name) as (shard, name):
            kind = shard.dtype(name)
        if kind not in DTYPES.values():
            raise ValueError(
                f"The checkpoint {str(self.folder)!r} does not fit: weight {name!r} must be of "
                f"{', '.join(DTYPES.values())}. Received: dtype={kind!r}"
            )
        return np.dtype(kind)

    def read(self, name, into=None):
        """Reads a weight into a contiguous array, or a new one, and returns it."""
        dtype = self.dtype(name)
        if into is None:
            into = empty(self.shape(name), dtype)
        if into.dtype != dtype:
            into[...] = self.read(name)
            return into
        with self._turned_to_that_of(name) as (shard, name):
            shard.read(name, into)
        return into

    def are_equal_or_one(self, name, other):
        """Whether two weights are the same, or the second is not there."""
        if other not in self.shard_of:
            return True
        return self.shape(name) == self.shape(other) and np.array_equal(
            self.read(name), self.read(other)
        )

    def _index(self):
        for file in (SAFETENSORS, PICKLED):
            index, whole = self.folder / f"{file}.index.json", self.folder / file
            if index.is_file():
                try:
                    weight_map = dict(json.loads(index.read_text())["weight_map"].items())
                    inside = {shard: Path(shard).name == shard for shard in weight_map.values()}
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise self._damaged(index) from error
                for shard, is_inside in inside.items():
                    if not (is_inside and (self.folder / shard).is_file()):
                        raise ValueError(
                            f"The checkpoint {str(self.folder)!r} must have the shard {shard!r}, "
                            "which its index names and which is not there"
                        )
                return {name: self.folder / shard for name, shard in weight_map.items()}
            if whole.is_file():
                with self._turned_to(whole) as shard:
                    return dict.fromkeys(shard.names(), whole)
        raise ValueError(
            f"The checkpoint {str(self.folder)!r} must have weights: neither {SAFETENSORS!r} nor "
            f"{PICKLED!r} is there, nor an index of shards"
        )

    @contextlib.contextmanager
    def _turned_to_that_of(self, name):
        """The opened shard that has a weight, and what it is called there."""
        path, name = self.shard_of[name], self._called.get(name, name)
        with self._turned_to(path) as shard:
            if name not in shard.names():
                raise ValueError(
                    f"The checkpoint {str(self.folder)!r} does not fit or is damaged: it lacks the "
                    f"weight {name!r}, which its index places in {path.name!r}"
                )
            yield shard, name

    @contextlib.contextmanager
    def _turned_to(self, path):
        """The opened shard; what it says of its format is said of the file."""
        try:
            if path != self._open_path:
                self._close()
                self._shard = (_Safe if path.suffix == ".safetensors" else _Pickled)(path)
                self._open_path = path
            yield self._shard
        except _DamagedError as error:
            raise self._damaged(path) from error

    def _damaged(self, path):
        return ValueError(
            f"The checkpoint {str(self.folder)!r} does not fit or is damaged: {path.name!r} cannot "
            "be read"
        )


class _DamagedError(Exception):
    """A file is not in its format."""


class _Safe:
    """The weights of a shard of safetensors."""

    def __init__(self, path):
        safetensors = require("safetensors", "hub")
        try:
            with safetensors.safe_open(path, framework="numpy"):  # which checks header and length
                pass
        except safetensors.SafetensorError as error:
            raise _DamagedError from error
        # Read without a buffer of its own, into the arrays that are to have the weights.
        self.file = path.open("rb", buffering=0)
        self.start = 8 + int.from_bytes(self.file.read(8), "little")
        self.header = json.loads(self.file.read(self.start - 8))
        self.header.pop("__metadata__", None)

    def close(self):
        self.file.close()

    def names(self):
        return self.header.keys()

    def shape(self, name):
        return tuple(self.header[name]["shape"])

    def dtype(self, name):
        kind = self.header[name]["dtype"]
        return DTYPES.get(kind, kind)

    def read(self, name, into):
        self.file.seek(self.start + self.header[name]["data_offsets"][0])
        rest = memoryview(into.reshape(-1).view("uint8"))
        while rest:
            count = self.file.readinto(rest)
            if not count:
                raise _DamagedError
            rest = rest[count:]


class _Pickled:
    """The weights of a shard that PyTorch wrote."""

    def __init__(self, path):
        torch = require("torch", "torch")
        mmap = zipfile.is_zipfile(path)  # files of versions before 1.6 are none
        with path.open("rb") as file:
            if file.read(2) == b"PK" and not mmap:  # its directory, at the end, is not there
                raise _DamagedError
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise _DamagedError from error
        if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
            raise _DamagedError
        self.int16 = torch.int16
        self.weights = weights

    def close(self):
        self.weights = None

    def names(self):
        return self.weights.keys()

    def shape(self, name):
        return tuple(self.weights[name].shape)

    def dtype(self, name):
        return str(self.weights[name].dtype).removeprefix("torch.")

    def read(self, name, into):
        tensor = self.weights[name].detach()
        if into.dtype == ml_dtypes.bfloat16:  # which PyTorch's arrays cannot be
            into, tensor = into.view("int16"), tensor.view(self.int16)
        into[...] = tensor.numpy()


def write(tensors, folder, shard_bytes=5 * 2**30):
    """Writes weights as safetensors, in shards if they are large.

    Args:
        tensors: iterable of pairs of a name and a NumPy array.
        folder: path, of a folder that is there.
        shard_bytes: a shard is closed before it would be larger.

    Raises:
        ValueError: if an array is of another dtype than those that are read, as in a model that has
            been quantized.
    """
    save_file = require("safetensors.numpy", "hub").save_file
    folder = Path(folder)
    files, shard, size, total = [], {}, 0, 0

    def close():
        files.append((folder / f"{len(files)}.tmp", list(shard)))
        save_file(shard, files[-1][0], {"format": "pt"})
        shard.clear()

    for name, array in tensors:
        if size and size + array.nbytes > shard_bytes:
            close()
            size = 0
        if array.dtype.name not in DTYPES.values():
            raise ValueError(
                f"Weight {name!r} must be of {', '.join(DTYPES.values())}. "
                f"Received: dtype={array.dtype.name!r}"
            )
        shard[name] = np.ascontiguousarray(array)
        size += array.nbytes
        total += array.nbytes
    close()
    if len(files) == 1:
        files[0][0].rename(folder / SAFETENSORS)
        return
    weight_map = {}
    for number, (path, names) in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        path.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=1))
