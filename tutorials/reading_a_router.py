# %% [markdown]
# # Reading a router: which expert reads which word
#
#     KERAS_BACKEND=jax python tutorials/reading_a_router.py
#
# Any backend (a notebook: start Jupyter with `KERAS_BACKEND` set), and matplotlib
# (`pip install 'keras-moe[plots]'`); two minutes and 2 GB. Expected: figures like those below, as
# `runs/*.png`, and experts that read a kind of words each, one verbs, say, another the ends.
#
# What you learn: to ask any model which expert every token goes to, and to see whether experts
# share the work, what they are for, and when that is settled.

# %%
from collections import Counter
from pathlib import Path

import keras
import numpy as np
from matplotlib import pyplot

import keras_moe
import zoo
from keras_moe import metrics, plots
from zoo.pretraining.objectives import Causal, Masked
from zoo.tasks import acceptability

SIZE = 1.0  # 1.0 gives the results on this page; a smaller value trains less and runs faster

Path("runs").mkdir(exist_ok=True)

# %% [markdown]
# ## Text and models
# Sentences that a small grammar writes, which comes with the library; any list of strings will do.
# The models are two small decoders with two sparse blocks of eight experts, Switch and expert
# choice, that guess the next token. To read the routers of the library's pretrained encoders
# instead, on real words, change the first line to `SHIPPED = True`, and nothing else.

# %%
SHIPPED = False

judgements = acceptability.generate()
sentences = [row.sentence for row in judgements["train"] if row.label == 1]
sentences = sentences[: round(len(sentences) * SIZE)]
unseen = [row.sentence for row in judgements["test"] if row.label == 1][:100]
tokenizer = zoo.default_tokenizer()
vocabulary = range(8192)
if not SHIPPED:  # the grammar knows few words: only these get a number, which makes training fast
    vocabulary = sorted({0, 1, *(int(t) for text in sentences + unseen for t in tokenizer(text))})
number = {token: number for number, token in enumerate(vocabulary)}


def encode(text):
    return [number[int(token)] for token in tokenizer(text)]


def make(name):
    """`"switch"` or `"expert_choice"`: a model whose backbone has mixtures of experts."""
    if SHIPPED:
        return zoo.from_preset(f"{name}_mini_en")
    builder = {"switch": zoo.switch_transformer, "expert_choice": zoo.expert_choice_transformer}
    backbone = builder[name](
        "mini",
        num_experts=8,
        vocabulary_size=len(vocabulary),
        architecture="decoder",
        num_layers=2,
        hidden_dim=64,
        num_heads=2,
        key_dim=32,
        intermediate_dim=128,
        sparse_blocks=(1, 2),
        dropout=0.0,
        expert_dropout=0.0,
    )
    return zoo.CausalLM(backbone)


keras.utils.set_random_seed(0)
switch = make("switch")

# %% [markdown]
# ## Asking the router
# `keras_moe.routings(model, inputs)` calls a model and gives the routings of all its sparse layers,
# by their names. `keras_moe.metrics` makes numbers of them, `keras_moe.plots` pictures. Asked about
# are a hundred sentences that the models are not trained on; padding counts nowhere. The tokenizer
# cuts some words: "-s" is a token that goes on with the one before it.

# %%
ids = [encode(text)[:24] for text in unseen]
words = [[tokenizer.id_to_token(vocabulary[token]) for token in row] for row in ids]
words = [[w.strip("▁") or "_" if w[0] in "▁.?" else f"-{w}" for w in row] for row in words]
probe = np.array([row + [0] * (24 - len(row)) for row in ids], "int32")
probe = {"token_ids": probe, "padding_mask": (probe > 0).astype("int32")}


def read(model):
    """The routings of the probe, in the order of the layers."""
    return keras_moe.routings(model.backbone, probe)


def loads(model):
    """For each sparse layer how many tokens chose each expert, `[experts]`."""
    return {
        name.split("/")[-1]: keras.ops.convert_to_numpy(metrics.expert_tokens(routing))
        for name, routing in read(model).items()
    }


# %% [markdown]
# ## Training, watched
# While the model is trained its router is asked again and again.
# `keras_moe.callbacks.RoutingMetrics` would give a few figures of every layer after every epoch;
# this keeps the whole load.

# %%
EPOCHS, BATCH, RATE = 8, 32, 5e-4 if SHIPPED else 5e-3


def train(model, callbacks=()):
    """Trains a model on blocks of 32 tokens, sentences end to end."""
    stream = [token for text in sentences for token in [*encode(text), 1]]
    blocks = np.array(stream[: len(stream) // 32 * 32], "int32").reshape(-1, 32)
    objective = Causal(31)
    if SHIPPED:  # hidden tokens are replaced by the one after the vocabulary and 99 more
        objective = Masked(32, sentinel=8099, ordinary=(3, 8000))
    rng = np.random.default_rng(0)
    x, labels, counts = objective(rng.permutation(blocks), rng)
    model.compile(
        keras.optimizers.Adam(RATE), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    options = {"batch_size": BATCH, "epochs": EPOCHS, "shuffle": False, "verbose": 2}
    model.fit(x, labels, sample_weight=counts, callbacks=list(callbacks), **options)


def watch(epoch, logs=None):
    if epoch + 1 in (1, 2, 4, 8):
        seen[epoch + 1] = loads(switch)


seen = {0: loads(switch)}
train(switch, [keras.callbacks.LambdaCallback(on_epoch_end=watch)])

# %% [markdown]
# ## Do experts share the work?
# Left, all layers at the end: 1 is a fair share, 0 an expert that nobody asks. Right, the first
# layer after some epochs; in row 0 nothing was learnt yet. After two epochs little changes: the
# shares are settled early. The balancing loss keeps every expert at work, but for words as few as
# these it does not make them equal.
#
# ![loads of the experts](figures/router_loads.png)

# %%
figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4), layout="constrained")
plots.load(seen[EPOCHS], axes=left)
left.set_title("after training")
first = next(iter(seen[EPOCHS]))
plots.load({epoch: of_layers[first] for epoch, of_layers in seen.items()}, axes=right)
right.set(title=first, ylabel="epochs")
figure.savefig("runs/router_loads.png", dpi=80)

# %% [markdown]
# ## Who reads what?
# The tokens that each expert of the first layer gets most often, and some sentences in the colours
# of their experts. `expert_weights` has a row of `[experts]` for every token; a grey one would have
# found its expert full. In the figure expert 6 reads the ends of sentences, 2 many of the verbs, 1
# "the" and 0 the endings; 4 reads nouns and whatever else.
#
# ![sentences, coloured by expert](figures/router_tokens.png)


# %%
def served(model):
    """`[sentences, length, experts]`: the weights of the first layer's experts."""
    weights = metrics.expert_weights(next(iter(read(model).values())))
    return weights.reshape(*probe["token_ids"].shape, -1)


weights = served(switch)
for expert in range(weights.shape[-1]):
    tokens = Counter()
    for row, of_row in zip(words, weights, strict=True):
        tokens.update(w for w, used in zip(row, of_row[:, expert] > 0, strict=False) if used)
    print(expert, *(f"{word} {count}" for word, count in tokens.most_common(8)), sep="  ")

figure, axes = pyplot.subplots(figsize=(11, 4), layout="constrained")
plots.tokens(words[:10], weights[:10], axes=axes)
figure.savefig("runs/router_tokens.png", dpi=90)

# %% [markdown]
# ## How many experts read a token?
# Switch: one, or none if it is full, which happens in training, where experts have less room. Where
# experts choose, a token may get none, one or many: the twin with expert choice, trained in the
# same way. Decoders like this one choose by thresholds that were learnt in training, so that no
# token depends on a later one; of the eight experts a token gets about two.
#
# ![experts per token](figures/experts_per_token.png)

# %%
keras.utils.set_random_seed(0)
choice = make("expert_choice")
train(choice)
asked = {
    "Switch": read(switch),
    "Switch, in training": keras_moe.routings(switch.backbone, probe, training=True),
    "expert choice": read(choice),
}
histograms = {
    name: sum(
        keras.ops.convert_to_numpy(metrics.experts_per_token_histogram(routing))
        for routing in routings.values()
    )
    for name, routings in asked.items()
}
figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 3.4), layout="constrained")
plots.experts_per_token(histograms, axes=left)
left.set_title("all layers")
plots.tokens(words[:6], served(choice)[:6], width=60, axes=right)
right.set_title("expert choice, first layer")
figure.savefig("runs/experts_per_token.png", dpi=90)
