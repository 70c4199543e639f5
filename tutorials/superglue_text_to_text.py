# %% [markdown]
# # SuperGLUE as text to text
#
#     KERAS_BACKEND=jax python tutorials/superglue_text_to_text.py
#
# Any backend (a notebook: start Jupyter with `KERAS_BACKEND` set), and
# `pip install 'keras-moe[glue]'`; MINUTES minutes and MEMORY GB. Expected: an encoder-decoder
# that reads two facts and a question, writes "true" or "false", and is right about ACCURACY of 400
# questions.
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

# %% [markdown]
# ## The official files
# SuperGLUE comes as a folder of JSON lines for each task. No one may hand it on, so this makes a
# little one in BoolQ's format: two facts, and whether one of them is so. With the real one
# (https://super.gluebenchmark.com/tasks) change `made_up_boolq()` to `Path("SuperGLUE")`, and
# nothing else; passages are long there, and want a `LENGTH` of 256 and an hour.

# %%
NOUNS = {
    "an animal": "horse dog cat sheep cow bird fish wolf lion bear rabbit fox goat pig mouse duck",
    "a person": "king soldier doctor farmer teacher queen lawyer priest sailor widow boy lady guest "
    "judge nurse clerk",
    "a building": "house church castle tower palace school theatre temple prison hotel museum "
    "library cathedral station barn cottage",
}
PASSAGES = (
    "We saw the {} near the river.",
    "In the morning the old {} was there again. Nobody spoke of it.",
    "It was late. She thought of the {} on the way home.",
    "There was a {} in the picture. He looked at it for a long time.",
)


def made_up_boolq(sizes=(("train", 3000), ("val", 400), ("test", 400))):
    """A folder with the files of BoolQ, small ones. Training has the first twelve of the nouns."""
    rng = random.Random(0)
    folder = Path("runs/made_up")
    (folder / "BoolQ").mkdir(parents=True, exist_ok=True)
    for split, size in sizes:
        known = slice(0, 12) if split == "train" else slice(12, None)
        with (folder / "BoolQ" / f"{split}.jsonl").open("w") as file:
            for number in range(size):
                row = question(rng, known)
                if split == "test":
                    del row["label"]
                file.write(json.dumps({**row, "idx": number}) + "\n")
    return folder


def question(rng, known):
    """A sentence with a noun, and whether the noun is of a kind."""
    kind, other = rng.sample(list(NOUNS), 2)
    is_so = rng.random() < 0.5
    noun = rng.choice(NOUNS[kind].split()[known])
    return {
        "passage": rng.choice(PASSAGES).format(noun),
        "question": f"is there {kind if is_so else other} in it",
        "label": is_so,
    }


SOURCE = made_up_boolq()
LENGTH = 32

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
# gets them all, and the decoder those of the same layers; only its attention to the encoder is new.
# The decoder here has two blocks, dense ones, since one word is to be written.

# %%
keras.utils.set_random_seed(0)
pretrained = zoo.from_preset("switch_mini_en")
backbone = zoo.switch_transformer(
    "mini",
    num_experts=pretrained.backbone.num_experts,
    group=pretrained.backbone.group,
    num_decoder_layers=2,
    decoder_sparse_blocks=(),
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
BATCH, EPOCHS = 32, 3

steps = EPOCHS * len(train.inputs) // BATCH
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
