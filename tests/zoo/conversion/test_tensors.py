"""Files of weights, good and damaged."""

import errno
import json
import re
import sys
import weakref
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from zoo.conversion import tensors
from zoo.conversion.tensors import DTYPES, Tensors, Weight, write

# 32, 12 and 24 bytes.
WEIGHTS = {
    "a": np.arange(8, dtype="float32").reshape(4, 2),
    "b": np.array([1, 2, 3], "float32"),
    "c": -np.arange(6, dtype="float32").reshape(2, 3),
}
SHARDS = {"first": ("a", "c"), "second": ("b",)}
SAFE = pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])


def save(arrays, path):
    """As the suffix says."""
    if path.suffix == ".safetensors":
        save_file(arrays, path, {"format": "pt"})
    else:
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path)


def whole(folder, safe=True):
    path = folder / (tensors.SAFETENSORS if safe else tensors.PICKLED)
    save(WEIGHTS, path)
    return path


def sharded(folder, safe=True):
    """The index of two shards, which are there."""
    suffix = ".safetensors" if safe else ".bin"
    for shard, names in SHARDS.items():
        save({name: WEIGHTS[name] for name in names}, folder / f"{shard}{suffix}")
    weight_map = {name: f"{shard}{suffix}" for shard, names in SHARDS.items() for name in names}
    index = folder / f"{tensors.SAFETENSORS if safe else tensors.PICKLED}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def repack(path, method=zipfile.ZIP_STORED, change=lambda name, content: content):
    """Writes a zip archive anew, as another program would."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def change(index, **shard_of):
    content = json.loads(index.read_text())
    content["weight_map"] |= shard_of
    index.write_text(json.dumps(content))


def fails(folder, message, name="a"):
    """Whether it is noticed when the folder is opened or a weight is read."""
    with pytest.raises(ValueError, match=message) as error, Tensors(folder) as opened:
        opened.read(name)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@SAFE
@pytest.mark.parametrize("kind", [whole, sharded])
def test_weights_are_read_by_name(kind, safe, tmp_path):
    kind(tmp_path, safe)
    with Tensors(tmp_path) as opened:
        assert opened.names == set(WEIGHTS)
        for name, expected in WEIGHTS.items():
            assert opened.shape(name) == expected.shape
            assert opened.dtype(name) == expected.dtype
            ours = opened.read(name)
            np.testing.assert_array_equal(ours, expected, strict=True)
            assert ours.flags.c_contiguous and ours.flags.writeable


@SAFE
def test_read_into_an_array_that_is_there(safe, tmp_path):
    """A part of a larger one, and one of another dtype."""
    whole(tmp_path, safe)
    with Tensors(tmp_path) as opened:
        bank = np.full((3, 4, 2), 9, "float32")
        opened.read("a", bank[1])
        np.testing.assert_array_equal(bank[1], WEIGHTS["a"])
        assert (bank[[0, 2]] == 9).all()
        double = np.zeros(3, "float64")
        assert opened.read("b", double) is double
        np.testing.assert_array_equal(double, WEIGHTS["b"])


@SAFE
def test_every_dtype(safe, tmp_path):
    """Also scalars and what has no numbers; bit by bit, bfloat16 too."""
    arrays = {dtype: np.array([[1.5, -3, 7]]).astype(dtype) for dtype in DTYPES.values()}
    arrays |= {"scalar": np.array(2.5, "float32"), "none": np.zeros((0, 3), "float32")}
    if safe:
        save(arrays, tmp_path / tensors.SAFETENSORS)
    else:
        bfloat16 = torch.tensor([[1.5, -3, 7]], dtype=torch.bfloat16)
        rest = {n: torch.tensor(a) for n, a in arrays.items() if n != "bfloat16"}
        torch.save({**rest, "bfloat16": bfloat16}, tmp_path / tensors.PICKLED)
    assert arrays["bfloat16"].dtype == ml_dtypes.bfloat16
    with Tensors(tmp_path) as opened:
        for name, expected in arrays.items():
            np.testing.assert_array_equal(opened.read(name), expected, strict=True)


def test_pickled_parameters_of_an_old_version(tmp_path):
    """Not a zip file, and with gradients."""
    weights = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in WEIGHTS.items()}
    path = tmp_path / tensors.PICKLED
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    with Tensors(tmp_path) as opened:
        np.testing.assert_array_equal(opened.read("a"), WEIGHTS["a"], strict=True)


def test_safetensors_before_pickles_and_an_index_before_a_file(tmp_path):
    torch.save({"old": torch.ones(1)}, tmp_path / tensors.PICKLED)
    with Tensors(tmp_path) as opened:
        assert opened.names == {"old"}
    save({"whole": np.ones(1)}, tmp_path / tensors.SAFETENSORS)
    with Tensors(tmp_path) as opened:
        assert opened.names == {"whole"}
    sharded(tmp_path)
    with Tensors(tmp_path) as opened:
        assert opened.names == set(WEIGHTS)


@SAFE
def test_one_shard_is_open_at_a_time(safe, tmp_path, monkeypatch):
    sharded(tmp_path, safe)
    seen, open_path, load = {}, Path.open, torch.load  # of each shard, whether it is open

    def num_open():
        return sum(is_open() for is_open in seen.values())

    def open_(path, *args, **kwargs):
        file = open_path(path, *args, **kwargs)
        if path.suffix == ".safetensors":
            assert not num_open() and path.stem not in seen
            seen[path.stem] = lambda: not file.closed
        return file

    def load_(path, **kwargs):
        assert not num_open() and path.stem not in seen
        weights = load(path, **kwargs)
        tensor = weakref.ref(next(iter(weights.values())))
        seen[path.stem] = lambda: tensor() is not None
        return weights

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(torch, "load", load_)
    with Tensors(tmp_path) as opened:
        assert not seen
        for name in ("c", "a", "b", "b"):
            opened.read(name)
            assert num_open() == 1
    assert list(seen) == ["first", "second"] and not num_open()


@pytest.mark.parametrize("kept", [["encoder"], ["decoder"], ["encoder", "decoder"]])
def test_a_shared_weight_by_its_other_names(kept, tmp_path):
    """By the first of them; without one of its own it is not read twice."""
    arrays = {f"{side}.embed_tokens.weight": WEIGHTS["a"] + len(side) for side in kept}
    arrays |= {f"{side}.embed_tokens.weight": WEIGHTS["a"] for side in kept[:1]}
    save(arrays, tmp_path / tensors.SAFETENSORS)
    with Tensors(tmp_path) as opened:
        assert opened.names == {*arrays, "shared.weight"}
        np.testing.assert_array_equal(opened.read("shared.weight"), WEIGHTS["a"])
        assert opened.shape("shared.weight") == (4, 2) and opened.dtype("shared.weight") == "f4"


def test_views_in_a_pickle_are_read_as_they_look(tmp_path):
    """Also with PyTorch's negative bit, and parts of a larger storage."""
    weight = torch.tensor(WEIGHTS["a"])
    views = {
        "turned": weight.t().contiguous().t(),
        "negative": torch._neg_view(-weight),
        "part": torch.cat([weight, weight])[4:],
        "parameter": torch.nn.Parameter(weight),
    }
    torch.save(views, tmp_path / tensors.PICKLED)
    with Tensors(tmp_path) as opened:
        for name in views:
            np.testing.assert_array_equal(opened.read(name), WEIGHTS["a"], strict=True)


@SAFE
def test_parts_of_a_tensor_have_names_of_their_own(safe, tmp_path):
    whole(tmp_path, safe)
    with Tensors(tmp_path) as opened:
        opened.split("a", {"x": (1, 2), "y": (3, 2)})
        opened.rename("b", "z")
        assert opened.names == {"x", "y", "z", "c"}
        assert opened.shape("y") == (3, 2) and opened.shape("z") == (3,)
        np.testing.assert_array_equal(opened.read("x"), WEIGHTS["a"][:1], strict=True)
        np.testing.assert_array_equal(opened.read("y"), WEIGHTS["a"][1:], strict=True)
        with pytest.raises(ValueError, match=r"'c'.*4 values.*shape=\(2, 3\)"):
            opened.split("c", {"u": (2, 2)})


def test_are_equal_or_one(tmp_path):
    arrays = {"a": WEIGHTS["a"], "same": WEIGHTS["a"].copy(), "other": WEIGHTS["a"] + 1}
    arrays["wide"] = WEIGHTS["a"].reshape(2, 4)
    save(arrays, tmp_path / tensors.SAFETENSORS)
    with Tensors(tmp_path) as opened:
        names = ("same", "absent", "other", "wide")
        equal = [opened.are_equal_or_one("a", other) for other in names]
    assert equal == [True, True, False, False]


def test_shapes_there():
    """Kernels are `[in, out]` here, and those of experts one array."""
    kernel, bank = np.zeros((2, 5)), np.zeros((3, 2, 5))
    assert Weight(kernel, ("w",)).shape_there() == (2, 5)
    assert Weight(kernel, ("w",), True).shape_there() == (5, 2)
    assert Weight(bank, ("x", "y", "z"), stacked=True).shape_there() == (2, 5)
    assert Weight(bank, ("x", "y", "z"), True, True).shape_there() == (5, 2)
    assert Weight(bank[:1], ("x",), True, True).shape_there() == (5, 2)


def raise_(error):
    raise error


class TestDamage:
    def test_no_weights(self, tmp_path):
        fails(tmp_path, "'model.safetensors'.*'pytorch_model.bin'")

    @SAFE
    @pytest.mark.parametrize("kind", [whole, sharded])
    def test_a_file_cut_short(self, kind, safe, tmp_path):
        kind(tmp_path, safe)
        (path,) = tmp_path.glob("first.*" if kind is sharded else "*model*")
        content = path.read_bytes()
        for length in (len(content) - 1, len(content) // 2, 9, 3, 0):
            path.write_bytes(content[:length])
            fails(tmp_path, f"damaged.*'{path.name}'")

    def test_a_file_that_is_cut_while_it_is_read(self, tmp_path):
        path = whole(tmp_path)
        with Tensors(tmp_path) as opened:
            opened.shape("a")
            path.write_bytes(path.read_bytes()[:-1])
            opened.read("a")
            with pytest.raises(ValueError, match="damaged.*'model.safetensors'"):
                opened.read("c")

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b'"shape":[4,2]', b'"shape":[4,3]'),  # more than its bytes
            (b'"data_offsets":[0,32]', b'"data_offsets":[4,32]'),  # fewer
            (b'"data_offsets":[0,32]', b'"data_offsets":[8,40]'),  # another's
            (b'"data_offsets":[44,68]', b'"data_offsets":[44,99]'),  # beyond the end
            (b'"dtype":"F32"', b'"dtype":"F99"'),
            (b'"dtype":"F32"', b'"dtype":"F64"'),
            (b'{"', b"{{"),
        ],
    )
    def test_a_header_that_was_changed(self, tmp_path, old, new):
        path = whole(tmp_path)
        content = path.read_bytes()
        assert old in content and len(old) == len(new)
        path.write_bytes(content.replace(old, new, 1))
        fails(tmp_path, "damaged.*'model.safetensors'")

    @pytest.mark.parametrize("length", [0, 1, 2**20, 2**63])
    def test_a_header_of_another_length(self, tmp_path, length):
        path = whole(tmp_path)
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
        fails(tmp_path, "damaged.*'model.safetensors'")

    @SAFE
    def test_a_file_of_the_other_format(self, safe, tmp_path):
        path, other = whole(tmp_path, safe), whole(tmp_path, not safe)
        path.write_bytes(other.read_bytes())
        if not safe:
            other.unlink()
        fails(tmp_path, f"damaged.*'{path.name}'")

    @SAFE
    def test_a_shard_that_is_not_there(self, safe, tmp_path):
        shard = json.loads(sharded(tmp_path, safe).read_text())["weight_map"]["b"]
        (tmp_path / shard).unlink()
        fails(tmp_path, f"shard '{shard}'.*index")

    @pytest.mark.parametrize("shard", ["../shard.safetensors", "/shard.safetensors", "a/b", "."])
    def test_a_shard_elsewhere(self, tmp_path, shard):
        folder = tmp_path / "model"
        folder.mkdir()
        change(sharded(folder), a=shard)
        save(WEIGHTS, tmp_path / "shard.safetensors")
        fails(folder, f"shard '{re.escape(shard)}'.*index")

    @SAFE
    def test_an_index_that_names_the_wrong_shard(self, safe, tmp_path):
        index = sharded(tmp_path, safe)
        wrong = f"second{'.safetensors' if safe else '.bin'}"
        change(index, a=wrong)
        fails(tmp_path, f"'a'.*index.*'{wrong}'")
        with Tensors(tmp_path) as opened:
            np.testing.assert_array_equal(opened.read("b"), WEIGHTS["b"])
            np.testing.assert_array_equal(opened.read("c"), WEIGHTS["c"])

    @pytest.mark.parametrize(
        "content",
        ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": null}'],
    )
    def test_an_index_without_shards(self, tmp_path, content):
        sharded(tmp_path).write_text(content)
        fails(tmp_path, "damaged.*'model.safetensors.index.json'")

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", "[" * 10**5])
    def test_an_index_that_is_no_object(self, tmp_path, content):
        sharded(tmp_path).write_text(content)
        fails(tmp_path, "'model.safetensors.index.json' must hold a JSON object")

    @pytest.mark.parametrize("content", [{"a": 3}, [1], torch.ones(3), {"a": [torch.ones(3)]}])
    def test_a_pickle_of_something_else(self, tmp_path, content):
        torch.save(content, tmp_path / tensors.PICKLED)
        fails(tmp_path, "damaged.*'pytorch_model.bin'")

    @pytest.mark.parametrize("new", [True, False], ids=["zip", "of an old version"])
    def test_a_pickle_that_would_run_code(self, tmp_path, new):
        marker = tmp_path / "ran"

        class Payload:
            def __reduce__(self):
                return (open, (str(marker), "w"))

        path = tmp_path / tensors.PICKLED
        torch.save({"a": Payload()}, path, _use_new_zipfile_serialization=new)
        fails(tmp_path, "damaged.*'pytorch_model.bin'")
        assert not marker.exists()
        torch.load(path, weights_only=False)  # which would
        assert marker.exists()

    @SAFE
    def test_a_dtype_that_is_not_read(self, safe, tmp_path):
        """Its shape may be read, and other weights."""
        weights = {"a": torch.ones(2, dtype=torch.float8_e4m3fn), "b": torch.ones(3)}
        if safe:
            save_torch_file(weights, tmp_path / tensors.SAFETENSORS)
        else:
            torch.save(weights, tmp_path / tensors.PICKLED)
        kind = "F8_E4M3" if safe else "float8_e4m3fn"
        file = tensors.SAFETENSORS if safe else tensors.PICKLED
        fails(tmp_path, f"'a'.*float64.*bfloat16.*dtype='{kind}' in '{file}'")
        with Tensors(tmp_path) as opened:
            assert opened.shape("a") == (2,) and opened.read("b").tolist() == [1, 1, 1]

    @SAFE
    @pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint8", "bool"])
    def test_integers_are_no_weights(self, safe, dtype, tmp_path):
        """They are the codes of a quantized weight, which are not its values."""
        file = tensors.SAFETENSORS if safe else tensors.PICKLED
        save({"a": WEIGHTS["a"].astype(dtype)}, tmp_path / file)
        kind = dtype if not safe else "I|U|BOOL"
        fails(tmp_path, f"'a' must be of float64.*dtype='({kind}).*'{file}'")

    @pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_a_pickle_that_is_compressed(self, method, tmp_path):
        path = whole(tmp_path, safe=False)
        repack(path, method)
        fails(tmp_path, "damaged.*'pytorch_model.bin'.*compressed.*`torch.save`")
        repack(path, zipfile.ZIP_STORED)
        with Tensors(tmp_path) as opened:
            np.testing.assert_array_equal(opened.read("a"), WEIGHTS["a"])

    def test_a_pickle_with_a_flipped_bit(self, tmp_path):
        path = whole(tmp_path, safe=False)
        content = bytearray(path.read_bytes())
        content[content.index(WEIGHTS["b"].tobytes()) + 1] ^= 1
        path.write_bytes(content)
        fails(tmp_path, "damaged.*'pytorch_model.bin'.*data/0' does not match its checksum")

    def test_a_pickle_with_less_than_its_weights_need(self, tmp_path):
        """PyTorch would read the bytes that follow."""
        path = whole(tmp_path, safe=False)
        repack(path, change=lambda name, content: content[:-4] if "/data/" in name else content)
        fails(tmp_path, "damaged.*'pytorch_model.bin'")

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_pickle_with_two_entries_of_one_name(self, tmp_path):
        path = whole(tmp_path, safe=False)
        with zipfile.ZipFile(path, "a") as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data/1"))
            archive.writestr(name, bytes(12))
        fails(tmp_path, "damaged.*'pytorch_model.bin'.*one name")

    @pytest.mark.filterwarnings("ignore:Sparse")
    @pytest.mark.parametrize(
        ("change", "kind"),
        [
            (lambda weight: weight.to("meta"), "without values"),
            (torch.Tensor.to_sparse, "sparse_coo"),
            (torch.Tensor.to_sparse_csr, "sparse_csr"),
        ],
    )
    def test_a_tensor_that_is_no_array(self, change, kind, tmp_path):
        weights = {"a": change(torch.ones(4, 2)), "b": torch.ones(3)}
        torch.save(weights, tmp_path / tensors.PICKLED)
        fails(tmp_path, f"weight 'a' must be an array.*{kind} in 'pytorch_model.bin'")
        with Tensors(tmp_path) as opened:
            assert opened.read("b").tolist() == [1, 1, 1]

    @SAFE
    @pytest.mark.parametrize(
        "error", [MemoryError(), OSError(errno.EMFILE, "Too many open files"), PermissionError()]
    )
    def test_what_is_not_the_files_fault_goes_through(self, tmp_path, monkeypatch, error, safe):
        whole(tmp_path, safe)
        function = "safetensors.safe_open" if safe else "torch.load"
        monkeypatch.setattr(function, lambda *args, **kwargs: raise_(error))
        with pytest.raises(type(error)) as raised:
            Tensors(tmp_path)
        assert raised.value is error

    @pytest.mark.parametrize(
        ("package", "extra", "safe"), [("safetensors", "hub", True), ("torch", "torch", False)]
    )
    def test_a_missing_package_names_the_extra(self, tmp_path, monkeypatch, package, extra, safe):
        sharded(tmp_path, safe)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"'{package}'.*keras-moe\[{extra}\]"):
            Tensors(tmp_path).shape("a")


class TestWrite:
    def test_one_file(self, tmp_path):
        """What is a view of something larger, or turned round, is written as it looks."""
        weights = {**WEIGHTS, "turned": WEIGHTS["a"].T, "part": WEIGHTS["a"][:, 1]}
        write(weights.items(), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        for name, ours in load_file(tmp_path / "model.safetensors").items():
            np.testing.assert_array_equal(ours, weights.pop(name), strict=True)
        assert not weights
        with (tmp_path / "model.safetensors").open("rb") as file:  # or transformers refuses it
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        assert header["__metadata__"] == {"format": "pt"}

    @pytest.mark.parametrize(
        ("shard_bytes", "shards"),
        [
            (68, ["abc"]),
            (67, ["ab", "c"]),
            (44, ["ab", "c"]),
            (43, ["a", "bc"]),
            (36, ["a", "bc"]),
            (35, ["a", "b", "c"]),
            (1, ["a", "b", "c"]),  # a weight that is larger has a file of its own
        ],
    )
    def test_shards_in_order(self, shard_bytes, shards, tmp_path):
        write(WEIGHTS.items(), tmp_path, shard_bytes)
        with Tensors(tmp_path) as opened:
            assert opened.names == set(WEIGHTS)
            for name, expected in WEIGHTS.items():
                np.testing.assert_array_equal(opened.read(name), expected, strict=True)
        if len(shards) == 1:
            assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
            return
        files = [f"model-0000{i}-of-0000{len(shards)}.safetensors" for i in (1, 2, 3)]
        files = files[: len(shards)]
        index = "model.safetensors.index.json"
        assert {path.name for path in tmp_path.iterdir()} == {index, *files}
        assert json.loads((tmp_path / index).read_text()) == {
            "metadata": {"total_size": 68},
            "weight_map": {
                n: file for file, names in zip(files, shards, strict=True) for n in names
            },
        }
        for file, names in zip(files, shards, strict=True):
            assert set(load_file(tmp_path / file)) == set(names)

    def test_every_dtype_that_is_read(self, tmp_path):
        arrays = {dtype: np.array([1.5, -3]).astype(dtype) for dtype in DTYPES.values()}
        write(arrays.items(), tmp_path)
        with Tensors(tmp_path) as opened:
            for name, expected in arrays.items():
                np.testing.assert_array_equal(opened.read(name), expected, strict=True)

    @pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "bool", "uint32", "float8_e4m3fn"])
    def test_a_dtype_that_would_not_be_read_back(self, dtype, tmp_path):
        array = np.zeros(2).astype(dtype)
        with pytest.raises(ValueError, match=f"'x'.*float64.*bfloat16.*dtype='{dtype}'"):
            write([("x", array)], tmp_path)
        assert not list(tmp_path.iterdir())
