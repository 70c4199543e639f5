"""A small Transformer over bytes, trained by `model.fit`: what the experiments vary.

Everything that a run depends on is in its settings, a dictionary that JSON can hold:

    kind            "dense", "switch", "top_k", "noisy" or "expert_choice": the feed-forward layers
    hidden          width of the dense layer or of an expert
    experts, k      their number, and how many a token gets (with expert choice on average)
    capacity        capacity factor; None drops nothing
    router          further arguments of the router
    init_scale      of the experts' kernels, see `keras_moe.FeedForwardExperts`
    scaled          which kernels start with it: those of the "experts", or "all"
    dropout         after attention and feed-forward layers
    expert_dropout  inside the experts
    precision       "float32"; "selective": bfloat16 but for the router; "bfloat16": with the router
    objective       "next": predict the next byte; "masked": predict bytes that are hidden
    learning_rate   peak of Adam's, after a linear warm-up of a tenth of the steps, then a cosine
    steps, seed
    sequences       of the text, seen again and again; None: all of it, in one pass
    split           what it is evaluated on: "heldout", or "tuning", documents kept from training

B batch, L length, D width.
"""

import gzip
import json
import time

import keras
import keras_hub
import numpy as np
from keras import ops

import keras_moe

WIDTH, BLOCKS, HEADS, LENGTH, BATCH = 64, 2, 4, 128, 32
BYTES = 256  # 256 itself hides a byte
EVERY = 100  # steps between evaluations
EVALUATED = 512  # sequences
TUNING_DOCUMENTS = 3
DEFAULTS = {
    "hidden": 64,
    "experts": 1,
    "k": 1,
    "capacity": None,
    "router": {},
    "init_scale": 1.0,
    "scaled": "experts",
    "dropout": 0.0,
    "expert_dropout": 0.0,
    "precision": "float32",
    "sequences": None,
    "objective": "next",
    "split": "heldout",
}


class Text:
    """The bytes of a corpus in sequences: one pass of training text, and two splits to evaluate on.

    Args:
        folder: with files `novels-train-*.jsonl.gz` and `novels-heldout-*.jsonl.gz`, one JSON
            object `{"title": ..., "text": ...}` a line.
    """

    def __init__(self, folder):
        documents = {part: self._documents(folder, part) for part in ("train", "heldout")}
        tuning = documents["train"][:TUNING_DOCUMENTS]
        self.train = self._sequences(documents["train"][TUNING_DOCUMENTS:])
        self.evaluated = {}
        for split, texts in (("tuning", tuning), ("heldout", documents["heldout"])):
            sequences = self._sequences(texts)
            evenly = np.linspace(0, len(sequences) - 1, min(EVALUATED, len(sequences)))
            self.evaluated[split] = sequences[evenly.astype(int)]

    def _documents(self, folder, part):
        texts = []
        for path in sorted(folder.glob(f"novels-{part}-*.jsonl.gz")):
            with gzip.open(path, "rt") as lines:
                texts += [json.loads(line)["text"].encode() for line in lines]
        np.random.default_rng(0).shuffle(texts)
        return texts

    def _sequences(self, texts):
        """`[sequences, length + 1]` bytes."""
        joined = np.frombuffer(b"\0".join(texts), "uint8")
        return joined[: len(joined) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)

    def order(self, wanted, sequences, seed):
        """Places in the training text: `wanted` of them to train on, 20 batches to watch after it.

        Args:
            wanted: integer.
            sequences: how many different ones; `None`: as many as wanted.
            seed: integer, of the order.

        Raises:
            ValueError: if the text is too short.
        """
        rng = np.random.default_rng(seed)
        different = wanted if sequences is None else sequences
        order = rng.permutation(len(self.train))
        if len(order) < different + 20 * BATCH:
            raise ValueError(
                "`steps` must leave the text unrepeated and `sequences` be fewer than it has: at "
                f"most {len(order) // BATCH - 20} steps or {len(order) - 20 * BATCH} sequences. "
                f"Received: steps={wanted // BATCH}, sequences={sequences}"
            )
        passes = [order[:different]]
        while len(passes) * different < wanted:
            passes.append(rng.permutation(passes[0]))
        return np.concatenate(passes)[:wanted], order[different : different + 20 * BATCH]

    def examples(self, sequences, objective, seed):
        """Inputs, targets and weights of a loss, `[sequences, length]` each.

        With the objective "masked" one byte in seven is hidden.
        """
        sequences = sequences.astype("int32")
        inputs, targets = sequences[:, :-1], sequences[:, 1:]
        if objective == "next":
            return inputs, targets, np.ones(inputs.shape, "float32")
        hidden = np.random.default_rng(seed).random(inputs.shape) < 1 / 7
        return np.where(hidden, BYTES, inputs), inputs, hidden.astype("float32")


class Bfloat16SwitchRouter(keras_moe.SwitchRouter):
    """A router as it is without selective precision: logits and softmax in bfloat16."""

    def score(self, inputs, mask=None, training=False):
        inputs = ops.cast(self.prepare(inputs, mask, training), "bfloat16")
        logits = ops.matmul(inputs, ops.cast(self.kernel, "bfloat16"))
        return ops.cast(logits, "float32"), ops.cast(ops.softmax(logits), "float32")


def make_router(options):
    """The router of a kind of feed-forward layer."""
    kind, capacity = options["kind"], options["capacity"]
    more = dict(options["router"])
    if options["scaled"] == "all":
        more["kernel_initializer"] = initializer(options)
    if kind == "expert_choice":
        return keras_moe.ExpertChoiceRouter(capacity_factor=capacity, **more)
    more |= {"capacity_factor": capacity, "eval_capacity_factor": capacity}
    if kind == "switch":
        low = options["precision"] == "bfloat16"
        return (Bfloat16SwitchRouter if low else keras_moe.SwitchRouter)(**more)
    router = {"top_k": keras_moe.TopKRouter, "noisy": keras_moe.NoisyTopKRouter}[kind]
    return router(options["k"], **more)


def initializer(options):
    """Of the kernels that are not an expert's; a new one at every call, or all would be alike."""
    if options["scaled"] == "experts":
        return "glorot_uniform"
    return keras.initializers.VarianceScaling(options["init_scale"], "fan_in", "truncated_normal")


def make_model(settings):
    """The model of a run, logits of bytes from bytes."""
    options = {**DEFAULTS, **settings}
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(
        "float32" if options["precision"] == "float32" else "mixed_bfloat16"
    )
    try:
        return _model(options)
    finally:
        keras.config.set_dtype_policy(before)


def _model(options):
    causal = options["objective"] == "next"

    def feed_forward(number):
        if options["kind"] == "dense":
            return keras.Sequential(
                [
                    keras.layers.Dense(options["hidden"], "relu", use_bias=False),
                    keras.layers.Dense(WIDTH, use_bias=False),
                ]
            )
        experts = keras_moe.FeedForwardExperts(
            options["experts"],
            options["hidden"],
            init_scale=options["init_scale"],
            dropout=options["expert_dropout"],
        )
        return keras_moe.MixtureOfExperts(
            experts, make_router(options), group="batch", name=f"moe_{number}"
        )

    def dropout(x):
        return keras.layers.Dropout(options["dropout"])(x) if options["dropout"] else x

    numbers = keras.Input((LENGTH,), dtype="int32")
    x = keras_hub.layers.TokenAndPositionEmbedding(BYTES + 1, LENGTH, WIDTH)(numbers)
    if not causal:
        # Each byte sees its neighbours. With attention alone no contestant had learnt more than the
        # bytes' frequencies after 1,200 steps.
        x = x + keras.layers.Conv1D(WIDTH, 3, padding="same")(x)
    for number in range(BLOCKS):
        attention = keras.layers.MultiHeadAttention(
            HEADS, WIDTH // HEADS, kernel_initializer=initializer(options)
        )
        normed = keras.layers.RMSNormalization()(x)
        x = x + dropout(attention(normed, normed, use_causal_mask=causal))
        x = x + dropout(feed_forward(number)(keras.layers.RMSNormalization()(x)))
    head = keras.layers.Dense(BYTES, kernel_initializer=initializer(options), dtype="float32")
    logits = head(keras.layers.RMSNormalization()(x))
    return keras.Model(numbers, logits)


def step_flops(settings):
    """Multiplications and additions of a step, forward and backward.

    Empty slots are included where every expert has one row of them: at capacity factors below 1.5.
    Above, and without a capacity, experts get as many rows as they need, of which the last may have
    empty slots, which are not counted.
    """
    options = {**DEFAULTS, **settings}
    feed_forward = 2 * WIDTH * options["hidden"]
    if options["kind"] != "dense":
        capacity = options["capacity"]
        if options["kind"] == "expert_choice":
            slots = capacity
        else:
            k = options["k"] if options["kind"] in ("top_k", "noisy") else 1
            slots = k * (1 if capacity is None or capacity >= 1.5 else capacity)
        kernels = 2 if options["kind"] == "noisy" else 1
        feed_forward = slots * feed_forward + kernels * WIDTH * options["experts"]
    attention = 4 * WIDTH * WIDTH + 2 * LENGTH * WIDTH
    neighbours = 3 * WIDTH * WIDTH if options["objective"] == "masked" else 0
    per_byte = BLOCKS * (attention + feed_forward) + neighbours + WIDTH * BYTES
    return 6 * BATCH * LENGTH * per_byte


def learning_rate(settings):
    warm_up = max(settings["steps"] // 10, 1)
    return keras.optimizers.schedules.CosineDecay(
        0.0,
        settings["steps"] - warm_up,
        warmup_target=settings["learning_rate"],
        warmup_steps=warm_up,
    )


def train(text, watch=None, **settings):
    """One run.

    Args:
        text: a `Text`.
        watch: function of the trained model, and of the inputs, targets and weights of 20 batches
            it has not seen yet; what it returns joins the result.
        settings: see above.

    Returns:
        A dictionary: `curve`, pairs of a step and the nats per byte on the split; `loss`, the last
        of them; `parameters`; `step_flops`; `step_seconds`, the median over the evaluations;
        `routing`, the figures of the last training steps, means over the layers, and
        `routing_of_all`, those of all of them.
    """
    keras.utils.set_random_seed(settings["seed"])
    options = {**DEFAULTS, **settings}
    model = make_model(settings)
    # The mean over the bytes that count: one over all would shrink beside the balancing losses.
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
    )
    model.compile(
        keras.optimizers.Adam(learning_rate(settings)),
        cross_entropy,
        weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy("nats", from_logits=True)],
    )
    order, unseen = text.order(settings["steps"] * BATCH, options["sequences"], settings["seed"])
    examples = text.examples(text.train[order], options["objective"], settings["seed"])
    held_out = text.examples(text.evaluated[options["split"]], options["objective"], seed=0)

    curve, seconds, routing = [], [], []
    ends = [*range(0, settings["steps"], EVERY), settings["steps"]]
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        x, y, weight = (array[start * BATCH : end * BATCH] for array in examples)
        begin = time.perf_counter()
        history = model.fit(
            x,
            y,
            BATCH,
            sample_weight=weight,
            shuffle=False,
            verbose=0,
            callbacks=[keras_moe.callbacks.RoutingMetrics()],
        ).history
        seconds.append((time.perf_counter() - begin) / (end - start))
        routing.append(routing_figures(history))
        x, y, weight = held_out
        figures = model.evaluate(x, y, BATCH, 0, weight, return_dict=True)
        curve.append([end, figures["nats"]])
    result = {
        "curve": curve,
        "loss": curve[-1][1],
        "parameters": model.count_params(),
        "step_flops": step_flops(settings),
        "step_seconds": float(np.median(seconds)),
        "routing": routing[-1],
        "routing_of_all": {
            name: float(np.mean([figures[name] for figures in routing])) for name in routing[-1]
        },
    }
    if watch is not None:
        result |= watch(model, *text.examples(text.train[unseen], options["objective"], seed=0))
    keras.backend.clear_session()
    return result


def step_seconds(text, contestants, rounds=5, steps=20):
    """What a step takes, the contestants taking turns in one process.

    Args:
        text: a `Text`.
        contestants: name -> settings.
        rounds: turns of each.
        steps: a turn's.

    Returns:
        Dictionary: name -> list of the seconds of a step in each round.
    """
    models, seconds = {}, {name: [] for name in contestants}
    examples = {
        objective: text.examples(text.train[: steps * BATCH], objective, seed=0)
        for objective in ("next", "masked")
    }
    for turn in range(rounds + 1):  # the first one compiles
        for name, settings in contestants.items():
            if name not in models:
                models[name] = make_model(settings)
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                models[name].compile("adam", loss)
            x, y, _ = examples[settings.get("objective", "next")]
            begin = time.perf_counter()
            models[name].fit(x, y, BATCH, shuffle=False, verbose=0)
            if turn:
                seconds[name].append((time.perf_counter() - begin) / steps)
    return seconds


def routing_figures(history):
    """Means over the layers of what `RoutingMetrics` found; nothing for a dense model."""
    by_figure = {}
    for name, values in history.items():
        if "/" in name:
            by_figure.setdefault(name.rpartition("/")[2], []).append(values[-1])
    return {figure: float(np.mean(values)) for figure, values in by_figure.items()}
