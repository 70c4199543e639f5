# %% [markdown]
# # Four papers, one problem: who goes where
#
#     KERAS_BACKEND=jax python tutorials/four_papers.py
#
# Any backend (a notebook: start Jupyter with `KERAS_BACKEND` set), and matplotlib
# (`pip install 'keras-moe[plots]'`); a minute or two and 2 GB. Expected: a table with errors in or
# near the ranges at the end of this page, and a figure like the one below, `runs/four_papers.png`.
#
# What you learn: what the routers of four papers do with the same points, at the same price.
#
# | paper | who decides | here |
# |---|---|---|
# | [1991][a] | nobody: all experts see all points, a gate weighs them | `zoo.adaptive_mixture` |
# | [2017][b] | a point takes its 2 best experts, by noisy logits | `NoisyTopKRouter(2)` |
# | [2021][c] | a point takes its best expert, if that has room | `SwitchRouter()` |
# | [2022][d] | an expert takes its best points | `ExpertChoiceRouter()` |
#
# [a]: https://doi.org/10.1162/neco.1991.3.1.79 "Adaptive mixtures of local experts"
# [b]: https://arxiv.org/abs/1701.06538 "The sparsely-gated mixture-of-experts layer"
# [c]: https://arxiv.org/abs/2101.03961 "Switch Transformers"
# [d]: https://arxiv.org/abs/2202.09368 "Mixture-of-experts with expert choice routing"
#
# ![what each makes of the picture, and who goes where](figures/four_papers.png)

# %%
import csv
import math
from pathlib import Path

import keras
import numpy as np
from matplotlib import pyplot

import keras_moe
import zoo

SIZE = 1.0  # 1.0 gives the results on this page; a smaller value trains less and runs faster

# %% [markdown]
# ## The problem
# A picture of eight patches, each with stripes of its own direction: the height of a point is to be
# learnt from its place. One small network has to fit all patches at once; experts can part them.
#
# The paper of 1991 parted vowels by two formants, another map with regions: with Peterson and
# Barney's measurements (`pb52` of the R package phonTools, as a file) change the last line of this
# cell to `points, heights = vowels("peterson_barney_1952.csv")`.

# %%
rng = np.random.default_rng(0)


def patchwork(number=5120, patches=8, stripes=3):
    """Points of the unit square, and the heights of the picture there."""
    centres = (np.arange(patches)[:, None] * [0.755, 0.570] + 0.5) % 1  # evenly spread
    points = rng.random((number, 2))
    offset = points[:, None] - centres
    nearest = (offset**2).sum(axis=-1).argmin(axis=1)
    angle = 3 * np.pi * nearest / patches
    place = offset[np.arange(number), nearest]
    along = place[:, 0] * np.cos(angle) + place[:, 1] * np.sin(angle)
    return points, np.sin(2 * np.pi * stripes * along)


def vowels(path):
    """Formants within the unit square; 1 for heed and hod, 0 for hid and hud, as in the paper."""
    with open(path) as file:
        rows = [row for row in csv.DictReader(file) if row["vowel"] in ("i", "I", "A", "V")]
    rows = rng.permutation(rows)  # which are in the order of the speakers
    formants = np.array([[float(row["f1"]), float(row["f2"])] for row in rows])
    points = (formants - formants.min(axis=0)) / np.ptp(formants, axis=0)
    return points, np.array([float(row["vowel"] in ("i", "A")) for row in rows])


points, heights = patchwork()

# %% [markdown]
# Routers are linear in what they see. So that they can draw curved borders, a point is described by
# how near it is to each of 25 places, a point's token, of width 27 with its coordinates. A fifth of
# the points is held out.
#
# The loss of 1991 takes errors to be Gaussian, of variance 1. How strongly its experts compete
# depends on the scale of the heights; for everybody their standard deviation is 1.5 here.


# %%
def tokens(points):
    """Points `[number, 2]` as `[number, 27]`."""
    places = np.stack(np.meshgrid(*[np.linspace(0, 1, 5)] * 2), axis=-1).reshape(-1, 2)
    squares = ((points[:, None] - places) ** 2).sum(axis=-1)
    near = np.exp(-squares / (2 * 0.15**2))
    return np.concatenate([near, points - 0.5], axis=1).astype("float32")


x = tokens(points)
y = (1.5 * (heights - heights.mean()) / heights.std()).astype("float32")[:, None]
held = len(x) // 5
width = x.shape[1]

# %% [markdown]
# ## The contestants
# All cost the same for each point. The dense network has 16 hidden units, and so has each of
# Switch's eight experts, one of which a point gets. Where a point gets two experts they have 8
# units, and where it gets all eight they have 4 (these give one number, not 27).
#
# Around the sparse layers is a residual connection, as in a Transformer: `x + layer(x)`. The last
# contestant is the mixture of 1991 with experts of 32 units, as many parameters as Switch has, to
# see what all experts for all points are worth, at seven times the price.


# %%
def model_with(layer):
    inputs = keras.Input((width,))
    return keras.Model(inputs, keras.layers.Dense(1)(inputs + layer(inputs)))


def dense():
    hidden, output = keras.layers.Dense(16, activation="relu"), keras.layers.Dense(width)
    return model_with(keras.Sequential([hidden, output]))


def sparse(router, hidden_dim):
    """A model whose tokens, the points of a batch, are routed together."""
    experts = keras_moe.FeedForwardExperts(num_experts=8, hidden_dim=hidden_dim, use_bias=True)
    return model_with(keras_moe.MixtureOfExperts(experts, router, group="batch", name="moe"))


def adaptive(hidden_dim):
    def expert():
        hidden = keras.layers.Dense(hidden_dim, activation="relu")
        return keras.Sequential([hidden, keras.layers.Dense(1)])

    return zoo.adaptive_mixture([expert() for _ in range(8)])


contestants = {
    "dense": dense,
    "1991": lambda: adaptive(4),
    "2017": lambda: sparse(keras_moe.NoisyTopKRouter(2), 8),
    "2021": lambda: sparse(keras_moe.SwitchRouter(), 16),
    "2022": lambda: sparse(keras_moe.ExpertChoiceRouter(), 8),
    "1991, wide": lambda: adaptive(32),
}

# %% [markdown]
# ## Training
# The same steps, rate and order for all. The loss of 1991 asks each expert to be right by itself,
# not their sum; the others minimise the squared error, and the routers add their balancing losses.

# %%
BATCH, EPOCHS = 512, round(75 * SIZE)


def train(make):
    keras.utils.set_random_seed(0)
    model = make()
    mixture = isinstance(model, zoo.AdaptiveMixture)
    steps = EPOCHS * math.ceil((len(x) - held) / BATCH)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.03, steps)),
        keras_moe.losses.MixtureOfExpertsLoss() if mixture else "mse",
    )
    history = model.fit(
        x[held:],
        y[held:],
        batch_size=BATCH,
        epochs=EPOCHS,
        verbose=0,
        callbacks=[keras_moe.callbacks.RoutingMetrics()],
    ).history
    return model, {name: values[-1] for name, values in history.items()}


trained = {name: train(make) for name, make in contestants.items()}

# %% [markdown]
# ## The table
# `error` is the share of the held-out heights' variance that is not explained, `multiplications`
# those of a point's forward pass. `busiest expert` is relative to a fair share, `dropped` the share
# of points that found their expert full, both in the last epoch.
#
# Expert choice looks at all points of a batch: asked for one point, or for points that all lie in
# one patch, its experts would have to share these. So everybody is asked for all held-out points at
# once, which lie as the training points do. (`inference="threshold"` makes expert choice route each
# point alone.)


# %%
def multiplications(model):
    """Of a token's forward pass; of each bank only the experts that a token gets."""
    kernels = [w for w in model.trainable_weights if "kernel" in w.name]
    total = sum(math.prod(kernel.shape) for kernel in kernels)
    for layer in keras_moe.mixtures(model).values():
        bank = sum(math.prod(w.shape) for w in layer.experts.trainable_weights if w.ndim == 3)
        total -= round(bank * (1 - layer.router.experts_per_token / layer.router.num_experts))
    return total


def predict(model, x):
    return model.predict(x, batch_size=len(x), verbose=0)


errors = {
    name: np.mean((predict(model, x[:held]) - y[:held]) ** 2) / y[:held].var()
    for name, (model, _) in trained.items()
}
print("| | parameters | multiplications | error | busiest expert | dropped |")
print("|---|---|---|---|---|---|")
for name, (model, logs) in trained.items():
    figures = (logs.get(f"moe/{figure}") for figure in ("max_share", "dropped"))
    routing = ["" if figure is None else f"{figure:.2f}" for figure in figures]
    row = [name, f"{model.count_params():,}", f"{multiplications(model):,}", f"{errors[name]:.3f}"]
    print("|", " | ".join(row + routing), "|")

# %% [markdown]
# ## Who goes where
# `keras_moe.routings` says what the routers of a model do with given inputs, and
# `keras_moe.metrics.expert_weights` what each expert's output is multiplied by. Of the mixture of
# 1991 the gate's proportions are the same thing. A point of the map has the colours of its experts,
# mixed by their weights, and is white where no expert serves it.


# %%
def weights(model, x):
    """`[points, experts]`: with which weight each expert serves each point."""
    if isinstance(model, zoo.AdaptiveMixture):
        _, gate_logits = keras_moe.losses.unpack(model(x))
        return keras.ops.convert_to_numpy(keras.ops.softmax(gate_logits))
    return keras_moe.metrics.expert_weights(keras_moe.routings(model, x)["moe"])[0]


def colours(weights):
    palette = np.array(pyplot.colormaps["Set1"].colors)[:8]
    total = weights.sum(axis=1, keepdims=True)
    mixed = weights @ palette / np.maximum(total, 1e-9)
    return np.where(total > 0, np.clip(mixed, 0, 1), 1.0)


side = 80
grid = np.stack(np.meshgrid(*[(np.arange(side) + 0.5) / side] * 2), axis=-1).reshape(-1, 2)
shown = list(contestants)[:5]
figure, panels = pyplot.subplots(2, 6, figsize=(13, 4.6), layout="constrained")
options = {"origin": "lower", "extent": (0, 1, 0, 1)}
spread = {"cmap": "gray", "vmin": y.min(), "vmax": y.max()}
panels[0, 0].scatter(*points[held:].T, c=y[held:, 0], s=3, **spread)
panels[0, 0].set(title="data", aspect="equal", xlim=(0, 1), ylim=(0, 1))
for column, name in enumerate(shown, 1):
    model = trained[name][0]
    image = predict(model, tokens(grid)).reshape(side, side)
    panels[0, column].imshow(image, **spread, **options)
    panels[0, column].set_title(name)
    if name != "dense":
        who = colours(weights(model, tokens(grid)))
        panels[1, column].imshow(who.reshape(side, side, 3), **options)
for panel in panels.flat:
    panel.set(xticks=[], yticks=[])
panels[1, 2].set_ylabel("who goes where")
for panel in panels[1, :2]:
    panel.remove()
bars = figure.add_subplot(panels[0, 0].get_gridspec()[1, :2])
bars.barh(list(errors), list(errors.values()), color="gray")
bars.invert_yaxis()
bars.set_xlabel("error, share of the variance")
Path("runs").mkdir(exist_ok=True)
figure.savefig("runs/four_papers.png", dpi=110)

# %% [markdown]
# ## What to see
# Five runs (three seeds on JAX, one each on TensorFlow and PyTorch) had these errors:
#
# | dense | 1991 | 2017 | 2021 | 2022 | 1991, wide |
# |---|---|---|---|---|---|
# | 0.073-0.098 | 0.080-0.131 | 0.044-0.060 | 0.055-0.079 | 0.063-0.076 | 0.050-0.058 |
#
# 2017, 2022 and 1991 wide were better than the dense network in every run, 2021 in four of five;
# 1991 was worse in four of five. Between the others one run decides nothing.
#
# * **1991** draws regions with soft borders, each led by one expert, which several patches may
#   share. At the same price its experts are small, because all of them see every point; seven times
#   the price makes it as good as 2017.
# * **2017** gives every point two experts, and the colours of a region are mixtures. Its noise and
#   its two losses spread the points: the busiest expert has little more than its share.
# * **2021** has one colour for each point and hard borders, and one expert as wide as the dense
#   network where 2017 has two of half its width. Here they are not balanced well: the busiest is
#   wanted twice as often as it should be, and about a sixth of the points find no room in training.
#   In the figure's map an expert that is full leaves white: points are seated in their order, from
#   the bottom to the top, and the last ones stand. The residual connection carries them.
#   `SwitchRouter(load_balancing_weight=0.1)` drops fewer; try it.
# * **2022** lets every expert take as many points as any other, so that balance needs no loss;
#   regions overlap, and a point may have one expert or several.
#
# Next: [reading a router](reading_a_router.ipynb) looks at a model of language.
