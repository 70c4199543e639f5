"""The weights in a folder of transformers' format, one at a time.

Such a folder holds `model.safetensors` or `pytorch_model.bin`, or several shards of one of them
with an index, `<file>.index.json`, that says which shard has which weight.
"""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"


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
    """The weights of a checkpoint by name, as NumPy arrays; at most one shard is open at a time.

    Pickled shards are read by PyTorch with `weights_only`, so that nothing in them is run.

    Example:

    ```python
    with Tensors(folder) as tensors:
        tensors["shared.weight"]  # a NumPy array
    ```

    Args:
        folder: path of the checkpoint.

    Raises:
        ValueError: if there are no weights, or if a shard is missing or damaged.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.shard_of = self._index()
        self._open_path, self._shard = None, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._open_path, self._shard = None, None

    @property
    def names(self):
        """Names of all weights."""
        return set(self.shard_of)

    def __getitem__(self, name):
        path = self.shard_of[name]
        if path != self._open_path:
            self._shard = None  # let go of the last one first
            self._shard, self._open_path = self._opened(path), path
        try:
            return self._shard(name)
        except Exception as error:
            raise self._damaged(path) from error

    def _index(self):
        for file in (SAFETENSORS, PICKLED):
            index, whole = self.folder / f"{file}.index.json", self.folder / file
            if index.is_file():
                try:
                    weight_map = json.loads(index.read_text())["weight_map"]
                except (ValueError, KeyError, TypeError) as error:
                    raise self._damaged(index) from error
                shards = {name: self.folder / shard for name, shard in weight_map.items()}
                for path in shards.values():
                    if path.parent != self.folder or not path.is_file():
                        raise ValueError(
                            f"The checkpoint {str(self.folder)!r} must have the shard "
                            f"{path.name!r}, which its index names and which is not there"
                        )
                return shards
            if whole.is_file():
                return dict.fromkeys(self._names(whole), whole)
        raise ValueError(
            f"The checkpoint {str(self.folder)!r} must have weights: neither {SAFETENSORS!r} nor "
            f"{PICKLED!r} is there, nor an index of shards"
        )

    def _names(self, path):
        if path.name == SAFETENSORS:
            return self._header(path)
        self._shard, self._open_path = self._opened(path), path
        return self._shard.args[0]

    def _header(self, path):
        import safetensors

        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                return list(file.keys())
        except Exception as error:
            raise self._damaged(path) from error

    def _opened(self, path):
        """A function from names of weights to arrays."""
        try:
            if path.suffix == ".safetensors":
                import safetensors

                return safetensors.safe_open(path, framework="numpy").get_tensor
            return _Pickled(path)
        except ImportError:
            raise
        except Exception as error:
            raise self._damaged(path) from error

    def _damaged(self, path):
        return ValueError(
            f"The checkpoint {str(self.folder)!r} does not fit or is damaged: {path.name!r} cannot "
            "be read"
        )


class _Pickled:
    """The weights of a shard that PyTorch wrote."""

    def __init__(self, path):
        try:
            import torch
        except ImportError as error:
            raise ImportError(
                f"{path.name!r} is a file of PyTorch's: install torch to read it"
            ) from error
        mmap = zipfile.is_zipfile(path)  # files of versions before 1.6 are none
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        self.args = (weights,)

    def __call__(self, name):
        import torch

        tensor = self.args[0][name].detach()
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def write(tensors, folder, shard_bytes=5 * 2**30):
    """Writes weights as safetensors, in shards if they are large.

    Args:
        tensors: iterable of pairs of a name and a NumPy array.
        folder: path, of a folder that is there.
        shard_bytes: a shard is closed before it would be larger.
    """
    from safetensors.numpy import save_file

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
