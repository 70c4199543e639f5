"""Whole checkpoints in transformers' format: a `config.json` and weights, in a folder."""

import collections
import contextlib
import functools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from keras import ops

from keras_moe.ops import adopt, empty, transposed
from keras_moe.routing.base import positive_integer
from zoo.conversion import decoders, t5
from zoo.conversion.config import choice, shown
from zoo.conversion.tensors import DTYPES, Tensors, write
from zoo.files import is_file, read_json, require_absent, written_whole
from zoo.models.deferred import Deferred

FLOATS = tuple(DTYPES.values())
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
HEADS = ("ForConditionalGeneration", "ForCausalLM", "WithLMHeadModel")
MODULES = {family: module for module in (t5, decoders) for family in module.FAMILIES}


def load_transformers(folder, dtype=None, load_weights=True):
    """Loads a model from a folder that transformers wrote, one weight at a time.

    The tokenizer is loaded, too, if its files are there: `spiece.model` for T5 and the Switch
    models, `tokenizer.json` for Mixtral and OLMoE, whose ids are then those of transformers.

    Args:
        folder: with a `config.json`, and weights as safetensors or as PyTorch's pickles, in one
            file or in shards. The family is T5, T5 1.1, mT5, Switch Transformers, Mixtral or OLMoE.
        dtype: dtype or dtype policy of the layers; "auto" for the dtype that the embedding table
            has in the files (without weights: that the config names); `None` for Keras' own.
        load_weights: `False` leaves all weights as they are initialized, and needs no files of
            them.

    The weights of the routers' losses are those that make them as large here, where the losses of
    all blocks add up, as in transformers, which pools the blocks' tokens (those of the encoder and
    of the decoder apart) to make one, when the experts are used equally. Of a Switch Transformer's
    encoder or decoder whose blocks are all sparse transformers has no such loss, and neither has
    what is loaded. Routers compute in float32, whatever the config's `router_dtype`. Where the
    config has several ids that end a text, texts end at the first of them, or the tokenizer's.

    Returns:
        A `zoo.Seq2SeqLM`, or a `zoo.CausalLM` for Mixtral and OLMoE; without a preprocessor if
        there is no tokenizer.

    Raises:
        ValueError: if something is missing or damaged, the family is another, or a weight does not
            fit.
        ImportError: if safetensors, or torch for a pickle, is not installed.
    """
    folder = Path(folder)
    config = read_config(folder)
    family = MODULES[config["model_type"]]
    if not load_weights:
        if dtype == "auto":
            name = "dtype" if "dtype" in config else "torch_dtype"  # as it was called before
            dtype = choice(config, name, FLOATS, None)
        with Deferred() as deferred:
            backbone = family.make(config, None, dtype)
        preprocessor = family.preprocessor(folder, config)
        deferred.initialize()
        return family.TASK(backbone, preprocessor)
    with Tensors(folder) as tensors:
        _require(folder, {family.EMBEDDING}, tensors.names)
        family.prepare(config, tensors)
        shapes = family.first_shapes(config)
        there = [name for name in shapes if name in tensors.names]
        for name in sorted(there, key=tensors.shard_of):
            _check_shape(folder, name, tensors.shape(name), shapes[name])
        if dtype == "auto":
            dtype = tensors.dtype(family.EMBEDDING).name
        with Deferred() as deferred:
            backbone = family.make(config, tensors, dtype)
        wanted = _wanted(folder, family, backbone, tensors)
        preprocessor = family.preprocessor(folder, config)
        # Closed before the files are: its thread may be reading.
        with contextlib.closing(_values(tensors, wanted)) as values:
            deferred.initialize(values)
    return family.TASK(backbone, preprocessor)


def _wanted(folder, family, backbone, tensors):
    """The weights of a backbone, a shard's after another's; the files have them, and no others."""
    wanted = list(family.weights(backbone))
    of_names = {name: weight for weight in wanted for name in weight.names}
    _require(folder, set(of_names), tensors.names)
    if unknown := sorted(tensors.names - set(of_names) - family.IGNORED - {family.OUTPUT}):
        raise ValueError(
            f"The checkpoint {str(folder)!r} does not fit: the model has no place for "
            f"{_weights(unknown)}"
        )
    for name in sorted(of_names, key=tensors.shard_of):
        _check_shape(folder, name, tensors.shape(name), of_names[name].shape_there())
        tensors.dtype(name)
    return sorted(wanted, key=lambda weight: tensors.shard_of(weight.names[0]))


def has_tokenizer(folder):
    """Whether `load_transformers` would load a tokenizer from a folder.

    Raises:
        ValueError: if the folder is of no family that is known, or its tokenizer cannot be used.
    """
    config = read_config(folder)
    return MODULES[config["model_type"]].has_tokenizer(Path(folder), config)


def read_config(folder):
    """The `config.json` of a folder, of a family that is known."""
    path = Path(folder) / "config.json"
    if not is_file(path):
        raise ValueError(
            "`folder` must be a checkpoint of transformers, with a `config.json` in it; "
            f"`zoo.from_preset` knows addresses, too. Received: folder={str(folder)!r}"
        )
    config = read_json(path)
    if "model_type" not in config:
        raise ValueError(
            f"The checkpoint {str(folder)!r} does not fit or is damaged: its `config.json` names "
            "no `model_type`"
        )
    family = config["model_type"]
    if not isinstance(family, str) or family not in MODULES:
        raise ValueError(
            f"The checkpoint {str(folder)!r} must be of one of the families "
            f"{', '.join(MODULES)}. Received: model_type={shown(family)}"
        )
    kinds = config.get("architectures")
    if kinds is not None and not isinstance(kinds, list):
        raise ValueError(
            f"The checkpoint {str(folder)!r} does not fit or is damaged: `architectures` in its "
            f"`config.json` must be a list of names. Received: architectures={shown(kinds)}"
        )
    if kinds and not any(isinstance(kind, str) and kind.endswith(HEADS) for kind in kinds):
        raise ValueError(
            f"The checkpoint {str(folder)!r} must be of a model that writes texts, "
            f"{' or '.join(HEADS)}. Received: architectures={shown(kinds)}"
        )
    return config


def _require(folder, names, there):
    if missing := sorted(names - there):
        raise ValueError(
            f"The checkpoint {str(folder)!r} does not fit or is damaged: it lacks "
            f"{_weights(missing)}"
        )


def _weights(names):
    return f"the weight {names[0]!r}" + (f" and {len(names) - 1} others" if names[1:] else "")


def _check_shape(folder, name, shape, wanted):
    if shape != wanted:
        raise ValueError(
            f"The checkpoint {str(folder)!r} does not fit: weight {name!r} has shape {shape}, and "
            f"the model of its 'config.json' wants {wanted}"
        )


def _values(tensors, weights):
    """Pairs of a variable and a function that returns its value; what is next is read meanwhile."""

    free = []  # memory that has been used: to fill it anew is faster than to get more

    def memory(size):
        fits = [place for place, buffer in enumerate(free) if buffer.size >= size]
        if fits:
            return free.pop(fits[0])
        del free[:1]
        return empty((size,), "uint8")

    def read(weight):
        first = weight.names[0]
        shape = (len(weight.names), *tensors.shape(first))
        dtype = tensors.dtype(first)
        size = math.prod(shape) * dtype.itemsize
        buffer = memory(size) if weight.transposed else empty((size,), "uint8")
        array = buffer[:size].view(dtype).reshape(shape)
        for part, name in zip(array, weight.names, strict=True):
            tensors.read(name, part)
        return buffer, array if weight.stacked else array[0]

    def value(weight, waiting):
        buffer, array = waiting.pop().result()  # and nobody else keeps them
        if weight.transposed:
            tensor, is_free = transposed(array)
            if is_free:
                free.append(buffer)
        else:
            tensor = adopt(array)
        return ops.cast(tensor, weight.variable.dtype)

    with ThreadPoolExecutor(1) as reader:
        ahead = collections.deque()
        for weight in weights:
            ahead.append((weight, reader.submit(read, weight)))
            if len(ahead) > 1:
                weight, array = ahead.popleft()
                yield weight.variable, functools.partial(value, weight, [array])
        for weight, array in ahead:
            yield weight.variable, functools.partial(value, weight, [array])


def save_transformers(model, folder, shard_bytes=5 * 2**30):
    """Writes a model as transformers does, so that its `from_pretrained` loads it.

    Args:
        model: a `zoo.Seq2SeqLM` or a `zoo.CausalLM`. Dropout and the router's z-loss, where
            transformers has none, are left out, and so is the tokenizer of a `CausalLM` unless it
            was loaded from transformers' files. The weights of its routers' losses are translated
            as `load_transformers` does; transformers has one for encoder and decoder, and their
            mean is written.
        folder: path; it must not be there yet.
        shard_bytes: largest size of a file, in bytes, but for a weight that is larger.

    Raises:
        ValueError: if the folder is there, `shard_bytes` is no positive integer, or the model has
            something that transformers has not: any router but those of its families, for one, see
            `zoo.switch_transformer`.
    """
    require_absent(folder)
    positive_integer("shard_bytes", shard_bytes)
    family = next((f for f in set(MODULES.values()) if isinstance(model, f.TASK)), None)
    if family is None:
        raise ValueError(
            "`model` must be a `zoo.Seq2SeqLM` or a `zoo.CausalLM`. "
            f"Received: a {type(model).__name__}"
        )
    config = family.config(model)
    special = {name: config[name] for name in SPECIAL if config.get(name) is not None}
    with written_whole(folder) as beside:
        for name, entries in (("config.json", config), ("generation_config.json", special)):
            (beside / name).write_text(json.dumps(entries, indent=2) + "\n")
        if model.preprocessor is not None:
            family.write_tokenizer(model, beside)
        write(_named(family, model.backbone), beside, shard_bytes)


def _named(family, backbone):
    for weight in (*family.copies(backbone), *family.weights(backbone)):
        value = ops.convert_to_numpy(weight.variable)  # a tensor, where LoRA adds to it
        parts = value if weight.stacked else [value]
        for name, part in zip(weight.names, parts, strict=True):
            yield name, part.T if weight.transposed else part
