"""Damages folders of models in many ways, and reports each that is not noticed.

python -m tests.damage                      1,200 mutants, about ten minutes on PyTorch
python -m tests.damage --count 60 --seed 3  fewer, and others

A mutant is a copy of a small preset (with `sha256.json`), of a folder of transformers' format, or
of a `.keras` file, with one piece of damage: bytes that are flipped, cut off or added, a file that
is missing, a folder, a broken link or another file, entries of JSON of another type, entries and
weights that are missing, renamed or added, weights of another dtype or shape, entries of an archive
that are compressed. Each mutant must be loaded equal, with the same outputs, or be refused:

* with a `ValueError` of one sentence, which names the damaged file, or the entry or weight in it;
* within ten seconds.

Only damage that can be known counts. A preset has checksums, and so have the entries of
`pytorch_model.bin` and of `.keras` files. Of a safetensors file or a `config.json`, which have
none, a flipped bit may make another weight or setting that is as good as the first, and nobody can
know: those files are damaged only in ways that their format does not allow. Where a config may
lack an entry, which then has a default, or a file may be missing, other outputs are allowed.

Keras reads a `.keras` file whose checksum does not match all the same, so that its checksums are
compared here before.
"""

import argparse
import collections
import json
import pathlib
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from typing import Any, NamedTuple

import keras
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

import keras_moe
import zoo
from tests.zoo.conversion import small_decoders, small_t5
from zoo.presets import explained

SECONDS = 10
TEXT = "The quick brown fox."
IDS = np.array([[5, 9, 7, 1]])
ODD = (None, True, "x", -1, 0, 2.5, 10**30, float("nan"), float("inf"), [], [[1]], {}, {"a": 1})


class Base(NamedTuple):
    """A folder that is damaged."""

    name: str
    folder: pathlib.Path
    load: Any  # function of a folder that returns outputs
    expected: Any  # the outputs without damage


class Damage(NamedTuple):
    """What was done to a copy of a base."""

    kind: str
    file: str  # path within the folder
    names: tuple = ()  # one of which, or the file's, must be in the error
    known: bool = True  # whether other outputs show a fault


class Outcome(NamedTuple):
    """What became of a mutant."""

    verdict: str  # "equal", "refused", "unknowable", or the fault
    base: str
    damage: Damage
    message: str = ""
    seconds: float = 0.0

    @property
    def is_fault(self):
        return self.verdict not in ("equal", "refused", "unknowable")


# === Bases ===


def bases(folder):
    """Small models of each kind, in a folder that is there."""
    for name, make, load in (
        ("preset", _preset, _load_preset),
        ("unchecked preset", _unchecked_preset, _load_preset),
        ("switch", _switch, _load_transformers),
        ("mixtral", _mixtral, _load_transformers),
        ("olmoe", _olmoe, _load_transformers),
        ("keras", _keras, _load_keras),
    ):
        path = folder / name
        make(path)
        yield Base(name, path, load, load(path))


def _unchecked_preset(folder):
    """As KerasHub saves it."""
    _preset(folder)
    (folder / "sha256.json").unlink()


def _preset(folder):
    keras.utils.set_random_seed(0)
    backbone = zoo.EncoderBackbone(
        vocabulary_size=8000,
        num_layers=2,
        num_heads=2,
        hidden_dim=4,
        key_dim=2,
        intermediate_dim=6,
        router=keras_moe.SwitchRouter(),
        num_experts=2,
    )
    preprocessor = zoo.EncoderTextClassifierPreprocessor(zoo.default_tokenizer(), 12)
    zoo.save_preset(zoo.EncoderTextClassifier(backbone, 2, preprocessor), folder)


def _switch(folder):
    torch.manual_seed(0)
    options = {**small_t5.SWITCH, "num_layers": 2, "num_sparse_encoder_layers": 1}
    options |= {"num_decoder_layers": 2, "vocab_size": 8128}
    config = transformers.SwitchTransformersConfig(**options)
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "spiece.model").write_bytes(zoo.default_tokenizer().proto)


def _mixtral(folder):
    folder.mkdir()
    model = small_decoders.theirs("mixtral")
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _olmoe(folder):
    small_decoders.theirs("olmoe").save_pretrained(folder, save_original_format=False)


def _keras(folder):
    keras.utils.set_random_seed(0)
    folder.mkdir()
    layer = keras_moe.MixtureOfExperts(
        keras_moe.FeedForwardExperts(2, 6), keras_moe.TopKRouter(2), group="sequence"
    )
    inputs = keras.Input((4, 3))
    keras.Model(inputs, layer(inputs)).save(folder / "model.keras")


def _load_preset(folder):
    model = zoo.from_preset(folder)
    texts = model.preprocessor([TEXT])
    return np.concatenate(
        [
            np.ravel(keras.ops.convert_to_numpy(x)).astype("float64")
            for x in (*texts.values(), model(texts))
        ]
    )


def _load_transformers(folder):
    model = zoo.from_preset(folder)
    sides = ("encoder_", "decoder_") if isinstance(model, zoo.Seq2SeqLM) else ("",)
    inputs = {f"{side}token_ids": IDS for side in sides}
    inputs |= {f"{side}padding_mask": np.ones_like(IDS) for side in sides}
    outputs = np.ravel(keras.ops.convert_to_numpy(model(inputs)))
    if model.preprocessor is None:
        return outputs
    return np.concatenate([outputs, model.preprocessor.tokenizer(TEXT)])


def _load_keras(folder):
    path = folder / "model.keras"
    with explained(path):
        try:
            with zipfile.ZipFile(path) as archive:
                if name := archive.testzip():
                    raise ValueError(f"its entry {name!r} does not match its checksum")
        except (zipfile.BadZipFile, EOFError, struct.error) as error:
            raise ValueError(f"it is no archive ({error})") from error
        model = keras.saving.load_model(path)
        inputs = np.arange(12.0, dtype="float32").reshape(1, 4, 3)
        return keras.ops.convert_to_numpy(model(inputs))


# === Damage ===


def damage(base, folder, rng):
    """Damages a copy of a base; returns what was done, or `None` if it cannot be done there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    path = files[rng.integers(len(files))]
    kinds = [*OF_FILES, *BY_SUFFIX.get(path.suffix, ()) * 3]
    kind = kinds[rng.integers(len(kinds))]
    done = kind(base, path, rng)
    if done is None:
        return None
    options = done if isinstance(done, dict) else {}
    return Damage(kind.__name__.strip("_"), str(path.relative_to(folder)), **options)


def _has_checksums(base, path):
    return base.name in ("preset", "keras") and path.name != "sha256.json" or path.suffix == ".bin"


def _is_optional(base, path):
    """Whether the file may be missing."""
    return path.name in (
        "generation_config.json",
        "metadata.json",
        "sha256.json",
        "spiece.model",
    )


def _remove(base, path, rng):
    path.unlink()
    return {"known": not _is_optional(base, path)}


def _make_folder(base, path, rng):
    path.unlink()
    path.mkdir()
    return True


def _break_link(base, path, rng):
    path.unlink()
    path.symlink_to("nothing")
    return True


def _link_elsewhere(base, path, rng):
    """A link to a file with the same content is no damage."""
    target = path.parent.parent / f"{path.parent.name}-elsewhere"
    shutil.copy(path, target)
    path.unlink()
    path.symlink_to(target)
    return True


def _truncate(base, path, rng):
    content = path.read_bytes()
    length = int(rng.integers(len(content))) if content else 0
    path.write_bytes(content[:length])
    return True


def _empty(base, path, rng):
    path.write_bytes(b"")
    return True


def _append(base, path, rng):
    with path.open("ab") as file:
        file.write(rng.bytes(int(rng.integers(1, 64))))
    return True


def _random_bytes(base, path, rng):
    path.write_bytes(rng.bytes(path.stat().st_size))
    return True


def _flip(base, path, rng):
    content = bytearray(path.read_bytes())
    end, names = len(content), ()
    if path.suffix == ".safetensors":  # the header, whose names and sizes are all needed
        end, names = 8 + int.from_bytes(content[:8], "little"), tuple(load_file(path))
    elif not _has_checksums(base, path):
        return None
    content[rng.integers(end)] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    return {"names": names}


def _swap(base, path, rng):
    others = [p for p in path.parent.glob(f"*{path.suffix}") if p != path and p.is_file()]
    others = [p for p in others if not p.name.startswith("generation_config")]
    if not others or path.name == "generation_config.json":
        return None
    other = others[rng.integers(len(others))]
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)
    return {"names": (other.name,)}


def _zeros_at_the_end(base, path, rng):
    content = bytearray(path.read_bytes())
    length = int(rng.integers(1, min(64, len(content)) + 1))
    if not _has_checksums(base, path) and path.suffix != ".json":
        return None
    content[-length:] = bytes(length)
    path.write_bytes(content)
    return True


def _nest(base, path, rng):
    path.write_text("[" * 10**5 if rng.integers(2) else '{"a":' * 10**5)
    return True


def _in_json(path, rng):
    """The content of a JSON file, and the place of an entry of an object in it."""
    content = json.loads(path.read_text())
    part, names = content, []
    while True:
        keys = sorted(part)
        if not keys:
            return content, part, None, names
        key = keys[rng.integers(len(keys))]
        names.append(key)
        if not isinstance(part[key], dict) or rng.integers(3) == 0:
            return content, part, key, names
        part = part[key]


def _wrong_type(base, path, rng):
    content, part, key, names = _in_json(path, rng)
    if key is None:
        return None
    odd = ODD[rng.integers(len(ODD))]
    kinds = (int, float) if isinstance(part[key], (int, float)) else (type(part[key]),)
    is_number = isinstance(odd, (int, float)) and not isinstance(odd, bool)
    is_other = type(odd) is not type(part[key]) and not (is_number and int in kinds)
    part[key] = odd
    path.write_text(json.dumps(content))
    known = is_other and odd is not None
    return {"names": tuple(names), "known": known or _has_checksums(base, path)}


def _drop_entry(base, path, rng):
    content, part, key, names = _in_json(path, rng)
    if key is None:
        return None
    del part[key]
    path.write_text(json.dumps(content))
    return {"names": tuple(names), "known": _has_checksums(base, path)}


def _rename_entry(base, path, rng):
    content, part, key, names = _in_json(path, rng)
    if key is None:
        return None
    part[f"{key}x"] = part.pop(key)
    path.write_text(json.dumps(content))
    return {"names": tuple(names), "known": _has_checksums(base, path)}


def _add_entry(base, path, rng):
    content, part, _, names = _in_json(path, rng)
    part["extra"] = ODD[rng.integers(len(ODD))]
    path.write_text(json.dumps(content))
    return {"names": ("extra", *names)}


def _write_again(base, path, rng):
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    return True


def _with_weights(change):
    """Damage of the weights in a file of transformers' format."""

    def damaged(base, path, rng):
        is_safe = path.suffix == ".safetensors"
        load = load_file if is_safe else (lambda path: torch.load(path, weights_only=True))
        weights = {name: np.array(weight) for name, weight in load(path).items()}
        names = sorted(weights)
        name = names[rng.integers(len(names))]
        if change(weights, name, rng) is None:
            return None
        if is_safe:
            weights = {n: np.ascontiguousarray(weight) for n, weight in weights.items()}
            save_file(weights, path, {"format": "pt"})
        else:
            torch.save({n: torch.from_numpy(w.copy()) for n, w in weights.items()}, path)
        # Whatever the tables of the logits and of the embedding are, tied or not, is a model.
        original = name.replace(".mlp.", ".block_sparse_moe.")  # Mixtral's, which errors name
        return {"names": (name, f"{name}x", original), "known": name != "lm_head.weight"}

    damaged.__name__ = change.__name__
    return damaged


@_with_weights
def _drop_weight(weights, name, rng):
    return weights.pop(name)


@_with_weights
def _rename_weight(weights, name, rng):
    weights[f"{name}x"] = weights.pop(name)
    return True


@_with_weights
def _add_weight(weights, name, rng):
    weights[f"{name}x"] = weights[name]
    return True


@_with_weights
def _other_dtype(weights, name, rng):
    dtypes = ("int8", "uint8", "int32", "int64", "bool")
    weights[name] = weights[name].astype(dtypes[rng.integers(len(dtypes))])
    return True


@_with_weights
def _double(weights, name, rng):
    """A wider dtype has the same values."""
    weights[name] = weights[name].astype("float64")
    return True


@_with_weights
def _other_shape(weights, name, rng):
    shape = weights[name].shape
    other = (shape[::-1], (*shape, 1), (1, *shape), (-1,))[rng.integers(4)]
    changed = weights[name].reshape(other)
    if changed.shape == shape:
        return None
    weights[name] = changed
    return True


@_with_weights
def _shorter(weights, name, rng):
    weights[name] = weights[name][:-1]
    return True


def _odd_tensor(base, path, rng):
    weights = torch.load(path, weights_only=True)
    names = sorted(name for name in weights if weights[name].ndim == 2)
    name = names[rng.integers(len(names))]
    make = (
        lambda weight: weight.to("meta"),
        torch.Tensor.to_sparse,
        torch.Tensor.to_sparse_csr,
        lambda weight: weight.to(torch.complex64),
        lambda weight: weight.to(torch.float8_e4m3fn),
        lambda weight: weight.t().contiguous().t(),
        torch.nn.Parameter,
        lambda weight: torch._neg_view(-weight),
    )[rng.integers(8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save({**weights, name: make(weights[name])}, path)
    return {"names": (name,)}


def _pack(base, path, rng):
    """Entries of an archive, compressed or not, some of them missing or twice."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    place, change = int(rng.integers(len(entries))), rng.integers(4)
    name, content = entries[place]
    if change == 1:
        del entries[place]
    elif change == 2:
        entries.append((name, content[::-1]))
    elif change == 3:
        entries[place] = (name, content[: len(content) // 2])
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", methods[rng.integers(4)]) as new:
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in entries:
            new.writestr(name, content)
    # What half of an HDF5 file or of a list says, nobody knows but its author.
    return {"known": change < 2}


OF_FILES = (
    _remove,
    _make_folder,
    _break_link,
    _link_elsewhere,
    _truncate,
    _empty,
    _append,
    _random_bytes,
    _flip,
    _swap,
    _zeros_at_the_end,
)
OF_WEIGHTS = (
    _drop_weight,
    _rename_weight,
    _add_weight,
    _other_dtype,
    _double,
    _other_shape,
    _shorter,
)
BY_SUFFIX = {
    ".json": (
        _nest,
        _wrong_type,
        _wrong_type,
        _drop_entry,
        _rename_entry,
        _add_entry,
        _write_again,
    ),
    ".safetensors": OF_WEIGHTS,
    ".bin": (*OF_WEIGHTS, _odd_tensor, _pack),
    ".keras": (_pack, _flip),
}


# === Verdicts ===


def judge(base, folder, done):
    """Loads a mutant and says what became of it."""
    begin = time.perf_counter()
    verdict, message = "equal", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = base.load(folder)
        if outputs.shape != base.expected.shape or not np.array_equal(outputs, base.expected):
            verdict = "WRONG OUTPUTS" if done.known else "unknowable"
    except ValueError as error:
        verdict, message = "refused", str(error)
        named = (pathlib.Path(done.file).name, *done.names)
        if "\n" in message:
            verdict = "SEVERAL LINES"
        elif not any(name in message for name in named):
            verdict = "NOT NAMED"
    except Exception as error:  # any other is a fault, which is reported
        verdict, message = type(error).__name__, "".join(traceback.format_exception(error)[-3:])
    seconds = time.perf_counter() - begin
    if seconds > SECONDS:
        verdict = "SLOW"
    return Outcome(verdict, base.name, done, message.replace(str(folder), "FOLDER"), seconds)


def campaign(count, seed, folder):
    """Yields the outcomes of so many mutants, as many of each base; the same for the same seed."""
    made, number = list(bases(folder)), 0
    while number < count:
        base = made[number % len(made)]
        rng = np.random.default_rng([seed, number])
        done = None
        while done is None:
            mutant = folder / "mutant" / "model"
            shutil.rmtree(mutant.parent, ignore_errors=True)
            shutil.copytree(base.folder, mutant)
            done = damage(base, mutant, rng)
        yield judge(base, mutant, done)
        number += 1


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.damage", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=1200, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="others for another seed")
    options = parser.parse_args(arguments)
    outcomes, slowest = collections.Counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number, outcome in enumerate(
            campaign(options.count, options.seed, pathlib.Path(folder))
        ):
            outcomes["FAULT" if outcome.is_fault else outcome.verdict] += 1
            slowest = max(slowest, outcome.seconds)
            if outcome.is_fault:
                print(number, outcome.verdict, outcome.base, *outcome.damage[:3], flush=True)
                print(f"    {outcome.message.strip()[-600:]}", flush=True)
    print(", ".join(f"{kind}: {n}" for kind, n in sorted(outcomes.items())), f"({slowest:.1f} s)")
    return 1 if outcomes["FAULT"] else 0


if __name__ == "__main__":
    sys.exit(main())
