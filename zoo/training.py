"""Fine-tuning on a GLUE task by `model.fit`: progress, the official metric, resuming, results."""

import contextlib
from pathlib import Path

import keras
import numpy as np

import keras_moe
from keras_moe.distribution import process_id
from zoo.batches import TokenBatches
from zoo.extras import require
from zoo.models import builders
from zoo.models.encoder import EncoderTextClassifier, EncoderTextClassifierPreprocessor
from zoo.presets import from_preset
from zoo.runs import Run, SaveRun, SeedEpochs, devices
from zoo.tasks import data, metrics
from zoo.tasks.task import get, recipe
from zoo.tokenizer import default_tokenizer

MODELS = {
    "switch": builders.switch_transformer,
    "expert_choice": builders.expert_choice_transformer,
    "dense": builders.dense_transformer,
}

# What a model that is built from scratch takes; the dense one has no experts.
_DENSE_OPTIONS = ("size", "dropout")
_SPARSE_OPTIONS = (*_DENSE_OPTIONS, "num_experts", "expert_dropout")

_VOCABULARY_SIZE = 8192  # of the shipped tokenizer's 8,000 pieces, rounded up

# T5's own limit in training (https://arxiv.org/abs/1910.10683, section 3.1.2). Almost all of GLUE
# is shorter, and attention's memory grows with the square: one head's scores of a batch of 32 are
# 32 MB at 512 tokens.
_LONGEST = 512


def finetune(
    task="acceptability",
    model="switch",
    *,
    data_dir=None,
    output=None,
    size=None,
    num_experts=None,
    epochs=None,
    batch_size=None,
    learning_rate=None,
    dropout=None,
    expert_dropout=None,
    max_length=64,
    max_examples=None,
    seed=0,
    restart=False,
    mesh=None,
    verbose="auto",
):
    """Fine-tunes one model on one task, and resumes where an interrupted run of the same stopped.

    The folder `output` gets, after every epoch, `results.json` and the weights of the last and of
    the best epoch, written beside and renamed, so that a run may be killed at any time; at the end
    `preset/`, the best epoch's model for `zoo.from_preset`.

    Args:
        task: name of a task, see `zoo.tasks.task.TASKS`.
        model: "switch", "expert_choice" or "dense", built from scratch; or the folder of a preset
            to start from.
        data_dir: TensorFlow Datasets directory, see `python -m zoo prepare`.
        output: folder of the run; by default named after task, model, backend and seed.
        size: size of a model that is built from scratch; `None`: "mini".
        num_experts: experts per sparse block of one that is built from scratch; `None`: 8.
        epochs: passes over the training data; `None`: as `zoo.tasks.task.recipe` has it.
        batch_size: examples per step; `None`: likewise.
        learning_rate: peak of the schedule: a tenth of the steps warming up, then a cosine;
            `None`: likewise.
        dropout: rate of a model that is built from scratch; `None`: likewise.
        expert_dropout: rate on the experts' hidden units of one that is built from scratch;
            `None`: as `dropout`.
        max_length: tokens per example, at most 512; longer ones are cut.
        max_examples: only so many training examples, for a quick look.
        seed: of weights, dropout and the order of the examples.
        restart: throws an earlier run in `output` away.
        mesh: dictionary of the arguments of `keras_moe.distribution.ExpertParallel`, whose devices
            share experts and batch, `{"data": 2, "experts": 4}`, say; `None`: one device. A run may
            go on with another mesh than it began with. It may lie over several processes, see
            `python -m keras_moe.launch`, that see the same `data_dir` and `output`.
        verbose: as in `keras.Model.fit`; of several processes the first one speaks.

    Returns:
        The content of `results.json`.

    Raises:
        ValueError: if an argument is out of range or not for this model, or `output` holds a run
            with other settings.
        FileNotFoundError: if the data is not there.
    """
    parallel = devices(mesh)  # TensorFlow wants it first
    verbose = verbose if process_id() == 0 else 0
    task = get(task)
    given = {
        "size": size,
        "num_experts": num_experts,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "dropout": dropout,
        "expert_dropout": expert_dropout,
    }
    settings = {
        "task": task.name,
        "model": str(model),
        "backend": keras.backend.backend(),
        **_chosen(given, model, task),
        "max_length": max_length,
        "max_examples": max_examples,
        "seed": seed,
    }
    _check(settings)
    label = model if model in MODELS else "-".join(Path(model).parts[-2:])
    name = f"{task.name.replace('/', '-')}-{label}-{settings['backend']}-seed{seed}"
    chosen = (task.primary, *(metric for metric in task.metrics if metric != task.primary))
    run = Run(
        Path(output or Path("runs") / name), settings, [f"val_{name}" for name in chosen], restart
    )
    if run.finished:
        if process_id() == 0:
            print(f"{run.folder} holds this run, finished: nothing to do")
        return run.results
    for module in ("sklearn", "scipy"):  # of the metrics: better missed now than after an epoch
        require(module)

    with contextlib.nullcontext() if parallel is None else parallel.scope():
        _train(run, task, model, settings, data_dir, verbose)
    return run.results


def _train(run, task, model, settings, data_dir, verbose):
    seed = settings["seed"]
    keras.utils.set_random_seed(seed)
    classifier = _build(task, model, settings)
    train, *validation = (
        _batches(classifier.preprocessor, task, split, data_dir, settings)
        for split in ("train", *task.validation)
    )
    # The texts are tokenised once; the task's own `fit` would do it again every epoch.
    network = keras.Model(classifier.input, classifier.output, name="network")
    network.compile(
        optimizer=_optimizer(settings, len(train)),
        loss=_loss(task),
        weighted_metrics=[] if task.num_classes == 1 else ["accuracy"],
    )
    run.open(network)
    network.fit(
        train,
        validation_data=validation[0],
        epochs=settings["epochs"],
        initial_epoch=run.epoch,
        shuffle=False,  # Keras would shuffle the batches by a state that no file keeps
        verbose=verbose,
        callbacks=[
            SeedEpochs(seed, train),
            OfficialMetrics(task, dict(zip(task.validation, validation, strict=True))),
            keras_moe.callbacks.RoutingMetrics(),
            EpochLine(),
            SaveRun(run),
        ],
    )
    run.finish(network, classifier)


def _chosen(given, model, task):
    """The options that were given, and the defaults of others; `None` is none for this model."""
    if model not in MODELS and not Path(model).is_dir():
        raise ValueError(
            f"`model` must be one of {', '.join(MODELS)} or the folder of a preset. "
            f"Received: model={str(model)!r}"
        )
    if model in MODELS:
        takes = _DENSE_OPTIONS if model == "dense" else _SPARSE_OPTIONS
        reason = f"the model {model!r}, which has no experts"
    else:
        takes, reason = (), "the folder of a preset, which brings its own"
    left_out = [name for name in _SPARSE_OPTIONS if name not in takes]
    for name in left_out:
        if given[name] is not None:
            raise ValueError(
                f"`{name}` must be left out with {reason}. "
                f"Received: {name}={given[name]!r}, model={str(model)!r}"
            )
    defaults = {"size": "mini", "num_experts": 8, **recipe(task)}
    chosen = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    return chosen | dict.fromkeys(left_out)


def _check(settings):
    for name in ("epochs", "batch_size", "num_experts"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(
                f"`{name}` must be a positive integer. Received: {name}={settings[name]}"
            )
    if not 4 <= settings["max_length"] <= _LONGEST:  # two texts and the marks of their ends need 4
        raise ValueError(
            f"`max_length` must be from 4 to {_LONGEST}. "
            f"Received: max_length={settings['max_length']}"
        )
    if not 0 <= settings["seed"] < 2**32:  # NumPy's range
        raise ValueError(f"`seed` must be from 0 to {2**32 - 1}. Received: seed={settings['seed']}")
    for name in ("dropout", "expert_dropout"):
        if settings[name] is not None and not 0 <= settings[name] < 1:
            raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={settings[name]}")
    if settings["max_examples"] is not None and settings["max_examples"] < settings["batch_size"]:
        raise ValueError(
            f"`max_examples` must be at least the batch size, {settings['batch_size']}. "
            f"Received: max_examples={settings['max_examples']}"
        )
    if not 0 < settings["learning_rate"] < float("inf"):
        raise ValueError(
            "`learning_rate` must be a positive number. "
            f"Received: learning_rate={settings['learning_rate']}"
        )


def _build(task, model, settings):
    if model in MODELS:
        preprocessor = EncoderTextClassifierPreprocessor(
            default_tokenizer(), sequence_length=settings["max_length"]
        )
        options = {
            "size": settings["size"],
            "architecture": "encoder",
            "vocabulary_size": _VOCABULARY_SIZE,
            "dropout": settings["dropout"],
        }
        if model != "dense":
            expert_dropout = settings["expert_dropout"]
            options["num_experts"] = settings["num_experts"]
            options["expert_dropout"] = (
                settings["dropout"] if expert_dropout is None else expert_dropout
            )
        return EncoderTextClassifier(
            MODELS[model](**options), task.num_classes, preprocessor, dropout=settings["dropout"]
        )
    classifier = from_preset(model, num_classes=task.num_classes)
    if not isinstance(classifier, EncoderTextClassifier):
        raise ValueError(
            "`model` must be the preset of a `zoo.EncoderTextClassifier`. "
            f"Received: a {type(classifier).__name__} in {str(model)!r}"
        )
    classifier.preprocessor.sequence_length = settings["max_length"]
    return classifier


def _batches(preprocessor, task, split, data_dir, settings):
    examples = data.load(task, split, data_dir)
    training = split == "train"
    texts, labels = examples[:2]
    if training and settings["max_examples"] is not None:
        texts = tuple(column[: settings["max_examples"]] for column in texts)
        labels = labels[: settings["max_examples"]]
    # With `y` named, KerasHub does not take a pair of texts for texts and labels.
    tokens = preprocessor(texts if len(texts) > 1 else texts[0], y=None)
    token_ids, mask = (
        keras.ops.convert_to_numpy(tokens[name]) for name in ("token_ids", "padding_mask")
    )
    longest = settings["max_length"]
    lengths = [length for length in (16, 32, 64, 128, 256) if length < longest] + [longest]
    batches = TokenBatches(
        token_ids,
        mask.astype(bool),
        labels,
        settings["batch_size"],
        lengths,
        shuffle_seed=settings["seed"] if training else None,
    )
    if not len(batches):
        raise ValueError(
            f"`batch_size` must be at most the number of examples, {len(labels)}. "
            f"Received: batch_size={settings['batch_size']}"
        )
    return batches


def _loss(task):
    # A mean over examples: rows that only fill up a batch weigh nothing, and are not counted.
    if task.num_classes == 1:
        return keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


def _optimizer(settings, steps_per_epoch):
    steps = steps_per_epoch * settings["epochs"]
    rate = settings["learning_rate"]
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=rate / 100,
        decay_steps=max(1, steps - steps // 10),
        alpha=0.01,
        warmup_target=rate,
        warmup_steps=steps // 10,
    )
    return keras.optimizers.AdamW(schedule, weight_decay=0.01, clipnorm=1.0)


class OfficialMetrics(keras.callbacks.Callback):
    """Adds the task's official metrics on its validation splits to the logs of every epoch.

    It goes before `keras_moe.callbacks.RoutingMetrics`, because the order of the callbacks is the
    order in the log, where the many routing figures would hide the one that counts. The routing
    figures do not see its predictions: they were read when Keras' own evaluation ended.

    Args:
        task: a `Task`.
        splits: name -> `TokenBatches` with their labels. The metrics of the first are named
            `val_<metric>`, those of others `<split>_<metric>`.
    """

    def __init__(self, task, splits):
        super().__init__()
        self.task = task
        self.splits = splits

    def on_epoch_end(self, epoch, logs=None):
        for split, batches in self.splits.items():
            prefix = "val" if split == self.task.validation[0] else split
            order = batches.order
            outputs = self.model.predict(batches, verbose=0)[order >= 0]
            scores = metrics.evaluate(self.task, batches.labels[order[order >= 0]], outputs)
            logs.update({f"{prefix}_{metric}": value for metric, value in scores.items()})


class EpochLine(keras.callbacks.ProgbarLogger):
    """Keras' progress bar, with each routing figure averaged over the layers.

    There are eight figures per sparse layer. `History` and `SaveRun` get them all: only what is
    shown at the end of an epoch is shortened. It goes after the callbacks that add to the logs.
    """

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, self._shortened(logs))

    @staticmethod
    def _shortened(logs):
        short, figures = {}, {}
        for name, value in logs.items():
            layer, _, figure = name.rpartition("/")
            if layer:  # "moe_2/dropped" or "val_moe_2/dropped"
                prefix = "val_moe" if layer.startswith("val_") else "moe"
                figures.setdefault(f"{prefix}/{figure}", []).append(value)
            else:
                short[name] = value
        return short | {name: np.mean(values) for name, values in figures.items()}
