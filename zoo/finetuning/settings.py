"""What a run is: the options that were given, the defaults of others, and what is refused."""

import keras

from keras_moe.routing.base import positive_integer
from zoo import recipes
from zoo.finetuning.trainable import OF_EXPERTS, TRAIN
from zoo.models.builders import MODELS
from zoo.presets import encoder_config
from zoo.runs import check_seed_and_rate
from zoo.tasks.task import get, recipe

# What a model that is built from scratch takes, and what of that has to do with experts.
_BUILT = ("size", "num_experts")
_OF_EXPERTS = ("num_experts", "expert_dropout")

PAIRS = ("apart", "together")

# T5's own limit in training (https://arxiv.org/abs/1910.10683, section 3.1.2). Almost all of GLUE
# is shorter, and attention's memory grows with the square: one head's scores of a batch of 32 are
# 32 MB at 512 tokens.
_LONGEST = 512


def settle(
    task,
    model=None,
    preset=None,
    load_weights=None,
    train=None,
    lora_rank=None,
    size=None,
    num_experts=None,
    epochs=None,
    batch_size=None,
    learning_rate=None,
    dropout=None,
    expert_dropout=None,
    max_length=None,
    pairs=None,
    mix_layers=None,
    max_examples=None,
    seed=0,
):
    """The settings of a run, for its `results.json`.

    Args:
        As `zoo.finetune`.

    Returns:
        Dictionary of the arguments and the backend; `None` is none for this model.

    Raises:
        ValueError: if an argument is out of range or not for this model.
        OSError: if the preset is on a hub that cannot be reached.
    """
    task = get(task)
    if preset is not None and model is not None:
        raise ValueError(f"`model` must be left out with a preset. Received: model={model!r}")
    if preset is None:
        if load_weights is not None:
            raise ValueError(
                "`load_weights` must be left out without a preset. "
                f"Received: load_weights={load_weights!r}"
            )
        model = "switch" if model is None else model
        if model not in MODELS:
            raise ValueError(
                f"`model` must be one of {', '.join(MODELS)}, and what is to be trained further is "
                f"a `preset`. Received: model={str(model)!r}"
            )
        sparse = model != "dense"
        defaults = {"size": "mini", "num_experts": 8, "max_length": 64, **recipe(task)}
        defaults |= {"pairs": recipes.pairs(task), "mix_layers": False}
    else:
        sparse = _has_experts(encoder_config(preset))
        defaults = recipes.preset_recipe(task, sparse)
        load_weights = True if load_weights is None else load_weights
        _check_flag("load_weights", load_weights)
    if pairs == "together":  # and nothing is compared
        defaults["mix_layers"] = False
    if train is None:
        train = defaults["train"] if load_weights else "all"  # new experts know nothing yet
    given = {
        "size": size,
        "num_experts": num_experts,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "dropout": dropout,
        "expert_dropout": expert_dropout,
        "max_length": max_length,
        "pairs": pairs,
        "mix_layers": mix_layers,
    }
    kind = f"preset={str(preset)!r}" if preset is not None else f"model={model!r}"
    _check_kind(given, train, preset is not None, sparse, kind)
    if train == "lora":
        lora_rank = 8 if lora_rank is None else lora_rank
    elif lora_rank is not None:
        raise ValueError(
            "`lora_rank` must be left out unless `train` is 'lora'. "
            f"Received: lora_rank={lora_rank}"
        )
    chosen = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    if not sparse:
        chosen |= dict.fromkeys(_OF_EXPERTS)
    settings = {
        "task": task.name,
        "model": model,
        "preset": preset and str(preset),
        "load_weights": load_weights,
        "train": train,
        "lora_rank": lora_rank,
        "backend": keras.backend.backend(),
        **chosen,
        "max_examples": max_examples,
        "seed": seed,
    }
    _check(settings, texts=len(task.inputs))
    return settings


def _has_experts(config):
    return bool(config.get("router") and config["num_experts"] and config["sparse_blocks"] != [])


def _check_kind(given, train, is_preset, sparse, kind):
    """Refuses what is for models of another kind."""
    if train not in TRAIN:
        raise ValueError(f"`train` must be one of {', '.join(TRAIN)}. Received: train={train!r}")
    if train in OF_EXPERTS and not sparse:
        raise ValueError(
            "`train` must be 'all' or 'lora' for a model without experts. "
            f"Received: train={train!r}, {kind}"
        )
    left_out = {} if sparse else dict.fromkeys(_OF_EXPERTS, "a model without experts")
    if is_preset:
        left_out |= dict.fromkeys(_BUILT, "a preset, which brings its own")
    for name, reason in left_out.items():
        if given[name] is not None:
            raise ValueError(
                f"`{name}` must be left out with {reason}. Received: {name}={given[name]!r}, {kind}"
            )


def _check_flag(name, value):
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True, False or None. Received: {name}={value!r}")


def _check(settings, texts):
    if texts == 1 and settings["pairs"] is not None:
        raise ValueError(
            "`pairs` must be left out for a task with one text. "
            f"Received: pairs={settings['pairs']!r}, task={settings['task']!r}"
        )
    if texts == 2 and settings["pairs"] not in PAIRS:
        raise ValueError(
            f"`pairs` must be one of {', '.join(PAIRS)}. Received: pairs={settings['pairs']!r}"
        )
    _check_flag("mix_layers", settings["mix_layers"])
    for name in ("epochs", "batch_size", "num_experts", "lora_rank", "max_length", "max_examples"):
        if settings[name] is not None:
            positive_integer(name, settings[name])
    if not 4 <= settings["max_length"] <= _LONGEST:  # two texts and the marks of their ends need 4
        raise ValueError(
            f"`max_length` must be from 4 to {_LONGEST}. "
            f"Received: max_length={settings['max_length']}"
        )
    check_seed_and_rate(settings)
    for name in ("dropout", "expert_dropout"):
        if settings[name] is not None and not 0 <= settings[name] < 1:
            raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={settings[name]}")
    if settings["max_examples"] is not None and settings["max_examples"] < settings["batch_size"]:
        raise ValueError(
            f"`max_examples` must be at least the batch size, {settings['batch_size']}. "
            f"Received: max_examples={settings['max_examples']}"
        )
