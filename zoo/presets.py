"""Models by name, from folders and the hub: presets, and checkpoints of transformers."""

import contextlib
import json
import math
import os
import re
from numbers import Integral, Real
from pathlib import Path

import h5py
import keras
import keras_hub

import zoo.models.decoder  # these register the classes that presets name
import zoo.models.encoder
import zoo.models.encoder_decoder
import zoo.models.masked_lm
import zoo.models.moe_lstm
from zoo.catalogue import did_you_mean, shipped
from zoo.conversion import load_transformers
from zoo.conversion.folder import has_tokenizer
from zoo.files import is_file, read_json, written_whole
from zoo.hub import CARD, HASHES, check_hashes, download, sha256
from zoo.models.figures import figures

HEADLESS = (zoo.models.decoder.CausalLM, zoo.models.encoder_decoder.Seq2SeqLM)
LANGUAGE_MODELS = (*HEADLESS, zoo.models.moe_lstm.LstmCausalLM)
# The files of a preset that describe Keras objects.
CONFIGS = ("config.json", "task.json", "preprocessor.json", "tokenizer.json")
WEIGHTS, SHARDS, HEAD = "model.weights.h5", "model.weights.json", "task.weights.h5"
# What Keras, the backends and h5py raise for files that describe no model, or another one.
DAMAGE = (
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
)
# Sizes in a backbone's config whose product a preset's weights cannot fall short of.
SLACK = 2**24  # values that a model may have too many, so that Keras names the first weight
SIZES = (
    ("vocabulary_size", "hidden_dim"),
    ("num_layers", "hidden_dim"),
    ("num_decoder_layers", "hidden_dim"),
    ("num_heads", "key_dim", "hidden_dim"),
    ("intermediate_dim", "hidden_dim"),
    ("num_buckets", "num_heads"),
    ("lstm_dim", "hidden_dim"),
)


def from_preset(
    preset, num_classes=None, load_weights=True, dtype=None, dropout=None, expert_dropout=None
):
    """Loads a model with its weights, and its tokenizer where it has one.

    Example:

    ```python
    model = zoo.from_preset("hf://google/switch-base-8")
    model.generate("A <extra_id_0> walks into a bar.", max_length=20)
    ```

    Args:
        preset: a folder, or "hf://owner/model" for one on the Hugging Face hub, see
            `zoo.list_presets`; or the name of a folder in `zoo/assets/presets`. What is in a folder
            was saved by `zoo.save_preset` or `save_to_preset`, or by transformers, see
            `zoo.load_transformers`.
        num_classes: makes a new head of that many classes; `None` keeps the saved one. For text
            classifiers, and encoders that were pretrained, only.
        load_weights: `False` leaves all weights as they are initialized.
        dtype: dtype or dtype policy of the backbone's layers; "auto" for the policy that it was
            saved with, or of a checkpoint of transformers the dtype of its files; `None` for Keras'
            own.
        dropout: rate of the zoo's own models instead of the saved one, experts left out.
        expert_dropout: the same of the experts' hidden units.

    Returns:
        A `zoo.EncoderTextClassifier`, `zoo.EncoderMaskedLM`, `zoo.Seq2SeqLM`, `zoo.CausalLM` or
        `zoo.LstmCausalLM`.

    Raises:
        ValueError: if there is no such preset, or one in which something is missing or damaged, or
            `num_classes` or a rate is out of range, or for a model without such a rate.
        OSError: if the hub cannot be reached and the cache does not have the model.
        ImportError: if a package is missing that the files or the hub need.
    """
    if num_classes is not None and not (isinstance(num_classes, Integral) and num_classes > 0):
        raise ValueError(
            f"`num_classes` must be a positive integer. Received: num_classes={num_classes!r}"
        )
    rates = {"dropout": dropout, "expert_dropout": expert_dropout}
    for name, rate in rates.items():
        if rate is not None and not (isinstance(rate, Real) and 0 <= rate < 1):
            raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={rate!r}")
    model = _loaded(_folder(preset, load_weights), preset, num_classes, load_weights, dtype)
    rates = {name: rate for name, rate in rates.items() if rate is not None}
    return _with_rates(model, rates) if rates else model


def _loaded(folder, preset, num_classes, load_weights, dtype):
    if _is_of_transformers(folder):
        _only_classifiers_have_heads(preset, num_classes)
        return load_transformers(folder, dtype, load_weights)
    task = _task_class(folder, num_classes)
    has_head = num_classes is None and task not in HEADLESS
    if load_weights:
        _check_weights(folder, has_head)
    check_hashes(folder, load_weights)
    if load_weights:
        _check_sizes(folder, has_head)
    if dtype == "auto":
        with explained(folder / "config.json"):
            dtype = _saved_dtype(folder)
    elif dtype is None:
        with explained(folder / "config.json"):
            saved = _saved_dtype(folder)
        if saved and saved.name.startswith("mixed_"):  # whose name KerasHub takes for a dtype
            dtype = keras.config.dtype_policy()
    options = {"load_weights": load_weights, "dtype": dtype}
    if issubclass(task, keras_hub.models.TextClassifier):
        # KerasHub takes the head to be a new one whenever it is told of classes at all.
        head = {} if num_classes is None else {"num_classes": int(num_classes)}
        with explained(folder):
            return keras_hub.models.TextClassifier.from_preset(str(folder), **options, **head)
    _only_classifiers_have_heads(preset, num_classes)
    if not is_file(folder / "task.json") and not _has_tokenizer(folder):
        options["preprocessor"] = None
    with explained(folder):
        return task.from_preset(str(folder), **options)


def _with_rates(model, rates):
    """The model anew, with other rates of dropout and the same weights."""
    config = model.get_config()
    backbone = config["backbone"]["config"]
    for name in rates:
        if name not in backbone or (name == "expert_dropout" and not backbone["router"]):
            raise ValueError(
                f"`{name}` must be None for a model that has no such rate. "
                f"Received: {name}={rates[name]}"
            )
    backbone |= rates
    if "dropout" in config and "dropout" in rates:  # of a head
        config["dropout"] = rates["dropout"]
    new = type(model).from_config({**config, "preprocessor": None})
    new.preprocessor = model.preprocessor
    new.set_weights(model.get_weights())
    return new


def encoder_config(preset, trained=False):
    """The config of the encoder of a preset, which is read without its weights.

    Args:
        preset: as in `from_preset`.
        trained: whether it must be a text classifier's; else an encoder that was pretrained will
            do, of which `from_preset` makes a classifier.

    Raises:
        ValueError: if there is no such preset, or it is of another kind of model.
        OSError: if the hub cannot be reached and the cache does not have the preset.
        ImportError: if the hub needs a package that is missing.
    """
    folder = _folder(preset, weights=False)
    encoder = False
    if not _is_of_transformers(folder):
        task = _task_class(folder, num_classes=1)
        config = read_json(folder / "config.json")
        kind = keras.saving.get_registered_object(config["registered_name"])
        encoder = issubclass(task, keras_hub.models.TextClassifier) and issubclass(
            kind, zoo.models.encoder.EncoderBackbone
        )
    if not encoder:
        raise ValueError(
            "`preset` must be of a text classifier, or of an encoder that guesses hidden tokens. "
            f"Received: preset={str(preset)!r}"
        )
    if trained and not _names_a_classifier(folder / "task.json"):
        raise ValueError(
            "`preset` must be of a text classifier, and this one has no trained classifier. "
            f"Received: preset={str(preset)!r}"
        )
    return config["config"]


def _names_a_classifier(path):
    if not is_file(path):
        return False
    named = keras.saving.get_registered_object(read_json(path)["registered_name"])
    return isinstance(named, type) and issubclass(named, keras_hub.models.TextClassifier)


def _saved_dtype(folder):
    """The dtype policy that the backbone of a preset was saved with; `None` if it says none."""
    dtype = read_json(folder / "config.json")["config"].get("dtype")
    if dtype is None:
        return None
    if not isinstance(dtype, dict):  # KerasHub reads no other kind
        raise ValueError(f"`dtype` must be a dtype policy's config or null. Received: {dtype!r}")
    return keras.dtype_policies.get(dtype)


def require_generation(preset):
    """Refuses a preset that generates no text from texts, without its weights.

    Args:
        preset: as in `from_preset`.

    Raises:
        ValueError: if there is no such preset, it is of another kind of model, or it has no
            tokenizer, or one that cannot be used.
        OSError: if the hub cannot be reached and the cache does not have the preset.
        ImportError: if the hub needs a package that is missing.
    """
    folder = _folder(preset, weights=False)
    writers = (keras_hub.models.CausalLM, keras_hub.models.Seq2SeqLM)
    if not _is_of_transformers(folder) and not issubclass(_task_class(folder, 1), writers):
        raise ValueError(
            "`preset` must be of a language model or a text-to-text model. "
            f"Received: preset={str(preset)!r}"
        )
    if not _has_tokenizer(folder):
        raise ValueError(f"`preset` must have a tokenizer. Received: preset={str(preset)!r}")


def _folder(preset, weights):
    if not isinstance(preset, (str, os.PathLike)):
        raise ValueError(
            f"`preset` must be a name, a folder, or 'hf://owner/model'. Received: preset={preset!r}"
        )
    if str(preset).startswith("hf://"):
        return download(str(preset), weights)
    if preset in shipped():
        return shipped()[preset]
    folder = Path(preset)
    if not folder.is_dir():
        raise ValueError(
            f"`preset` must be {''.join(f'{name}, ' for name in shipped())}a folder that is there, "
            "or 'hf://owner/model'. "
            f"Received: preset={str(preset)!r}.{did_you_mean(preset)}"
        )
    return folder


def _has_tokenizer(folder):
    if _is_of_transformers(folder):
        return has_tokenizer(folder)
    return is_file(folder / "tokenizer.json")


def _only_classifiers_have_heads(preset, num_classes):
    if num_classes is not None:
        raise ValueError(
            "`num_classes` must be None for a language model. "
            f"Received: num_classes={num_classes}, preset={str(preset)!r}"
        )


def _is_of_transformers(folder):
    path = folder / "config.json"
    return is_file(path) and "model_type" in read_json(path)


def _task_class(folder, num_classes):
    """The class of a preset's model: what `task.json` names, or what its backbone is made for."""
    _check_configs(folder)
    is_task = is_file(folder / "task.json")
    path = folder / ("task.json" if is_task else "config.json")
    name = read_json(path)["registered_name"]
    named = keras.saving.get_registered_object(name)
    named = named if isinstance(named, type) else object
    if issubclass(named, zoo.models.masked_lm.EncoderMaskedLM) and num_classes is not None:
        return keras_hub.models.TextClassifier  # on its backbone
    if issubclass(named, keras_hub.models.Task):
        return named
    if is_task or not issubclass(named, keras_hub.models.Backbone):
        raise ValueError(
            f"`preset` must be of a task or of a backbone. Received: {name!r} in {path.name!r}, "
            f"preset={str(folder)!r}"
        )
    for task in LANGUAGE_MODELS:
        if issubclass(named, task.backbone_cls):
            return task
    if num_classes is None:
        raise ValueError(
            "`num_classes` must be given for a preset without a `task.json`. "
            f"Received: num_classes=None, preset={str(folder)!r}"
        )
    return keras_hub.models.TextClassifier


def save_preset(model, folder, licence=None, training_data=None, scores=None):
    """Saves a model as a preset with a model card and the SHA-256 of every file.

    `zoo.from_preset` loads it, and checks the files; `zoo.upload` brings it to the hub.

    Args:
        model: a task with its preprocessor, e.g. a `zoo.Seq2SeqLM`.
        folder: path; it must not be there yet.
        licence: name of a licence, "apache-2.0", say.
        training_data: a sentence.
        scores: name of a metric -> number.

    Raises:
        ValueError: if the folder is there, the model is no task, or a score is no number.
    """
    folder = Path(folder)
    if not isinstance(model, keras_hub.models.Task):
        raise ValueError(
            f"`model` must be a task, such as a `zoo.Seq2SeqLM`. Received: a {type(model).__name__}"
        )
    if not all(isinstance(score, Real) for score in (scores or {}).values()):
        raise ValueError(f"`scores` must be numbers. Received: scores={scores}")
    card = model_card(model, folder.name, licence, training_data, scores)
    with written_whole(folder) as beside:
        model.save_to_preset(str(beside))
        files = sorted(path for path in beside.rglob("*") if path.is_file())
        hashes = {path.relative_to(beside).as_posix(): sha256(path) for path in files}
        (beside / HASHES).write_text(json.dumps(hashes, indent=1) + "\n")
        (beside / CARD).write_text(card)  # which may be edited


def model_card(model, name, licence=None, training_data=None, scores=None):
    """What a reader must know of a model, in Markdown with the hub's header.

    Args:
        model: a task.
        name: of the model.
        licence: name of a licence, "apache-2.0", say.
        training_data: a sentence.
        scores: name of a metric -> number.
    """
    sizes = figures(model.backbone)
    header = ["---", "library_name: keras-hub", "tags: [keras, mixture-of-experts]"]
    header += [f"license: {licence}"] if licence else []
    lines = [
        *header,
        "---",
        f"# {name}",
        f"A `zoo.{type(model).__name__}` of keras_moe, on TensorFlow, JAX and PyTorch:",
        "",
        "```python",
        "import zoo",
        "",
        f'model = zoo.from_preset("{name}")  # this folder, or "hf://owner/{name}"',
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {sizes.parameters:,} |",
        f"| of them active for a token | {sizes.active_parameters:,} |",
        f"| training FLOPs per token | {sizes.training_flops_per_token:,} |",
        f"| licence | {licence or 'not stated'} |",
        f"| training data | {training_data or 'not stated'} |",
        *(f"| {metric} | {score:.4g} |" for metric, score in (scores or {}).items()),
    ]
    return "\n".join(lines) + "\n"


def _check_configs(folder):
    if not is_file(folder / "config.json"):
        within = folder / "preset"
        hint = f". Did you mean {str(within)!r}?" if os.path.isfile(within / "config.json") else ""
        raise ValueError(
            "`preset` must be the folder of a saved preset, with a `config.json` in it. "
            f"Received: preset={str(folder)!r}{hint}"
        )
    for path in (folder / name for name in CONFIGS):
        if is_file(path) and not _describes_an_object(read_json(path)):
            raise ValueError(
                f"`preset` must hold a {path.name!r} that describes a Keras object or a model of "
                "transformers, and this one does not or is damaged. "
                f"Received: preset={str(folder)!r}"
            )


def _describes_an_object(config):
    of = {"class_name": str, "registered_name": str, "config": dict}
    return all(isinstance(config.get(name), kind) for name, kind in of.items())


def _check_weights(folder, with_head):
    # KerasHub leaves a head whose file is missing as it was initialized, and says nothing.
    missing = None if not with_head or is_file(folder / HEAD) else HEAD
    # A large model's are in several files, which the second one lists.
    if not is_file(folder / WEIGHTS) and not is_file(folder / SHARDS):
        missing = WEIGHTS
    if missing:
        raise ValueError(
            f"`preset` must hold the file {missing!r}. Received: preset={str(folder)!r}"
        )


def _check_sizes(folder, with_head):
    """Refuses files of weights that cannot be read, and a config that needs many more weights.

    Raises:
        ValueError: if a file is damaged, or the model would be larger than its weights: memory for
            all of the model is taken before Keras compares the first weight.
    """
    sizes = _num_values(folder)
    if with_head:
        _num_values_in(folder / HEAD)
    for name in ("config.json", "task.json"):
        if not is_file(folder / name):
            continue
        config = read_json(folder / name)["config"]
        if name == "task.json":
            backbone = config.get("backbone")
            config = backbone.get("config") if isinstance(backbone, dict) else None
        if not isinstance(config, dict):
            continue
        products = list(SIZES)
        if config.get("router") and config.get("sparse_blocks") != []:
            width = "expert_dim" if config.get("expert_dim") else "intermediate_dim"
            products.append(("num_experts", width, "hidden_dim"))
        for names in products:
            values = {name: config.get(name) for name in names}
            if all(type(value) is int for value in values.values()) and (
                math.prod(values.values()) > sizes + SLACK
            ):
                received = ", ".join(f"{key}={value}" for key, value in values.items())
                raise ValueError(
                    f"The checkpoint {str(folder)!r} does not fit or is damaged: {name!r} asks for "
                    f"more weights than the {sizes:,} values of the weights' files. "
                    f"Received: {received}"
                )


def _num_values(folder):
    """How many values the files of a preset's weights have, which are all there."""
    if is_file(folder / WEIGHTS):
        return _num_values_in(folder / WEIGHTS)
    shards = read_json(folder / SHARDS).get("weight_map")
    lists = shards.values() if isinstance(shards, dict) else [None]
    lists = [[shard] if isinstance(shard, str) else shard for shard in lists]
    names = {}
    for part in lists:
        is_list = isinstance(part, list) and all(isinstance(name, str) for name in part)
        if not is_list or any(Path(name).name != name for name in part):
            raise ValueError(
                f"{SHARDS!r} must name files of the folder in its `weight_map`. "
                f"Received: preset={str(folder)!r}"
            )
        names |= dict.fromkeys(part)
    for name in names:
        if not is_file(folder / name):
            raise ValueError(
                f"`preset` must hold the file {name!r}. Received: preset={str(folder)!r}"
            )
    return sum(_num_values_in(folder / name) for name in names)


def _num_values_in(path):
    """How many values the datasets of a file of weights have."""
    sizes = []
    try:
        with h5py.File(path) as file:
            file.visititems(
                lambda name, part: (
                    sizes.append(part.size) if isinstance(part, h5py.Dataset) else None
                )
            )
    except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:
        reason = (str(error).strip() or "unknown reason").splitlines()[0]
        raise ValueError(
            f"The checkpoint {str(path.parent)!r} does not fit or is damaged: {path.name!r} cannot "
            f"be read: {reason}"
        ) from error
    return sum(size for size in sizes if size)


@contextlib.contextmanager
def explained(path):
    """Says in one sentence what does not fit when a checkpoint is loaded within.

    Args:
        path: of the checkpoint.

    Raises:
        ValueError: for what Keras and h5py raise about missing, damaged or ill-fitting files; it
            names the file of a folder, or the first weight that differs and both shapes, where
            shapes differ.
    """
    try:
        yield
    except DAMAGE as error:
        file, reason = _culprit(Path(path)), _reason(str(error))
        if file is not None:
            name, error = file
            reason = f"{name!r} cannot be used: {_reason(str(error))}"
        elif files := [
            repr(name) for name in (HEAD, WEIGHTS, SHARDS) if Path(path, name).is_file()
        ]:
            reason += f" from {' and '.join(files)}"
        raise ValueError(
            f"The checkpoint {str(path)!r} does not fit or is damaged: {reason}"
        ) from error


def _culprit(folder):
    """The file of a preset that cannot be used, and the error; `None` if each can alone."""
    if not folder.is_dir():
        return None
    for name in CONFIGS:
        if not is_file(folder / name):
            continue
        try:
            made = keras.saving.deserialize_keras_object(read_json(folder / name))
        except DAMAGE as error:
            return name, error
    if is_file(folder / "tokenizer.json"):  # the last, which is what was made
        try:
            made.load_preset_assets(str(folder))
        except DAMAGE as error:
            return ", ".join(getattr(made, "file_assets", ["tokenizer.json"])), error
    return None


# Keras' own message: both shapes, and then the weight with all of its values.
_SHAPES = re.compile(
    r"variable\.shape=(\(.*?\)), Received: value\.shape=\D*([\d, ]*)\D.*?path=(\S+),", re.DOTALL
)
# Of an error within a layer's `call`, between the codes for bold letters.
_WRAPPED = re.compile(r"^Exception encountered when calling \S+\s+\x1b\[1m([^\n]+?)\x1b\[0m")
_MISSING = re.compile(r"Layer '\S+' expected .*? during loading")


def _reason(message):
    shapes, missing = _SHAPES.search(message), _MISSING.search(message)
    if wrapped := _WRAPPED.search(message):
        return wrapped[1]
    if shapes:
        ours, theirs, name = shapes.groups()
        return f"weight {name!r} has shape {ours} in the model and ({theirs}) in the checkpoint"
    if missing:
        return missing.group()
    return (message.strip() or "unknown reason").splitlines()[0]
