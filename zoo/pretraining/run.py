"""Pretraining by `model.fit`: text, an objective, and a run that goes on where it stopped."""

import contextlib
import itertools
import shutil
from pathlib import Path

import keras
import numpy as np

import keras_moe
from keras_moe.distribution import process_id
from zoo.extras import require
from zoo.pretraining.build import RATES, check, make_objective, make_optimizer, make_task
from zoo.pretraining.feed import Feed, Heldout
from zoo.pretraining.sources import check_apart, described, sources
from zoo.pretraining.text import Blocks
from zoo.runs import EpochLine, Run, SaveRun, SeedEpochs, StopAtNaN, devices
from zoo.tokenizer import default_tokenizer, t5_tokenizer


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
    num_experts=None,
    capacity_factor="default",
    steps=10000,
    steps_per_save=500,
    batch_size=64,
    length=128,
    optimizer="adamw",
    learning_rate=None,
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
        num_experts: experts per sparse block; `None`: 8. This and the other options of routers are
            refused with a dense model.
        capacity_factor: of the routers, in training and in inference; `None`: no token is dropped;
            "default": as the model's paper has it. With expert choice it is the number of experts
            that see a token on average, each narrower by this factor, see
            `zoo.expert_choice_transformer`.
        steps: batches to train on, counted one by one where gradients are accumulated, too; a
            multiple of `accumulate`.
        steps_per_save: batches from one checkpoint to the next; must divide `steps`.
        batch_size: blocks of text per step.
        length: tokens of a block.
        optimizer: "adamw" (beta_2 0.98, and a weight decay of 0.01 on matrices but for the table of
            positions), or "adafactor", whose rate is relative to the size of the weights.
        learning_rate: peak of the schedule; `None`: 1e-3 for AdamW, 1e-2 for Adafactor.
        schedule: "cosine", to a hundredth at the end, or "inverse_sqrt", see
            `zoo.InverseSquareRoot`.
        warmup_steps: in which the rate rises in a line; less than `steps`.
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
        ImportError: if a package is missing that the text or TensorBoard needs.
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
        "num_experts": 8 if num_experts is None and model != "dense" else num_experts,
        "capacity_factor": capacity_factor,
        "steps": steps,
        "steps_per_save": steps_per_save,
        "batch_size": batch_size,
        "length": length,
        "optimizer": optimizer,
        "learning_rate": RATES.get(optimizer) if learning_rate is None else learning_rate,
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
    check(settings)
    name = f"pretrain-{model}-{objective}-{settings['backend']}-seed{seed}"
    metric = "val_perplexity" if heldout else "loss"
    run = Run(Path(output or Path("runs") / name), settings, [metric], restart, last=True)
    if run.finished:
        if process_id() == 0:
            print(f"{run.folder} holds this run, finished: nothing to do")
        return run.results
    if tensorboard:
        for module in ("tensorboard", "tensorflow"):  # which writes the logs, whatever the backend
            require(module, "tensorboard")
    with contextlib.nullcontext() if parallel is None else parallel.scope():
        _train(run, settings, texts, tensorboard, verbose)
    return run.results


def _train(run, settings, texts, tensorboard, verbose):
    keras.utils.set_random_seed(settings["seed"])
    tokenizer = t5_tokenizer(default_tokenizer().proto, sentinels=100)
    objective = make_objective(settings, tokenizer)
    end = tokenizer.end_token_id
    order = {name: settings[name] for name in ("batch_size", "window", "seed")}
    blocks = Blocks(texts["corpus"], tokenizer, end, objective, **order)
    heldout = None
    if texts["heldout"]:
        heldout = Heldout(Blocks(texts["heldout"], tokenizer, end, objective, 1, 1), settings)
    task = make_task(settings, objective.architecture, tokenizer)
    network = keras.Model(task.input, task.output, name="network")
    network.compile(
        make_optimizer(settings, task),
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="mean_with_sample_weight"
        ),
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="cross_entropy"),
            keras.metrics.SparseCategoricalAccuracy(name="accuracy"),
        ],
    )
    place = run.results["history"][-1]["place"] if run.epoch else None
    batches = blocks.batches(place)
    first = next(batches)  # text that cannot be read is refused before an old run is thrown away
    run.open(network)
    if run.restart and process_id() == 0:
        shutil.rmtree(run.folder / "tensorboard", ignore_errors=True)
    feed = Feed(itertools.chain([first], batches))
    callbacks = [
        SeedEpochs(settings["seed"]),
        StopAtNaN(run),
        keras_moe.callbacks.RoutingMetrics(),
        Perplexity(),
        EpochLine(),
        SaveRun(run, lambda: {"place": feed.place(settings["steps_per_save"])}),
    ]
    if tensorboard and process_id() == 0:
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


class Perplexity(keras.callbacks.Callback):
    """Adds the exponential of the cross-entropies to the logs: without the routers' losses."""

    def on_epoch_end(self, epoch, logs=None):
        for prefix in ("", "val_"):
            if f"{prefix}cross_entropy" in logs:
                logs[f"{prefix}perplexity"] = float(np.exp(logs[f"{prefix}cross_entropy"]))
