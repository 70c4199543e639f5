"""The weights in a folder of transformers' format, one at a time.

Such a folder holds `model.safetensors` or `pytorch_model.bin`, or several shards of one of them
with an index, `<file>.index.json`, that says which shard has which weight.
"""

import collections
import contextlib
import errno
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from keras_moe.ops import empty
from zoo.extras import require
from zoo.files import is_file, parse_json, read_json

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
# A weight that layers share has several names, and a file that has it once any of them: safetensors
# itself keeps the first of the alphabet.
ALIASES = {"shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")}


class Weight(NamedTuple):
    """A weight here, and what it is called there."""

    variable: Any
    names: tuple  # one; of a bank of experts one per expert, which may be one, too
    transposed: bool = False
    stacked: bool = False  # whether `variable` has an axis of experts, which the named ones lack

    def shape_there(self):
        """Shape of each of the named weights."""
        shape = tuple(self.variable.shape)[1 if self.stacked else 0 :]
        return shape[::-1] if self.transposed else shape


class Place(NamedTuple):
    """Where a weight is stored."""

    path: Path  # the shard
    name: str  # of the stored tensor
    first: int = 0  # index of the weight's first value in the tensor
    shape: tuple | None = None  # of the weight, when the tensor holds more than this weight


class Tensors:
    """The weights of a checkpoint by name; at most one shard is open at a time.

    Pickled shards are read by PyTorch with `weights_only`, so that nothing in them is run.
    They must be stored without compression, as PyTorch writes them, and match their checksums.

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
        self._facts = {}  # path of a shard that has been open -> name -> shape and dtype
        self._places = {name: Place(path, name) for name, path in self._index().items()}
        for name, others in ALIASES.items():
            there = [other for other in others if other in self._places]
            if there and name not in self._places:
                self._places[name] = self._places[there[0]]

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
        return set(self._places)

    def shard_of(self, name):
        """Path of the file that holds a weight."""
        return self._places[name].path

    def split(self, name, parts):
        """Gives names to the parts of a tensor, in place of the tensor's own name.

        Args:
            name: name of a tensor of rank 1 or more.
            parts: dictionary of new names and shapes, in the order in which the parts are stored
                one after another.

        Raises:
            ValueError: if the parts do not make up the whole tensor.
        """
        place, first = self._places[name], 0
        for part, shape in parts.items():
            self._places[part] = place._replace(first=first, shape=shape)
            first += math.prod(shape)
        if first != math.prod(self.shape(name)):
            raise ValueError(
                f"The checkpoint {str(self.folder)!r} does not fit: weight {name!r} must have "
                f"{first} values. Received: shape={self.shape(name)}"
            )
        del self._places[name]

    def rename(self, name, new):
        """Gives a weight another name."""
        self._places[new] = self._places.pop(name)

    def shape(self, name):
        """Shape of a weight, as its file says."""
        place, shape, _ = self._place_of(name)
        return shape if place.shape is None else place.shape

    def dtype(self, name):
        """Its dtype."""
        place, _, kind = self._place_of(name)
        if kind not in DTYPES.values():
            raise ValueError(
                f"The checkpoint {str(self.folder)!r} does not fit: weight {name!r} must be of "
                f"{', '.join(DTYPES.values())}. Received: dtype={kind!r} in {place.path.name!r}"
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
        place = self._places[name]
        with self._turned_to(place.path) as shard:
            shard.read(place.name, into, place.first)
        return into

    def are_equal_or_one(self, name, other):
        """Whether two weights are the same, or the second is not there."""
        if other not in self._places:
            return True
        return self.shape(name) == self.shape(other) and np.array_equal(
            self.read(name), self.read(other)
        )

    def _index(self):
        for file in (SAFETENSORS, PICKLED):
            index, whole = self.folder / f"{file}.index.json", self.folder / file
            if is_file(index):
                weight_map = read_json(index).get("weight_map")
                if not isinstance(weight_map, dict) or not all(
                    isinstance(shard, str) for shard in weight_map.values()
                ):
                    raise self._damaged(index)
                for shard in dict.fromkeys(weight_map.values()):
                    is_inside = Path(shard).name == shard
                    if not (is_inside and os.path.isfile(self.folder / shard)):
                        raise ValueError(
                            f"The checkpoint {str(self.folder)!r} must have the shard {shard!r}, "
                            f"which its index {index.name!r} names and which is not there"
                        )
                return {name: self.folder / shard for name, shard in weight_map.items()}
            if is_file(whole):
                return dict.fromkeys(self._facts_of(whole), whole)
        raise ValueError(
            f"The checkpoint {str(self.folder)!r} must have weights: neither {SAFETENSORS!r} nor "
            f"{PICKLED!r} is there, nor an index of shards, '{SAFETENSORS}.index.json'"
        )

    def _facts_of(self, path):
        """Shapes and dtypes of a shard's tensors by name, read once."""
        if path not in self._facts:
            with self._turned_to(path) as shard:
                self._facts[path] = shard.facts()
        return self._facts[path]

    def _place_of(self, name):
        """The place of a weight, and the shape and the dtype of the tensor there."""
        place = self._places[name]
        facts = self._facts_of(place.path)
        if place.name not in facts:
            raise ValueError(
                f"The checkpoint {str(self.folder)!r} does not fit or is damaged: it lacks the "
                f"weight {place.name!r}, which its index places in {place.path.name!r}"
            )
        shape, kind = facts[place.name]
        if shape is None:
            raise ValueError(
                f"The checkpoint {str(self.folder)!r} does not fit: weight {name!r} must be an "
                f"array of numbers. Received: {kind} in {place.path.name!r}"
            )
        return place, shape, kind

    @contextlib.contextmanager
    def _turned_to(self, path):
        """The opened shard; what it says of its format is said of the file."""
        try:
            if path != self._open_path:
                self._close()
                if path.suffix == ".safetensors":
                    self._shard = _Safe(path)
                else:
                    self._shard = _Pickled(path, check=path not in self._facts)
                self._open_path = path
            yield self._shard
        except _DamagedError as error:
            raise self._damaged(path, str(error)) from error

    def _damaged(self, path, reason=""):
        return ValueError(
            f"The checkpoint {str(self.folder)!r} does not fit or is damaged: {path.name!r} cannot "
            f"be read{reason and ': '}{reason}"
        )


class _DamagedError(Exception):
    """A file is not in its format; the text, which may be empty, says why."""


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
        self.header = parse_json(self.file.read(self.start - 8))
        self.header.pop("__metadata__", None)

    def close(self):
        self.file.close()

    def facts(self):
        return {
            name: (tuple(entry["shape"]), DTYPES.get(entry["dtype"], entry["dtype"]))
            for name, entry in self.header.items()
        }

    def read(self, name, into, first):
        begin = self.header[name]["data_offsets"][0] + first * into.itemsize
        self.file.seek(self.start + begin)
        rest = memoryview(into.reshape(-1).view("uint8"))
        while rest:
            count = self.file.readinto(rest)
            if not count:
                raise _DamagedError
            rest = rest[count:]


class _Pickled:
    """The weights of a shard that PyTorch wrote."""

    def __init__(self, path, check):
        torch = require("torch", "torch")
        mmap = zipfile.is_zipfile(path)  # files of versions before 1.6 are none
        with path.open("rb") as file:
            if file.read(2) == b"PK" and not mmap:  # its directory, at the end, is not there
                raise _DamagedError
        sizes = _check_archive(path, check) if mmap else None
        try:
            weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged pickle may raise anything
            raise _DamagedError from error
        if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
            raise _DamagedError
        self.int16, self.strided = torch.int16, torch.strided
        self.weights = weights
        if sizes is not None and self._storages() - sizes:
            raise _DamagedError("its weights need more values than are there")

    def close(self):
        self.weights = None

    def facts(self):
        return {name: self._fact(tensor) for name, tensor in self.weights.items()}

    def _fact(self, tensor):
        kind = str(tensor.dtype).removeprefix("torch.")
        if self._is_plain(tensor):
            return tuple(tensor.shape), kind
        if tensor.is_meta:
            return None, "a tensor without values"
        names = {"quantized": tensor.is_quantized, "nested": tensor.is_nested}
        layout = str(tensor.layout).removeprefix("torch.")
        return None, f"a tensor that is {next((n for n, fits in names.items() if fits), layout)}"

    def _is_plain(self, tensor):
        """Whether a tensor holds one value for each of its places."""
        others = (tensor.is_quantized, tensor.is_nested, tensor.layout != self.strided)
        return tensor.device.type == "cpu" and not any(others)

    def _storages(self):
        """How many storages of each size, in bytes, the plain tensors have."""
        storages = (t.untyped_storage() for t in self.weights.values() if self._is_plain(t))
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return collections.Counter(size for size in sizes.values() if size)

    def read(self, name, into, first):
        tensor = self.weights[name].detach().resolve_conj().resolve_neg()
        if tensor.shape != into.shape:  # a part
            tensor = tensor.reshape(-1)[first : first + into.size].reshape(into.shape)
        if into.dtype == ml_dtypes.bfloat16:  # which PyTorch's arrays cannot be
            into, tensor = into.view("int16"), tensor.view(self.int16)
        into[...] = tensor.numpy()


def _check_archive(path, check):
    """Checks the entries of a zip archive that PyTorch maps into memory as they are.

    PyTorch itself takes compressed bytes for weights, and checks no checksum.

    Returns:
        How many entries of each size, in bytes, there are.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise _DamagedError("its entries are compressed, write it again by `torch.save`")
            if len({entry.filename for entry in entries}) < len(entries):
                raise _DamagedError("several of its entries have one name")
            if check and (name := archive.testzip()):
                raise _DamagedError(f"its entry {name!r} does not match its checksum")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise _DamagedError from error  # RuntimeError: an entry claims to be encrypted
    except (ValueError, OverflowError) as error:  # names that are no text, impossible places
        raise _DamagedError from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place before the start of the file
            raise _DamagedError from error
        raise
    return collections.Counter(entry.file_size for entry in entries)


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
