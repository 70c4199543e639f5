"""What a run of pretraining consists of, as its settings say: checks, model, optimizer."""

import keras

import keras_moe
from keras_moe.routing.base import positive_integer
from zoo.models.builders import MODELS
from zoo.models.decoder import CausalLM, CausalLMPreprocessor
from zoo.models.deferred import Deferred
from zoo.models.encoder import EncoderTextClassifierPreprocessor
from zoo.models.encoder_decoder import Seq2SeqLM, Seq2SeqLMPreprocessor
from zoo.models.masked_lm import EncoderMaskedLM
from zoo.pretraining.objectives import OBJECTIVES
from zoo.runs import check_seed_and_rate
from zoo.schedules import InverseSquareRoot

TASKS = {
    "encoder": (EncoderMaskedLM, EncoderTextClassifierPreprocessor),
    "decoder": (CausalLM, CausalLMPreprocessor),
    "encoder_decoder": (Seq2SeqLM, Seq2SeqLMPreprocessor),
}
RATES = {"adamw": 1e-3, "adafactor": 1e-2}  # T5's Adafactor has 1e-2
SCHEDULES = ("cosine", "inverse_sqrt")
DTYPES = ("float32", "mixed_bfloat16")
RESIDUAL_WEIGHTS = ("/output/kernel", "/experts/kernel_out")
VOCABULARY_SIZE = 8192  # the shipped tokenizer's 8,000 pieces and 100 sentinels, rounded up


def check(settings):
    """Refuses settings that are out of range, or not for this model.

    Raises:
        ValueError: if one is.
    """
    _check_choices(settings)
    counts = ("steps", "steps_per_save", "batch_size", "length", "accumulate", "warmup_steps")
    for name in (*counts, "window", "heldout_batches"):
        positive_integer(name, settings[name])
    for name in ("steps_per_save", "accumulate"):
        if settings["steps"] % settings[name]:
            raise ValueError(
                f"`{name}` must divide the steps, {settings['steps']}. "
                f"Received: {name}={settings[name]}"
            )
    if settings["warmup_steps"] >= settings["steps"]:
        raise ValueError(
            f"`warmup_steps` must be less than the steps, {settings['steps']}. "
            f"Received: warmup_steps={settings['warmup_steps']}"
        )
    # Relative positions and the zoo's tokens are made for texts of some sentences.
    if not 8 <= settings["length"] <= 512:
        raise ValueError(f"`length` must be from 8 to 512. Received: length={settings['length']}")
    check_seed_and_rate(settings)
    for name in ("clip", "router_z_weight"):
        if not 0 <= settings[name] < float("inf"):
            raise ValueError(f"`{name}` must not be negative. Received: {name}={settings[name]}")
    if not 0 < settings["residual_scale"] <= 1:
        raise ValueError(
            "`residual_scale` must be in (0, 1]. "
            f"Received: residual_scale={settings['residual_scale']}"
        )
    if not 0 <= settings["dropout"] < 1:
        raise ValueError(f"`dropout` must be in [0, 1). Received: dropout={settings['dropout']}")
    _check_router(settings)


def _check_choices(settings):
    choices = {
        "model": MODELS,
        "objective": OBJECTIVES,
        "optimizer": RATES,
        "schedule": SCHEDULES,
        "dtype": DTYPES,
    }
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            raise ValueError(
                f"`{name}` must be one of {', '.join(allowed)}. Received: {name}={settings[name]!r}"
            )


def _check_router(settings):
    factor = settings["capacity_factor"]
    if settings["model"] == "dense":
        without = {"num_experts": None, "capacity_factor": "default", "router_z_weight": 0}
        for name, value in without.items():
            if settings[name] != value:
                raise ValueError(
                    f"`{name}` must be left out of a dense model. "
                    f"Received: {name}={settings[name]!r}"
                )
        return
    positive_integer("num_experts", settings["num_experts"])
    drops_nothing = factor is None and settings["model"] == "switch"
    is_number = isinstance(factor, (int, float)) and 0 < factor < float("inf")
    if factor != "default" and not drops_nothing and not is_number:
        allowed = ", or None" if settings["model"] == "switch" else ""
        raise ValueError(
            f"`capacity_factor` must be a positive number{allowed}, or 'default'. "
            f"Received: capacity_factor={factor!r}"
        )


def make_objective(settings, tokenizer):
    """The objective that the settings name."""
    last = tokenizer.vocabulary_size() - 1
    given = {
        "length": settings["length"],
        "sentinel": last,
        "end": tokenizer.end_token_id,
        "ordinary": (3, last - 99),  # after <pad>, </s>, <unk> and before the sentinels
        "density": settings["density"],
        "mean_span": settings["mean_span"],
    }
    kind = OBJECTIVES[settings["objective"]]
    return kind(**{name: v for name, v in given.items() if name in kind.__dataclass_fields__})


def make_task(settings, architecture, tokenizer):
    """The model that the settings name, with its initial weights."""
    task, preprocessor = TASKS[architecture]
    return task(initial_backbone(settings, architecture), preprocessor(tokenizer))


def initial_backbone(settings, architecture):
    """The backbone of that model."""
    options = {
        "size": settings["size"],
        "architecture": architecture,
        "vocabulary_size": VOCABULARY_SIZE,
        "dropout": settings["dropout"],
        "dtype": settings["dtype"],
    }
    if settings["model"] != "dense":
        options["num_experts"] = settings["num_experts"]
        options["expert_dropout"] = settings["dropout"]
        options |= _routers(settings, options)
    backbone = MODELS[settings["model"]](**options)
    for weight in backbone.trainable_weights:
        if weight.path.endswith(RESIDUAL_WEIGHTS):
            weight.assign(weight * settings["residual_scale"])
    return backbone


def _routers(settings, options):
    """The builder's own routers, but for what is set."""
    with Deferred():  # without memory for weights
        builders_own = MODELS[settings["model"]](**options)
    routers = {}
    for name in ("router", "decoder_router"):
        serialized = getattr(builders_own, f"{name}_config", None)
        if serialized:
            config = {**serialized["config"], "router_z_weight": settings["router_z_weight"]}
            if settings["capacity_factor"] != "default" and name == "router":
                for factor in ("capacity_factor", "eval_capacity_factor"):
                    config[factor] = settings["capacity_factor"]
            routers[name] = keras.saving.deserialize_keras_object({**serialized, "config": config})
    return routers


def make_optimizer(settings, model):
    """The optimizer of a run, with its schedule.

    Args:
        settings: of the run.
        model: whose weights it is to train.
    """
    # Keras asks a schedule for the rate of a step, not of an update of accumulated gradients.
    rate, steps, warmup = (settings[k] for k in ("learning_rate", "steps", "warmup_steps"))
    if settings["schedule"] == "inverse_sqrt":
        schedule = InverseSquareRoot(rate, warmup)
    else:
        schedule = keras.optimizers.schedules.CosineDecay(
            rate / 100, steps - warmup, 0.01, warmup_target=rate, warmup_steps=warmup
        )
    options = {"global_clipnorm": settings["clip"] or None}
    if settings["accumulate"] > 1:
        options["gradient_accumulation_steps"] = settings["accumulate"]
    if settings["optimizer"] == "adafactor":
        return keras_moe.optimizers.Adafactor(schedule, relative_step=False, **options)
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.01, beta_2=0.98, **options)
    # Also the biases of positions, and of banks of experts.
    vectors = [w for w in model.trainable_weights if len(w.shape) == 1 or "bias" in w.path]
    optimizer.exclude_from_weight_decay(vectors)
    return optimizer
