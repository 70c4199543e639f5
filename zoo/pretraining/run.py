"""Pretraining by `model.fit`: text, an objective, and a run that goes on where it stopped."""

import contextlib
import math
from pathlib import Path

import keras
import numpy as np

import keras_moe
from keras_moe.distribution import process_id
from keras_moe.routing.base import positive_integer
from zoo.models.decoder import CausalLM, CausalLMPreprocessor
from zoo.models.encoder import EncoderTextClassifierPreprocessor
from zoo.models.encoder_decoder import Seq2SeqLM, Seq2SeqLMPreprocessor
from zoo.models.masked_lm import EncoderMaskedLM
from zoo.pretraining.feed import Feed, Heldout
from zoo.pretraining.objectives import OBJECTIVES
from zoo.pretraining.sources import check_apart, described, sources
from zoo.pretraining.text import Blocks
from zoo.runs import Run, SaveRun, SeedEpochs, devices
from zoo.schedules import InverseSquareRoot
from zoo.tokenizer import default_tokenizer, t5_tokenizer
from zoo.training import MODELS, EpochLine

TASKS = {
    "encoder": (EncoderMaskedLM, EncoderTextClassifierPreprocessor),
    "decoder": (CausalLM, CausalLMPreprocessor),
    "encoder_decoder": (Seq2SeqLM, Seq2SeqLMPreprocessor),
}
OPTIMIZERS = ("adamw", "adafactor")
SCHEDULES = ("cosine", "inverse_sqrt")
RESIDUAL_WEIGHTS = ("/output/kernel", "/experts/kernel_out")


def pretrain(
    model="switch",
    corpus=(),
    *,
    heldout=(),
    data_dir=None,
    objective="masked",
    density=0.15,
    mean_span=3.0,
    output=None,
    size="mini",
    num_experts=8,
    capacity_factor="default",
    steps=10000,
    steps_per_save=500,
    batch_size=64,
    length=128,
    optimizer="adamw",
    learning_rate=1e-3,
    schedule="cosine",
    warmup_steps=1000,
    accumulate=1,
    clip=1.0,
    router_z_weight=0.0,
    dropout=0.0,
    residual_scale=1.0,
    dtype="float32",
    window=8192,
    heldout_batches=50,
    seed=0,
    tensorboard=False,
    restart=False,
    mesh=None,
    verbose="auto",
):
    """Pretrains a model from scratch, and goes on where an interrupted run of the same stopped.

    An "epoch" of the log is `steps_per_save` steps. After each the folder `output` has
    `results.json`, with the losses, the held-out perplexity and the place in the text, and the
    weights; at the end `preset/` for `zoo.from_preset` and `zoo.finetune`.

    Args:
        model: "switch", "expert_choice" or "dense".
        corpus: list of files or data sets to train on, see
            `zoo.pretraining.sources.sources`.
        heldout: the same to measure the perplexity on, never trained on; none: not measured.
        data_dir: folder of TensorFlow Datasets, if any of these is one; `None`: its default one.
        objective: "masked" (an encoder), "span" or "prefix" (an encoder-decoder) or "causal" (a
            decoder), see `zoo.pretraining.objectives`.
        density: share of the tokens that "masked" and "span" hide.
        mean_span: tokens that "span" hides in one place, in the mean.
        output: folder of the run; by default named after model, objective, backend and seed.
        size: of the model, see `zoo.switch_transformer`.
        num_experts: experts per sparse block; left out of a dense model.
        capacity_factor: of the routers, in training and in inference; `None`: no token is dropped;
            "default": as the model's paper has it.
        steps: batches to train on, counted one by one where gradients are accumulated, too.
        steps_per_save: batches from one checkpoint to the next; must divide `steps`.
        batch_size: blocks of text per step.
        length: tokens of a block.
        optimizer: "adamw" or "adafactor".
        learning_rate: peak of the schedule.
        schedule: "cosine", to a hundredth at the end, or "inverse_sqrt" (Raffel et al. 2020).
        warmup_steps: in which the rate rises in a line.
        accumulate: steps whose gradients make one update.
        clip: largest norm of all gradients; 0: any.
        router_z_weight: of the routers' z-loss (ST-MoE, https://arxiv.org/abs/2202.08906, Eq. 5).
        dropout: rate, of the experts too.
        residual_scale: of the initial weights that write to the residual stream, those that end
            attention, feed-forward layers and experts, relative to T5's. Below 1 a text's tokens
            are not drowned at first (GPT-2 took 1 / sqrt(its layers)).
        dtype: "float32", or "mixed_bfloat16" to compute in bfloat16.
        window: blocks that are shuffled together, a multiple of the batch size.
        heldout_batches: batches, at most, of the held-out text: its first blocks, with the same
            noise whatever the seed, so that runs of as many blocks can be compared.
        seed: of weights, noise and the order of the text.
        tensorboard: whether logs for TensorBoard are written to `output/tensorboard`.
        restart: throws an earlier run in `output` away.
        mesh: as in `zoo.finetune`.
        verbose: as in `keras.Model.fit`.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: if an argument is out of range, if text cannot be read, or `output` holds a run
            with other settings.
        FloatingPointError: if the loss is not finite; the last checkpoint stays.
    """
    parallel = devices(mesh)  # TensorFlow wants it first
    verbose = verbose if process_id() == 0 else 0
    texts = {
        "corpus": sources(corpus, "corpus", data_dir),
        "heldout": sources(heldout, "heldout", data_dir) if heldout else [],
    }
    check_apart(**texts)
    settings = {
        "model": model,
        "objective": objective,
        "backend": keras.backend.backend(),
        **described("corpus", texts["corpus"]),
        **described("heldout", texts["heldout"]),
        "density": density if objective in ("masked", "span") else None,
        "mean_span": mean_span if objective == "span" else None,
        "size": size,
        "num_experts": None if model == "dense" else num_experts,
        "capacity_factor": "default" if model == "dense" else capacity_factor,
        "steps": steps,
        "steps_per_save": steps_per_save,
        "batch_size": batch_size,
        "length": length,
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup_steps": warmup_steps,
        "accumulate": accumulate,
        "clip": clip,
        "router_z_weight": router_z_weight,
        "dropout": dropout,
        "residual_scale": residual_scale,
        "dtype": dtype,
        "window": window,
        "heldout_batches": heldout_batches,
        "seed": seed,
    }
    _check(settings)
    name = f"pretrain-{model}-{objective}-{settings['backend']}-seed{seed}"
    metric = "val_perplexity" if heldout else "loss"
    run = Run(Path(output or Path("runs") / name), settings, [metric], restart, last=True)
    if run.finished:
        if process_id() == 0:
            print(f"{run.folder} holds this run, finished: nothing to do")
        return run.results
    with contextlib.nullcontext() if parallel is None else parallel.scope():
        _train(run, settings, texts, tensorboard, verbose)
    return run.results


def _train(run, settings, texts, tensorboard, verbose):
    keras.utils.set_random_seed(settings["seed"])
    tokenizer = t5_tokenizer(default_tokenizer().proto, sentinels=100)
    objective = _objective(settings, tokenizer)
    end = tokenizer.end_token_id
    order = {name: settings[name] for name in ("batch_size", "window", "seed")}
    blocks = Blocks(texts["corpus"], tokenizer, end, objective, **order)
    heldout = None
    if texts["heldout"]:
        heldout = Heldout(Blocks(texts["heldout"], tokenizer, end, objective, 1, 1), settings)
    task = _task(settings, objective.architecture, tokenizer)
    network = keras.Model(task.input, task.output, name="network")
    network.compile(
        _optimizer(settings),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="cross_entropy"),
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        ],
    )
    run.open(network)
    place = run.results["history"][-1]["place"] if run.epoch else None
    feed = Feed(blocks.batches(place))
    callbacks = [
        SeedEpochs(settings["seed"]),
        StopAtNaN(run),
        keras_moe.callbacks.RoutingMetrics(),
        Perplexity(),
        EpochLine(),
        SaveRun(run, lambda: {"place": feed.place(settings["steps_per_save"])}),
    ]
    if tensorboard:
        callbacks.append(keras.callbacks.TensorBoard(run.folder / "tensorboard"))
    try:
        network.fit(
            feed.stream(),
            steps_per_epoch=settings["steps_per_save"],
            epochs=settings["steps"] // settings["steps_per_save"],
            initial_epoch=run.epoch,
            shuffle=False,
            validation_data=heldout,
            verbose=verbose,
            callbacks=callbacks,
        )
    finally:
        feed.close()
    run.finish(network, task)


def _check(settings):
    choices = {
        "model": MODELS,
        "objective": OBJECTIVES,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "dtype": ("float32", "mixed_bfloat16"),
    }
    for name, allowed in choices.items():
        if settings[name] not in allowed:
            raise ValueError(
                f"`{name}` must be one of {', '.join(allowed)}. Received: {name}={settings[name]!r}"
            )
    for name in ("steps", "steps_per_save", "batch_size", "accumulate", "warmup_steps"):
        positive_integer(name, settings[name])
    for name in ("window", "heldout_batches"):
        positive_integer(name, settings[name])
    if settings["steps"] % settings["steps_per_save"]:
        raise ValueError(
            f"`steps_per_save` must divide the steps, {settings['steps']}. "
            f"Received: steps_per_save={settings['steps_per_save']}"
        )
    if not 8 <= settings["length"] <= 512:
        raise ValueError(f"`length` must be from 8 to 512. Received: length={settings['length']}")
    if not 0 < settings["learning_rate"] < float("inf"):
        raise ValueError(
            "`learning_rate` must be a positive number. "
            f"Received: learning_rate={settings['learning_rate']}"
        )
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


def _objective(settings, tokenizer):
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


def _task(settings, architecture, tokenizer):
    task, preprocessor = TASKS[architecture]
    return task(initial_backbone(settings, architecture), preprocessor(tokenizer))


def initial_backbone(settings, architecture):
    """The backbone that the settings of a run name, with its initial weights."""
    options = {"size": settings["size"], "architecture": architecture, "dtype": settings["dtype"]}
    options["dropout"] = settings["dropout"]
    if settings["model"] != "dense":
        options["num_experts"] = settings["num_experts"]
        options["expert_dropout"] = settings["dropout"]
        options["router"] = _router(settings, architecture)
    backbone = MODELS[settings["model"]](**options)
    for weight in backbone.trainable_weights:
        if weight.path.endswith(RESIDUAL_WEIGHTS):
            weight.assign(weight * settings["residual_scale"])
    return backbone


def _router(settings, architecture):
    """The builder's own router, but for what is set."""
    options = {"size": settings["size"], "architecture": architecture}
    serialized = MODELS[settings["model"]](**options).router_config
    config = {**serialized["config"], "router_z_weight": settings["router_z_weight"]}
    if settings["capacity_factor"] != "default":
        config["capacity_factor"] = config["eval_capacity_factor"] = settings["capacity_factor"]
    return keras.saving.deserialize_keras_object({**serialized, "config": config})


def _optimizer(settings):
    # Keras counts the updates of the optimizer, not the steps.
    steps, warmup = (settings[k] // settings["accumulate"] for k in ("steps", "warmup_steps"))
    rate, warmup = settings["learning_rate"], max(1, warmup)
    if settings["schedule"] == "inverse_sqrt":
        rate = InverseSquareRoot(rate, warmup)
    else:
        rate = keras.optimizers.schedules.CosineDecay(
            0.0, max(1, steps - warmup), 0.01, warmup_target=rate, warmup_steps=warmup
        )
    options = {"global_clipnorm": settings["clip"] or None}
    if settings["accumulate"] > 1:
        options["gradient_accumulation_steps"] = settings["accumulate"]
    if settings["optimizer"] == "adafactor":
        return keras_moe.optimizers.Adafactor(rate, relative_step=False, **options)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=0.01, beta_2=0.98, **options)
    optimizer.exclude_from_weight_decay(var_names=["scale", "bias"])
    return optimizer


class StopAtNaN(keras.callbacks.Callback):
    """Raises a FloatingPointError at the step whose loss is not finite.

    Args:
        run: a `Run`, which then has what it had.
    """

    def __init__(self, run):
        super().__init__()
        self.run = run

    def on_train_batch_end(self, batch, logs=None):
        if not math.isfinite(float(logs["loss"])):
            done = self.run.epoch * self.params["steps"]
            raise FloatingPointError(
                f"The loss must be finite. Received: {float(logs['loss'])} at step "
                f"{done + batch + 1}; {self.run.folder} has the weights of step {done}"
            )


class Perplexity(keras.callbacks.Callback):
    """Adds the exponential of the cross-entropies to the logs: without the routers' losses."""

    def on_epoch_end(self, epoch, logs=None):
        for prefix in ("", "val_"):
            if f"{prefix}cross_entropy" in logs:
                logs[f"{prefix}perplexity"] = float(np.exp(logs[f"{prefix}cross_entropy"]))
