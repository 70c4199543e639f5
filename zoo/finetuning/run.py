"""One run: a model, a task, a seed; progress, the official metric, resuming, results."""

import contextlib
from pathlib import Path

import keras

import keras_moe
from keras_moe.distribution import process_id
from zoo.extras import require
from zoo.finetuning import trainable
from zoo.finetuning.batches import TokenisedTask
from zoo.finetuning.classifiers import build
from zoo.finetuning.scores import OfficialMetrics
from zoo.finetuning.settings import settle
from zoo.runs import EpochLine, Run, SaveRun, SeedEpochs, StopAtNaN, devices
from zoo.tasks.task import get


def finetune(
    task="acceptability",
    model=None,
    *,
    preset=None,
    load_weights=None,
    train=None,
    lora_rank=None,
    data_dir=None,
    output=None,
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
    restart=False,
    mesh=None,
    verbose="auto",
):
    """Fine-tunes one model on one task, and resumes where an interrupted run of the same stopped.

    The folder `output` gets, after every epoch, `results.json` and the weights of the last and of
    the best epoch, written beside and renamed, so that a run may be killed at any time; at the end
    `preset/`, the best epoch's model for `zoo.from_preset`.

    Example:

    ```python
    zoo.finetune("glue/rte", preset="runs/mine/preset", train="non_experts", data_dir="tfds")
    ```

    Args:
        task: name of a task, see `zoo.tasks.task.TASKS`.
        model: "switch", "expert_choice" or "dense", built from scratch; `None`: "switch", unless
            there is a preset.
        preset: of a text classifier, which gets a new head, or of an encoder that guesses hidden
            tokens; see `zoo.from_preset`.
        load_weights: whether a preset's weights are taken (`None`: they are), or new ones: what
            they are worth is seen against such a run.
        train: "all" weights, "frozen_experts", "non_experts", "experts" or "lora"; the classifier's
            head always is. See `zoo.finetuning.trainable.choose`. `None`: "all", or with a preset's
            weights as `zoo.recipes.preset_recipe` has it.
        lora_rank: of "lora"; `None`: 8.
        data_dir: TensorFlow Datasets directory, see `python -m zoo prepare`.
        output: folder of the run; by default named after task, model, backend and seed.
        size: size of a model that is built from scratch; `None`: "mini".
        num_experts: experts per sparse block of one that is built from scratch; `None`: 8.
        epochs: passes over the training data; `None`: as `zoo.tasks.task.recipe` has it, or for a
            preset `zoo.recipes.preset_recipe`.
        batch_size: examples per step; `None`: likewise.
        learning_rate: peak of the schedule: a tenth of the steps warming up, then a cosine;
            `None`: likewise.
        dropout: rate of all but the experts; `None`: likewise.
        expert_dropout: rate on the experts' hidden units; `None`: likewise, from scratch as
            `dropout`.
        max_length: tokens per example, at most 512; longer ones are cut; `None`: 64, or for a
            preset likewise.
        pairs: of texts, where a task has them: read "together" as one text, or "apart", and then
            compared, see `zoo.EncoderTextClassifier`; `None`: as `zoo.recipes.pairs` has it.
        mix_layers: whether the head sees a learnt mean of all layers' outputs instead of the last
            one's, see `zoo.EncoderTextClassifier`; `None`: of a preset it does, where two texts are
            read apart.
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
        FloatingPointError: if the loss is not finite; the last checkpoint stays.
    """
    parallel = devices(mesh)  # TensorFlow wants it first
    settings = settle(
        task,
        model,
        preset=preset,
        load_weights=load_weights,
        train=train,
        lora_rank=lora_rank,
        size=size,
        num_experts=num_experts,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        dropout=dropout,
        expert_dropout=expert_dropout,
        max_length=max_length,
        pairs=pairs,
        mix_layers=mix_layers,
        max_examples=max_examples,
        seed=seed,
    )
    name = f"{settings['task'].replace('/', '-')}-{label(settings)}-seed{seed}"
    run = open_run(Path(output or Path("runs") / name), settings, restart)
    with contextlib.nullcontext() if parallel is None else parallel.scope():
        Bench(settings, data_dir).train(run, verbose)
    return run.results


def label(settings):
    """Model, if its weights are new, what is trained, and backend, for the name of a folder."""
    preset = settings["preset"]
    model = settings["model"] if preset is None else "-".join(Path(preset).parts[-2:])
    weights = "-new" if settings["load_weights"] is False else ""
    train = "" if settings["train"] == "all" else f"-{settings['train']}"
    return f"{model.removeprefix('/')}{weights}{train}-{settings['backend']}"


def open_run(folder, settings, restart=False):
    """The `Run` of a folder.

    Args:
        folder: path.
        settings: see `zoo.finetuning.settings.settle`.
        restart: throws an earlier run in it away, once the new one begins.

    Raises:
        ValueError: if the folder holds another run or a damaged one.
    """
    task = get(settings["task"])
    names = (task.primary, *(metric for metric in task.metrics if metric != task.primary))
    return Run(folder, settings, [f"val_{name}" for name in names], restart)


class Bench:
    """What runs that differ in nothing but their seed share: data, and a compiled network.

    Args:
        settings: see `zoo.finetuning.settings.settle`; the seed is each run's own.
        data_dir: TensorFlow Datasets directory.
    """

    def __init__(self, settings, data_dir):
        self.task = get(settings["task"])
        self.data = TokenisedTask(
            self.task, data_dir, settings["max_length"], settings["max_examples"]
        )
        self.classifier = self.network = None

    def train(self, run, verbose="auto"):
        """Trains a `Run` to its end, unless it is there already."""
        verbose = verbose if process_id() == 0 else 0
        if run.finished:
            if process_id() == 0:
                print(f"{run.folder} holds this run, finished: nothing to do")
            return
        for module in ("sklearn", "scipy"):  # of the metrics: better missed now than after an epoch
            require(module)
        settings = run.results["settings"]
        keras.utils.set_random_seed(settings["seed"])
        classifier = build(self.task, settings)
        trainable.choose(classifier, settings["train"], settings["lora_rank"])
        batch_size = settings["batch_size"]
        batches = self.data.batches(
            "train", classifier.preprocessor, batch_size, shuffle_seed=settings["seed"]
        )
        validation = {
            split: (
                self.data.examples(split),
                self.data.batches(split, classifier.preprocessor, batch_size),
            )
            for split in self.data.validation
        }
        self._begin_with(classifier, settings, len(batches))
        examples = len(self.data.examples("train").labels)
        run.of_data(partial=list(self.data.partial), training_examples=examples)
        run.open(self.network)
        self.network.fit(
            batches,
            validation_data=validation[self.data.validation[0]][1],
            epochs=settings["epochs"],
            initial_epoch=run.epoch,
            shuffle=False,  # Keras would shuffle the batches by a state that no file keeps
            verbose=verbose,
            callbacks=[
                SeedEpochs(settings["seed"], batches),
                StopAtNaN(run),
                OfficialMetrics(self.task, validation),
                keras_moe.callbacks.RoutingMetrics(),
                EpochLine(),
                SaveRun(run),
            ],
        )
        run.finish(self.network, self.classifier)

    def _begin_with(self, classifier, settings, steps_per_epoch):
        """Compiles a network, or gives the one that is compiled these weights to begin with."""
        if self.network is None:
            self.classifier = classifier
            # The texts are tokenised once; the task's own `fit` would do it again every epoch.
            self.network = trainable.Network(classifier.input, classifier.output, name="network")
            self.network.compile(
                optimizer=_optimizer(settings, steps_per_epoch),
                loss=_loss(self.task),
                weighted_metrics=_metrics(self.task),
            )
            return
        for ours, begin in zip(self.classifier.weights, classifier.weights, strict=True):
            ours.assign(begin)
        for variable in self.network.optimizer.variables:
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))


def _loss(task):
    # A mean over examples: rows that only fill up a batch weigh nothing, and are not counted.
    if task.num_classes == 1:
        return keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )


def _metrics(task):
    # An object: of a name Keras makes one in the step, which TensorFlow then traces again.
    return [] if task.num_classes == 1 else [keras.metrics.SparseCategoricalAccuracy("accuracy")]


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
