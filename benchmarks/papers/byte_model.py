"""A small Transformer over bytes, trained in one pass by `model.fit`: what the experiments vary.

Everything that a run depends on is in its settings, a dictionary that JSON can hold:

    kind            "dense", "switch", "top_k", "noisy" or "expert_choice": the feed-forward layers
    hidden          width of the dense layer or of an expert
    experts, k      their number, and how many a token gets (with expert choice on average)
    capacity        capacity factor; None drops nothing
    router          further arguments of the router
    init_scale      of the experts' kernels
    objective       "next": predict the next byte; "masked": predict bytes that are hidden
    learning_rate   peak of Adam's, after a linear warm-up of a tenth of the steps, then a cosine
    steps, seed
    split           what it is evaluated on: "heldout", or "tuning", documents kept from training

B batch, L length, D width.
"""

import gzip
import json
import time

import keras
import keras_hub
import numpy as np

import keras_moe

WIDTH, BLOCKS, HEADS, LENGTH, BATCH = 64, 2, 4, 128, 32
BYTES = 256  # 256 itself hides a byte
CHECKPOINTS = 12  # evaluations in a run
EVALUATED = 512  # sequences
TUNING_DOCUMENTS = 3
DEFAULTS = {
    "hidden": 64,
    "experts": 1,
    "k": 1,
    "capacity": None,
    "router": {},
    "init_scale": 1.0,
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

    def examples(self, sequences, objective, seed):
        """Inputs, targets and weights of a loss, `[sequences, length]` each.

        With the objective "masked" spans of three bytes are hidden, one byte in seven in all.
        """
        sequences = sequences.astype("int32")
        inputs, targets = sequences[:, :-1], sequences[:, 1:]
        if objective == "next":
            return inputs, targets, np.ones(inputs.shape, "float32")
        start = np.random.default_rng(seed).random(inputs.shape) < 0.05
        hidden = start.copy()
        for shift in (1, 2):
            hidden[:, shift:] |= start[:, :-shift]
        return np.where(hidden, BYTES, inputs), inputs, hidden.astype("float32")


def make_router(kind, k, capacity, options):
    """The router of a kind of feed-forward layer."""
    if kind == "switch":
        return keras_moe.SwitchRouter(
            capacity_factor=capacity, eval_capacity_factor=capacity, **options
        )
    if kind == "expert_choice":
        return keras_moe.ExpertChoiceRouter(capacity_factor=capacity, **options)
    router = {"top_k": keras_moe.TopKRouter, "noisy": keras_moe.NoisyTopKRouter}[kind]
    return router(k, capacity_factor=capacity, eval_capacity_factor=capacity, **options)


def make_model(settings):
    """The model of a run, logits of bytes from bytes."""
    options = {**DEFAULTS, **settings}
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
            options["experts"], options["hidden"], init_scale=options["init_scale"]
        )
        router = make_router(options["kind"], options["k"], options["capacity"], options["router"])
        return keras_moe.MixtureOfExperts(experts, router, group="batch", name=f"moe_{number}")

    numbers = keras.Input((LENGTH,), dtype="int32")
    x = keras_hub.layers.TokenAndPositionEmbedding(BYTES + 1, LENGTH, WIDTH)(numbers)
    for number in range(BLOCKS):
        attention = keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)
        normed = keras.layers.RMSNormalization()(x)
        x = x + attention(normed, normed, use_causal_mask=causal)
        x = x + feed_forward(number)(keras.layers.RMSNormalization()(x))
    return keras.Model(numbers, keras.layers.Dense(BYTES)(keras.layers.RMSNormalization()(x)))


def step_flops(settings):
    """Multiplications and additions of a step, forward and backward.

    Empty slots are included where every expert has one row of them, which is so with these capacity
    factors, under 1.5; without a capacity a product's last row may have more.
    """
    options = {**DEFAULTS, **settings}
    feed_forward = 2 * WIDTH * options["hidden"]
    if options["kind"] != "dense":
        slots = options["k"] if options["capacity"] is None else options["capacity"]
        if options["kind"] in ("top_k", "noisy") and options["capacity"] is not None:
            slots *= options["k"]
        kernels = 2 if options["kind"] == "noisy" else 1
        feed_forward = slots * feed_forward + kernels * WIDTH * options["experts"]
    attention = 4 * WIDTH * WIDTH + 2 * LENGTH * WIDTH
    return 6 * BATCH * LENGTH * (BLOCKS * (attention + feed_forward) + WIDTH * BYTES)


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
        watch: function of the trained model and of training inputs it has not seen yet; what it
            returns joins the result.
        settings: see above.

    Returns:
        A dictionary: `curve`, pairs of a step and the nats per byte on the split; `loss`, the last
        of them; `parameters`; `step_flops`; `step_seconds`, the median over the checkpoints;
        `routing`, the figures of the last checkpoint, means over the layers.
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
    order = np.random.default_rng(settings["seed"]).permutation(len(text.train))
    wanted = settings["steps"] * BATCH
    if len(order) < wanted + 20 * BATCH:
        raise ValueError(
            f"`steps` must leave the text unrepeated, at most {len(order) // BATCH - 20}. "
            f"Received: steps={settings['steps']}"
        )
    examples = text.examples(text.train[order[:wanted]], options["objective"], settings["seed"])
    held_out = text.examples(text.evaluated[options["split"]], options["objective"], seed=0)

    curve, seconds = [], []
    ends = np.linspace(0, settings["steps"], CHECKPOINTS + 1).astype(int)
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
        x, y, weight = held_out
        figures = model.evaluate(x, y, BATCH, 0, weight, return_dict=True)
        curve.append([int(end), figures["nats"]])
    result = {
        "curve": curve,
        "loss": curve[-1][1],
        "parameters": model.count_params(),
        "step_flops": step_flops(settings),
        "step_seconds": float(np.median(seconds)),
        "routing": routing_figures(history),
    }
    if watch is not None:
        unseen = text.train[order[wanted : wanted + 20 * BATCH]]
        result |= watch(model, text.examples(unseen, options["objective"], seed=0)[0])
    keras.backend.clear_session()
    return result


def routing_figures(history):
    """Means over the layers of what `RoutingMetrics` found; nothing for a dense model."""
    by_figure = {}
    for name, values in history.items():
        if "/" in name:
            by_figure.setdefault(name.rpartition("/")[2], []).append(values[-1])
    return {figure: float(np.mean(values)) for figure, values in by_figure.items()}
