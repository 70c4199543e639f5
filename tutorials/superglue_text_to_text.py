# %% [markdown]
# # SuperGLUE as text to text
#
#     KERAS_BACKEND=jax python tutorials/superglue_text_to_text.py
#
# Any backend (a notebook: start Jupyter with `KERAS_BACKEND` set), and
# `pip install 'keras-moe[glue]'`; four minutes and 3 GB. Expected: an encoder-decoder that writes
# the word "acceptable" or "unacceptable" behind a sentence, and is right about ACCURACY of them.
#
# What you learn: what a task looks like to a text-to-text model; to make one of a pretrained
# encoder; to train it by `fit` on strings; and to score what it writes as T5 does.

# %%
import keras
import numpy as np

import zoo
from zoo.tasks.text_scores import score_text
from zoo.tasks.text_to_text import load_text

# %% [markdown]
# ## A task in words
# T5 and Switch Transformers write their answers: every task of GLUE and SuperGLUE becomes a text to
# read, with the names of task and features in it, and a word to write. `load_text` has T5's form of
# all of them. The one here comes with the library; for one of SuperGLUE change the first line to
# `TASK, DATA, LENGTH = "super_glue/cb", "tfds", 160`, and nothing else (`python -m zoo prepare`
# makes the folder `tfds` of the official files; texts are cut to `LENGTH` tokens).

# %%
TASK, DATA, LENGTH = "acceptability", None, 32

train, validation = (load_text(TASK, split, DATA) for split in ("train", "validation"))
order = np.random.default_rng(0).permutation(len(train.inputs))[:2000]
for text, word in zip(train.inputs[:3], train.targets, strict=False):
    print(f"{text!r} -> {word!r}")

# %% [markdown]
# ## An encoder-decoder of an encoder
# The library's pretrained models are encoders. Rothe et al. 2020
# (https://arxiv.org/abs/1907.12461) begin text-to-text models with the weights of one: the encoder
# has them all, and the decoder those of the same layers; only its attention to the encoder is new.
# The decoder here has two blocks, both dense, since one word is to be written.

# %%
keras.utils.set_random_seed(0)
pretrained = zoo.from_preset("switch_mini_en")
backbone = zoo.switch_transformer(
    "mini",
    num_experts=pretrained.backbone.num_experts,
    group=pretrained.backbone.group,
    num_decoder_layers=2,
    decoder_sparse_blocks=(),
    expert_dropout=0.4,
)
weights = {weight.path: weight for weight in pretrained.backbone.weights}
new = []
for weight in backbone.trainable_weights:
    side, _, path = weight.path.partition("_") if "_block_" in weight.path else ("", "", "")
    path = path or weight.path.removeprefix("encoder_")
    path = path.replace("/encoder_moe_", "/moe_")
    if path in weights and weights[path].shape == weight.shape:
        weight.assign(keras.ops.copy(weights[path]))
    else:
        new.append(weight.path)
print(f"{len(new)} of {len(backbone.trainable_weights)} weights are new:", *new, sep="\n  ")

preprocessor = zoo.Seq2SeqLMPreprocessor(
    pretrained.preprocessor.tokenizer,
    encoder_sequence_length=LENGTH,
    decoder_sequence_length=8,
)
model = zoo.Seq2SeqLM(backbone, preprocessor)

# %% [markdown]
# ## Training on strings
# `fit` takes what the encoder reads and what the decoder is to write; the preprocessor does the
# rest. What is new in the model wants a higher rate than a pretrained classifier's.

# %%
model.compile(
    keras.optimizers.AdamW(1e-3, global_clipnorm=1.0),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    weighted_metrics=["accuracy"],
)
model.fit(
    {
        "encoder_text": np.array(train.inputs)[order],
        "decoder_text": np.array(train.targets)[order],
    },
    batch_size=32,
    epochs=4,
    verbose=2,
)

# %% [markdown]
# ## Scoring what it writes
# `generate` writes a text for each. `score_text` reads it as T5 does: a text that is none of the
# task's words is wrong, whatever the label, and the metrics are the official ones.

# %%
written = model.generate(validation.inputs, max_length=8)
for text, word, target in zip(validation.inputs[:5], written, validation.targets, strict=False):
    print(f"{text!r} -> {word!r}, right: {target!r}")
scores = score_text(TASK, written, validation)
print(scores)

# %% [markdown]
# On one task of a few words a classifier (see [fine-tuning on GLUE](finetune_on_glue.ipynb)) is
# cheaper. Text to text pays where one model learns many tasks at once:
# `zoo.tasks.mixtures` mixes them in proportion to their sizes, as T5 does.
