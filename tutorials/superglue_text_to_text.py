# %% [markdown]
# # SuperGLUE as text to text
#
#     KERAS_BACKEND=jax python tutorials/superglue_text_to_text.py
#
# Any backend (a notebook: start Jupyter with `KERAS_BACKEND` set), and
# `pip install 'keras-moe[glue]'`; two minutes and 3 GB. Expected: an encoder-decoder that reads two
# sentences and a question, and writes "true" or "false"; it is right about nearly all of 400
# questions on things that it was not trained on.
#
# What you learn: what SuperGLUE looks like to a text-to-text model; to make one of a pretrained
# encoder; to train it by `fit` on strings; to score what it writes as T5 does; and to write the
# file that the benchmark's server takes.

# %%
import json
import random
import re
from pathlib import Path

import keras
import numpy as np

import keras_moe
import zoo
from zoo.tasks import load_text, prepare, score_text, write_submission

SIZE = 1.0  # 1.0 gives the results on this page; a smaller value trains less and runs faster

# %% [markdown]
# ## The official files
# SuperGLUE comes as a folder of JSON lines for each task. It is not part of this library, so this
# makes a little one in BoolQ's format: what something is or is not, and whether it is. With the
# real one (https://super.gluebenchmark.com/tasks) change the line of `SOURCE` to
# `SOURCE, LENGTH = Path("SuperGLUE"), 256`, and nothing else; that takes an hour, and from its
# 9,427 questions a model of this size learns little.

# %%
THINGS = ("river", "road", "house", "garden", "church", "tower", "forest", "bridge", "lake", "wall")
KINDS = ("old", "long", "dark", "cold", "small", "quiet", "famous", "narrow", "green", "empty")
SAID = {
    True: ("is", "is very", "is still", "is rather", "was always"),
    False: ("is not", "is never", "is no longer", "is hardly", "was never"),
}
BESIDE = (
    "We saw it in the morning.",
    "Nobody spoke of it again.",
    "She thought of it on the way home.",
    "He looked at it for a long time.",
)


def made_up_boolq(sizes=(("train", 2000), ("val", 400), ("test", 400))):
    """A folder with the files of BoolQ, small ones."""
    rng = random.Random(0)
    folder = Path("runs/made_up")
    (folder / "BoolQ").mkdir(parents=True, exist_ok=True)
    for split, size in sizes:
        with (folder / "BoolQ" / f"{split}.jsonl").open("w") as file:
            for number in range(round(size * SIZE)):
                row = question(rng, THINGS[:7] if split == "train" else THINGS[7:])
                if split == "test":
                    del row["label"]
                file.write(json.dumps({**row, "idx": number}) + "\n")
    return folder


def question(rng, things):
    """What a thing is, or is not, and something beside the point."""
    thing, kind, is_so = rng.choice(things), rng.choice(KINDS), rng.random() < 0.5
    passage = [f"The {thing} {rng.choice(SAID[is_so])} {kind}.", rng.choice(BESIDE)]
    return {"passage": " ".join(passage), "question": f"is the {thing} {kind}", "label": is_so}


SOURCE, LENGTH = made_up_boolq(), 32

prepare("super_glue/boolq", SOURCE, "runs/tfds", force=True)

# %% [markdown]
# ## A task in words
# T5 and Switch Transformers write their answers: every task of GLUE and SuperGLUE becomes a text to
# read, with the names of task and features in it, and a word to write. `load_text` has T5's form of
# all of them.

# %%
splits = ("train", "validation", "test")
train, validation, test = (load_text("super_glue/boolq", split, "runs/tfds") for split in splits)
for text, word in zip(train.inputs[:3], train.targets, strict=False):
    print(f"{text!r} -> {word!r}")

# %% [markdown]
# ## An encoder-decoder of an encoder
# The pretrained models of the library are encoders. Rothe et al. 2020
# (https://arxiv.org/abs/1907.12461) begin text-to-text models with the weights of one: the encoder
# gets them all, and the decoder those of the same layers. New are its attention to the encoder and
# the second block's feed-forward layer, in whose place the encoder has a mixture of experts.
# The decoder here has two blocks, dense ones, since one word is to be written. Its outputs meet the
# embedding table as they are: T5 divides them by the root of their width, and has a table of larger
# numbers.

# %%
keras.utils.set_random_seed(0)
pretrained = zoo.from_preset("switch_mini_en")
backbone = zoo.switch_transformer(
    "mini",
    num_experts=pretrained.backbone.num_experts,
    group=pretrained.backbone.group,
    num_decoder_layers=2,
    decoder_sparse_blocks=(),
    scale_outputs=False,
)


def in_the_encoder(path):
    """Where the pretrained encoder has the weight: nothing in it is called by its side."""
    return re.sub("^(encoder|decoder)_", "", path).replace("/encoder_moe_", "/moe_")


report = keras_moe.surgery.copy_weights(pretrained.backbone, backbone, rename=in_the_encoder)
print(f"{len(report.copied)} weights are pretrained, these are new:", *report.kept, sep="\n  ")
preprocessor = zoo.Seq2SeqLMPreprocessor(
    pretrained.preprocessor.tokenizer, encoder_sequence_length=LENGTH, decoder_sequence_length=4
)
model = zoo.Seq2SeqLM(backbone, preprocessor)

# %% [markdown]
# ## Training on strings
# `fit` takes what the encoder reads and what the decoder is to write; the preprocessor does the
# rest.

# %%
BATCH, EPOCHS = 32, 2

steps = EPOCHS * -(-len(train.inputs) // BATCH)
rate = keras.optimizers.schedules.CosineDecay(
    1e-5, steps - steps // 10, warmup_target=1e-3, warmup_steps=steps // 10
)
model.compile(
    keras.optimizers.AdamW(rate, global_clipnorm=1.0),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    weighted_metrics=["accuracy"],
)
texts = {"encoder_text": np.array(train.inputs), "decoder_text": np.array(train.targets)}
model.fit(texts, batch_size=BATCH, epochs=EPOCHS, verbose=2)

# %% [markdown]
# ## What it writes, and what that is worth
# `generate` writes a text for each. `score_text` reads it as T5 does: a text that is none of the
# task's words is wrong, whatever the label, and the metrics are the official ones.

# %%
written = model.generate(validation.inputs, max_length=4)
for text, word, target in zip(validation.inputs[:5], written, validation.targets, strict=False):
    print(f"{text!r} -> {word!r}, right: {target!r}")
scores = score_text("super_glue/boolq", written, validation)
print(scores)

# %% [markdown]
# The test set has no labels; the server has them.

# %%
written = model.generate(test.inputs, max_length=4)
path = write_submission("super_glue/boolq", test, written, "runs/submission")
print(path, path.read_text().splitlines()[0])

# %% [markdown]
# On one task of two words a classifier (see [fine-tuning on GLUE](finetune_on_glue.ipynb)) is
# cheaper. Text to text pays where one model learns many tasks at once: `zoo.tasks.mixture` mixes
# them in proportion to their sizes, as T5 does.
