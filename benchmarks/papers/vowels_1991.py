"""Adaptive mixtures of local experts (1991) against backpropagation: epochs to learn four vowels.

    python -m benchmarks.papers.vowels_1991            2 minutes on 2 cores
    python -m benchmarks.papers.vowels_1991 --quick    20 seconds

Jacobs, Jordan, Nowlan and Hinton 1991, Neural Computation 3:79-87, Table 1: two formants of a
vowel, four vowels, one output; full-batch gradient descent until the mean squared error is 0.08.
Data: `peterson_barney_1952.csv`, the table `pb52` of the R package phonTools.

What is run: 25 seeds of every system on the split of the speakers in the order of the file and on 3
random ones. The step size of a system is the one of 8 at which 10 other seeds learn fastest on the
first split, among those at which most of them learn. Everything runs on JAX, the seeds as one
batch.
"""

import csv
import functools
import os

import numpy as np

from benchmarks.papers.runs import Runs, options
from benchmarks.tables import drawn, markdown, mean_sd

# Experts are one layer with a sigmoid, hidden units sigmoids. The factor 1/2 on the squared error
# is in Eq. 3 and in backpropagation, not in Eqs. 1 and 2: `step_scale` makes up for it.
SYSTEMS = {
    "4 experts": {"experts": 4, "form": "mixture"},
    "8 experts": {"experts": 8, "form": "mixture"},
    "BP 6": {"hidden": 6, "init": 0.5},
    "BP 12": {"hidden": 12, "init": 0.5},
    "BP 6, init 0.1": {"hidden": 6, "init": 0.1},
    "BP 12, init 0.1": {"hidden": 12, "init": 0.1},
    "4 experts, Eq. 1": {"experts": 4, "form": "cooperative"},
    "4 experts, Eq. 2": {"experts": 4, "form": "competitive"},
}
STEP_SIZES = (5, 7, 10, 14, 20, 28, 40, 56)
FULL = {"seeds": 25, "tuning_seeds": 10, "step_sizes": STEP_SIZES, "splits": 4, "max_epochs": 6000}
QUICK = {"seeds": 2, "tuning_seeds": 2, "step_sizes": (14, 20), "splits": 2, "max_epochs": 800}
CRITERION = 0.08
TRAINING_SPEAKERS = 50
VOWELS = {"i": 1, "I": 0, "A": 1, "V": 0}  # and their targets
WORDS = {"i": "heed", "I": "hid", "A": "hod", "V": "hud"}
EFFECTIVELY_ZERO = 0.05
COMPARED = (
    ("4 experts", "BP 6"),
    ("8 experts", "BP 12"),
    ("4 experts", "BP 6, init 0.1"),
    ("8 experts", "BP 12, init 0.1"),
    ("8 experts", "4 experts"),
    ("BP 12", "BP 6"),
    ("4 experts", "4 experts, Eq. 1"),
    ("4 experts", "4 experts, Eq. 2"),
)


def main(arguments=None):
    chosen = options("vowels_1991", __doc__, "vowels", arguments)
    os.environ["KERAS_BACKEND"] = "jax"
    protocol = QUICK if chosen.quick else FULL
    vowels = Vowels(chosen.data / "peterson_barney_1952.csv")
    runs = Runs(chosen.into / "vowels_1991.jsonl")
    results, tuning = experiment(runs, vowels, protocol)
    print(report(results, tuning))
    draw(results, vowels, chosen.into / "vowels_1991.png")


class Vowels:
    """The four vowels: first and second formant in kHz, as in the paper, and who said what.

    Args:
        path: of the table.
    """

    def __init__(self, path):
        with open(path) as file:
            rows = [row for row in csv.DictReader(file) if row["vowel"] in VOWELS]
        self.formants = np.array([[row["f1"], row["f2"]] for row in rows], "float32") / 1000
        self.vowel = np.array([row["vowel"] for row in rows])
        self.target = np.array([[VOWELS[vowel]] for vowel in self.vowel], "float32")
        self.speaker = np.array([int(row["speaker"]) for row in rows])

    def training(self, split):
        """Which rows are for training; split 0 is by the order of the file, others are random."""
        speakers = np.array(list(dict.fromkeys(self.speaker.tolist())))
        if split > 0:
            speakers = np.random.default_rng(split).permutation(speakers)
        return np.isin(self.speaker, speakers[:TRAINING_SPEAKERS])


def experiment(runs, vowels, protocol):
    """All runs.

    Returns:
        Tuple of the results, `{system: [result of each split]}`, and of those of the tuning,
        `{system: {step size: result}}`.
    """
    train = functools.partial(run, vowels)
    seeds = list(range(protocol["seeds"]))
    others = list(range(1000, 1000 + protocol["tuning_seeds"]))
    results, tuning = {}, {}
    for name, system in SYSTEMS.items():
        settings = {**system, "max_epochs": protocol["max_epochs"]}
        tuning[name] = {
            step_size: runs(train, **settings, step_size=step_size, split=0, seeds=others)
            for step_size in protocol["step_sizes"]
        }
        best = fastest(tuning[name])
        results[name] = [
            {**runs(train, **settings, step_size=best, split=split, seeds=seeds), "step_size": best}
            for split in range(protocol["splits"])
        ]
    return results, tuning


def fastest(by_step_size):
    """The step size of the fewest epochs, among those at which most seeds reach the criterion."""

    def rank(step_size):
        result = by_step_size[step_size]
        return -sum(result["reached"]), np.mean(result["epochs"])

    return min(by_step_size, key=rank)


def run(vowels, step_size, split, seeds, max_epochs, **system):
    """Trains a system from every seed; figures of each."""
    training = vowels.training(split)
    x, y = vowels.formants, vowels.target
    many, step_scale = descent_of(max_epochs, **system)
    weights = many.initial_weights(seeds)
    epochs, reached, weights = many(weights, x[training], y[training], step_scale * step_size)
    right = (np.asarray(many.predictions(weights, x)) > 0.5) == (y > 0.5)
    result = {
        "epochs": epochs.tolist(),
        "reached": reached.tolist(),
        "train": right[:, training].mean(axis=(1, 2)).round(4).tolist(),
        "test": right[:, ~training].mean(axis=(1, 2)).round(4).tolist(),
        "parameters": many.model.count_params(),
        "weights": [w[0].round(5).tolist() for w in map(np.asarray, weights)],  # first seed's
    }
    if "experts" in system:
        shares = np.asarray(shares_of(many.outputs(weights, x[training])))
        result["active"] = (shares.max(axis=1) > EFFECTIVELY_ZERO).sum(axis=-1).tolist()
        front = np.isin(vowels.vowel[training], ("i", "I"))
        result["parted"] = [round(parted(shares_NE, front), 4) for shares_NE in shares]
    return result


def parted(shares_NE, front_N):
    """How many cases are led by the expert that leads most of their kind, front vowels or back.

    0 if one expert leads most of both.
    """
    leader_N = shares_NE.argmax(axis=-1)
    of_front, of_back = (np.bincount(leader_N[kind]).argmax() for kind in (front_N, ~front_N))
    if of_front == of_back:
        return 0.0
    return float(np.mean(leader_N == np.where(front_N, of_front, of_back)))


@functools.cache
def descent_of(max_epochs, experts=None, form=None, hidden=None, init=None):
    """A system's `Descent`, compiled once, and what its step sizes are multiplied by."""
    import keras

    from benchmarks.papers.descent import Descent
    from keras_moe.losses import MixtureOfExpertsLoss

    if experts:
        loss, step_scale = MixtureOfExpertsLoss(form), 1 if form == "mixture" else 0.5
    else:
        loss, step_scale = keras.losses.MeanSquaredError(), 0.5
    make_model = functools.partial(network, experts, hidden, init)
    return Descent(make_model, loss, CRITERION, max_epochs), step_scale


def network(experts=None, hidden=None, init=None):
    """A new model, a mixture or a network with hidden units, with fresh weights."""
    import keras

    import zoo

    def layer(units, initializer):
        # Without a seed of their own they draw from Keras' global one, each something else.
        kernel, bias = initializer(), initializer()
        return keras.layers.Dense(
            units, "sigmoid", kernel_initializer=kernel, bias_initializer=bias
        )

    if experts:
        normal = functools.partial(keras.initializers.RandomNormal, stddev=0.1)
        model = zoo.adaptive_mixture([layer(1, normal) for _ in range(experts)])
    else:
        uniform = functools.partial(keras.initializers.RandomUniform, -init, init)
        model = keras.Sequential([layer(hidden, uniform), layer(1, uniform)])
    model.build((None, 2))
    return model


def report(results, tuning):
    """The tables, in Markdown."""
    tables = results_table(results), comparison_table(results), *tuning_tables(tuning)
    return "\n\n".join(tables)


def results_table(results):
    header = ["system", "parameters", "step size", "split", "epochs", "median", "learnt"]
    rows = []
    for name, splits in results.items():
        for split, result in enumerate(splits):
            epochs = result["epochs"]
            row = [name, result["parameters"], result["step_size"], split_name(split)]
            row += [mean_sd(epochs), f"{np.median(epochs):.0f}"]
            row += [f"{sum(result['reached'])}/{len(epochs)}"]
            row += [f"{100 * np.mean(result[part]):.1f}" for part in ("train", "test")]
            if "active" in result:
                active, share = np.mean(result["active"]), np.mean(result["parted"])
                rows.append([*row, f"{active:.2f}", f"{100 * share:.1f}"])
            else:
                rows.append([*row, "", ""])
    return markdown([*header, "train %", "test %", "active experts", "parted %"], rows)


def comparison_table(results):
    """Ratios of mean epochs and what a t-test with pooled variance says of them."""
    from scipy import stats

    splits = range(len(results["BP 6"]))
    rows = []
    for one, other in COMPARED:
        row = [f"{one} / {other}"]
        for split in splits:
            a, b = (results[name][split]["epochs"] for name in (one, other))
            row.append(f"{np.mean(a) / np.mean(b):.2f} ({p_value(stats.ttest_ind(a, b).pvalue)})")
        rows.append(row)
    return markdown(["mean epochs", *map(split_name, splits)], rows)


def p_value(p):
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def tuning_tables(tuning):
    """Mean epochs at every step size, and how many seeds learnt if not all did; the parting too."""
    epochs, parting = [], []
    for name, by_step_size in tuning.items():
        best, cells = fastest(by_step_size), []
        for step_size, result in by_step_size.items():
            learnt, of = sum(result["reached"]), len(result["reached"])
            cell = f"{np.mean(result['epochs']):.0f}" + (f" ({learnt}/{of})" if learnt < of else "")
            cells.append(f"**{cell}**" if step_size == best else cell)
        epochs.append([name, *cells])
        if "parted" in result:
            shares = [np.mean(result["parted"]) for result in by_step_size.values()]
            parting.append([name, *(f"{100 * share:.0f}" for share in shares)])
    step_sizes = list(next(iter(tuning.values())))
    return [
        markdown(["tuning: mean epochs at step size", *step_sizes], epochs),
        markdown(["tuning: parted % at step size", *step_sizes], parting),
    ]


def split_name(split):
    return f"random {split}" if split else "file order"


def draw(results, vowels, path):
    """Where four experts decide, shaded by their shares, and the epochs of every run."""
    with drawn(path, 2, figsize=(11, 4.6)) as (left, right):
        draw_regions(left, results["4 experts"][0]["weights"], vowels)
        for number, splits in enumerate(results.values()):
            for split, result in enumerate(splits):
                at = number + 0.15 * (split - (len(splits) - 1) / 2)
                label = None if number else split_name(split)
                at = [at] * len(result["epochs"])
                right.plot(result["epochs"], at, ".", color=f"C{split}", label=label)
        right.legend(fontsize=8)
        right.set_yticks(range(len(results)), results)
        right.invert_yaxis()
        right.set(xlabel="epochs", title="every run")


def draw_regions(axes, weights, vowels):
    from keras_moe.losses import unpack

    model = network(experts=4)
    model.set_weights([np.array(w) for w in weights])
    f1, f2 = np.meshgrid(np.linspace(0.1, 1.3, 120), np.linspace(0.5, 3.9, 120))
    packed = model(np.stack([f1.ravel(), f2.ravel()], axis=-1).astype("float32"))
    prediction = np.asarray(model.blend(packed)).reshape(f1.shape)
    outputs = np.asarray(unpack(packed)[0])[..., 0].reshape(*f1.shape, -1)
    shares = np.asarray(shares_of(packed)).reshape(*f1.shape, -1)
    colours = np.array([[0.99, 0.75, 0.6], [0.65, 0.8, 0.95], [0.7, 0.9, 0.7], [0.85, 0.75, 0.95]])
    extent = (f1.min(), f1.max(), f2.min(), f2.max())
    axes.imshow(shares @ colours, origin="lower", extent=extent, aspect="auto")
    axes.contour(f1, f2, prediction, [0.5], colors="black", linewidths=2)
    for expert in np.flatnonzero(shares.max(axis=(0, 1)) > EFFECTIVELY_ZERO):
        axes.contour(f1, f2, outputs[..., expert], [0.5], linestyles="--", colors="firebrick")
    for vowel, marker in zip(VOWELS, "o^sx", strict=True):
        where = vowels.vowel == vowel
        axes.plot(*vowels.formants[where].T, marker, markersize=3, color="black", alpha=0.5)
        axes.plot([], [], marker, color="black", label=WORDS[vowel])
    axes.plot([], [], color="black", label="the mixture decides")
    axes.plot([], [], "--", color="firebrick", label="an active expert would")
    axes.legend(framealpha=0.6, fontsize=8)
    axes.set(xlabel="F1 (kHz)", ylabel="F2 (kHz)", title="the decision, and the experts' shares")


def shares_of(packed):
    """The gate's proportions, `[..., experts]`."""
    from keras import ops

    from keras_moe.losses import unpack

    return ops.softmax(unpack(packed)[1])


if __name__ == "__main__":
    main()
